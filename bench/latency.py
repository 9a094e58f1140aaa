"""`bench latency`: how long kube-scheduler waits for /filter and /prioritize, beside a server that decides nothing.

The product's handlers and the canned answer run in processes of their own on the same aiohttp and uvloop; one raw
keep-alive socket asks both in turn, block by block, so that whatever else the machine does falls on both. Every answer
is judged after its block. Invariant: ratios and medians are of one run; a wrong answer fails it, however fast it came.
"""

from __future__ import annotations

import gc
import json
import math
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from bench.child import Child
from bench.errors import BenchError
from bench.latency_world import Ask, Spot, ask, give_back, node_name, sampled, take, world, wrong_filter, wrong_scores
from scheduler.clock import RealClock

Json = dict[str, Any]
Say = Callable[[str], None]

HOST = "127.0.0.1"
BLOCK = 25  # cycles of one arm before the other's turn
BLOCKS = 6  # of each arm in a round
WARM = 2  # blocks before the clock
AT_NODES = 5000  # the size at which the ratios are told
RSS_NODES = 10_000
START_S = 180.0
WIRE_US = 40.0  # copy through the loopback and one wake-up of each side
JSON_BYTES_PER_US = 1200.0  # the fastest parsers
WRONG_SHOWN = 5
CLOCK = RealClock()


class LatencyError(BenchError):
    """The run could not be finished; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What `bench latency` was asked: cluster sizes, values of K, rounds of all arms, seed."""

    nodes: tuple[int, ...]
    counts: tuple[int, ...]
    rounds: int
    seed: int


