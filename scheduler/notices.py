"""Kubernetes Events that tell, in `kubectl describe pod`, why a pod waits: one for each change of the reason.

Beside the turn and never in its way: a step looks at some of the waiting pods and writes a few Events. Invariants: at
most `PER_S` Events a second in all, at most one per pod, reason and minute; what waits to be written is bounded, and
what does not fit is counted and tried again later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

import structlog

from scheduler import PREFIX
from scheduler.clock import Clock
from scheduler.decision.reasons import REASONS
from scheduler.desk import Desk
from scheduler.kube.port import ApiError, Cluster, Object, UnknownOutcome
from scheduler.model.reservation import Row
from scheduler.waiting import PENDING, judged_word, waiting_word

log = structlog.get_logger(__name__)

PER_S = 5
LOOKED_AT = 1000  # pods a step: a millisecond
STANDS_S = 3.0  # a reason that goes sooner is told to nobody
QUEUED_MAX = 1000
REPEAT_S = 60.0
AGAIN_S = 600.0  # a pod whose Event was dropped
WRITE_S = 5.0
BUSY, BUSY_S = 429, 1.0
FORBIDDEN, FORBIDDEN_S = 403, 60.0  # no right to write Events, or a namespace that is going away
NAME_MAX = 200  # of the pod's name in the Event's, which has at most 253


@dataclass(slots=True)
class Notices:
    """Writes Events about waiting pods.

    Attributes:
        count: called with `sent`, `dropped` or `failed` for each Event.
    """

    desk: Desk
    cluster: Cluster
    clock: Clock
    count: Callable[[str], None]
    _told: dict[str, tuple[str, float]] = field(default_factory=dict)  # uid -> word, and until when that stands
    _due: dict[str, float] = field(default_factory=dict)  # uid -> since when, the one that is told next first
    _sent: dict[tuple[str, str], float] = field(default_factory=dict)  # (uid, word) -> when, of the last minute
    _at: int = 0
    _quiet_s: float = 0.0  # nothing is written before

    async def step(self) -> None:
        """Look at some pods and write a few Events; call it once a second."""
        if not self.desk.dependencies.closed:
            return  # it would be told to a server that is busy enough
        now_s = self.clock.monotonic()
        self._look(now_s)
        for key in [key for key, at_s in self._sent.items() if now_s - at_s >= REPEAT_S]:
            del self._sent[key]
        if now_s < self._quiet_s:
            return
        for uid, since_s in list(islice(self._due.items(), PER_S)):
            if now_s - since_s < STANDS_S or not await self._tell(uid):
                return

    def _look(self, now_s: float) -> None:
        """Find pods whose reason has changed, some at a time; forget those that wait no longer."""
        waiting = self.desk.order.words
        if self._at >= len(waiting):
            self._at = 0
            for uid in [uid for uid in self._told if uid not in waiting]:
                del self._told[uid]
        some = list(islice(waiting, self._at, self._at + LOOKED_AT))
        self._at += LOOKED_AT
        for uid in some:
            row = self.desk.book.rows.get(uid)
            word = waiting_word(self.desk, row) if row is not None else ""
            known, until_s = self._told.get(uid, ("", 0.0))
            if word in {"", PENDING} or uid in self._due or (word == known and now_s < until_s):
                continue
            if len(self._due) < QUEUED_MAX:
                self._due[uid] = now_s
            else:
                self._told[uid] = word, now_s + AGAIN_S
                self.count("dropped")

    async def _tell(self, uid: str) -> bool:
        """Write the Event of one pod, if it still waits; False = write no more for now."""
        row, now_s = self.desk.book.rows.get(uid), self.clock.monotonic()
        said = waiting_word(self.desk, row) if row is not None else ""
        if row is None or said in {"", PENDING}:
            del self._due[uid]
            return True
        word = judged_word(self.desk, row)
        known = self._sent.get((uid, word))
        if word == PENDING or (known is not None and now_s - known < REPEAT_S):
            del self._due[uid]  # it is looked at again
            return True
        try:
            async with asyncio.timeout(WRITE_S):
                await self.cluster.create("events", row.namespace, event(row, word, self.clock.wall_us()))
        except ApiError as error:
            if error.status == BUSY:
                self._quiet_s = now_s + max(error.retry_after_s, BUSY_S)
                return False
            self._quiet_s = now_s + (FORBIDDEN_S if error.status == FORBIDDEN else BUSY_S)
            self._end(uid, said, now_s + AGAIN_S, "failed")
            log.info("event.refused", pod=f"{row.namespace}/{row.name}", reason=word, error=str(error))
            return False
        except (UnknownOutcome, TimeoutError):  # it may be there; two are worse than none
            self._end(uid, said, now_s + AGAIN_S, "failed")
            self._quiet_s = now_s + BUSY_S
            return False
        self._sent[uid, word] = now_s
        self._end(uid, said, float("inf"), "sent")
        return True

    def _end(self, uid: str, word: str, until_s: float, outcome: str) -> None:
        self._due.pop(uid, None)
        self._told[uid] = word, until_s
        self.count(outcome)


def event(row: Row, word: str, now_us: int) -> Object:
    """Return the Event that says of a pod why it waits: a constant sentence, without numbers and names."""
    at = datetime.fromtimestamp(now_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{row.name[:NAME_MAX].rstrip('-.')}.{now_us:x}", "namespace": row.namespace},
        "eventTime": f"{at}.{now_us % 1_000_000:06}Z",
        "type": "Normal",
        "reason": word,
        "note": REASONS[word].text,
        "action": "Waiting",
        "regarding": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": row.namespace,
            "name": row.name,
            "uid": row.id,
        },
        "reportingController": f"{PREFIX}scheduler",
        "reportingInstance": "tessera",
    }
