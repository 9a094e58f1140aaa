"""Node agents that nobody should trust: broken reports, deltas and frames over real WebSockets, by seed.

Invariant: what is plainly no report of the node that HELLO named (no JSON, another node, another version, more GPUs
than the node has, an old number) must not be acknowledged; every message gets an answer or a close with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from bench.hostile_bodies import GARBAGE, Attacker
from nodeagent.messages import ACK, DELTA, FULL, HELLO, MESSAGE_MAX, PAST, PATH, REFUSED, WANTED
from nodeagent.report import VERSION

Json = dict[str, Any]

GPUS = 8
LINES = 20  # at once, each for a node of its own: a node may send a few messages a second
ADDRESSES = 200  # of the loopback network, for each may only try to connect so often
ANSWER_S = 60.0
INTERNAL_ERROR = 1011
GARBLED = 0.02  # of the connections bring no HTTP, and as many a wrong token
SIZES = (MESSAGE_MAX - 1, MESSAGE_MAX, MESSAGE_MAX + 1, 2 * MESSAGE_MAX)
KINDS = (FULL,) * 5 + (DELTA,) * 4 + (PAST,) * 2 + (HELLO, ACK, b"", b"\0", b"X")


def good_report(node: str, boot: str, seq: int) -> Json:
    """Return a report of a machine whose GPUs are well."""
    devices = [
        {"index": at, "uuid": f"GPU-{node}-{at}", "name": "H100", "bus": f"{at}:00.0", "pci_id": 1, "memory_mib": 81559}
        for at in range(GPUS)
    ]
    used = [{"device": devices[0]["uuid"], "slice": None, "kind": "external", "memory_mib": 5, "busy_ratio": 0.5}]
    said = {"node": node, "boot": boot, "seq": seq, "at_us": seq, "agent": "1", "v": VERSION, "driver": "580.1"}
    return {**said, "devices": devices, "lost": [], "uses": used, "notes": []}


def hello(node: str, boot: str) -> bytes:
    """Return the first frame of a connection."""
    return HELLO + json.dumps({"node": node, "boot": boot, "agent": "1", "node_uid": "", "v": 1}).encode()


@dataclass(slots=True)
class Frame:
    """A message, and what is known of it: `seq` of the report it should be, and whether it must not be taken."""

    wire: bytes
    seq: int
    bad: bool


class AgentAttacker(Attacker):
    """Makes frames as an agent's connection would carry them, nearly all of them broken."""

    def __init__(self, seed: int, pods: list[Json], names: list[str]) -> None:
        """Keep what real bodies are made of."""
        super().__init__(seed, pods, names)
        self._node, self._boot, self._seq, self._kind = names[0], "boot", 0, FULL

    def draw(self) -> float:
        """Return what decides about a connection, 0..1."""
        return self._rng.random()

    def garbage(self) -> bytes:
        """Return bytes that are no WebSocket."""
        return self._rng.choice(GARBAGE)

    def frame(self, node: str, boot: str, seq: int) -> Frame:
        """Return a message on a connection of this node, whose last report has the number before `seq`."""
        self._node, self._boot, self._seq = node, boot, seq
        self._kind = kind = self._rng.choice(KINDS)
        if self._rng.random() < 0.003:
            body = b" " * (self._rng.choice(SIZES) - 1)
        else:
            weights, ways = zip(*self._ways, strict=True)
            body = self._rng.choices(ways, weights)[0](self._real(""))
        return Frame(kind + body, seq, _plainly_bad(kind, body, node, seq))

    def _real(self, verb: str) -> Json:
        """Return a report or a delta, now and then of another node, number, start or size; whatever verb."""
        del verb
        draw = self._rng.random()
        real = good_report(self._node, self._boot, self._seq)
        if draw < 0.05:
            real["node"] = self._rng.choice(self._names)
        elif draw < 0.1:
            real["seq"] = self._rng.choice([0, self._seq - 1, 2**62, -1])
        elif draw < 0.15:
            real["boot"] = self._rng.choice(["", "another", self._boot])
        elif draw < 0.2:
            real["devices"] *= self._rng.choice([2, 5, 200])
        if self._kind != DELTA:
            return real
        paths = [
            ["devices", self._rng.randint(-1, 9), "memory_mib"],
            ["node"],
            ["uses", 0],
            ["devices", 0, "health"],
            [],
        ]
        changes = [[self._rng.choice(paths), self._rng.choice([1, "x", None, {}, [], 2**70])] for _ in range(3)]
        return {"base": self._seq - self._rng.choice([1, 1, 1, 2, 0]), "set": [[["seq"], self._seq], *changes]}


def _plainly_bad(kind: bytes, body: bytes, node: str, seq: int) -> bool:
    """Say whether nobody could rightly acknowledge a message."""
    if kind not in {FULL, DELTA, PAST}:
        return True
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return True
    if not isinstance(said, dict):
        return True
    if kind == DELTA:
        return said.get("base") != seq - 1 or not isinstance(said.get("set"), list)
    listed = [said.get(key, []) for key in ("devices", "lost")]
    many = kind == FULL and all(isinstance(one, list) for one in listed) and sum(map(len, listed)) > GPUS
    return said.get("node") != node or said.get("v") != VERSION or many


