from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler.ledger.quota import (
    Quota,
    Usage,
    available,
    borrowed,
    charge,
    entitled,
    exceeding,
    grow,
    lacking,
    potential,
    refund,
    would_borrow,
)
from scheduler.model.queue import Queue

NAMES = "abcdef"
KEYS = ("gpu", "H100")
Own = dict[tuple[str, str], int]


def queue(name: str, parent: str = "", *, borrow: Mapping[str, int] | None = None, **given: Any) -> Queue:
    lend = given.pop("lend", {})
    return Queue(name, parent, nominal=given, borrow_limit=borrow or {}, lend_limit=lend)


# an oracle that knows nothing of kept sums on the way: everything from each queue's own pods, top to bottom, anew


def children(quota: Quota, name: str) -> list[str]:
    return [one.name for one in quota.queues.values() if one.parent == name]


def brings(quota: Quota, name: str, key: str) -> int:
    """What a queue's subtree has in all."""
    mine = quota.queues[name].nominal.get(key, 0)
    return mine + sum(brings(quota, one, key) - keeps(quota, one, key) for one in children(quota, name))


def keeps(quota: Quota, name: str, key: str) -> int:
    lend = quota.queues[name].lend_limit.get(key)
    return 0 if lend is None else max(brings(quota, name, key) - lend, 0)


def stands(quota: Quota, own: Own, name: str, key: str) -> int:
    """What stands against a queue: its own pods and what the queues below take beyond what they keep."""
    below = sum(max(stands(quota, own, one, key) - keeps(quota, one, key), 0) for one in children(quota, name))
    return (own.get((name, key), 0) if limited(quota, name, key) else 0) + below


def limited(quota: Quota, name: str, key: str) -> bool:
    one = quota.queues[name]
    return one.lists(key) or (bool(one.parent) and limited(quota, one.parent, key))


def most(quota: Quota, name: str, key: str) -> int:
    """What may at most stand against a queue."""
    limit = quota.queues[name].borrow_limit.get(key) if quota.queues[name].parent else 0
    return 10**9 if limit is None else brings(quota, name, key) + limit


def passes(quota: Quota, own: Own, name: str, key: str, amount: int) -> bool:
    """One more amount keeps every queue within its most, or where it is not, no further from it."""
    after = {**own, (name, key): own.get((name, key), 0) + amount}
    return not limited(quota, name, key) or all(
        stands(quota, after, one, key) <= max(most(quota, one, key), stands(quota, own, one, key))
        for one in quota.queues
    )


def usage_of(quota: Quota, own: Own) -> Usage:
    usage = Usage()
    for (name, key), amount in own.items():
        charge(quota, usage, name, {key: amount})
    return usage


amounts = st.one_of(st.none(), st.integers(0, 3), st.integers(0, 8))
limits = st.tuples(amounts, amounts).map(
    lambda pair: {key: amount for key, amount in zip(KEYS, pair, strict=True) if amount is not None}
)


@st.composite
def quotas(draw: st.DrawFn) -> Quota:
    made = []
    for index, name in enumerate(NAMES[: draw(st.integers(1, len(NAMES)))]):
        parent = draw(st.sampled_from(["", *NAMES[:index]]))
        made.append(Queue(name, parent, 1, draw(limits), draw(limits), draw(limits)))
    return grow(made)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Quota, Own]:
    """A tree and any usage of it, beyond the limits too, as after limits were lowered."""
    quota = draw(quotas())
    pairs = st.tuples(st.sampled_from(sorted(quota.queues)), st.sampled_from(KEYS))
    return quota, draw(st.dictionaries(pairs, st.integers(1, 9), max_size=6))


@settings(max_examples=300)
@given(situation=situations())
def test_available_is_what_a_brute_search_finds(situation: tuple[Quota, Own]) -> None:
    quota, own = situation
    usage = usage_of(quota, own)
    for name, key in product(quota.queues, KEYS):
        free = available(quota, usage, name, key)
        if free is None:
            assert not limited(quota, name, key)
            continue
        assert limited(quota, name, key)
        assert passes(quota, own, name, key, free)
        assert not passes(quota, own, name, key, free + 1)


