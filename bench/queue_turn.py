"""`bench queue-turn`: decisions a second of the queue's turn on a large cluster, and how long /filter waits meanwhile.

The real desk, turn and ledger in one process, without an API server: requests wait in four queues, one of them nested,
and are decided, claimed and committed in one go while a client asks /filter for other pods every few milliseconds.
Every grant is looked at afterwards: no node may hold more than it has, and no queue more than its quota.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from bench.kube_objects import pod_object
from bench.machines import draw_nodes
from scheduler import GATE, geometry
from scheduler.clock import RealClock
from scheduler.config import Settings
from scheduler.desk import Desk
from scheduler.embedded.cluster import EmbeddedCluster
from scheduler.errors import StoreError
from scheduler.ids import seeded_ids
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.ledger.ledger import advance
from scheduler.ledger.taking import newborn
from scheduler.model.pod import Pod
from scheduler.model.queue import Queue, Selector
from scheduler.model.reservation import Change, Event, State
from scheduler.queueing.release import Window
from scheduler.settling import Settler
from scheduler.store.store import Store
from scheduler.store.writer import ThreadedWriter
from scheduler.turning import Turner

Json = dict[str, Any]
ALL = Selector()
QUEUES = (
    Queue("research", nominal={"cpu": 1 << 30}, namespaces=ALL),
    Queue("vision", "research", nominal={"gpu": 12_000}, namespaces=ALL),
    Queue("batch", weight=2, nominal={"gpu": 20_000}, namespaces=ALL),
    Queue("free", namespaces=ALL),
)
SIZES = (1, 1, 2, 0, 1, 4)
ASK_EVERY_S = 0.004
FILTER_MS_MAX = 50.0
NAMED = 500  # of 5,000 nodes by default sampling
EPOCH_US = 1_767_225_600_000_000


class _Memory:
    """A ledger that keeps nothing."""

    async def commit(self, changes: tuple[Change, ...]) -> None:
        """Take note of nothing."""

    async def close(self) -> None:
        """Do nothing."""


def run_queue_turn(nodes: int, requests: int, store: str, seed: int, say: Callable[[str], None]) -> Json:
    """Run it and return the report.

    Args:
        nodes: how many.
        requests: how many wait.
        store: `none` or `sqlite`.
        seed: of nodes and requests.
        say: takes one line of progress.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-turn-") as folder:
        ledger = Store.open(f"sqlite:///{Path(folder) / 'ledger.db'}") if store == "sqlite" else None
        try:
            return asyncio.run(_run(nodes, requests, ledger, seed, say))
        finally:
            if ledger is not None:
                ledger.close()


async def _run(nodes: int, requests: int, ledger: Store | None, seed: int, say: Callable[[str], None]) -> Json:
    clock, settings = RealClock(), Settings()
    desk = Desk(clock, settings.policy.policies(), fence=ledger.fence if ledger else 1)
    desk.queues.replace((queue, "") for queue in QUEUES)
    products = geometry.products()
    for raw in draw_nodes(np.random.default_rng(seed), nodes):
        raw["metadata"] |= {"uid": raw["metadata"]["name"], "resourceVersion": "1"}
        node = read_node(raw, products)
        assert node is not None
        desk.registry.put_node(node)
    writer = ThreadedWriter(ledger) if ledger else _Memory()
    cluster = EmbeddedCluster(clock, seeded_ids(Random(seed)))
    turner = Turner.of(desk, cluster, writer, Settler(desk, cluster, writer, clock, lambda _: None), clock, settings)
    turner.releaser.window = Window(requests, requests)  # nobody lets them go here
    await _line_up(desk, turner, writer, requests)
    say(f"{requests} requests wait in {len(QUEUES)} queues before {nodes} nodes")
    strangers = [_pod(f"stranger-{number}", SIZES[number % len(SIZES)], "free", held=False) for number in range(64)]
    await _warm(desk, turner, strangers)
    waits: list[float] = []
    asking = asyncio.ensure_future(_ask(desk, strangers, waits))
    begun = time.perf_counter()
    await turner.step()
    seconds = time.perf_counter() - begun
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await writer.close()
    rows = [row for row in desk.book.rows.values() if row.state is State.RESERVED]
    wrong = _wrong(desk)
    p99 = float(np.percentile(waits, 99)) if waits else 0.0
    text = "\n".join(f"{row.name} {row.node} {row.allocation}" for row in rows)
    say(f"{turner.decided} decided in {seconds:.2f} s, {len(rows)} reserved, {len(waits)} calls of /filter meanwhile")
    return {
        "decisions_per_s": round(turner.decided / seconds, 1),
        "filter_ms_p99": round(p99, 2),
        "journal_digest": ledger.head[1] if ledger else hashlib.sha256(text.encode()).hexdigest(),
        "decided": turner.decided,
        "reserved": len(rows),
        "checked": len(rows),
        "wrong": wrong[:10],
        "seed": seed,
        "ok": not wrong and len(rows) > 0 and p99 <= FILTER_MS_MAX,
    }


