"""Whose turn computes the next piece of its prompt: tenants take turns, and within a tenant so do its turns.

    tenant   who was served longest ago goes first; who comes to the line, behind all who wait in it
    turn     by priority, plus one for each `AGING` pieces of its tenant that it has waited; then as tenants

A tenant's priorities order its own turns only: it cannot put itself before others, however many turns it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sessiond.turnwork import TurnWork

AGING = 8  # pieces of others that make up for one step of priority


@dataclass(slots=True)
class _Tenant:
    """`since`: how many pieces the tenant had computed when each turn came or was last chosen, by turn id."""

    served_at: tuple[int, bool]  # pieces of all tenants by then, the last its own; until it has one, when it came
    served: int = 0  # its own
    works: list[TurnWork] = field(default_factory=list)
    since: dict[str, int] = field(default_factory=dict)

    def first(self) -> TurnWork:
        def rank(work: TurnWork) -> tuple[int, int]:
            waited = self.served - self.since[work.turn_id]
            return -(work.priority + waited // AGING), -waited

        return min(self.works, key=rank)


class Line:
    """Turns with pieces left to compute."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}  # those with turns in line
        self._served = 0

    def __iter__(self) -> Iterator[TurnWork]:
        return (work for tenant in self._tenants.values() for work in tenant.works)

    def __len__(self) -> int:
        return sum(len(tenant.works) for tenant in self._tenants.values())

    def add(self, work: TurnWork) -> None:
        # As if served when it came: else tenants with short turns, who come again and again, always pass who waits.
        tenant = self._tenants.setdefault(work.tenant, _Tenant((self._served, False)))
        tenant.works.append(work)
        tenant.since[work.turn_id] = tenant.served

    def remove(self, work: TurnWork) -> None:
        """Raises ValueError if it is not in line."""
        tenant = self._tenants.get(work.tenant)
        if tenant is None:
            raise ValueError(f"{work.turn_id} is not in line")
        tenant.works.remove(work)
        del tenant.since[work.turn_id]
        if not tenant.works:
            del self._tenants[work.tenant]

    def next(self) -> TurnWork:
        """Choose who computes a piece now. It stays in line. There must be one."""
        tenant = min(self._tenants.values(), key=lambda tenant: tenant.served_at)
        work = tenant.first()
        self._served += 1
        tenant.served += 1
        tenant.served_at, tenant.since[work.turn_id] = (self._served, True), tenant.served
        return work
