"""Work ahead of the next call: in a pause, and not between pods that come at an even pace."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from scheduler.clock import LoopClock, VirtualLoop
from scheduler.config import Settings
from scheduler.desk import Desk
from scheduler.metrics import Metrics
from scheduler.web.extender import GAP_S_MAX, PACE, QUIET_S, Extender

BODY = orjson.dumps({"Pod": {"metadata": {"uid": "u", "name": "p", "namespace": "n"}, "spec": {}}, "NodeNames": ["a"]})


class Tidied(Desk):
    """A desk that notes when it was asked to work ahead."""

    times: list[float]

    def tidy(self) -> bool:
        """Note when; there is nothing to do."""
        self.times.append(self.clock.monotonic())
        return False


async def nobody(_: object) -> str:
    """Bind no pod."""
    return ""


def run(gap_s: float, calls: int) -> tuple[list[float], float]:
    """Ask at an even pace; return when work ahead was done, and when the last call came."""
    loop = VirtualLoop()

    async def ask() -> tuple[list[float], float]:
        clock = LoopClock(asyncio.get_running_loop())
        desk = Tidied(clock, Settings().policy.policies())
        desk.times = []
        extender = Extender(desk, clock, Metrics(clock, "1"), str, nobody)
        for _ in range(calls):
            await clock.sleep(gap_s)
            status, _ = await extender.filter(BODY)
            assert status == 200
        last_s = clock.monotonic()
        await clock.sleep(1.0)
        return desk.times, last_s

    try:
        return loop.run_until_complete(ask())
    finally:
        loop.close()


@pytest.mark.parametrize("gap_s", [0.001, 0.011, 0.05])
def test_an_even_pace_is_no_pause(gap_s: float) -> None:
    times, last_s = run(gap_s, 40)
    assert not [time for time in times if last_s - 20 * gap_s < time <= last_s], "once the pace is known"
    assert any(QUIET_S <= time - last_s <= PACE * GAP_S_MAX + 2 * gap_s for time in times), "a pause is used"


def test_each_of_a_few_pods_finds_the_work_done() -> None:
    times, _ = run(0.5, 10)
    assert len(times) == 10