@dataclass(slots=True)
class Wire:
    """One keep-alive connection and nothing between it and the clock."""

    port: int
    _socket: socket.socket = field(init=False)

    def __enter__(self) -> Self:
        self._socket = socket.create_connection((HOST, self.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def post(self, request: bytes) -> bytes:
        """Send a whole request and return the body of its answer.

        Raises:
            LatencyError: the answer is not 200, or has no Content-Length.
        """
        self._socket.sendall(request)
        got = self._socket.recv(65536)
        while (end := got.find(b"\r\n\r\n")) < 0:
            got += self._more()
        head, body = got[:end].lower(), got[end + 4 :]
        mark = head.find(b"content-length: ")
        if mark < 0 or b" 200 " not in head[:15]:
            raise LatencyError(f"the server answered {head[:200]!r}")
        length = int(head[mark + 16 :].split(b"\r", 1)[0])
        while len(body) < length:
            body += self._more()
        return body

    def _more(self) -> bytes:
        got = self._socket.recv(65536)
        if not got:
            raise LatencyError("the server closed the connection")
        return got


def request(path: str, body: bytes) -> bytes:
    """Return the bytes of one POST, as kube-scheduler's client writes it."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def arguments(pod: bytes, names: Iterable[str]) -> bytes:
    """Return the body of /filter and /prioritize."""
    return b'{"Pod":%b,"Nodes":null,"NodeNames":%b}' % (pod, orjson.dumps(list(names)))


@dataclass(slots=True)
class Server:
    """One server process with its two connections open."""

    child: Child
    wire: Wire
    control: Wire

    def tell(self, **orders: object) -> Json:
        """Send orders past the timed path; returns the server's CPU seconds and resident MiB."""
        answer: Json = orjson.loads(self.control.post(request("/control", orjson.dumps(orders))))
        return answer


@dataclass(slots=True)
class Samples:
    """Microseconds of one arm and K: per round, and the server's CPU per cycle."""

    filters: list[list[float]] = field(default_factory=list)
    prioritizes: list[list[float]] = field(default_factory=list)
    cpu_s: float = 0.0
    cycles: int = 0


@dataclass(slots=True)
class Arm:
    """Cycles against one pair of servers that hold the same cluster."""

    tessera: Server
    canned: Server
    nodes: int
    spots: dict[str, Spot]
    rng: np.random.Generator
    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    _number: int = 0

    def round(self, count: int, blocks: int) -> tuple[Samples, Samples]:
        """Ask both servers in turn; returns the samples of Tessera and of the canned answer."""
        ours, floor = Samples([[]], [[]]), Samples([[]], [[]])
        for _ in range(blocks):
            self._block(count, ours, floor)
        return ours, floor

    def _block(self, count: int, ours: Samples, floor: Samples) -> None:
        asks = [self._ask() for _ in range(BLOCK)]
        offers = [self._offer() for _ in asks]
        filters = [request("/scheduler/filter", arguments(a.pod, o)) for a, o in zip(asks, offers, strict=True)]
        # In a cluster the watch has told both sides of a pod before kube-scheduler asks about it.
        before = self.tessera.tell(count=count, come=[orjson.Fragment(asked.pod) for asked in asks])
        replies, others = [], []
        gc.disable()
        for asked, sent in zip(asks, filters, strict=True):
            begun = time.perf_counter_ns()
            reply = self.tessera.wire.post(sent)
            ours.filters[-1].append((time.perf_counter_ns() - begun) / 1000)
            replies.append(reply)
            others.append(self._prioritize(asked, reply, ours) if count > 1 else b"")
        gc.enable()
        after = self.tessera.tell(go=[asked.uid for asked in asks])
        ours.cpu_s += after["cpu_s"] - before["cpu_s"]
        ours.cycles += BLOCK
        self._judge(asks, offers, replies, others, count)
        self._floor(filters, replies, others, floor)

    def _prioritize(self, asked: Ask, reply: bytes, samples: Samples) -> bytes:
        """Go on as kube-scheduler does: with one node left it asks nothing more."""
        names = orjson.loads(reply)["NodeNames"]
        if len(names) < 2:
            return b""
        sent = request("/scheduler/prioritize", arguments(asked.pod, names))
        begun = time.perf_counter_ns()
        scores = self.tessera.wire.post(sent)
        samples.prioritizes[-1].append((time.perf_counter_ns() - begun) / 1000)
        return scores

    def _floor(self, filters: list[bytes], replies: list[bytes], others: list[bytes], samples: Samples) -> None:
        """Send the same requests to the server that decides nothing; its answers have the same lengths."""
        length = round(median(len(reply) for reply in replies))
        scored = [len(other) for other in others if other]
        lengths = {"filter": length, "prioritize": round(median(scored)) if scored else 2}
        self.canned.tell(lengths=lengths)
        gc.disable()
        for sent, reply, other in zip(filters, replies, others, strict=True):
            begun = time.perf_counter_ns()
            self.canned.wire.post(sent)
            samples.filters[-1].append((time.perf_counter_ns() - begun) / 1000)
            if other:
                pod = sent[sent.index(b"\r\n\r\n") + 11 : sent.rindex(b',"Nodes":null')]
                again = request("/scheduler/prioritize", arguments(pod, orjson.loads(reply)["NodeNames"]))
                begun = time.perf_counter_ns()
                self.canned.wire.post(again)
                samples.prioritizes[-1].append((time.perf_counter_ns() - begun) / 1000)
        gc.enable()

    def _judge(
        self, asks: list[Ask], offers: list[list[str]], replies: list[bytes], others: list[bytes], count: int
    ) -> None:
        """Let the oracle follow the block answer by answer, and undo what it took."""
        parsed = [orjson.loads(reply) for reply in replies]
        for asked, offered, reply, other in zip(asks, offers, parsed, others, strict=True):
            problems = [wrong_filter(asked, offered, count, reply, self.spots)]
            if other:
                problems.append(wrong_scores(reply["NodeNames"], orjson.loads(other)))
            self.checked += len(problems)
            self.wrong += [problem for problem in problems if problem]
            take(asked, reply, self.spots)
        for asked, reply in zip(asks, parsed, strict=True):
            give_back(asked, reply, self.spots)

    def _ask(self) -> Ask:
        self._number += 1
        return ask(self.rng, self._number)

    def _offer(self) -> list[str]:
        """Return the names of one call: a stretch from a rotating start, in the order in which workers append."""
        many = sampled(self.nodes)
        start = int(self.rng.integers(self.nodes))
        places = start + self.rng.permutation(many // 16 + 1).repeat(16)[:many] * 16 + np.tile(range(16), many)[:many]
        return [node_name(number) for number in dict.fromkeys((places % self.nodes).tolist())]


async def run_latency(settings: Settings, say: Say) -> Json:
    """Measure every size and K, and return the report.

    Raises:
        LatencyError: a server did not start, or answered what is no answer.
    """
    rows: list[Json] = []
    checked, wrong = 0, list[str]()
    with tempfile.TemporaryDirectory(prefix="tessera-latency-") as folder:
        for nodes in settings.nodes:
            say(f"{nodes} nodes of 8 GPUs, {sampled(nodes)} names a call")
            async with AsyncExitStack() as stack:
                arm = await _arm(stack, Path(folder), nodes, settings.seed)
                rows += [_row(nodes, count, *samples) for count, samples in _rounds(arm, settings).items()]
                checked, wrong = checked + arm.checked, wrong + arm.wrong
        async with AsyncExitStack() as stack:
            arm = await _arm(stack, Path(folder), RSS_NODES, settings.seed)
            arm.round(max(settings.counts), WARM)
            rss_mib = arm.tessera.tell()["rss_mib"]
            checked, wrong = checked + arm.checked, wrong + arm.wrong
    for problem in wrong[:WRONG_SHOWN]:
        say(f"wrong: {problem}")
    return {
        "rows": rows,
        **figures(rows),
        "rss_mib_10k": round(rss_mib, 1),
        "checked": checked,
        "wrong": len(wrong),
        "seed": settings.seed,
        "ok": checked > 0 and not wrong,
    }


def _rounds(arm: Arm, settings: Settings) -> dict[int, tuple[list[Samples], list[Samples]]]:
    """Warm up, then run all values of K in every round."""
    found: dict[int, tuple[list[Samples], list[Samples]]] = {count: ([], []) for count in settings.counts}
    for count in settings.counts:
        arm.round(count, WARM)
    for _ in range(settings.rounds):
        for count, (ours, floor) in found.items():
            for kept, samples in zip((ours, floor), arm.round(count, BLOCKS), strict=True):
                kept.append(samples)
    return found


async def _arm(stack: AsyncExitStack, folder: Path, nodes: int, seed: int) -> Arm:
    tessera = await _start(stack, folder, "tessera", f"--nodes={nodes}", f"--seed={seed}")
    canned = await _start(stack, folder, "canned")
    spots = {raw["metadata"]["name"]: spot for raw, _, spot in world(nodes, seed)}
    return Arm(tessera, canned, nodes, spots, np.random.default_rng([seed, nodes, 1]))


async def _start(stack: AsyncExitStack, folder: Path, what: str, *arguments_: str) -> Server:
    log = folder / f"{what}-{time.monotonic_ns()}.log"
    child = Child(what, [sys.executable, "-m", "bench.latency_server", what, *arguments_], log)
    stack.push_async_callback(child.kill)
    deadline = time.monotonic() + START_S
    while not (lines := log.read_text().split("\n")[:-1]) or not lines[-1].startswith('{"port"'):
        if not child.alive or time.monotonic() > deadline:
            raise LatencyError(f"the server {what} did not start; its log ends:\n{child.tail()}")
        await CLOCK.sleep(0.05)
    ports = json.loads(lines[-1])
    wires = [stack.enter_context(Wire(ports[key])) for key in ("port", "control")]
    return Server(child, *wires)


def _row(nodes: int, count: int, ours: list[Samples], floor: list[Samples]) -> Json:
    """Return the figures of one size and K: medians over rounds of each round's median."""
    filters = [value for samples in ours for value in samples.filters[-1]]
    prioritize_us = _typical(samples.prioritizes[-1] for samples in ours)
    canned_us = _typical(samples.filters[-1] for samples in floor) or 0.0
    canned_us += _typical(samples.prioritizes[-1] for samples in floor) or 0.0
    cpu_s, cycles = sum(samples.cpu_s for samples in ours), sum(samples.cycles for samples in ours)
    return {
        "nodes": nodes,
        "names": sampled(nodes),
        "k": count,
        "filter_us_p50": round(_typical(samples.filters[-1] for samples in ours) or 0.0, 1),
        "filter_us_p99": round(float(np.percentile(filters, 99)), 1),
        "prioritize_us_p50": None if prioritize_us is None else round(prioritize_us, 1),
        "canned_us_p50": round(canned_us, 1),
        "cpu_us": round(cpu_s / cycles * 1e6, 1),
    }


def _typical(rounds: Iterable[Sequence[float]]) -> float | None:
    medians = [median(values) for values in rounds if values]
    return median(medians) if medians else None


def figures(rows: Sequence[Json]) -> Json:
    """Return what is told of all rows together; null where the run has no such row.

    Args:
        rows: as in the report.
    """

    def ratio(count: int) -> float | None:
        row = next((row for row in rows if row["nodes"] == AT_NODES and row["k"] == count), None)
        if row is None:
            return None
        spent: float = row["filter_us_p50"] + (row["prioritize_us_p50"] or 0.0)
        canned: float = row["canned_us_p50"]
        return round(spent / canned, 3)

    points = [(row["nodes"], row["filter_us_p50"]) for row in rows if row["k"] == 16]
    return {"ratio_k1": ratio(1), "ratio_k16": ratio(16), "exponent": exponent(points)}


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the slope of the least-squares line through the logarithms; None below two sizes."""
    if len({size for size, _ in points}) < 2:
        return None
    xs, ys = zip(*((math.log(size), math.log(value)) for size, value in points), strict=True)
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope: float = sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True))
    slope /= sum((x - middle_x) ** 2 for x in xs)
    return round(slope, 3)


def limit_us(row: Json) -> float:
    """Return what no server can go below: the loopback's copy and wake-ups, and reading the names as JSON."""
    calls = 1 if row["prioritize_us_p50"] is None else 2
    names: int = row["names"]
    return round(calls * WIRE_US + (49 * names + 3600 * calls) / JSON_BYTES_PER_US, 0)


def show(report: Json) -> None:
    """Print the table for people to stderr."""
    console = Console(stderr=True)
    table = Table(
        "nodes", "names", "K", "filter p50", "p99", "prioritize p50", "canned", "ratio", "limit", "CPU a cycle"
    )
    for row in report["rows"]:
        spent = row["filter_us_p50"] + (row["prioritize_us_p50"] or 0.0)
        ratio = f"{spent / row['canned_us_p50']:.2f}"
        figures_ = [row["filter_us_p50"], row["filter_us_p99"], row["prioritize_us_p50"], row["canned_us_p50"]]
        texts = ["-" if value is None else f"{value:.0f}" for value in figures_]
        sizes = [str(row[key]) for key in ("nodes", "names", "k")]
        table.add_row(*sizes, *texts, ratio, f"{limit_us(row):.0f}", f"{row['cpu_us']:.0f}")
    console.print(table)
    console.print(
        "microseconds; limit: 40 us of loopback a call and JSON at 1.2 GB/s. The names alone grow with exponent 0.52."
        f" {report['checked']} answers checked, {report['wrong']} wrong."
    )