@settings(max_examples=200)
@given(situation=situations())
def test_usage_is_a_sum_that_no_order_changes(situation: tuple[Quota, Own]) -> None:
    quota, own = situation
    usage, other = usage_of(quota, own), usage_of(quota, dict(reversed(own.items())))
    assert usage == other
    for name in quota.queues:
        for key in KEYS:
            assert usage.counted.get((name, key), 0) == stands(quota, own, name, key)
            everything = sum(amount for (one, k), amount in own.items() if k == key and name in quota.path(one))
            assert usage.held.get((name, key), 0) == everything


@given(situation=situations())
def test_what_is_given_back_leaves_no_trace(situation: tuple[Quota, Own]) -> None:
    quota, own = situation
    usage = usage_of(quota, own)
    for (name, key), amount in own.items():
        refund(quota, usage, name, {key: amount})
    assert usage == Usage()


@given(situation=situations(), data=st.data())
def test_what_is_kept_is_never_taken_by_others(situation: tuple[Quota, Own], data: st.DataObject) -> None:
    quota, own = situation
    name, key = data.draw(st.sampled_from(sorted(quota.queues))), data.draw(st.sampled_from(KEYS))
    rest = keeps(quota, name, key) - stands(quota, own, name, key)
    free = available(quota, usage_of(quota, own), name, key)
    assert free is None or free >= rest


class Traffic(RuleBasedStateMachine):
    """Charges that were asked for first, refunds of any of them, and limits that change beneath them."""

    quota: Quota
    granted: list[tuple[str, str, int]]

    @initialize(quota=quotas())
    def start(self, quota: Quota) -> None:
        self.quota, self.granted, self.usage, self.own = quota, [], Usage(), {}
        self.over: dict[tuple[str, str], int] = {}

    @rule(data=st.data(), key=st.sampled_from(KEYS), amount=st.integers(1, 5))
    def take(self, data: st.DataObject, key: str, amount: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.quota.queues)))
        if not lacking(self.quota, self.usage, name, {key: amount}):
            charge(self.quota, self.usage, name, {key: amount})
            self.granted.append((name, key, amount))
            self.own[name, key] = self.own.get((name, key), 0) + amount

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name, key, amount = self.granted.pop(data.draw(st.integers(0, len(self.granted) - 1)))
        refund(self.quota, self.usage, name, {key: amount})
        self.own[name, key] -= amount

    @rule(data=st.data())
    def change_limits(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.quota.queues)))
        changed = replace(self.quota.queues[name], nominal=data.draw(limits), lend_limit=data.draw(limits))
        self.quota = grow({**self.quota.queues, name: changed}.values())
        self.usage = usage_of(self.quota, self.own)
        self.over = {pair: amount for pair, amount in self.beyond().items() if amount}

    def beyond(self) -> dict[tuple[str, str], int]:
        return {
            (name, key): max(stands(self.quota, self.own, name, key) - most(self.quota, name, key), 0)
            for name in self.quota.queues
            for key in KEYS
        }

    @invariant()
    def nothing_is_negative_and_what_is_beyond_only_falls(self) -> None:
        assert all(amount > 0 for sums in (self.usage.held, self.usage.counted) for amount in sums.values())
        for pair, amount in self.beyond().items():
            assert amount <= self.over.get(pair, 0), f"{pair} grew beyond its limit"
            self.over[pair] = amount


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# by hand


def test_a_team_borrows_what_another_does_not_use() -> None:
    quota, usage = grow([queue("root"), queue("a", "root", gpu=8), queue("b", "root", gpu=4)]), Usage()
    assert (available(quota, usage, "a", "gpu"), potential(quota, "a", "gpu")) == (12, 12)
    assert not would_borrow(quota, usage, "a", {"gpu": 8})
    assert would_borrow(quota, usage, "a", {"gpu": 9})
    charge(quota, usage, "a", {"gpu": 10})
    assert borrowed(quota, usage, "a") == {"gpu": 2}
    assert lacking(quota, usage, "b", {"gpu": 4}) == {"gpu": 2}, "lent until it comes back"
    assert exceeding(quota, "b", {"gpu": 13}) == {"gpu": 1}


