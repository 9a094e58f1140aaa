"""The table itself: every cycle spends a budget, terminal states absorb, and nothing bound can expire."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest

from scheduler.ledger.lifecycle import HOLDING, SPENDS, TERMINAL, TRANSITIONS, IllegalTransition, step
from scheduler.model.reservation import Event, State


def order(spends: set[Event]) -> list[State]:
    graph: TopologicalSorter[State] = TopologicalSorter()
    for (state, event), target in TRANSITIONS.items():
        if event not in spends and state is not None:
            graph.add(target, state)
    return list(graph.static_order())


def test_every_cycle_spends_a_budget() -> None:
    assert set(order(set(SPENDS))) == set(State)


@pytest.mark.parametrize(
    ("free", "loop"),
    [
        pytest.param(Event.RECLAIM, {State.RUNNING, State.RECLAIMING}, id="reclaim and spare"),
        pytest.param(Event.VOID, {State.QUEUED, State.RESERVED}, id="reserve and void"),
    ],
)
def test_a_budget_that_is_not_spent_is_a_loop_with_a_name(free: Event, loop: set[State]) -> None:
    with pytest.raises(CycleError) as caught:
        order(set(SPENDS) - {free})
    assert loop <= set(caught.value.args[1])


def test_every_state_is_reached_and_left_unless_terminal() -> None:
    assert set(TRANSITIONS.values()) == set(State)
    left = {state for state, _ in TRANSITIONS if state is not None}
    assert left == set(State) - TERMINAL
    assert not HOLDING & TERMINAL


@pytest.mark.parametrize("state", [None, *State])
@pytest.mark.parametrize("event", list(Event))
def test_step_is_the_table_and_a_terminal_state_begins_anew(state: State | None, event: Event) -> None:
    start = None if state in TERMINAL else state
    if (start, event) in TRANSITIONS:
        assert step(state, event) is TRANSITIONS[start, event]
    else:
        with pytest.raises(IllegalTransition, match=str(event)):
            step(state, event)


def test_what_has_no_pod_bound_may_expire_and_nothing_else() -> None:
    assert {state for state, event in TRANSITIONS if event is Event.EXPIRE} == {State.HELD, State.QUEUED}


def test_a_bound_pod_is_booked_from_every_state_that_does_not_hold_it_yet() -> None:
    adopting = {state for state, event in TRANSITIONS if event is Event.ADOPT}
    assert adopting == {None, State.HELD, State.QUEUED, State.RESERVED, State.BINDING}
