"""What every kind of database must do alike: all or none, compare-and-set, fence, chain, accounts, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from scheduler.errors import ConflictError, StoreError
from scheduler.ledger.journal import GENESIS, digest, recompute_accounts, verify
from scheduler.ledger.ledger import TERMINAL_KEPT, Book
from scheduler.model.reservation import Change, Credit, Event, State
from scheduler.store import schema
from scheduler.store.store import CHECKPOINT_EVERY, Store
from tests.ledger.lives import NOW, born, history, row_in, step

OpenStore = Callable[[], Store]

ODD = "gpu-ü-한-\U0001f5a5 'quoted\" \\back\n"


def bound(name: str) -> tuple[Change, ...]:
    return tuple(history(State.BOUND, name))


def fill(store: Store, count: int, *, prefix: str = "r") -> None:
    for start in range(0, count, 50):
        group = [bound(f"{prefix}{number}") for number in range(start, min(start + 50, count))]
        assert store.commit(group) == [None] * len(group)


def test_what_was_committed_is_loaded_again(store: Store) -> None:
    given = [history(state, f"in-{state.value}") for state in State]
    assert store.commit([tuple(changes) for changes in given]) == [None] * len(given)
    book = Book()
    for changes in given:
        book.apply(changes)
    rows, credits_ = store.load()
    assert rows == book.rows
    assert credits_ == book.credits
    assert len(credits_) == 1
    assert store.accounts() == book.accounts() == recompute_accounts(store.journal())
    assert store.verify().ok
    assert store.row("in-BOUND") == book.rows["in-BOUND"]
    assert store.row("nobody") is None


def test_any_text_survives(store: Store) -> None:
    change = step(None, Event.ADOPT, born=born("x", namespace=ODD, queue=ODD, borrowed=True), node=ODD, allocation=ODD)
    assert store.commit([(change,)]) == [None]
    assert store.load()[0]["x"] == change.after
    assert store.verify().ok


def test_the_chain_goes_on_from_commit_to_commit(store: Store) -> None:
    assert store.head == (0, GENESIS)
    fill(store, 3)
    lines = list(store.journal())
    assert [line["seq"] for line in lines] == list(range(1, 13))
    assert verify(lines).head == store.head[1] == lines[-1]["hash"]
    assert list(store.journal(10)) == lines[9:]


def test_only_the_guilty_transaction_of_a_group_fails(store: Store) -> None:
    fill(store, 2)
    stale = (step(replace(row_in(State.BOUND, "r0"), epoch=7), Event.FINISH),)
    twice = bound("r1")
    foreign = (step(None, Event.SUBMIT, born=born("f"), fence=store.fence + 1),)
    good = [bound("new-1"), (step(row_in(State.BOUND, "r1"), Event.FINISH),)]
    results = store.commit([good[0], stale, twice, foreign, good[1]])
    assert [type(result) for result in results] == [type(None), ConflictError, ConflictError, ConflictError, type(None)]
    rows, _ = store.load()
    assert (rows["r0"].state, rows["r1"].state, rows["new-1"].state) == (State.BOUND, State.RELEASED, State.BOUND)
    assert "f" not in rows
    assert store.verify().ok
    assert store.accounts() == Book(rows).accounts()


def test_a_transaction_is_all_or_none(store: Store) -> None:
    start = row_in(State.QUEUED)
    assert store.commit([(step(None, Event.SUBMIT, born=born()),)]) == [None]
    reserve = step(start, Event.RESERVE)
    stray = step(row_in(State.BOUND, "stray"), Event.START)
    assert isinstance(store.commit([(reserve, stray)])[0], ConflictError)
    assert store.load()[0]["a"].state is State.QUEUED
    assert store.accounts() == {}
    assert store.head[0] == 1


def test_a_change_on_top_of_a_failed_one_fails_too(store: Store) -> None:
    assert store.commit([(step(None, Event.SUBMIT, born=born()),)]) == [None]
    failed = step(row_in(State.QUEUED), Event.RESERVE, fence=store.fence + 5)
    on_top = step(failed.after, Event.CANCEL)
    assert [type(result) for result in store.commit([(failed,), (on_top,)])] == [ConflictError, ConflictError]
    assert store.load()[0]["a"].state is State.QUEUED


def test_the_database_refuses_an_account_below_zero(store: Store) -> None:
    fill(store, 1)
    row = replace(row_in(State.BOUND, "r0"), gpu_milli=5000)
    result = store.commit([(step(row, Event.FINISH),)])[0]
    assert isinstance(result, ConflictError)
    assert store.verify().ok


def test_a_new_life_writes_over_the_ended_one(store: Store) -> None:
    rejected = step(None, Event.REJECT, born=born())
    again = step(rejected.after, Event.SUBMIT, born=born())
    assert store.commit([(rejected,), (again,)]) == [None, None]
    assert store.load()[0]["a"].epoch == 2
    assert isinstance(store.commit([(step(None, Event.SUBMIT, born=born()),)])[0], ConflictError)


def test_credits_are_left_taken_and_gone(store: Store) -> None:
    lost = [*history(State.RUNNING, "p1", workload="job")]
    lost.append(step(lost[-1].after, Event.FAIL))
    assert store.commit([tuple(lost)]) == [None]
    left = store.load()[1]["job"]
    assert left == Credit("job", NOW, 0, 0, 0)
    taken = step(None, Event.SUBMIT, born=born("p2", workload="job"), credit=left)
    assert store.commit([(taken,)]) == [None]
    assert store.load()[1] == {}


def test_a_writer_that_was_superseded_writes_nothing_more(store: Store) -> None:
    fill(store, 1)
    assert store.raise_fence() == 2
    late = (step(row_in(State.BOUND, "r0"), Event.FINISH),)
    assert isinstance(store.commit([late])[0], ConflictError)
    assert store.commit([(step(row_in(State.BOUND, "r0"), Event.FINISH, fence=2),)]) == [None]
    store.fence = 1
    assert isinstance(store.commit([bound("late")])[0], ConflictError), "the database checks the fence, too"
    store.fence = 2
    assert store.verify().ok


def test_checkpoints_let_a_start_verify_the_tail_only(store: Store) -> None:
    fill(store, CHECKPOINT_EVERY // 4 * 2 + 30)
    with store._engine.connect() as connection:
        seqs = list(connection.scalars(sa.select(schema.checkpoints.c.seq).order_by(schema.checkpoints.c.seq)))
    assert seqs == [1000, 2000]
    tail = store.verify_tail()
    assert (tail.ok, tail.rows, tail.head) == (True, 120, store.head[1])
    whole = store.verify()
    assert (whole.ok, whole.rows) == (True, 2120)


def edit(store: Store, statement: sa.Executable) -> None:
    assert store._writer is not None
    with store._writer.begin():
        store._writer.execute(statement)


def test_what_is_before_a_checkpoint_may_be_archived_and_nothing_else(store: Store) -> None:
    fill(store, CHECKPOINT_EVERY // 4 + 5)
    lines = schema.journal.c
    edit(store, sa.delete(schema.journal).where(lines.seq <= CHECKPOINT_EVERY))
    found = store.verify()
    assert (found.ok, found.rows) == (True, 20)
    fill(store, 3, prefix="later")
    assert store.verify().ok
    edit(store, sa.delete(schema.journal).where(lines.seq <= CHECKPOINT_EVERY + 2))
    assert not store.verify().ok


@pytest.mark.parametrize(
    ("statement", "first_bad"),
    [
        pytest.param(sa.update(schema.journal).where(schema.journal.c.seq == 3).values(node="gpu-9"), 3, id="edited"),
        pytest.param(sa.delete(schema.journal).where(schema.journal.c.seq == 4), 4, id="deleted"),
        pytest.param(sa.delete(schema.journal).where(schema.journal.c.seq >= 7), 7, id="cut off"),
        pytest.param(sa.delete(schema.journal), 1, id="emptied"),
        pytest.param(sa.update(schema.accounts).values(posted=schema.accounts.c.posted + 1), None, id="account"),
        pytest.param(sa.update(schema.requests).values(state="RUNNING"), None, id="row moved"),
        pytest.param(sa.update(schema.requests).values(state="RELEASED"), None, id="row freed"),
        pytest.param(sa.delete(schema.requests).where(schema.requests.c.id == "r1"), None, id="row deleted"),
    ],
)
def test_tampering_with_the_tables_is_found(store: Store, statement: sa.Executable, first_bad: int | None) -> None:
    fill(store, 2)
    edit(store, statement)
    for found in (store.verify(), store.verify_tail()):
        assert (found.ok, found.first_bad) == (False, first_bad)
        assert found.text


def test_a_rewritten_journal_does_not_fit_the_writers_mark(store: Store) -> None:
    fill(store, 1)
    whole = list(store.journal())
    forged = {**whole[-1], "node": "gpu-9"}
    forged.pop("hash")
    edit(store, sa.update(schema.journal).where(schema.journal.c.seq == 4).values(node="gpu-9", hash=digest(forged)))
    assert verify(store.journal()).ok, "the chain alone cannot tell"
    found = store.verify()
    assert (found.ok, found.first_bad) == (False, 4)


def test_ended_rows_beyond_what_memory_keeps_are_read_one_by_one(store: Store) -> None:
    names = [f"{number:05}" for number in range(TERMINAL_KEPT + 2)]
    changes = [step(None, Event.REJECT, born=born(name), now_us=NOW + number) for number, name in enumerate(names)]
    assert store.commit([tuple(changes)]) == [None]
    rows, _ = store.load()
    assert len(rows) == TERMINAL_KEPT
    assert "00001" not in rows
    assert store.row("00001") == changes[1].after


@pytest.mark.parametrize("url", ["mysql://root@localhost/x", "nonsense", "sqlite:///x.db?mode=rwc"])
def test_other_databases_are_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(StoreError, match=r"\."):
        Store.open(url)


@pytest.mark.parametrize("url", ["file", "postgres"], indirect=True)
def test_identity_stays_and_the_fence_rises_with_every_start(opened: OpenStore) -> None:
    first = opened()
    fill(first, 1)
    first.close()
    second = opened()
    assert (second.identity, second.fence, second.head) == (first.identity, first.fence + 1, first.head)
    assert second.verify_tail().ok