@dataclass(slots=True)
class Judge:
    """Counts what went wrong with answers."""

    note: Callable[[str, str], None]
    answers: dict[str, int] = field(default_factory=dict)

    def answer(self, sent: Frame, message: aiohttp.WSMessage, code: int | None) -> bool:
        """Judge an answer; returns whether the connection goes on."""
        if message.type is not aiohttp.WSMsgType.BINARY:
            self._count(f"closed {code}")
            if code in {None, INTERNAL_ERROR}:
                self.note("bad_5xx", f"closed with {code} after {sent.wire[:200]!r}")
            return False
        kind, body = bytes(message.data[:1]), message.data[1:]
        self._count(kind.decode())
        if kind == ACK and sent.bad:
            self.note("wrong", f"{body[:100]!r} to {sent.wire[:300]!r}")
        elif kind not in {ACK, REFUSED, WANTED}:
            self.note("wrong", f"an answer of kind {kind!r} to {sent.wire[:100]!r}")
        elif kind == REFUSED and not json.loads(body).get("why"):
            self.note("wrong", f"refused without a sentence: {sent.wire[:100]!r}")
        return True

    def _count(self, answer: str) -> None:
        self.answers[answer] = self.answers.get(answer, 0) + 1


class Swarm:
    """Connections to one port for agents."""

    def __init__(self, url: str, token: str, names: list[str], attacker: AgentAttacker, judge: Judge) -> None:
        """Note where, as whom and for which nodes; nothing is opened."""
        self._url, self._names, self._attacker, self._judge = url, names, attacker, judge
        self._headers = {"Authorization": f"Bearer {token}"}
        self._connections = self._starts = 0

    async def tell(self) -> None:
        """Say of every node that all is well, as after a new start of its machine."""
        self._starts += 1
        for name in self._names:
            async with self._connected(self._headers) as socket:
                boot = f"start-{self._starts}"
                await socket.send_bytes(hello(name, boot))
                await socket.receive(ANSWER_S)
                await socket.send_bytes(FULL + json.dumps(good_report(name, boot, 1)).encode())
                answer = await socket.receive(ANSWER_S)
                if answer.type is not aiohttp.WSMsgType.BINARY or answer.data[:1] != ACK:
                    self._judge.note("wrong", f"a good report of {name} got {answer.data!r}")

    async def attack(self, more: Callable[[], bool]) -> None:
        """Send messages over a few connections at once, for as long as `more` says that one more is to be sent."""
        async with asyncio.TaskGroup() as group:
            for name in self._names[:LINES]:
                group.create_task(self._line(name, more))

    async def _line(self, name: str, more: Callable[[], bool]) -> None:
        while more():
            try:
                draw = self._attacker.draw()
                if draw < GARBLED:
                    await self._garble()
                elif draw < 2 * GARBLED:
                    await self._strange()
                else:
                    await self._converse(name, more)
            except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
                self._judge.note("crashes", f"{error!r} on a connection of {name}")

    async def _converse(self, name: str, more: Callable[[], bool]) -> None:
        """Send messages, the first of which is due, until one ends the connection or no more is to be sent."""
        self._starts += 1
        boot, seq = f"start-{self._starts}", 2
        async with self._connected(self._headers) as socket:
            for first in (hello(name, boot), FULL + json.dumps(good_report(name, boot, 1)).encode()):
                await socket.send_bytes(first)
                begun = await socket.receive(ANSWER_S)
            if begun.type is not aiohttp.WSMsgType.BINARY or begun.data[:1] != ACK:
                self._judge.note("wrong", f"a good beginning got {begun.data!r}, {socket.close_code}")
                return
            while True:
                sent = self._attacker.frame(name, boot, seq)
                await socket.send_bytes(sent.wire)
                message = await socket.receive(ANSWER_S)
                if not self._judge.answer(sent, message, socket.close_code) or not more():
                    return
                seq += message.data[:1] == ACK

    async def _garble(self) -> None:
        """Send what is no HTTP; it must end."""
        parts = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(self._attacker.garbage())
            writer.write_eof()
            async with asyncio.timeout(ANSWER_S):
                await reader.read(-1)
        finally:
            writer.close()

    async def _strange(self) -> None:
        """Come with another token; only 401 is right."""
        with contextlib.suppress(aiohttp.WSServerHandshakeError):
            async with self._connected({"Authorization": "Bearer " + "x" * 43}):
                self._judge.note("wrong", "a stranger was let in")

    @contextlib.asynccontextmanager
    async def _connected(self, headers: dict[str, str]) -> AsyncGenerator[aiohttp.ClientWebSocketResponse, None]:
        self._connections += 1
        source = (f"127.0.{1 + self._connections % ADDRESSES}.1", 0)
        connector = aiohttp.TCPConnector(local_addr=source, force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.ws_connect(self._url + PATH, headers=headers, max_msg_size=0) as socket,
        ):
            yield socket
