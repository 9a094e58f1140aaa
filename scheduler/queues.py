"""What the watches of queues and namespaces feed, and the loop that writes each queue's status.

Without the CRD (or where `--queues FILE` names the queues) no queue is watched, and Tessera goes on: a cluster does
not need queues. Invariant: whatever an object says, it changes what is admitted and ends nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from random import Random

import structlog

from scheduler.clock import Clock
from scheduler.crew import Crew
from scheduler.desk import Desk
from scheduler.intake.queue import told_queue
from scheduler.kube.port import ApiError, Cluster, NotFound, Object, UnknownOutcome
from scheduler.kube.reflector import Reflector
from scheduler.ledger.lifecycle import HOLDING
from scheduler.ledger.queues import Queues
from scheduler.ledger.spent import PAST, Spent
from scheduler.ledger.standing import Standing, standings
from scheduler.loops import follow, forever
from scheduler.model.queue import Queue
from scheduler.store.store import Store

log = structlog.get_logger(__name__)

STATUS_EVERY_S = 5.0
ABSENT_S = 30.0
SPENT_EVERY_S = 5.0
LINES_AT_ONCE = 200
WRITES_MAX = 50  # statuses in one step
READY = "Ready"


@dataclass(slots=True)
class QueueSink:
    """Takes queues from the reflector, and keeps their statuses as they were last seen."""

    queues: Queues
    statuses: dict[str, Object] = field(default_factory=dict)

    def read(self, obj: Object) -> Object:
        """Return what `replace` wants."""
        return obj

    def replace(self, objects: list[Object]) -> None:
        """Take a whole list."""
        self.statuses = {obj["metadata"]["name"]: _status(obj) for obj in objects}
        told = [told_queue(obj) for obj in objects]
        self.queues.replace(told)
        for queue, sentence in told:
            _warn(queue.name, sentence)

    def upsert(self, obj: Object) -> None:
        """Take one new or changed queue."""
        queue, sentence = told_queue(obj)
        if self.queues.wrong.get(queue.name) != sentence:
            _warn(queue.name, sentence)
        self.statuses[queue.name] = _status(obj)
        self.queues.put(queue, sentence)

    def delete(self, obj: Object) -> None:
        """Take note that a queue is gone."""
        name = obj["metadata"]["name"]
        self.statuses.pop(name, None)
        self.queues.drop(name)


@dataclass(slots=True)
class NamespaceSink:
    """Takes namespaces from the reflector: their labels say which queues they may use."""

    queues: Queues

    def read(self, obj: Object) -> Object:
        """Return what `replace` wants."""
        return obj

    def replace(self, objects: list[Object]) -> None:
        """Take a whole list, the first one."""
        for obj in objects:
            self.upsert(obj)

    def upsert(self, obj: Object) -> None:
        """Take one new or changed namespace."""
        self.queues.put_namespace(obj["metadata"]["name"], obj["metadata"].get("labels") or {})

    def delete(self, obj: Object) -> None:
        """Take note that a namespace is gone."""
        self.queues.drop_namespace(obj["metadata"]["name"])


def _status(obj: Object) -> Object:
    found = obj.get("status")
    return found if isinstance(found, dict) else {}


def _warn(name: str, sentence: str) -> None:
    if sentence:
        log.warning("queue.wrong", queue=name, text=sentence)


class QueueFeed:
    """Follows namespaces and queues, and writes what people read in a queue's status.

    Attributes:
        given: the queues of a file, which count instead of the cluster's; None = no file. Set it before `start`.
    """

    def __init__(  # noqa: PLR0917 - the outside world, part by part
        self,
        desk: Desk,
        cluster: Cluster,
        clock: Clock,
        rng: Random,
        unready: Callable[[], str],
        store: Store,
        half_life_s: float,
    ) -> None:
        """Follow nothing yet.

        Args:
            desk: whose queues are fed.
            cluster: where they are.
            clock: for waits and times.
            rng: spreads time-outs and waits.
            unready: empty once what is used is known, so that it may be told.
            store: whose journal tells what queues used.
            half_life_s: after which use counts half.
        """
        desk.queues.spent = Spent(round(half_life_s * 1_000_000))
        self._store, self._told_seq = store, -1
        self.given: list[Queue] | None = None
        self._desk, self._cluster, self._clock, self._unready = desk, cluster, clock, unready
        self._sink = QueueSink(desk.queues)
        self._namespaces = Reflector(cluster, "namespaces", clock, NamespaceSink(desk.queues), rng=rng)
        self._queues = Reflector(cluster, "queues", clock, self._sink, rng=rng)

    async def start(self, crew: Crew) -> None:
        """Return when namespaces and queues are known: of a file, of the cluster, or that it has none."""
        crew.spawn(forever("spent", self.recall, self._clock, SPENT_EVERY_S))
        await follow(self._namespaces, crew, self._clock)
        if self.given is not None:
            self._desk.queues.replace((queue, "") for queue in self.given)
            return
        if await self._served():
            await follow(self._queues, crew, self._clock)
        else:
            log.warning("queues.absent", text="the cluster has no CRD queues.tessera.dev: nobody is limited")
            crew.spawn(self._follow_later())
        crew.spawn(forever("queues", self.step, self._clock, STATUS_EVERY_S))

    async def _served(self) -> bool:
        """Say whether the API server knows queues; ask until it answers."""
        while True:
            try:
                await self._cluster.list("queues", limit=1)
            except NotFound:
                return False
            except (ApiError, UnknownOutcome) as error:
                log.warning("queues.unknown", error=str(error))
                await self._clock.sleep(1.0)
            else:
                return True

    async def _follow_later(self) -> None:
        """Follow queues as soon as somebody has made it possible."""
        while not await self._served():
            await self._clock.sleep(ABSENT_S)
        await self._queues.run()

    async def recall(self) -> None:
        """Take in what the journal tells of what queues used since the last time; at first, all that still matters."""
        spent, rows = self._desk.queues.spent, self._desk.book.rows
        if self._told_seq < 0:
            since_us = self._clock.wall_us() - PAST * spent.half_life_us
            self._told_seq = self._first_line(since_us) - 1
            for row in [row for row in rows.values() if row.state in HOLDING and row.created_us < since_us]:
                spent.note_row(row, since_us)
        for count, line in enumerate(self._store.journal(self._told_seq + 1), start=1):
            spent.note_line(line)
            self._told_seq = line["seq"]
            if count % LINES_AT_ONCE == 0:
                await self._clock.sleep(0)

    def _first_line(self, since_us: int) -> int:
        """Return the number of the first line that was written since then, one past the end where there is none."""
        low, high = 1, self._store.head[0] + 1
        while low < high:
            middle = (low + high) // 2
            line = next(self._store.journal(middle), None)
            if line is None or line["at"] >= since_us:
                high = middle
            else:
                low = middle + 1
        return low

    async def step(self) -> None:
        """Write the statuses that are no longer true, some at a time; what fails is tried again at the next step."""
        if self._unready() or not self._sink.statuses:
            return
        desk, queues = self._desk, self._desk.queues
        usage = queues.usage(desk.book.rows, desk.registry.pods, desk.registry.nodes)
        stands = standings(queues, usage, queues.pending(desk.book.rows))
        due: list[tuple[str, Object]] = []
        for name in [name for name in sorted(self._sink.statuses) if name in queues.quota.queues]:
            before = self._sink.statuses[name]
            after = status_of(stands(name), before, self._clock.wall_us())
            if patch := difference(before, after):
                due.append((name, patch))
        for name, patch in due[:WRITES_MAX]:
            await self._write(name, patch)

    async def _write(self, name: str, patch: Object) -> None:
        queue = self._desk.queues.told(name)
        if queue is None:
            return
        try:
            await self._cluster.patch("queues", "", name, {"status": patch}, subresource="status")
        except (ApiError, UnknownOutcome) as error:
            log.warning("queue.status_not_written", queue=name, error=str(error))


def status_of(stands: Standing, before: Object, now_us: int) -> Object:
    """Return the status of a queue.

    Args:
        stands: where it stands.
        before: its status as it is; a condition that stays what it was keeps its time.
        now_us: wall time.
    """
    view = stands.view()
    reason, text = "Ready", "The queue can be used."
    if stands.sentence:
        reason, text = "Invalid", stands.sentence
    elif stands.stopped:
        reason, text = "Stopped", "The queue, or one above it, is stopped: it admits nothing."
    condition = {
        "type": READY,
        "status": "False" if stands.sentence or stands.stopped else "True",
        "reason": reason,
        "message": text,
        "observedGeneration": stands.queue.generation,
        "lastTransitionTime": datetime.fromtimestamp(now_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    old = _condition(before)
    if old.get("status") == condition["status"] and isinstance(old.get("lastTransitionTime"), str):
        condition["lastTransitionTime"] = old["lastTransitionTime"]
    return {
        "used": view["used"],
        "borrowed": view["borrowed"],
        "pending": stands.pending,
        "shown": view["shown"],
        "conditions": [condition],
    }


def _condition(status: Object) -> Object:
    listed = status.get("conditions")
    found = [one for one in listed if isinstance(one, dict) and one.get("type") == READY] if listed else []
    return found[0] if found else {}


def difference(before: Object, after: Object) -> Object:
    """Return the merge patch that makes one status of the other; empty = they are the same."""
    patch: Object = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            inner = {name: value.get(name) for name in old.keys() | value.keys() if value.get(name) != old.get(name)}
            if inner:
                patch[key] = dict(sorted(inner.items()))
        elif old != value:
            patch[key] = value
    return patch