def test_limits_on_borrowing_and_lending_hold_at_every_level() -> None:
    quota = grow(
        [
            queue("root", gpu=2),
            queue("left", "root", borrow={"gpu": 1}, gpu=1),
            queue("a", "left", gpu=4, lend={"gpu": 1}),
            queue("b", "left", gpu=0),
            queue("right", "root", gpu=10),
        ]
    )
    assert potential(quota, "b", "gpu") == 1 + 1 + 1  # left's own, a's one, and one from root
    usage = Usage()
    charge(quota, usage, "b", {"gpu": 3})
    assert available(quota, usage, "a", "gpu") == 3, "what is kept is there at any time"
    assert available(quota, usage, "right", "gpu") == 11


def test_a_pool_of_the_parent_is_shared_and_not_borrowed() -> None:
    quota, usage = grow([queue("lab", gpu=4), queue("a", "lab"), queue("b", "lab")]), Usage()
    charge(quota, usage, "a", {"gpu": 3})
    assert not would_borrow(quota, usage, "b", {"gpu": 1})
    assert lacking(quota, usage, "b", {"gpu": 2}) == {"gpu": 1}
    assert borrowed(quota, usage, "a") == {}
    assert usage.held == {("a", "gpu"): 3, ("lab", "gpu"): 3}


def test_what_nobody_on_the_path_lists_is_not_limited_and_costs_nobody() -> None:
    quota, usage = grow([queue("root"), queue("a", "root", gpu=2), queue("b", "root", cpu=1000)]), Usage()
    assert available(quota, usage, "b", "gpu") is None
    charge(quota, usage, "b", {"gpu": 50})
    assert available(quota, usage, "a", "gpu") == 2
    assert usage.held["root", "gpu"] == 50


def test_zero_means_none_and_an_unknown_queue_has_no_limit() -> None:
    quota, usage = grow([queue("a", gpu=0)]), Usage()
    assert lacking(quota, usage, "a", {"gpu": 1, "cpu": 9}) == {"gpu": 1}
    assert lacking(quota, usage, "a", {"gpu": 0}) == {}
    assert lacking(quota, usage, "nobody", {"gpu": 9}) == {}


def test_lowered_limits_let_usage_only_fall() -> None:
    before, usage = grow([queue("a", gpu=8)]), Usage()
    charge(before, usage, "a", {"gpu": 6})
    after = grow([queue("a", gpu=4)])
    assert lacking(after, usage, "a", {"gpu": 1}) == {"gpu": 1}
    refund(after, usage, "a", {"gpu": 3})
    assert lacking(after, usage, "a", {"gpu": 1}) == {}


def test_more_is_never_given_back_than_was_taken() -> None:
    quota, usage = grow([queue("a", gpu=8)]), Usage()
    charge(quota, usage, "a", {"gpu": 2})
    with pytest.raises(AssertionError, match="queue a: gpu would fall to -1"):
        refund(quota, usage, "a", {"gpu": 3})


def test_shares_are_measured_against_the_nearest_list_then_models_then_the_cluster() -> None:
    quota = grow([queue("root", gpu=10), queue("a", "root"), queue("b", H100=3, A100=2), queue("c")])
    capacity = {"gpu": 100, "cpu": 5000}
    assert entitled(quota, "a", capacity) == {"gpu": 10, "cpu": 5000}
    assert entitled(quota, "b", capacity) == {"gpu": 5, "H100": 3, "A100": 2, "cpu": 5000}
    assert entitled(quota, "c", capacity) == capacity


def test_a_stopped_queue_stops_those_below() -> None:
    quota = grow([replace(queue("root"), stopped=True), queue("a", "root"), queue("b")])
    assert [quota.stopped(name) for name in ("root", "a", "b", "nobody")] == [True, True, False, False]