async def _line_up(desk: Desk, turner: Turner, writer: Any, requests: int) -> None:
    """Let all requests be known and QUEUED, also in the ledger."""
    changes = []
    for number in range(requests):
        queue = QUEUES[number % len(QUEUES)].name
        pod = _pod(f"pod-{number:06}", SIZES[number % len(SIZES)], queue, held=True)
        desk.registry.put_pod(pod)
        born = newborn(pod.request, fence=desk.fence, now_us=EPOCH_US)
        changes.append(advance(None, Event.SUBMIT, now_us=EPOCH_US, fence=desk.fence, born=born))
        turner.watch(pod)
    desk.book.apply(changes)
    for start in range(0, requests, 1000):
        try:
            await writer.commit(tuple(changes[start : start + 1000]))
        except StoreError as error:
            raise SystemExit(f"the ledger took nothing: {error}") from error


def _pod(name: str, gpus: int, queue: str, *, held: bool) -> Pod:
    asked = {"cpu": str(2 + 2 * gpus), "memory": f"{4 + 8 * gpus}Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    raw = pod_object(name, requests=asked, labels={"tessera.dev/queue": queue}, gates=(GATE,) if held else ())
    raw["metadata"] |= {"uid": name, "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return read_pod(raw)


async def _warm(desk: Desk, turner: Turner, strangers: list[Pod]) -> None:
    """Let every class of asks be known, as it is after the first minute of a day."""
    names = list(desk.registry.nodes)[:NAMED]
    for pod in strangers[: len(SIZES)]:
        desk.filter(pod, names)
        desk.drop_intent(pod.uid)
    for uid in list(turner.waiting)[: len(SIZES)]:
        desk.could(desk.registry.pods[uid])


async def _ask(desk: Desk, strangers: list[Pod], waits: list[float]) -> None:
    """Ask /filter again and again; what counts is from when the call was due until it was answered."""
    names, number = list(desk.registry.nodes)[:NAMED], 0
    while True:
        due = time.perf_counter() + ASK_EVERY_S
        await desk.clock.sleep(ASK_EVERY_S)
        pod = strangers[number % len(strangers)]
        desk.filter(pod, names)
        desk.drop_intent(pod.uid)
        waits.append(1000 * (time.perf_counter() - due))
        number += 1


def _wrong(desk: Desk) -> list[str]:
    """Return nodes that hold more than they have, counted from the rows alone, and queues beyond their quota."""
    gpus, held = Counter[str](), Counter[str]()
    for row in desk.book.rows.values():
        if row.state is State.RESERVED:
            gpus[row.node] += row.gpu_milli // 1000
            held[row.queue] += row.gpu_milli // 1000
    nodes = desk.registry.nodes
    found = [
        f"{name} holds {count} of {nodes[name].gpus} GPUs" for name, count in gpus.items() if count > nodes[name].gpus
    ]
    for queue in QUEUES:
        limit = queue.nominal.get("gpu")
        if limit is not None and held[queue.name] > limit:
            found.append(f"queue {queue.name} holds {held[queue.name]} of {limit} GPUs")
    return found
