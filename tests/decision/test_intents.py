"""Intents lapse by themselves and leave a short memory behind."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.decision.intents import EXCLUDED_S, INTENTS_MAX, TTL_S, Intents


def test_an_intent_lapses_after_its_time_and_excludes_its_node_for_a_while() -> None:
    intents = Intents()
    intents.note("a", "node-1", 100.0)
    assert intents.lapse(100.0 + TTL_S - 0.001) == []
    assert intents.excluded("a", 100.0) == set()
    assert intents.lapse(100.0 + TTL_S) == ["a"]
    assert intents.get("a") is None
    assert intents.excluded("a", 100.0 + TTL_S) == {"node-1"}
    assert intents.excluded("b", 100.0 + TTL_S) == set()
    assert intents.excluded("a", 100.0 + TTL_S + EXCLUDED_S) == set()


def test_a_dropped_intent_excludes_nothing() -> None:
    intents = Intents()
    intents.note("a", "node-1", 0.0)
    dropped = intents.drop("a")
    assert dropped is not None
    assert dropped.node == "node-1"
    assert intents.drop("a") is None
    assert intents.lapse(1000.0) == []
    assert intents.excluded("a", 1000.0) == set()


def test_a_new_note_takes_the_place_of_the_old_one() -> None:
    intents = Intents()
    intents.note("a", "node-1", 0.0)
    intents.note("b", "node-1", 1.0)
    intents.note("a", "node-2", 10.0)
    assert len(intents) == 2
    assert intents.lapse(TTL_S + 1.0) == ["b"]
    noted = intents.get("a")
    assert noted is not None
    assert noted.node == "node-2"


def test_each_lapse_of_a_pod_is_remembered_for_its_own_time() -> None:
    intents = Intents()
    for node, at in (("node-1", 0.0), ("node-2", 20.0), ("node-3", 70.0)):
        intents.note("a", node, at)
        intents.lapse(at + TTL_S)
    assert intents.excluded("a", 85.0) == {"node-2", "node-3"}


@pytest.mark.parametrize("at", [5.0, TTL_S + 1.0], ids=["in time", "late"])
def test_no_more_than_so_many(at: float) -> None:
    intents = Intents()
    for number in range(INTENTS_MAX + 3):
        intents.note(f"uid-{number}", "node-1", 0.0)
    gone = intents.lapse(at)
    assert gone[:3] == ["uid-0", "uid-1", "uid-2"]
    assert len(intents) == (INTENTS_MAX if at < TTL_S else 0)
    excluded = sum(bool(intents.excluded(f"uid-{number}", at)) for number in range(INTENTS_MAX + 3))
    assert excluded == (0 if at < TTL_S else INTENTS_MAX)


UIDS, NODES = st.sampled_from("abcd"), st.sampled_from(["node-1", "node-2"])


class IntentsMachine(RuleBasedStateMachine):
    """A list of facts beside the real thing: nothing noted is given back twice or never."""

    def __init__(self) -> None:
        super().__init__()
        self.intents, self.now_s = Intents(), 0.0
        self.noted: dict[str, tuple[str, float]] = {}
        self.lapsed: dict[tuple[str, str], float] = {}

    @rule(uid=UIDS, node=NODES)
    def note(self, uid: str, node: str) -> None:
        self.intents.note(uid, node, self.now_s)
        self.noted[uid] = (node, self.now_s)

    @rule(uid=UIDS)
    def drop(self, uid: str) -> None:
        dropped = self.intents.drop(uid)
        assert (dropped and dropped.node) == self.noted.pop(uid, (None,))[0]

    @rule(seconds=st.sampled_from([0.0, 1.0, 7.5, 15.0, 61.0]))
    def lapse(self, seconds: float) -> None:
        self.now_s += seconds
        over = {uid for uid, (_, since) in self.noted.items() if self.now_s - since >= TTL_S}
        assert set(self.intents.lapse(self.now_s)) == over
        for uid in over:
            self.lapsed[uid, self.noted.pop(uid)[0]] = self.now_s

    @invariant()
    def the_same_is_known(self) -> None:
        assert len(self.intents) == len(self.noted)
        for uid in "abcd":
            intent = self.intents.get(uid)
            assert (intent and intent.node) == self.noted.get(uid, (None,))[0]
            expected = {n for (u, n), since in self.lapsed.items() if u == uid and self.now_s - since < EXCLUDED_S}
            assert self.intents.excluded(uid, self.now_s) == expected


TestIntents = IntentsMachine.TestCase
TestIntents.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
