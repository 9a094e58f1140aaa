"""`bench hostile`: requests that nobody should send, against a real Tessera process, and slow senders beside them.

The process serves a cluster in memory (`tessera serve --embedded`) on which pods run and wait. After the attack its
whole state as the API and the journal tell it must be what it was. Invariant: every answer is judged (it must be there,
be JSON, name only nodes that were offered); what is counted is told, and nothing is retried until it looks right.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import orjson

from bench.errors import BenchError
from bench.hostile_agents import AgentAttacker, Judge, Swarm
from bench.hostile_bodies import Attacker, Sent
from bench.hostile_webhook import ReviewAttacker, ReviewOracle, trusting
from bench.kube_objects import node_object, pod_object
from bench.product import Product, ProductError
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]

HOST = "127.0.0.1"
GPU = "nvidia.com/gpu"
NODES, RUNNING, WAITING = 20, 60, 5
CONNECTIONS = 4
WARM = 5000  # requests before the largest bodies, after them, and at the end; memory is the median of the latter two
LOOK_EVERY = 20  # requests between two looks at the memory, whose median no single large body moves
ANSWER_S = 25.0  # longer than any time-out of a listener
SLOW_S = 60.0  # 15 s for a body, 10 s in which the server still reads after its 408, and a busy machine
SLOW = (b"", b"POST /scheduler/fil", b"POST /scheduler/filter HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n{")
SLOW_EACH = 40
READ_PART = 5  # of the requests to the extender at least one in so many is answered 200; it is nearly half
SETTLED_S, SETTLE_MAX_S = 3.0, 120.0
INTENT_S = 16.0  # what /filter noted in memory lapses in 15 s
PAGE = 500
CLOCK = RealClock()


class HostileError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(slots=True)
class Findings:
    """What went wrong, counted; the first sentences of each kind are kept."""

    crashes: int = 0
    bad_5xx: int = 0
    wrong: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    reviews: ReviewOracle = field(default_factory=ReviewOracle)

    def note(self, kind: str, text: str) -> None:
        """Count one finding: `crashes`, `bad_5xx` or `wrong`."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.texts) < 20:
            self.texts.append(f"{kind}: {text}")


def judge(sent: Sent, status: int, body: bytes, found: Findings) -> None:
    """Judge one answer.

    Args:
        sent: the request.
        status: of the answer; 0 = the connection was closed without one.
        body: of the answer.
        found: takes what is wrong with it.
    """
    found.statuses[status] = found.statuses.get(status, 0) + 1
    if not status:
        if sent.framed and len(sent.body) < 1 << 24:
            found.note("crashes", f"no answer to {sent.wire[:120]!r}")
        return
    if not sent.framed or sent.verb == "HEAD":
        return
    try:
        answer = orjson.loads(body) if body else None
    except orjson.JSONDecodeError:
        answer = None
    if status >= 500 and (status == 500 or not isinstance(answer, dict)):
        found.note("bad_5xx", f"{status} {body[:200]!r} to {sent.wire[:300]!r}")
        return
    problem = ""
    if sent.verb in {"filter", "prioritize"}:
        problem = _mistaken(sent, status, answer)
    elif sent.verb == "webhook":
        problem = found.reviews.mistake(sent, status, body)
    if problem:
        found.note("wrong", f"{problem}: {body[:200]!r} to {sent.body[:300]!r}")


def _mistaken(sent: Sent, status: int, answer: object) -> str:
    """Say what is wrong with an answer of /filter or /prioritize: it must name nodes of the request alone."""
    if answer is None:
        return f"status {status} without JSON"
    if status != 200:
        return ""
    if isinstance(answer, list):
        named = [score.get("Host") for score in answer]
    elif isinstance(answer, dict):
        named = [*(answer.get("NodeNames") or ()), *(answer.get("FailedAndUnresolvableNodes") or ())]
    else:
        return "neither an object nor a list"
    offered = orjson.loads(sent.body).get("NodeNames")
    strange = set(named) - set(offered or ())
    return f"names {sorted(strange)[:3]} were not offered" if strange else ""


class Line:
    """One keep-alive connection that is opened again whenever the server has closed it."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Note the port, and TLS where it is spoken; nothing is opened."""
        self._port, self._tls = port, tls
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, sent: Sent) -> tuple[int, bytes]:
        """Send a request and return status and body; status 0 when the connection was closed without an answer.

        Raises:
            TimeoutError: nothing came.
            OSError: nobody listens.
        """
        fresh = self._streams is None
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port, limit=1 << 20, ssl=self._tls)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._exchange(sent)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            return (0, b"") if fresh else await self.ask(sent)  # it may have been closed after the last answer

    async def _exchange(self, sent: Sent) -> tuple[int, bytes]:
        assert self._streams is not None
        reader, writer = self._streams
        writer.write(sent.wire)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        found = re.search(rb"content-length: (\d+)", head)
        length = int(found[1]) if found and sent.verb != "HEAD" else 0
        body = await reader.readexactly(length)
        if b"connection: close" in head or not sent.framed or not head.startswith(b"http/1.1"):
            self.close()
        return int(head.split(b" ", 2)[1]), body

    def close(self) -> None:
        """Close, if it is open."""
        if self._streams:
            self._streams[1].close()
            self._streams = None


