"""Whatever a connection does to messages, Tessera ends with the agent's last report, and takes each report once."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.report import STATES, Report
from nodeagent.spool import Spool
from nodeagent.stream import Line, LineError, Stream
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.intake.report import read_report
from scheduler.web.agents import Agents, Known
from tests.web.agent_parts import GPUS, Rough, device, report, tessera

QUIET_S = 400.0  # longer than a hung connection and the longest back-off


class Machine:
    """A machine whose agent is started anew now and then, and that is itself."""

    def __init__(self, agents: Agents, rng: Random, folder: Path, *, honest: bool) -> None:
        self.agents, self.rng, self.folder, self.honest = agents, rng, folder, honest
        self.made: list[int] = []
        self.present: set[int] = set()
        take = agents.take

        def noted(known: Known, report: Report) -> None:
            self.present.add(report.at_us)
            take(known, report)

        agents.take = noted  # type: ignore[method-assign]
        self.boot, self.seq, self.rough = 1, 0, True
        self.last: Report | None = None
        self.taken: Counter[int] = Counter()
        agents.remember = lambda one: self.taken.update([one.at_us])
        self.start()

    def start(self) -> None:
        self.stream = Stream(self.connect, spool=Spool(self.folder), rng=self.rng, say=lambda _: None)
        self.task = asyncio.ensure_future(self.stream.run())
        self.seq = 0

    async def connect(self) -> Line:
        if self.rough and self.rng.random() < 0.3:
            raise LineError("nobody there")
        return Rough(self.agents, self.rng, lambda: self.rough, honest=self.honest)

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self.stream.close()

    def look(self) -> None:
        self.seq += 1
        there = [slot for slot in range(GPUS) if self.rng.random() < 0.9]
        mig = self.rng.choice(("on", "off"))
        devices = [device(slot, self.rng.choice(STATES), mig=mig) for slot in there]
        at_us = self.agents.wall_us()
        self.last = report(self.seq, *devices, boot=f"boot-{self.boot}", at_us=at_us)
        self.made.append(at_us)
        self.stream.publish(self.last)

    async def live(self, looks: int) -> None:
        for _ in range(looks):
            self.look()
            await self.agents.desk.clock.sleep(self.rng.choice((0.3, 5.0, 5.0, 40.0)))
            if (event := self.rng.random()) < 0.08:
                self.boot += event < 0.04
                await self.stop()
                await self.agents.desk.clock.sleep(self.rng.uniform(0.1, 30))
                self.start()


async def story(seed: int, folder: Path, *, honest: bool) -> tuple[Agents, Machine]:
    agents = tessera(LoopClock(asyncio.get_running_loop()))
    machine = Machine(agents, Random(seed), folder, honest=honest)
    await machine.live(machine.rng.randint(1, 30))
    machine.look()
    await agents.desk.clock.sleep(3.0)
    machine.rough = False
    await agents.desk.clock.sleep(QUIET_S)
    await machine.stop()
    return agents, machine


def told(seed: int, *, honest: bool = False) -> tuple[Agents, Machine]:
    loop = VirtualLoop()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return loop.run_until_complete(story(seed, Path(folder), honest=honest))
    finally:
        loop.close()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_tessera_ends_with_the_last_report(seed: int) -> None:
    agents, machine = told(seed)
    assert machine.last is not None
    registry = agents.desk.registry
    assert registry._seen["a"] == ("uid-a", read_report(machine.last), False)
    assert registry.differences("a") == []
    assert agents._known["a"].boot == machine.last.boot


@pytest.mark.parametrize("seed", range(20))
def test_the_past_is_taken_once_at_most(seed: int) -> None:
    _, machine = told(seed)
    assert max(machine.taken.values(), default=1) == 1


@pytest.mark.parametrize("seed", range(20))
def test_of_what_was_said_over_connections_that_break_nothing_is_lost(seed: int) -> None:
    _, machine = told(seed, honest=True)
    assert sorted([*machine.present, *machine.taken]) == machine.made


def test_there_is_a_past() -> None:
    assert sum(told(seed)[1].taken.total() for seed in range(5)) > 0
