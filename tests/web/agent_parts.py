"""Agents, reports and lines for tests: a Tessera that hears them, and connections that lose, double and swap."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from prometheus_client import CollectorRegistry

from nodeagent.messages import ACK, FULL, HELLO, REFUSED, Hello, Place, take, write
from nodeagent.report import Device, Health, Lost, Report, encode
from nodeagent.stream import LineError
from scheduler import geometry
from scheduler.clock import Clock
from scheduler.config import Settings
from scheduler.desk import Desk
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.web.agents import Agents, Caller, HungUp, Outcome, Talk
from tests.objects import raw_node, raw_pod

GPUS = 4
BOOT = "boot-1"
POD = "uid-agent"
CALLER = Caller("a", "uid-a", POD, 0)


async def nobody(_: str) -> Caller | None:
    return None


def tessera(clock: Clock, *, mode: str = "exact") -> Agents:
    """Return a Tessera with the nodes a and b, an agent's pod on each, and some that are none."""
    desk = Desk(clock, Settings().policy.policies())
    for name in ("a", "b"):
        node = read_node(raw_node(name, gpus=GPUS, mode=mode), geometry.products())
        assert node is not None
        desk.registry.put_node(node)
    for name, node_name, phase in (("agent", "a", "Running"), ("agent-b", "b", "Running"), ("over", "a", "Failed")):
        desk.registry.put_pod(read_pod(raw_pod(name, 0, node=node_name, phase=phase, scheduler="default-scheduler")))
    return Agents(desk, nobody, CollectorRegistry())


def device(index: int, state: str = "HEALTHY", *, mig: str = "off") -> Device:
    return Device(
        index=index, uuid=f"GPU-{index}", name="H100", bus=f"b{index}", pci_id=1, memory_mib=81559,
        health=Health(state), mig_mode=mig,
    )  # fmt: skip


def report(seq: int, *devices: Device, boot: str = BOOT, node: str = "a", at_us: int = 10**15, lost: int = 0) -> Report:
    gone = tuple(Lost(20 + at, None, "gone") for at in range(lost))
    return Report(node=node, boot=boot, seq=seq, at_us=at_us, agent="1", devices=devices, lost=gone)


def well(seq: int, **how: object) -> Report:
    return report(seq, *map(device, range(GPUS)), **how)  # type: ignore[arg-type]


def full(one: Report) -> bytes:
    return FULL + encode(one)


def hello(node: str = "a", boot: str = BOOT, uid: str = "") -> bytes:
    return write(HELLO, Hello(node, boot, "1", uid))


def greeted(agents: Agents, caller: Caller = CALLER, **how: str) -> Talk:
    talk = Talk(agents, caller)
    talk.hear(hello(**how))
    return talk


def answer(frame: bytes) -> tuple[bytes, int, str]:
    """Return kind, sequence number and sentence of ACK and REFUSED."""
    assert frame[:1] in {ACK, REFUSED}, frame
    place = take(Place, frame[1:])
    return frame[:1], place.seq, place.why


def counted(agents: Agents, outcome: Outcome) -> float:
    return float(agents._counts[outcome]._value.get())


class Rough:
    """One connection to a Tessera that loses, doubles, swaps and breaks as a seeded source says.

    `honest` ones only break, before or after a message has come, as TCP does.
    """

    def __init__(self, agents: Agents, rng: Random, rough: Callable[[], bool], *, honest: bool = False) -> None:
        self._talk, self._sleep = Talk(agents, CALLER), agents.desk.clock.sleep
        self._rng, self._rough, self._honest = rng, rough, honest
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._late: list[bytes] = []

    async def send(self, frame: bytes) -> None:
        await self._sleep(self._rng.uniform(0, 0.2))
        fate = self._rng.random() if self._rough() else 1.0
        if fate < (0.2 if self._honest else 0.05):
            if fate > 0.1:
                self._talk.hear(frame)
            self._answers.put_nowait(None)
            raise LineError("broken")
        if self._honest:
            self._hear(frame)
            return
        late, self._late = self._late, []
        if fate < 0.15:
            self._late = [frame]
        elif fate > 0.25:
            for one in [frame, *([frame] if fate < 0.35 else []), *late]:
                self._hear(one)

    def _hear(self, frame: bytes) -> None:
        if self._talk.ended.is_set():
            self._answers.put_nowait(None)
            return
        try:
            reply = self._talk.hear(frame)
        except HungUp:
            self._answers.put_nowait(None)
            return
        fate = self._rng.random() if self._rough() and not self._honest else 1.0
        for _ in range(0 if fate < 0.1 else 2 if fate < 0.2 else 1):
            self._answers.put_nowait(reply)

    async def receive(self) -> bytes:
        frame = await self._answers.get()
        if frame is None:
            raise LineError("hung up")
        return frame

    async def close(self) -> None:
        self._talk.leave()
