"""decide over every state and every pod: the table cell by cell, and what holds for all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.intake.allocation import write_allocation
from scheduler.ledger.ledger import ATTEMPTS_MAX, advance
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.ledger.reconcile import HELD_US_MAX, Action, Advance, Door, ReadBack, Touch, decide, drift
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.pod import Pod, Refusal, Request
from scheduler.model.reservation import Event, Row, State

from .lives import NOW, born, row_in

MINE = Allocation("a", 1, 1, "gpu-1", "exact", (("main", (Grant("whole", dev=0),)),))
REFUSED = Refusal("InvalidRequest", "request.invalid", "Ask for less.")
PLAIN = Pod(Request("a", "team", "a", "job-a", NOW), "1", ours=True)
BOUND = replace(PLAIN, node="gpu-1", allocation=MINE)

PODS: dict[str, Pod | None] = {
    "gone": None,
    "foreign": replace(BOUND, ours=False),
    "plain": PLAIN,
    "deleting": replace(PLAIN, deleting=True),
    "ended": replace(PLAIN, terminal=True, phase="Failed"),
    "refused": replace(PLAIN, request=replace(PLAIN.request, refusal=REFUSED)),
    "touched": replace(PLAIN, touch=1),
    "bound": BOUND,
    "running": replace(BOUND, phase="Running"),
    "elsewhere": replace(BOUND, node="gpu-2", allocation=replace(MINE, node="gpu-2")),
    "old epoch": replace(BOUND, allocation=replace(MINE, epoch=7)),
    "bare": replace(BOUND, allocation=None),
    "leaving": replace(BOUND, phase="Running", deleting=True),
    "succeeded": replace(BOUND, phase="Succeeded", terminal=True),
    "failed": replace(BOUND, phase="Failed", terminal=True),
}
SEEN_BOUND = {name for name, pod in PODS.items() if pod and pod.ours and pod.node and not pod.terminal}
STATES: list[State | None] = [None, *State]


def row_of(state: State | None, *, deadline_us: int = NOW + 60) -> Row | None:
    row = row_in(state) if state else None
    if row and state in {State.RESERVED, State.BINDING}:
        row = replace(row, deadline_us=deadline_us)
    return row


def words(actions: list[Action]) -> list[str]:
    return [action.event.value if isinstance(action, Advance) else type(action).__name__.lower() for action in actions]


# One line a state; the words are events, "readback" and "touch"; columns are the pods of PODS by name.
TABLE = {
    None: {
        "plain": "submit", "touched": "submit", "refused": "reject", "bound": "adopt", "running": "adopt start",
        "elsewhere": "adopt", "old epoch": "adopt", "bare": "adopt", "leaving": "adopt start",
    },
    State.HELD: {
        "gone": "cancel", "deleting": "cancel", "ended": "cancel", "refused": "reject", "bound": "adopt",
        "running": "adopt start", "elsewhere": "adopt", "old epoch": "adopt", "bare": "adopt",
        "leaving": "adopt start", "succeeded": "cancel", "failed": "cancel",
    },
    State.RESERVED: {
        "gone": "cancel", "deleting": "cancel", "ended": "cancel", "bound": "adopt", "running": "adopt start",
        "elsewhere": "adopt", "old epoch": "adopt", "bare": "adopt", "leaving": "adopt start",
        "succeeded": "cancel", "failed": "cancel",
    },
    State.BINDING: {
        "gone": "cancel", "plain": "touch", "refused": "touch", "deleting": "cancel", "ended": "cancel",
        "touched": "void", "bound": "post", "running": "post start", "elsewhere": "adopt", "old epoch": "adopt",
        "bare": "adopt", "leaving": "post start", "succeeded": "post", "failed": "post",
    },
    State.BOUND: {
        "gone": "finish", "running": "start", "leaving": "start", "succeeded": "finish", "failed": "fail",
    },
    State.RUNNING: {"gone": "finish", "succeeded": "finish", "failed": "fail"},
    State.REJECTED: {
        "plain": "submit", "touched": "submit", "bound": "adopt", "running": "adopt start", "elsewhere": "adopt",
        "old epoch": "adopt", "bare": "adopt", "leaving": "adopt start",
    },
}  # fmt: skip
TABLE[State.QUEUED] = dict(TABLE[State.HELD])
TABLE[State.HELD] |= dict.fromkeys(("plain", "touched"), "judge")
TABLE[State.RECLAIMING] = TABLE[State.RUNNING]
for _ended in TERMINAL - {State.REJECTED}:
    TABLE[_ended] = {name: says for name, says in TABLE[State.REJECTED].items() if says != "submit"}


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("state", STATES)
def test_each_cell_of_the_table(state: State | None, pod: str) -> None:
    says = TABLE[state].get(pod, "").split()
    row = row_of(state)
    assert words(decide(row, PODS[pod], now_us=NOW, fresh=True, in_flight=False)) == says
    stale = decide(row, PODS[pod], now_us=NOW, fresh=False, in_flight=False)
    unsure = state in HOLDING and pod == "gone" and says
    unsure = unsure or (state is State.BINDING and PODS[pod] is not None and not PODS[pod].node)
    assert words(stale) == (["readback"] if unsure else says)


@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("door", [Door.HOLDING, Door.FULL])
def test_a_closed_door_holds_who_comes_and_changes_nothing_else(state: State | None, pod: str, door: Door) -> None:
    through = words(decide(row_of(state), PODS[pod], now_us=NOW, fresh=True, in_flight=False))
    before = words(decide(row_of(state), PODS[pod], now_us=NOW, fresh=True, in_flight=False, door=door))
    held = {"submit": ["hold"] if door is Door.HOLDING else [], "judge": []}
    assert before == (held[through[0]] if through and through[0] in held else through)


def test_who_is_held_expires_after_a_day_unless_the_outage_is_over() -> None:
    row, pod = row_of(State.HELD), PODS["plain"]
    assert row is not None
    for later_us, door, says in (
        (HELD_US_MAX - 1, Door.HOLDING, []),
        (HELD_US_MAX, Door.HOLDING, ["expire"]),
        (HELD_US_MAX, Door.FULL, ["expire"]),
        (2 * HELD_US_MAX, Door.OPEN, ["judge"]),
    ):
        now_us = row.created_us + later_us
        assert words(decide(row, pod, now_us=now_us, fresh=True, in_flight=False, door=door)) == says


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("state", STATES)
def test_a_bind_in_flight_is_left_alone_and_matters_to_nothing_else(state: State | None, pod: str, fresh: bool) -> None:
    flying = decide(row_of(state), PODS[pod], now_us=NOW, fresh=fresh, in_flight=True)
    landed = decide(row_of(state), PODS[pod], now_us=NOW, fresh=fresh, in_flight=False)
    assert flying == ([] if state is State.BINDING else landed)


def apply(row: Row | None, pod: Pod | None, actions: list[Action]) -> tuple[Row | None, Pod | None, bool]:
    """Do what was decided, the way the shell does; the API server agrees with the cache here."""
    fresh = False
    for action in actions:
        if isinstance(action, Advance):
            row = advance(
                row,
                action.event,
                now_us=NOW,
                fence=1,
                reason=action.reason,
                node=action.node,
                allocation=action.allocation,
                born=born(),
            ).after
        else:
            fresh = True
            if isinstance(action, Touch):
                assert pod is not None
                pod = replace(pod, touch=action.epoch)
    return row, pod, fresh


@pytest.mark.parametrize("deadline_us", [NOW - 1, NOW + 1])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("state", STATES)
def test_it_settles_and_never_frees_a_bound_pod(state: State | None, pod: str, fresh: bool, deadline_us: int) -> None:
    row, seen = row_of(state, deadline_us=deadline_us), PODS[pod]
    path = [row]
    for _ in range(6):
        actions = decide(row, seen, now_us=NOW, fresh=fresh, in_flight=False)
        if not actions:
            break
        row, seen, fresh = apply(row, seen, actions)
        path.append(row)
    else:
        pytest.fail(f"does not come to rest: {path}")
    if pod in SEEN_BOUND:
        assert row is not None
        assert row.state in HOLDING - {State.RESERVED, State.BINDING}
        held = [one is not None and one.state in HOLDING for one in path]
        assert held == sorted(held), "once held it stays held"
    if pod in {"gone", "ended"} and row is not None and state not in {State.BOUND, State.RUNNING, State.RECLAIMING}:
        assert row.state in TERMINAL


@pytest.mark.parametrize("state", [State.RESERVED, State.BINDING])
def test_the_last_attempt_fails_instead_of_being_voided(state: State) -> None:
    row = row_of(state, deadline_us=NOW)
    assert row is not None
    pod = PODS["touched"]
    assert words(decide(row, pod, now_us=NOW, fresh=True, in_flight=False)) == ["void"]
    spent = replace(row, attempts=ATTEMPTS_MAX - 1)
    assert words(decide(spent, pod, now_us=NOW, fresh=True, in_flight=False)) == ["fail"]


def test_a_reservation_waits_for_its_deadline_and_a_binding_for_its_touch() -> None:
    assert decide(row_of(State.RESERVED), PLAIN, now_us=NOW + 59, fresh=True, in_flight=False) == []
    assert words(decide(row_of(State.RESERVED), PLAIN, now_us=NOW + 60, fresh=True, in_flight=False)) == ["void"]
    row = row_of(State.BINDING)
    assert decide(row, PLAIN, now_us=NOW, fresh=True, in_flight=False) == [Touch(1)]
    assert decide(row, PLAIN, now_us=NOW, fresh=False, in_flight=False) == [ReadBack()]


def test_adoption_takes_node_and_allocation_from_the_pod() -> None:
    (action,) = decide(row_of(State.QUEUED), PODS["elsewhere"], now_us=NOW, fresh=False, in_flight=False)
    assert action == Advance(Event.ADOPT, "FoundBound", "gpu-2", write_allocation(replace(MINE, node="gpu-2")))
    (bare,) = decide(row_of(State.BINDING), PODS["bare"], now_us=NOW, fresh=False, in_flight=False)
    assert bare == Advance(Event.ADOPT, "FoundBound", "gpu-1", "")


def test_a_refusal_is_told_with_its_reason() -> None:
    assert decide(None, PODS["refused"], now_us=NOW, fresh=False, in_flight=False) == [
        Advance(Event.REJECT, "InvalidRequest")
    ]


@pytest.mark.parametrize(
    ("state", "pod", "says"),
    [
        pytest.param(State.BOUND, "bound", "", id="agreed"),
        pytest.param(State.BOUND, "elsewhere", "bound to gpu-2, but the ledger says gpu-1", id="another node"),
        pytest.param(State.BOUND, "old epoch", "another allocation", id="another epoch"),
        pytest.param(State.BOUND, "bare", "no allocation", id="no annotation"),
        pytest.param(State.RUNNING, "gone", "its pod is gone", id="gone"),
        pytest.param(State.RUNNING, "succeeded", "has ended", id="ended"),
        pytest.param(State.RUNNING, "plain", "bound to no node", id="unbound"),
        pytest.param(State.QUEUED, "bound", "the ledger has QUEUED", id="not booked"),
        pytest.param(State.RELEASED, "running", "the ledger has RELEASED", id="freed while running"),
        pytest.param(None, "bound", "the ledger has no row", id="no row"),
        pytest.param(None, "foreign", "", id="somebody else's"),
        pytest.param(State.QUEUED, "plain", "", id="waiting"),
        pytest.param(State.RELEASED, "succeeded", "", id="over"),
    ],
)
def test_drift_is_said_in_sentences(state: State | None, pod: str, says: str) -> None:
    row, seen = row_of(state), PODS[pod]
    if row is not None and row.state in HOLDING:
        row = replace(row, allocation=write_allocation(MINE))
    found = drift({"a": row} if row else {}, {"a": seen} if seen else {})
    assert bool(found) == bool(says)
    assert says in " ".join(found)
    assert all(text.endswith(".") for text in found)
