"""Node agents as Tessera meets them: who may speak for a node, which report counts, and what their silence means.

Invariant: a report changes only the node that the API server's word about the token names, only forward (boot id and
sequence number), and never makes anything free: what it leaves out is not well, and who falls silent closes an exact
node for new work. Nothing is ever evicted here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import structlog
from aiohttp import WSCloseCode, WSMsgType, web
from prometheus_client import CollectorRegistry, Counter, Gauge

from nodeagent.messages import (
    ACK,
    DELTA,
    FULL,
    HELLO,
    MESSAGE_MAX,
    PAST,
    PATH,
    REFUSED,
    WANTED,
    WELCOME,
    Hello,
    Place,
    apply,
    take,
    write,
)
from nodeagent.report import BadReport, Report, decode
from scheduler.desk import Desk
from scheduler.errors import TesseraError
from scheduler.intake.report import gpus_told, read_report

from .access import Rate
from .patience import patience
from .problems import problem, problems, refuse_encodings

log = structlog.get_logger(__name__)

SILENT_S = 90.0
HELLO_S = 10.0
BEAT_S = 20.0
LINES_MAX = 20_000
PER_SECOND, BURST = 5.0, 60.0  # messages of one node; one comes every five seconds, and what was kept comes at once
ASKED_PER_SECOND, ASKED_BURST = 20.0, 300.0  # connections of one address; each asks the API server about a token
BOOTS_MAX, SPANS_MAX = 16, 64
SAID_MAX = 300


class Outcome(StrEnum):
    """What became of a message, or of a connection."""

    FULL = "full"
    DELTA = "delta"
    PAST = "past"
    DUPLICATE = "duplicate"
    GAP = "gap"
    OLDER = "older"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    TOO_MANY_GPUS = "too_many_gpus"
    OTHER_NODE = "other_node"
    UNKNOWN_NODE = "unknown_node"
    NO_POD = "no_pod"
    EXPIRED = "expired"
    REPLACED = "replaced"
    UNAUTHENTICATED = "unauthenticated"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom the API server vouches for.

    Attributes:
        node, node_uid: the node that its pod runs on; an empty node may be any (a developer's token), an empty uid is
            that of the node of this name when the connection was made.
        pod_uid: its pod, which must live on that node; empty = no pod.
        until_us: wall time after which the token is void; 0 = never.
    """

    node: str = ""
    node_uid: str = ""
    pod_uid: str = ""
    until_us: int = 0


Vouch: TypeAlias = Callable[[str], Awaitable[Caller | None]]
"""Token -> who shows it; None = nobody who may report. Raises TesseraError when it cannot be said."""


class HungUp(Exception):  # noqa: N818 - it says what happens
    """This connection must end; the sentence goes to the agent."""

    def __init__(self, outcome: Outcome, text: str) -> None:
        """Keep both."""
        super().__init__(text)
        self.outcome = outcome


@dataclass(slots=True)
class Spans:
    """Sequence numbers that were taken, as spans; of too many the two oldest become one."""

    taken: list[tuple[int, int]] = field(default_factory=list)

    def add(self, seq: int) -> bool:
        """Take a number; False when it was taken before."""
        if any(low <= seq <= high for low, high in self.taken):
            return False
        joined = (seq, seq)
        for span in [(low, high) for low, high in self.taken if high == seq - 1 or low == seq + 1]:
            self.taken.remove(span)
            joined = min(joined[0], span[0]), max(joined[1], span[1])
        self.taken = sorted([*self.taken, joined])
        if len(self.taken) > SPANS_MAX:
            (low, _), (_, high), *rest = self.taken
            self.taken = [(low, high), *rest]
        return True


@dataclass(slots=True)
class Known:
    """What is remembered of one node's reports, as long as its Node object lives.

    Attributes:
        uid: of the Node object.
        boot, seq: of the last report that counted.
        heard_s: when that was, on the monotonic clock; None = it never had one.
        boots: the numbers taken of each start of the machine.
        over: starts that were before the present one.
        talk: the connection that may speak for it.
    """

    uid: str
    boot: str = ""
    seq: int = 0
    heard_s: float | None = None
    boots: dict[str, Spans] = field(default_factory=dict)
    over: deque[str] = field(default_factory=lambda: deque(maxlen=BOOTS_MAX))
    talk: Talk | None = None