def cluster_files(folder: Path) -> tuple[list[Json], list[str]]:
    """Write a cluster for `--embedded`: nodes, pods that will run and pods that can never run.

    Returns:
        the pods, and the names of the nodes.
    """
    nodes, pods = [], []
    for number in range(NODES):
        labels = {f"{GPU}.product": "NVIDIA-H100-80GB-HBM3", f"{GPU}.count": "8", f"{GPU}.memory": "81559"}
        labels |= {"tessera.dev/mode": "exact"} if number % 2 else {}
        nodes.append(node_object(f"gpu-{number:05}", extended={GPU: "8"}, labels=labels))
    for number in range(RUNNING + WAITING):
        gpus = 16 if number >= RUNNING else number % 3
        amounts = {"cpu": "4", "memory": "8Gi"} | ({GPU: str(gpus)} if gpus else {})
        pod = pod_object(f"held-{number}", requests=amounts, labels={"tessera.dev/queue": "default"})
        pod["metadata"] |= {"uid": f"89eba25d-fdba-4624-9bb1-{number:012}", "resourceVersion": "247"}
        pod["spec"]["tolerations"] = [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}]
        pods.append(pod)
    for kind, items in (("nodes", nodes), ("pods", pods)):
        (folder / f"{kind}.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    return pods, [node["metadata"]["name"] for node in nodes]


async def run_hostile(port: str, bodies: int, seed: int, say: Say) -> Json:
    """Attack one port and return the report.

    Args:
        port: `extender`, `webhook`, `agents` or `api`.
        bodies: how many requests.
        seed: of all of them.
        say: takes one line of progress.

    Raises:
        HostileError: the run could not be finished.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-hostile-") as temporary:
        folder = Path(temporary)
        pods, names = cluster_files(folder)
        more = {
            "webhook": ["--webhook=127.0.0.1:0"],
            "agents": ["--agents=127.0.0.1:0", f"--agents-token={folder}/token"],
        }
        product = Product(folder, None, flags=[f"--embedded={folder}", *more.get(port, [])])
        attackers: dict[str, type[Attacker]] = {"webhook": ReviewAttacker, "agents": AgentAttacker}
        attacker = attackers.get(port, Attacker)(seed, pods, names)
        try:
            await product.start()
            run = _Run(product, folder, attacker, port, say)
            if isinstance(attacker, AgentAttacker):
                token = (folder / "token").read_text().strip()
                url = product.agents.replace("ws", "http", 1)
                run.swarm = Swarm(url, token, names, attacker, Judge(run.found.note, run.answers))
            return await run.everything(bodies, seed)
        except (ProductError, aiohttp.ClientError) as error:
            raise HostileError(str(error)) from error
        finally:
            await product.kill()


@dataclass(slots=True)
class _Run:
    product: Product
    folder: Path
    attacker: Attacker
    port: str
    say: Say
    found: Findings = field(default_factory=Findings)
    sent: int = 0
    swarm: Swarm | None = None
    answers: dict[str, int] = field(default_factory=dict)

    async def everything(self, bodies: int, seed: int) -> Json:
        before = await self._settled()
        self.say(f"{len(before)} facts of a settled cluster; {bodies} requests to the {self.port} port begin")
        window = min(WARM, bodies // 4)
        await self._attack(window)
        await self._largest()
        if self.port == "webhook":
            await asyncio.gather(self._slow(), self._attack(window))  # TLS takes 0.1 MiB for each, which pools keep
        before_mib = await self._attack(window)
        slow = asyncio.create_task(self._slow())
        await self._attack(max(bodies - self.sent - window, 0))
        grown_mib = await self._attack(bodies - self.sent) - before_mib
        await slow
        await CLOCK.sleep(INTENT_S)
        after = await self._settled()
        if self.port == "extender" and self.found.statuses.get(200, 0) < self.sent // READ_PART:
            self.found.note("wrong", "so few requests could be read that the attack did not reach what decides")
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        for text in [*self.found.texts, *(f"changed: {key}" for key in changed[:5])]:
            self.say(text)
        answers = dict(sorted((self.answers or self.found.statuses).items()))
        self.say(f"answers by {'kind' if self.swarm else 'status (0 = closed)'}: {answers}")
        found = self.found
        return {
            "sent": self.sent,
            "crashes": found.crashes,
            "bad_5xx": found.bad_5xx,
            "state_changed": len(changed),
            "rss_growth_mib": round(grown_mib, 1),
            "wrong": found.wrong,
            "checked": self.sent,
            "seed": seed,
            "ok": not (found.crashes or found.bad_5xx or changed or found.wrong),
        }

    async def _largest(self) -> None:
        """Send the largest bodies three times on every connection."""
        if self.port not in {"api", "agents"}:
            attacker = self.attacker
            make = attacker.largest_review if isinstance(attacker, ReviewAttacker) else attacker.largest
            lines = [Line(self._port(), self._tls()) for _ in range(CONNECTIONS)]
            for _ in range(3):
                await asyncio.gather(*(line.ask(make()) for line in lines))
            for line in lines:
                line.close()

    def _port(self) -> int:
        """Return the number of the port under attack."""
        return int(getattr(self.product, self.port).split(":")[2].split("/")[0])

    def _tls(self) -> ssl.SSLContext | None:
        return trusting() if self.port == "webhook" else None

    async def _attack(self, count: int) -> float:
        """Send this many requests over a few connections; the process must live through it.

        Returns:
            the MiB that it held meanwhile, as the median of many looks.
        """
        looks_mib = [self._rss_mib()]
        drawing = asyncio.Lock()
        number = self._port()
        until = self.sent + count
        if self.swarm is not None:
            return await self._speak(self.swarm, until, looks_mib)
        make: Callable[[], Sent] = getattr(self.attacker, self.port)

        async def sender() -> None:
            line = Line(number, self._tls())
            while self.sent < until:
                self.sent += 1
                if self.sent % LOOK_EVERY == 0:
                    looks_mib.append(self._rss_mib())
                async with drawing:  # beside the loop: hypothesis may think about a few bodies for a minute
                    sent = await asyncio.to_thread(make)
                try:
                    status, body = await line.ask(sent)
                except (TimeoutError, OSError) as error:
                    line.close()
                    self.found.note("crashes", f"{error!r} after {sent.wire[:200]!r}")
                    self.product.check()
                    continue
                judge(sent, status, body, self.found)
            line.close()

        async with asyncio.TaskGroup() as group:
            for _ in range(CONNECTIONS):
                group.create_task(sender())
        self.product.check()
        return median(looks_mib)

    async def _speak(self, swarm: Swarm, until: int, looks_mib: list[float]) -> float:
        """Send messages as node agents until so many are sent; returns the MiB that the process held meanwhile."""

        def more() -> bool:
            if self.sent >= until:
                return False
            self.sent += 1
            if self.sent % LOOK_EVERY == 0:
                looks_mib.append(self._rss_mib())
            return True

        await swarm.attack(more)
        self.product.check()
        return median(looks_mib)

    async def _slow(self) -> None:
        """Keep connections open with half a request, some with a byte now and then; each must be ended in time."""
        number = int((self.product.agents or self.product.webhook or self.product.extender).split(":")[2].split("/")[0])
        begun = time.monotonic()
        starts = [start.replace(b"/scheduler/filter", b"/mutate") for start in SLOW] if self.product.webhook else SLOW
        every = [(start, place % 2 == 0) for start in starts for place in range(SLOW_EACH)]
        ended = await asyncio.gather(*(_dawdle(number, start, self._tls(), drip=drip) for start, drip in every))
        for kept in [1 for one in ended if not one]:
            self.found.note("crashes", f"a slow sender was still served after {SLOW_S * kept:.0f} s")
        self.say(f"{len(ended)} slow senders were let go within {time.monotonic() - begun:.0f} s")

    async def _settled(self) -> dict[str, str]:
        """Return the state once it stays as it is; agents, if there are any, have just said that all is well."""
        if self.swarm is not None:
            await self.swarm.tell()
        deadline = time.monotonic() + SETTLE_MAX_S
        state = await self._state()
        while True:
            await CLOCK.sleep(SETTLED_S)
            again = await self._state()
            if again == state:
                return state
            state = again
            if time.monotonic() > deadline:
                raise HostileError(f"the cluster did not come to rest within {SETTLE_MAX_S:.0f} s")

    async def _state(self) -> dict[str, str]:
        """Return every node, GPU, Request and journal row, by key."""
        state: dict[str, str] = {}
        async with aiohttp.ClientSession() as session:
            for kind in ("nodes", "gpus", "requests"):
                cursor = ""
                while cursor is not None:
                    url = f"{self.product.api}/api/v1/{kind}?limit={PAGE}&cursor={cursor}"
                    async with session.get(url) as http:
                        page = await http.json()
                    for item in page["items"]:
                        key = item.get("id") or f"{item.get('node', '')}{item.get('name', '')}{item.get('dev', '')}"
                        state[f"{kind} {key}"] = json.dumps(item, sort_keys=True)
                    cursor = page["next"]
        journal = self.folder / "journal.jsonl"
        await self.product.export_journal(journal)
        for line in journal.read_text().splitlines():
            state[f"journal {json.loads(line)['seq']}"] = line
        return state

    def _rss_mib(self) -> float:
        text = Path(f"/proc/{self.product.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        return int(found[1]) / 1024 if found else 0.0


async def _dawdle(port: int, start: bytes, tls: ssl.SSLContext | None, *, drip: bool) -> bool:
    """Send half a request, then wait or send a byte a second; return whether the server ended it in time."""
    reader, writer = await asyncio.open_connection(HOST, port, ssl=tls)
    try:
        async with asyncio.timeout(SLOW_S):
            writer.write(start)
            while True:
                try:
                    async with asyncio.timeout(1.0):
                        if not await reader.read(4096):
                            return True
                except TimeoutError:
                    if drip:
                        writer.write(b"x")
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    finally:
        writer.close()
