"""The policies that the quality benchmarks compare, all with about the same budget.

Their history is prefilled by full attention, without them. Methods that choose by the queries of the prefill, H2O and
SnapKV that compresses once, would choose by the question's own here, and are left out: recall.py has both.
"""

from __future__ import annotations

from typing import Any

from _references import Oracle, Random

from sessiond.errors import InvalidConfig
from sessiond.policies.base import ModelFacts, Policy
from sessiond.policies.registry import parse

# Knobs that give a policy a budget of tokens; where it is a share of history, `share`.
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "kivi": ("kivi", {}),
    "shadowkv": ("shadowkv", {"budget": "budget", "outliers": "outliers", "local": "local"}),
    "shadowkv_no_outliers": ("shadowkv", {"budget": "budget", "outliers": 0, "local": "local"}),
    "kvzip": ("kvzip", {"share": "share"}),
}


def contenders(budget: int, share: float, facts: ModelFacts) -> dict[str, Policy]:
    """Every method attending to about `budget` tokens, or `share` of history, and what it is measured against.

    Full history in few bits attends to all. Policies that the model cannot take are left out: what is missing from a
    table was not measured.
    """
    found: dict[str, Policy] = {
        "oracle": Oracle(budget),
        "sieve": parse("sieve", {"least": budget, "most": budget}),
        "sieve_2bit": parse("sieve", {"least": budget, "most": budget, "bits": 2}),
        "rocketkv": parse("rocketkv", {"budget": 2 * budget}),
        "quest": parse("quest", {"budget": budget}),
        "snapkv": parse("snapkv", {"budget": budget}),
        "adakv": parse("adakv", {"budget": budget}),
        "window": parse("window", {"sinks": 4, "recent": budget - 4}),
        "random": Random(budget),
    }
    # ShadowKV's outliers and newest chunks of 8 are within the budget: at most half of a small one.
    given = {"budget": budget, "share": share, "outliers": min(12, budget // 32), "local": min(4, budget // 32)}
    for name, (policy, knobs) in _OTHERS.items():
        try:
            made = parse(policy, {knob: given.get(str(value), value) for knob, value in knobs.items()})
            made.fits(facts)
        except InvalidConfig as error:
            print(f"without {name}: {error}")
            continue
        found[name] = made
    return found


def only(policies: dict[str, Policy], names: str | None) -> dict[str, Policy]:
    """Those named in a comma-separated list, or all. Raises ValueError for a name that is not there."""
    if names is None:
        return policies
    wanted = names.split(",")
    if missing := [name for name in wanted if name not in policies]:
        raise ValueError(f"no policy {', '.join(missing)}; there are {', '.join(policies)}")
    return {name: policies[name] for name in wanted}