class Talk:
    """One connection: bytes in, bytes out, no socket needed."""

    def __init__(self, agents: Agents, caller: Caller) -> None:
        """Know who calls; nothing was said yet."""
        self._agents, self._caller = agents, caller
        self._hello: Hello | None = None
        self._uid = ""
        self._last: bytes | None = None  # the encoded report that the next delta is made against
        self._refused: Outcome | None = None  # of the last report
        self.ended = asyncio.Event()

    @property
    def node(self) -> str:
        """The node that it speaks for; empty before HELLO."""
        return self._hello.node if self._hello is not None else ""

    def hear(self, frame: bytes) -> bytes:
        """Take a message and return the answer. Raises HungUp."""
        kind, body = frame[:1], frame[1:]
        try:
            if self._hello is None:
                if kind != HELLO:
                    raise HungUp(Outcome.MALFORMED, "the first message must be HELLO")
                return self._greet(take(Hello, body))
            known = self._standing(self._hello.node)
            if kind == PAST:
                return self._past(known, decode(body))
            if kind == FULL:
                return self._present(known, decode(body), body, Outcome.FULL)
            if kind != DELTA:
                raise HungUp(Outcome.MALFORMED, "there is no such kind of message")
            if self._last is None:
                self._agents.count(Outcome.GAP)
                return WANTED
            try:
                self._last, report = apply(self._last, body)
            except BadReport:
                self._last = None
                self._agents.count(Outcome.GAP)
                return WANTED
            return self._present(known, report, self._last, Outcome.DELTA)
        except BadReport as error:
            raise HungUp(Outcome.MALFORMED, str(error)) from None

    def _greet(self, hello: Hello) -> bytes:
        """Let it speak for its node, in the place of whoever did before. Raises HungUp."""
        caller, node = self._caller, self._agents.desk.registry.nodes.get(hello.node)
        if caller.node not in {"", hello.node}:
            raise HungUp(Outcome.OTHER_NODE, f"this token is for a pod on {caller.node}, not on {hello.node}")
        if node is None:
            raise HungUp(Outcome.UNKNOWN_NODE, "the cluster has no node of this name (yet)")
        self._uid = caller.node_uid or node.uid
        if hello.node_uid not in {"", node.uid}:
            raise HungUp(Outcome.OTHER_NODE, "the node of this name is another one now")
        known = self._standing(hello.node)
        if hello.boot in known.over:
            raise HungUp(Outcome.OLDER, "the machine has been started anew since that boot id")
        self._hello = hello
        if known.talk is not None:
            self._agents.count(Outcome.REPLACED)
            known.talk.ended.set()
        known.talk = self
        return write(WELCOME, Place(hello.boot, known.seq if hello.boot == known.boot else 0))

    def _standing(self, name: str) -> Known:
        """Return what is known of the node, if this connection may (still) speak for it. Raises HungUp."""
        caller, registry = self._caller, self._agents.desk.registry
        if caller.until_us and caller.until_us <= self._agents.wall_us():
            raise HungUp(Outcome.EXPIRED, "the token is over; connect again with the new one")
        node = registry.nodes.get(name)
        if node is None or node.uid != self._uid:
            raise HungUp(Outcome.OTHER_NODE, "the node of this name is another one now, or gone")
        if caller.pod_uid:
            pod = registry.pods.get(caller.pod_uid)
            if pod is None or pod.node != name or pod.terminal:
                raise HungUp(Outcome.NO_POD, "the pod of this token does not run on this node (yet)")
        if self.ended.is_set():
            raise HungUp(Outcome.REPLACED, "another agent of this node has connected")
        return self._agents.known_of(name, node.uid)

    def _present(self, known: Known, report: Report, body: bytes, outcome: Outcome) -> bytes:
        """Take how the machine is now. Raises HungUp."""
        self._own(report)
        assert self._hello is not None
        if report.boot != self._hello.boot:
            raise HungUp(Outcome.OLDER, "the boot id is another one than HELLO's; connect again")
        if report.boot == known.boot and report.seq == known.seq:  # the answer was lost, or a delta cannot be read
            self._last = body
            self._agents.count(Outcome.DUPLICATE)
            return write(ACK, Place(report.boot, report.seq))
        if report.boot == known.boot and report.seq < known.seq:
            self._last = None
            return self._refuse(report, Outcome.OLDER, "a later report than this has been taken")
        node = self._agents.desk.registry.nodes[report.node]
        if (told := gpus_told(report)) > node.gpus_most:
            self._last = None
            why = f"the report names {told} GPUs and the node can have {node.gpus_most}; see its labels and its plugin"
            return self._refuse(report, Outcome.TOO_MANY_GPUS, why)
        self._last, self._refused = body, None
        self._agents.take(known, report)
        self._agents.count(outcome)
        return write(ACK, Place(report.boot, report.seq))

    def _past(self, known: Known, report: Report) -> bytes:
        """Take how the machine was: it counts once, and changes nothing now. Raises HungUp."""
        self._own(report)
        assert self._hello is not None
        if report.boot != self._hello.boot and report.boot not in known.over:
            known.over.append(report.boot)
        new = self._agents.spans(known, report.boot).add(report.seq)
        self._agents.count(Outcome.PAST if new else Outcome.DUPLICATE)
        if new:
            self._agents.remember(report)
        return write(ACK, Place(report.boot, report.seq))

    def _own(self, report: Report) -> None:
        if report.node != self.node:
            raise HungUp(Outcome.OTHER_NODE, f"the report is about {report.node}, not about {self.node}"[:SAID_MAX])

    def _refuse(self, report: Report, outcome: Outcome, why: str) -> bytes:
        self._agents.count(outcome)
        if outcome is not self._refused:
            self._refused = outcome
            log.warning("agent.refused", node=report.node, outcome=outcome.value, why=why)
        return write(REFUSED, Place(report.boot, report.seq, why[:SAID_MAX]))

    def leave(self) -> None:
        """Give the place up, unless another has it."""
        if self._hello is not None:
            self._agents.leave(self.node, self)


