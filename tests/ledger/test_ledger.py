"""advance and Book: what each event does to a row, and that every change can be undone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.ledger.ledger import AMOUNT_MAX, SPARED, TERMINAL_KEPT, Book, void_or_fail
from scheduler.ledger.lifecycle import ATTEMPTS_MAX, RECLAIMS_MAX, TERMINAL, IllegalTransition
from scheduler.model.reservation import Credit, Event, State

from .lives import NOW, SECOND, born, history, row_in, step

CREDIT = Credit("job-a", arrival_us=NOW - 50, attempts=2, reclaims=1, not_before_us=NOW + 7, count=2)


def test_a_new_life_starts_at_epoch_one_and_a_second_one_above() -> None:
    first = step(None, Event.SUBMIT, born=born(epoch=9, attempts=3))
    assert (first.after.epoch, first.after.attempts, first.entry.source) == (1, 0, None)
    ended = row_in(State.REJECTED)
    again = step(ended, Event.SUBMIT, born=born(), now_us=NOW + 5)
    assert (again.after.epoch, again.after.state, again.entry.source) == (2, State.QUEUED, State.REJECTED)
    assert again.after.created_us == NOW + 5
    assert again.before is ended


def test_a_new_life_needs_a_template_of_the_same_id() -> None:
    with pytest.raises(AssertionError, match="template"):
        step(None, Event.SUBMIT)
    with pytest.raises(AssertionError, match="id"):
        step(row_in(State.REJECTED), Event.SUBMIT, born=born("b"))


@pytest.mark.parametrize("event", [Event.SUBMIT, Event.HOLD])
def test_who_comes_takes_one_pod_of_the_credit(event: Event) -> None:
    made = step(None, event, born=born(), credit=CREDIT)
    taken = made.after
    assert (taken.arrival_us, taken.attempts, taken.reclaims, taken.not_before_us) == (NOW - 50, 2, 1, NOW + 7)
    assert made.credit == replace(CREDIT, count=1)
    assert made.credit_before == CREDIT
    with pytest.raises(AssertionError, match="one workload"):
        step(None, event, born=born("b"), credit=CREDIT)


@pytest.mark.parametrize("attempts", range(ATTEMPTS_MAX - 1))
def test_void_backs_off_twice_as_long_each_time_and_clears_the_reservation(attempts: int) -> None:
    before = replace(row_in(State.BINDING), attempts=attempts)
    made = step(before, Event.VOID, reason="ReservationTimedOut")
    after = made.after
    assert (after.state, after.epoch, after.attempts) == (State.QUEUED, before.epoch + 1, attempts + 1)
    assert after.not_before_us == NOW + 2**attempts * SECOND
    assert (after.node, after.allocation, after.deadline_us, after.reason) == ("", "", 0, "ReservationTimedOut")
    assert made.entry.node == "gpu-1"


@pytest.mark.parametrize("reason", sorted(SPARED))
@pytest.mark.parametrize("attempts", [0, ATTEMPTS_MAX - 1])
def test_a_reservation_that_nobody_tried_costs_no_attempt(attempts: int, reason: str) -> None:
    before = replace(row_in(State.RESERVED), attempts=attempts)
    assert void_or_fail(before, reason) is Event.VOID
    after = step(before, Event.VOID, reason=reason).after
    assert (after.state, after.epoch, after.attempts, after.node) == (State.QUEUED, before.epoch + 1, attempts, "")
    assert after.not_before_us > NOW


def test_the_last_attempt_is_failed_and_cannot_be_voided() -> None:
    last = replace(row_in(State.RESERVED), attempts=ATTEMPTS_MAX - 1)
    assert void_or_fail(last) is Event.FAIL
    assert void_or_fail(replace(last, attempts=ATTEMPTS_MAX - 2)) is Event.VOID
    with pytest.raises(AssertionError, match="last attempt"):
        step(last, Event.VOID)
    failed = step(last, Event.FAIL)
    assert (failed.after.state, failed.credit) == (State.FAILED, None)


def test_reclaims_are_counted_and_bounded() -> None:
    row = row_in(State.RUNNING)
    for count in range(1, RECLAIMS_MAX + 1):
        row = step(row, Event.RECLAIM).after
        assert row.reclaims == count
        row = step(row, Event.SPARE).after
    with pytest.raises(AssertionError, match="reclaimed"):
        step(row, Event.RECLAIM)


@pytest.mark.parametrize(
    ("state", "event", "leaves"),
    [
        (State.BOUND, Event.FAIL, True),
        (State.RUNNING, Event.FAIL, True),
        (State.RECLAIMING, Event.FAIL, True),
        (State.RECLAIMING, Event.FINISH, True),
        (State.RUNNING, Event.FINISH, False),
        (State.BOUND, Event.FINISH, False),
        (State.BINDING, Event.FAIL, False),
        (State.RESERVED, Event.CANCEL, False),
        (State.QUEUED, Event.EXPIRE, False),
    ],
)
def test_who_leaves_a_credit(state: State, event: Event, leaves: bool) -> None:
    made = step(row_in(state, arrival_us=NOW - 9), event)
    if leaves:
        assert made.credit is not None
        assert (made.credit.arrival_us, made.credit.count) == (NOW - 9, 1)
        assert made.credit.reclaims == (state is State.RECLAIMING)
    else:
        assert made.credit is None
    assert step(row_in(state, workload="a"), event).credit is None, "a pod without a controller never comes back"


def test_credits_of_one_workload_add_up() -> None:
    made = step(row_in(State.RUNNING, workload="job-a"), Event.FAIL, credit=CREDIT)
    assert made.credit == replace(CREDIT, count=3)


@pytest.mark.parametrize("column", ["gpu_milli", "cpu_milli", "memory_mib"])
@pytest.mark.parametrize("amount", [-1, AMOUNT_MAX + 1])
def test_amounts_are_bounded(column: str, amount: int) -> None:
    with pytest.raises(AssertionError, match="out of bounds"):
        step(None, Event.SUBMIT, born=born(**{column: amount}))
    assert step(None, Event.SUBMIT, born=born(**{column: AMOUNT_MAX})).after is not None


def test_a_reservation_has_a_node_and_a_short_record() -> None:
    with pytest.raises(AssertionError, match="without a node"):
        step(row_in(State.QUEUED), Event.RESERVE, node="")
    with pytest.raises(AssertionError, match="too long"):
        step(row_in(State.QUEUED), Event.RESERVE, decision="e" * 2049)


def test_the_deadline_lives_as_long_as_the_reservation() -> None:
    row = step(row_in(State.QUEUED), Event.RESERVE, deadline_us=NOW + 5).after
    binding = step(row, Event.BIND).after
    assert (row.deadline_us, binding.deadline_us) == (NOW + 5, NOW + 5)
    assert step(binding, Event.POST).after.deadline_us == 0


def test_the_journal_tells_the_allocation_once() -> None:
    told = [change.entry.allocation for change in history(State.RUNNING)]
    assert told == ["", '{"id":"a"}', "", "", ""]
    moved = step(row_in(State.RESERVED), Event.BIND, node="gpu-2", allocation='{"id":"a","node":"gpu-2"}')
    assert (moved.entry.allocation, moved.entry.node) == ('{"id":"a","node":"gpu-2"}', "gpu-2")


def test_an_illegal_event_changes_nothing() -> None:
    row = row_in(State.QUEUED)
    with pytest.raises(IllegalTransition):
        step(row, Event.POST)


def test_book_applies_and_reverts() -> None:
    book = Book(credits_={"job-a": CREDIT})
    submit = step(None, Event.SUBMIT, born=born(), credit=CREDIT)
    reserve = step(submit.after, Event.RESERVE)
    book.apply((submit, reserve))
    assert book.rows["a"].state is State.RESERVED
    assert book.credits["job-a"].count == 1
    assert book.accounts() == {
        ("default", "gpu_milli"): (1000, 0),
        ("default", "cpu_milli"): (4000, 0),
        ("default", "memory_mib"): (8192, 0),
    }
    book.revert((submit, reserve))
    assert (book.rows, book.credits, book.accounts()) == ({}, {"job-a": CREDIT}, {})


@pytest.mark.parametrize("first", [0, 1])
def test_changes_that_stand_on_each_other_revert_in_any_order(first: int) -> None:
    start = row_in(State.QUEUED)
    book = Book({"a": start}, {"job-a": CREDIT})
    reserve = step(start, Event.RESERVE)
    cancel = step(reserve.after, Event.CANCEL)
    book.apply((reserve,))
    book.apply((cancel,))
    for change in (reserve, cancel) if first == 0 else (cancel, reserve):
        book.revert((change,))
    assert book.rows == {"a": start}


@pytest.mark.parametrize("first", [0, 1])
def test_credits_that_stand_on_each_other_revert_in_any_order(first: int) -> None:
    book = Book({}, {"job": replace(CREDIT, workload="job")})
    made = []
    for name in "ab":
        made.append(step(None, Event.SUBMIT, born=born(name, workload="job"), credit=book.credits["job"]))
        book.apply(made[-1:])
    assert book.credits == {}
    for change in made if first == 0 else reversed(made):
        book.revert((change,))
    assert book.credits["job"].count == 2
    assert book.rows == {}


def test_book_refuses_a_change_of_another_row() -> None:
    book = Book({"a": row_in(State.RESERVED)})
    with pytest.raises(AssertionError, match="present row"):
        book.apply((step(row_in(State.QUEUED), Event.CANCEL),))


def test_live_rows_come_in_arrival_order_and_ended_ones_do_not() -> None:
    rows = [born("c"), born("b", arrival_us=NOW - 1), born("d", namespace="a"), born("e")]
    book = Book({row.id: row for row in [*rows, row_in(State.RELEASED, "z")]})
    assert [row.id for row in book.live()] == ["b", "d", "c", "e"]


def test_ended_rows_are_kept_for_replays_but_not_for_ever() -> None:
    book = Book()
    for number in range(TERMINAL_KEPT + 3):
        book.apply((step(None, Event.REJECT, born=born(str(number))),))
    assert len(book.rows) == TERMINAL_KEPT
    assert "2" not in book.rows
    assert book.rows["3"].state in TERMINAL
    reborn = step(book.rows["3"], Event.SUBMIT, born=born("3"))
    book.apply((reborn,))
    for number in range(5):
        book.apply((step(None, Event.REJECT, born=born(f"more-{number}")),))
    assert book.rows["3"].state is State.QUEUED
