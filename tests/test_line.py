"""Who computes next: tenants in turn, a tenant's turns by priority and age."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_harness import CELL, Session, ended, make_pair, random_ids, step_until

from sessiond.line import AGING, Line
from sessiond.scheduler import Scheduler
from sessiond.stepevents import Ended


@pytest.fixture(scope="module")
def model():
    return make_pair("llama").ours


@pytest.fixture
def add(model):
    """Puts a turn of two cells in a line, under a name that begins with its tenant."""

    def put(line: Line, name: str, priority: int = 0):
        work = Session(model, name).turn(random_ids(2 * CELL, 1), 1, tenant=name[0], priority=priority)
        line.add(work)
        return work

    return put


def chosen(line: Line, n: int) -> list[str]:
    return [line.next().turn_id for _ in range(n)]


def test_turns_of_a_tenant_take_turns_in_the_order_they_came(add):
    line = Line()
    for name in ("a1", "a2", "a3"):
        add(line, name)
    assert chosen(line, 4) == ["a1", "a2", "a3", "a1"]
    add(line, "a4")
    assert chosen(line, 4) == ["a2", "a3", "a1", "a4"]


def test_many_turns_of_a_tenant_weigh_no_more_than_one_of_another(add):
    line = Line()
    for i in range(50):
        add(line, f"a{i}")
    chosen(line, 10)
    add(line, "b")
    assert chosen(line, 1) == ["b"], "who was never served waits for one piece at most"
    assert Counter(name[0] for name in chosen(line, 40)) == {"a": 20, "b": 20}


def test_who_leaves_gives_its_place_to_the_others(add):
    line = Line()
    first, _ = add(line, "a1"), add(line, "b1")
    line.remove(first)
    assert chosen(line, 2) == ["b1", "b1"]
    assert [work.turn_id for work in line] == ["b1"]
    with pytest.raises(ValueError, match="not in line"):
        line.remove(first)


def test_tenants_that_come_again_and_again_do_not_pass_who_waits(add):
    line, served = Line(), Counter()
    for name in ("a", "b", "c"):
        add(line, name)
    for _ in range(12):
        work = line.next()
        served[work.tenant] += 1
        if work.tenant != "a":  # its only piece: it leaves, and its tenant's next turn comes at once
            line.remove(work)
            add(line, work.tenant)
    assert served == {"a": 4, "b": 4, "c": 4}


def test_higher_priority_goes_first_among_the_turns_of_a_tenant(add):
    line = Line()
    add(line, "a-low", -1)
    add(line, "a", 0)
    high = add(line, "a-high", 3)
    assert chosen(line, AGING) == ["a-high"] * AGING
    line.remove(high)
    assert chosen(line, 1) == ["a"]


def test_lower_priority_does_not_starve(add):
    line = Line()
    add(line, "a-low", -4)
    add(line, "a-high", 4)
    counts = Counter(chosen(line, 20 * 8 * AGING))
    assert counts["a-low"] == pytest.approx(20, abs=1), "a piece for each 8 steps of priority times AGING"


def test_priority_does_not_put_a_tenant_before_another(add):
    line = Line()
    add(line, "a", 4)
    add(line, "b", -4)
    assert Counter(chosen(line, 20)) == {"a": 10, "b": 10}


def test_one_prompt_is_not_behind_fifty_of_another_tenant(model):
    """By the scheduler: it has its first token after about twice its own pieces."""
    scheduler = Scheduler(model, CELL)
    for i in range(50):
        scheduler.add(Session(model, f"a{i}").turn(random_ids(4 * CELL, i), 1, tenant="a"))
    scheduler.step()
    scheduler.add(Session(model, "b").turn(random_ids(4 * CELL, 99), 1, tenant="b"))
    before = scheduler.counters.steps
    events = step_until(scheduler, lambda event: isinstance(event, Ended))
    assert list(ended(events)) == ["b"]
    assert scheduler.counters.steps - before == 7
