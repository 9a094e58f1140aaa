"""Both writers: what is awaited is durable, in order, and a bounded number waits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from scheduler.errors import BusyError, ConflictError, StoreError
from scheduler.model.reservation import Change, Event, State
from scheduler.store.store import Store
from scheduler.store.writer import GROUP_MAX, WAITING_MAX, InlineWriter, ThreadedWriter
from tests.ledger.lives import born, history, row_in, step


class Counting(Store):
    """A ledger that remembers how large its groups were."""

    groups: list[int]

    def commit(self, batch: Sequence[tuple[Change, ...]]) -> list[Exception | None]:
        """Note the group's size, then write it."""
        self.groups.append(len(batch))
        return super().commit(batch)


@pytest.fixture
def ledger(tmp_path: Path) -> Counting:
    """Return an open ledger in a file."""
    store = Counting.open(f"sqlite:///{tmp_path}/ledger.db")
    assert isinstance(store, Counting)
    store.groups = []
    return store


def submit(name: str) -> tuple[Change, ...]:
    return (step(None, Event.SUBMIT, born=born(name)),)


@pytest.mark.parametrize("kind", [InlineWriter, ThreadedWriter])
async def test_what_is_awaited_is_durable_and_in_order(
    ledger: Counting, kind: type[InlineWriter | ThreadedWriter]
) -> None:
    writer = kind(ledger)
    await asyncio.gather(*(writer.commit(submit(f"{number:04}")) for number in range(300)))
    await writer.close()
    assert [line["request"] for line in ledger.journal()] == [f"{number:04}" for number in range(300)]
    assert ledger.verify().ok
    assert sum(ledger.groups) == 300
    if kind is ThreadedWriter:
        assert max(ledger.groups) == GROUP_MAX
        assert len(ledger.groups) < 30
    ledger.close()


@pytest.mark.parametrize("kind", [InlineWriter, ThreadedWriter])
async def test_a_conflict_reaches_its_own_caller_only(
    ledger: Counting, kind: type[InlineWriter | ThreadedWriter]
) -> None:
    writer = kind(ledger)
    stray = (step(row_in(State.BOUND, "stray"), Event.START),)
    jobs = [submit("a"), stray, submit("b"), tuple(history(State.BOUND, "c"))]
    results = await asyncio.gather(*(writer.commit(job) for job in jobs), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ConflictError, type(None), type(None)]
    assert set(ledger.load()[0]) == {"a", "b", "c"}
    await writer.close()
    ledger.close()


async def test_a_bounded_number_waits_and_all_of_them_are_written() -> None:
    ledger = Store.open("sqlite://")
    writer = ThreadedWriter(ledger)
    with ledger._guard:  # the thread stands still in its first group
        names = map(str, range(WAITING_MAX + GROUP_MAX + 1))
        accepted = [asyncio.ensure_future(writer.commit(submit(name))) for name in names]
        await asyncio.wait(accepted, return_when=asyncio.FIRST_EXCEPTION)
        refused = [job for job in accepted if job.done()]
        assert refused
        assert all(isinstance(job.exception(), BusyError) for job in refused)
    waiting = [job for job in accepted if job not in refused]
    assert await asyncio.gather(*waiting) == [None] * len(waiting)
    assert len(waiting) >= WAITING_MAX
    await writer.close()
    assert ledger.head[0] == len(waiting)
    ledger.close()


async def test_patient_ones_are_bounded_too() -> None:
    ledger = Store.open("sqlite://")
    writer = ThreadedWriter(ledger)
    with ledger._guard:
        start = (step(row_in(State.BOUND, "a"), Event.START),)
        jobs = [asyncio.ensure_future(writer.commit(start)) for _ in range(WAITING_MAX + 10)]
        await asyncio.wait(jobs, return_when=asyncio.FIRST_EXCEPTION, timeout=5)
        refused = [job.exception() for job in jobs if job.done()]
    assert [type(error) for error in refused] == [BusyError] * 10
    await asyncio.gather(*jobs, return_exceptions=True)
    await writer.close()
    ledger.close()


async def test_closing_writes_what_waits_and_then_refuses(ledger: Counting) -> None:
    writer = ThreadedWriter(ledger)
    waiting = [asyncio.ensure_future(writer.commit(submit(str(number)))) for number in range(100)]
    await asyncio.wait([*waiting, asyncio.ensure_future(writer.close())])
    assert [job.exception() for job in waiting] == [None] * 100
    with pytest.raises(StoreError, match="stopping"):
        await writer.commit(submit("late"))
    await writer.close()
    ledger.close()


async def test_patient_steps_are_written_with_the_next_transaction_or_alone_after_a_moment(ledger: Counting) -> None:
    writer = ThreadedWriter(ledger)
    lives = {name: history(State.BINDING, name) for name in "ab"}
    for life in lives.values():
        await writer.commit(tuple(life))
    posts = [(step(life[-1].after, Event.POST),) for life in lives.values()]
    ledger.groups.clear()
    first = asyncio.ensure_future(writer.commit(posts[0]))
    await asyncio.sleep(0)
    await writer.commit(submit("c"))
    assert first.done()
    await writer.commit(posts[1])
    assert ledger.groups == [2, 1]
    assert [line["request"] for line in ledger.journal()][-3:] == ["a", "c", "b"]
    last = asyncio.ensure_future(writer.commit((step(posts[0][0].after, Event.START),)))
    await asyncio.sleep(0)
    await writer.close()  # does not wait for its moment
    await last
    assert ledger.load()[0]["a"].state is State.RUNNING
    ledger.close()


async def test_a_caller_that_goes_away_does_not_stop_its_commit(ledger: Counting) -> None:
    writer = ThreadedWriter(ledger)
    job = asyncio.ensure_future(writer.commit(submit("a")))
    await asyncio.wait([job], timeout=0)
    job.cancel()
    await writer.commit(submit("b"))
    await writer.close()
    assert set(ledger.load()[0]) == {"a", "b"}
    ledger.close()


async def test_a_bug_reaches_the_caller_and_the_writer_goes_on(ledger: Counting) -> None:
    writer = ThreadedWriter(ledger)
    with pytest.raises(AttributeError):
        await writer.commit(("not a change",))  # type: ignore[arg-type]
    await writer.commit(submit("a"))
    await writer.close()
    assert ledger.verify().ok
    ledger.close()