class Agents:
    """All nodes' agents."""

    def __init__(self, desk: Desk, vouch: Vouch, registry: CollectorRegistry) -> None:
        """Register the metrics; `vouch` knows tokens."""
        self.desk = desk
        self.vouch = vouch
        self.wall_us = desk.clock.wall_us
        self.rate = Rate(desk.clock, PER_SECOND, BURST)
        self.tries = Rate(desk.clock, ASKED_PER_SECOND, ASKED_BURST)
        self.open = 0
        self.remember: Callable[[Report], None] = lambda _: None
        """Takes each report of the past once, for whoever keeps a history."""
        self._known: dict[str, Known] = {}
        messages = Counter(
            "tessera_agent_messages", "Messages and connections of agents.", ["outcome"], registry=registry
        )
        self._counts = {outcome: messages.labels(outcome.value) for outcome in Outcome}
        nodes = Gauge("tessera_agent_nodes", "Nodes that have an agent.", ["state"], registry=registry)
        self._nodes = {state: nodes.labels(state) for state in ("reporting", "silent")}

    def count(self, outcome: Outcome) -> None:
        """Count what became of a message or a connection."""
        self._counts[outcome].inc()

    def known_of(self, name: str, uid: str) -> Known:
        """Return what is known of a node; a node with another uid is another node."""
        known = self._known.get(name)
        if known is None or known.uid != uid:
            self._hang_up(known)
            known = self._known[name] = Known(uid)
        return known

    def spans(self, known: Known, boot: str) -> Spans:
        """Return the numbers taken of one start of a machine; those of only a few starts are remembered."""
        taken = known.boots.setdefault(boot, Spans())
        if len(known.boots) > BOOTS_MAX:
            del known.boots[next(one for one in known.boots if one not in {boot, known.boot})]
        return taken

    def take(self, known: Known, report: Report) -> None:
        """Let a report count."""
        if report.boot != known.boot and known.boot:
            known.over.append(known.boot)
        if self.desk.registry.hear(report.node, read_report(report)):
            log.info("agent.inventory", node=report.node, gpus=len(report.devices), lost=len(report.lost))
        known.boot, known.seq, known.heard_s = report.boot, report.seq, self.desk.clock.monotonic()
        self.spans(known, report.boot).add(report.seq)

    def leave(self, name: str, talk: Talk) -> None:
        """Take note that a connection has ended."""
        known = self._known.get(name)
        if known is not None and known.talk is talk:
            known.talk = None

    async def step(self) -> None:
        """Close the exact nodes whose agents have been silent for too long, and forget nodes that are gone."""
        registry, now_s = self.desk.registry, self.desk.clock.monotonic()
        for name, known in list(self._known.items()):
            node = registry.nodes.get(name)
            if node is None or node.uid != known.uid:
                self._hang_up(self._known.pop(name))
            elif known.heard_s is not None and now_s - known.heard_s > SILENT_S and registry.hush(name):
                log.warning("agent.silent", node=name, seconds=round(now_s - known.heard_s))
        silent = sum(registry.nodes[name].silent for name in self._known)
        heard = sum(known.heard_s is not None for known in self._known.values())
        self._nodes["silent"].set(silent)
        self._nodes["reporting"].set(heard - silent)

    @staticmethod
    def _hang_up(known: Known | None) -> None:
        if known is not None and known.talk is not None:
            known.talk.ended.set()

    # the socket

    async def answer(self, http: web.Request) -> web.StreamResponse:
        """Serve one connection until it ends."""
        kind, _, token = http.headers.get("Authorization", "").partition(" ")
        if self.open >= LINES_MAX or self.tries.wait_s(http.remote or "") > 0:
            self.count(Outcome.BUSY)
            return problem(429, "rate.limited", "too many agents connect at once; try again in a while")
        try:
            known = kind.lower() == "bearer" and token and token.isascii()
            caller = await self.vouch(token.strip()) if known else None
        except TesseraError as error:
            self.count(Outcome.BUSY)
            return problem(503, "access.unavailable", f"the token cannot be checked now: {error}")
        if caller is None:
            self.count(Outcome.UNAUTHENTICATED)
            return problem(401, "access.unauthenticated", "show the projected token of Tessera's agent on this node")
        socket = web.WebSocketResponse(heartbeat=BEAT_S, max_msg_size=MESSAGE_MAX, compress=False)
        if not socket.can_prepare(http):
            self.count(Outcome.MALFORMED)
            return problem(400, "request.malformed", "agents speak WebSocket here")
        await socket.prepare(http)
        talk = Talk(self, caller)
        self.open += 1
        try:
            await self._converse(socket, talk)
        finally:
            self.open -= 1
            talk.leave()
        return socket

    async def _converse(self, socket: web.WebSocketResponse, talk: Talk) -> None:
        """Answer one message after the other; the connection also ends when another takes its place."""
        ending = asyncio.ensure_future(talk.ended.wait())
        talking = asyncio.ensure_future(self._listen(socket, talk))
        try:
            await asyncio.wait({ending, talking}, return_when=asyncio.FIRST_COMPLETED)
            if talking.done():
                await talking
            code, text = WSCloseCode.GOING_AWAY, "another agent speaks for this node, or Tessera ends"
        except HungUp as error:
            self.count(error.outcome)
            log.warning("agent.hung_up", node=talk.node, outcome=error.outcome.value, why=str(error))
            code, text = WSCloseCode.POLICY_VIOLATION, str(error)
        except Exception:
            log.exception("agent.failed", node=talk.node)
            code, text = WSCloseCode.INTERNAL_ERROR, "Tessera made a mistake; its log has it"
        finally:
            for task in (ending, talking):
                task.cancel()
            await asyncio.gather(ending, talking, return_exceptions=True)
        with contextlib.suppress(ConnectionError, RuntimeError):
            await socket.close(code=code, message=text.encode("ascii", "replace")[:120])

    async def _listen(self, socket: web.WebSocketResponse, talk: Talk) -> None:
        """Take messages until the agent hangs up. Raises HungUp."""
        while True:
            try:
                async with asyncio.timeout(None if talk.node else HELLO_S):
                    message = await socket.receive()
            except TimeoutError:
                raise HungUp(Outcome.MALFORMED, "no HELLO came in time") from None
            if message.type is WSMsgType.ERROR:
                large = getattr(message.data, "code", 0) == WSCloseCode.MESSAGE_TOO_BIG
                self.count(Outcome.TOO_LARGE if large else Outcome.MALFORMED)
                return
            if message.type in {WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED}:
                return
            if message.type is not WSMsgType.BINARY:
                raise HungUp(Outcome.MALFORMED, "messages are binary frames")
            if talk.node and (wait_s := self.rate.wait_s(talk.node)) > 0:
                await self.desk.clock.sleep(wait_s)  # the agent waits for each answer, so this slows it down
            await socket.send_bytes(talk.hear(message.data))

    async def hang_up(self, _: web.Application) -> None:
        """End every connection, for Tessera ends."""
        for known in self._known.values():
            self._hang_up(known)


def agents_app(agents: Agents) -> web.Application:
    """Serve node agents, over TLS or on loopback."""
    app = web.Application(client_max_size=1 << 16, middlewares=[patience, problems, refuse_encodings])
    app.on_shutdown.append(agents.hang_up)

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app.router.add_get(PATH, agents.answer)
    app.router.add_get("/healthz", healthz)
    return app
