"""The circuit breaker: a model that keeps every call, and the table of its phases."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.breaker import (
    FAILURES_MAX,
    OPEN_S,
    OPEN_S_MAX,
    PLENTY,
    PROBES,
    SLOW_MAX,
    WINDOW_S,
    Begun,
    Breaker,
    Dropped,
    Ended,
    Hanging,
    Phase,
    room,
    step,
)
from scheduler.clock import LoopClock
from scheduler.dependencies import Dependencies, Dependency
from scheduler.errors import ConflictError, StoreError, UnavailableError
from scheduler.guarded import guarded, judged_api, judged_store
from scheduler.kube.port import ApiError, Conflict, NotFound, UnknownOutcome
from tests.virtual import virtual

GAPS = st.sampled_from((0.0, 0.1, 0.5, 1.0, 2.5, 4.9, 5.0, 11.0))
SLOW = st.sampled_from((0, 0, 0, 1, 2, 5))
KINDS = st.sampled_from(("ok", "ok", "ok", "failed", "dropped"))


@dataclass
class Model:
    """The same rules, told by somebody who keeps every call."""

    phase: Phase = Phase.CLOSED
    ended: list[tuple[float, bool, int]] = field(default_factory=list)
    until_s: float = 0.0
    left: int = 0
    proven: int = 0

    def room(self, now_s: float) -> int:
        if self.phase is Phase.CLOSED:
            return PLENTY
        if self.phase is Phase.OPEN:
            return PROBES if now_s >= self.until_s else 0
        return self.left

    def begin(self) -> None:
        if self.phase is Phase.OPEN:
            self.phase, self.left, self.proven = Phase.HALF_OPEN, PROBES, 0
        if self.phase is Phase.HALF_OPEN:
            self.left -= 1

    def end(self, kind: str, slow: int, now_s: float) -> None:
        failed = kind == "failed"
        if self.phase is Phase.HALF_OPEN:
            if failed or slow:
                self.open(now_s)
            elif kind == "dropped":
                self.left += 1
            else:
                self.proven += 1
                if self.proven == PROBES:
                    self.phase, self.ended = Phase.CLOSED, []
        elif kind != "dropped" or slow:
            self.ended.append((now_s, failed, slow))
            late = [one for one in self.ended if int(one[0]) >= int(now_s) - WINDOW_S]
            slow_all = sum(one[2] for one in late)
            too_slow = slow_all >= SLOW_MAX and slow_all * 100 > len(late)
            if (failed or slow) and (sum(one[1] for one in late) >= FAILURES_MAX or too_slow):
                self.open(now_s)

    def open(self, now_s: float) -> None:
        self.phase, self.until_s = Phase.OPEN, now_s + OPEN_S


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(GAPS, KINDS, SLOW, st.integers(0, 3)), max_size=120))
def test_it_does_what_a_model_does_that_keeps_every_call(calls: list[tuple[float, str, int, int]]) -> None:
    breaker, model, now_s, under_way = Breaker(), Model(), 0.0, 0
    for gap_s, kind, slow, more in calls:
        now_s += gap_s
        for _ in range(1 + more):
            assert room(breaker, now_s) == model.room(now_s)
            if room(breaker, now_s):
                phase = breaker.phase
                breaker = step(breaker, Begun(), now_s)
                under_way = 1 if breaker.phase is not phase else under_way + 1
                model.begin()
        if not under_way:
            continue
        under_way -= 1
        phase = breaker.phase
        event = Dropped(slow) if kind == "dropped" else Ended(slow, failed=kind == "failed")
        breaker = step(breaker, event, now_s)
        model.end(kind, slow, now_s)
        if breaker.phase is not phase:
            under_way = 0  # whoever holds it forgets the others
        assert breaker.phase is model.phase
        assert len(breaker.lately) <= WINDOW_S + 1


@pytest.mark.parametrize(
    ("gap_s", "phase"),
    [pytest.param(2.4, Phase.OPEN, id="within ten seconds"), pytest.param(3.0, Phase.CLOSED, id="over twelve")],
)
def test_five_failures_in_ten_seconds_open_it(gap_s: float, phase: Phase) -> None:
    breaker = Breaker()
    for number in range(FAILURES_MAX - 1):
        breaker = step(breaker, Ended(failed=True), 100 + number * gap_s)
        assert breaker.phase is Phase.CLOSED
    assert step(breaker, Ended(failed=True), 100 + 4 * gap_s).phase is phase


@pytest.mark.parametrize(("fast", "phase"), [(100, Phase.OPEN), (600, Phase.CLOSED)])
def test_slow_calls_open_it_where_more_than_one_in_a_hundred_is(fast: int, phase: Phase) -> None:
    breaker = Breaker()
    for _ in range(fast):
        breaker = step(breaker, Ended(), 3)
    for _ in range(5):
        breaker = step(breaker, Ended(slow=1), 3)
    assert breaker.phase is phase


@pytest.mark.parametrize(("calls", "slow", "phase"), [(5, 5, Phase.OPEN), (1, 5, Phase.OPEN), (1, 4, Phase.CLOSED)])
def test_calls_that_hang_open_it_while_they_hang(calls: int, slow: int, phase: Phase) -> None:
    assert step(Breaker(), Hanging(calls, slow), 50).phase is phase


def test_whoever_asks_to_be_left_alone_is_but_not_for_ever() -> None:
    for asked_s, alone_s in ((0.0, OPEN_S), (20.0, 20.0), (1e9, OPEN_S_MAX)):
        breaker = Breaker(Phase.HALF_OPEN, sent=1)
        breaker = step(breaker, Ended(failed=True, wait_s=asked_s), 7)
        assert (room(breaker, 7 + alone_s - 0.001), room(breaker, 7 + alone_s)) == (0, PROBES)


def test_an_open_breaker_that_is_asked_too_early_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="open breaker"):
        step(Breaker(Phase.OPEN, until_s=5), Begun(), 4)
    with pytest.raises(AssertionError, match="no probe"):
        step(Breaker(Phase.HALF_OPEN, sent=PROBES), Begun(), 4)


# around it


class Place:
    """A dependency in virtual time."""

    def __init__(self) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        self.both = Dependencies(self.clock)
        self.one: Dependency = self.both.store

    async def call(self, lasts_s: float = 0.0, error: Exception | None = None) -> None:
        with self.one.asked(lambda: UnavailableError("open"), judged_store):
            await self.clock.sleep(lasts_s)
            if error is not None:
                raise error

    async def fail(self, times: int = 1) -> None:
        for _ in range(times):
            with suppress(StoreError):
                await self.call(error=StoreError("full"))


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    yield Place()


@virtual(place)
async def test_an_open_breaker_refuses_and_closes_after_three_probes(here: Place) -> None:
    await here.fail(5)
    assert (here.one.phase, here.both.closed, here.one.room()) == (Phase.OPEN, False, 0)
    with pytest.raises(UnavailableError):
        await here.call()
    assert "store" in here.both.trouble()
    await here.clock.sleep(OPEN_S)
    for left in (3, 2, 1):
        assert here.one.room() == left
        await here.call()
    assert (here.one.phase, here.both.trouble()) == (Phase.CLOSED, "")
    assert here.one.transitions == {Phase.OPEN: 1, Phase.HALF_OPEN: 1, Phase.CLOSED: 1}


@virtual(place)
async def test_calls_that_hang_are_noticed_before_they_end(here: Place) -> None:
    for count, after_s in ((5, 1.0), (1, 5.0)):
        here.one = Dependency("store", "", here.clock, single=True)
        hanging = [asyncio.ensure_future(here.call(60)) for _ in range(count)]
        await here.clock.sleep(after_s - 0.1)
        before = here.one.closed
        await here.clock.sleep(0.1)
        assert (before, here.one.closed) == (True, False)
        await asyncio.gather(*hanging)
        assert here.one.phase is Phase.OPEN  # what began before says nothing of now


@virtual(place)
async def test_what_began_before_a_probe_is_none(here: Place) -> None:
    hanging = [asyncio.ensure_future(here.call(6.5)) for _ in range(5)]
    await here.clock.sleep(1)
    assert here.one.phase is Phase.OPEN
    await here.clock.sleep(OPEN_S)
    await here.call(0.9)
    await asyncio.gather(*hanging)
    assert (here.one.phase, here.one.room()) == (Phase.HALF_OPEN, 2)


@virtual(place)
async def test_one_call_of_many_side_by_side_may_hang_alone(here: Place) -> None:
    here.one = here.both.api
    four = [asyncio.ensure_future(here.call(30)) for _ in range(4)]
    await here.clock.sleep(20)
    before = here.one.closed
    fifth = asyncio.ensure_future(here.call(30))
    await here.clock.sleep(1)
    assert (before, here.one.closed) == (True, False)
    await asyncio.gather(fifth, *four)


@virtual(place)
async def test_a_probe_that_hangs_opens_it_again_and_one_that_is_given_up_is_no_answer(here: Place) -> None:
    await here.fail(5)
    await here.clock.sleep(OPEN_S)
    probe = asyncio.ensure_future(here.call(60))
    await here.clock.sleep(0.5)
    assert (here.one.phase, here.one.room()) == (Phase.HALF_OPEN, 2)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    assert (here.one.phase, here.one.room()) == (Phase.HALF_OPEN, 3)
    probe = asyncio.ensure_future(here.call(60))
    await here.clock.sleep(1)
    assert (here.one.phase, here.one.room()) == (Phase.OPEN, 0)
    await probe


@virtual(place)
async def test_an_answer_that_was_no_failure_counts_as_none(here: Place) -> None:
    for _ in range(20):
        with suppress(ConflictError):
            await here.call(error=ConflictError("another row"))
    assert here.one.closed


@pytest.mark.parametrize(
    ("error", "judged"),
    [
        (Conflict(409, "Conflict", ""), (False, 0.0)),
        (NotFound(404, "NotFound", ""), (False, 0.0)),
        (ApiError(403, "Forbidden", ""), (False, 0.0)),
        (ApiError(429, "TooManyRequests", "", retry_after_s=7), (True, 7)),
        (ApiError(429, "OwnPace", "", retry_after_s=7), (False, 7)),
        (ApiError(503, "Unreachable", ""), (True, 0.0)),
        (UnknownOutcome("broken off"), (True, 0.0)),
    ],
)
def test_what_counts_as_a_failure_of_the_api_server(error: Exception, judged: tuple[bool, float]) -> None:
    assert judged_api(error) == judged


class Throttling:
    """An API server that has no time for new objects."""

    async def create(self, *_: object) -> None:
        raise ApiError(429, "TooManyRequests", "", retry_after_s=60)


@virtual(place)
async def test_events_that_are_put_off_stop_no_decision(here: Place) -> None:
    cluster, _ = guarded(Throttling(), None, here.both)  # type: ignore[arg-type]
    for kind, closed in (("events", True), ("leases", False)):
        for _ in range(5):
            with suppress(ApiError):
                await cluster.create(kind, "default", {})  # type: ignore[arg-type]
        assert here.both.api.closed is closed
