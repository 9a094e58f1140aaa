"""What has to be done about one Request, done: the actions of `ledger.reconcile` and nothing else.

Order of every change: in memory (no await), then the commit, then the API write. Room is given back only after the
commit that gives it up. This is the only place that compensates; handlers and watches merely say "look at this one".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from scheduler import TOUCH
from scheduler.clock import Clock
from scheduler.desk import Desk
from scheduler.errors import ConflictError, StoreError
from scheduler.faults import fault
from scheduler.intake.pod import read_pod
from scheduler.kube.port import ApiError, Cluster, NotFound, UnknownOutcome
from scheduler.ledger.ledger import advance
from scheduler.ledger.lifecycle import HOLDING, TERMINAL
from scheduler.ledger.reconcile import Action, Advance, Door, ReadBack, Touch, decide
from scheduler.ledger.taking import newborn
from scheduler.model.pod import Pod
from scheduler.model.reservation import Change, Event, Row

log = structlog.get_logger(__name__)

ROUNDS_MAX = 8
RETRY_S, LATEST_S = 1.0, 60.0
ASK_S = 2.0  # others wait for their turn behind a call that hangs


class Writer(Protocol):
    """Commits one transaction; returns when it is durable."""

    async def commit(self, changes: tuple[Change, ...]) -> None:
        """Raise ConflictError or StoreError when nothing was written."""
        ...

    async def close(self) -> None:
        """Write what is waiting and stop."""
        ...


@dataclass(slots=True)
class Settler:
    """Settles Requests one at a time per uid; different ones run side by side.

    Attributes:
        dirty: uids to look at, oldest first; the value says that the pod is known to be gone.
        recall: reads one row from the store, for an ended Request that is no longer in memory.
        working: uids somebody is busy with; a bind in flight is one of them.
    """

    desk: Desk
    cluster: Cluster
    writer: Writer
    clock: Clock
    recall: Callable[[str], Row | None]
    dirty: dict[str, bool] = field(default_factory=dict)
    working: dict[str, asyncio.Event] = field(default_factory=dict)
    bell: asyncio.Event = field(default_factory=asyncio.Event)  # rings when something was marked
    stirred: Callable[[], object] = bool  # called when somebody began to wait, or gave room back
    excuse: Callable[[str], str] = lambda _: ""  # why a reservation past its deadline costs no attempt, or empty
    _trouble: dict[str, tuple[int, str]] = field(default_factory=dict)  # uid -> times in a row, last problem
    _waiting: set[str] = field(default_factory=set)  # uids whose timer runs

    def mark(self, uid: str, *, gone: bool = False) -> None:
        """Ask for a look at this Request at the next step."""
        self.dirty[uid] = self.dirty.get(uid, False) or gone
        self.bell.set()

    async def settle(self, uid: str, *, fresh: bool = False) -> None:
        """Do what has to be done until nothing is left to do, a few rounds at most; errors mean later, not never."""
        if uid in self.working:  # whoever is at it rings when done
            self.dirty[uid] = self.dirty.get(uid, False) or fresh
            return
        async with self.alone(uid):
            try:
                await self.resolve(uid, fresh=fresh)
            except (ApiError, UnknownOutcome, StoreError) as error:
                self._later(uid, str(error))
            else:
                self._trouble.pop(uid, None)

    def _later(self, uid: str, problem: str) -> None:
        """Look again after a while, longer each time; one timer per Request, one log line per new problem."""
        times, known = self._trouble.get(uid, (0, ""))
        self._trouble[uid] = (times + 1, problem)
        if problem != known:
            log.warning("settle.later", request=uid, error=problem)
        if uid not in self._waiting:
            self._waiting.add(uid)
            self.clock.call_later(min(RETRY_S * 2.0 ** min(times, 10), LATEST_S), lambda: self._again(uid))

    def _again(self, uid: str) -> None:
        self._waiting.discard(uid)
        self.mark(uid)

    @asynccontextmanager
    async def alone(self, uid: str) -> AsyncGenerator[None, None]:
        """Be the only one busy with this Request; waits for whoever is."""
        while (busy := self.working.get(uid)) is not None:
            await busy.wait()
        done = self.working[uid] = asyncio.Event()
        try:
            yield
        finally:
            del self.working[uid]
            done.set()
            if uid in self.dirty:
                self.bell.set()

    def due(self, uid: str, *, fresh: bool = False) -> bool:
        """Say whether `settle` would find anything to do about a Request that nobody is busy with."""
        row, pod = self.desk.book.rows.get(uid), self.desk.registry.pods.get(uid)
        if self._actions(uid, row, pod, fresh=fresh):
            return True
        self._trouble.pop(uid, None)
        return False

    def _actions(self, uid: str, row: Row | None, pod: Pod | None, *, fresh: bool) -> list[Action]:
        epoch, refused = self.desk.order.astray.get(uid, (0, ""))
        refused = refused if row is not None and row.epoch == epoch else ""
        now_us = self.clock.wall_us()
        if row is not None and not refused and row.deadline_us and now_us >= row.deadline_us:
            refused = self.excuse(uid)
        door = self.desk.door(pod.request.namespace) if pod is not None else Door.OPEN
        return decide(row, pod, now_us=now_us, fresh=fresh, in_flight=False, refused=refused, door=door)

    async def resolve(self, uid: str, *, fresh: bool = False) -> None:
        """Settle for a caller that already holds this uid in `working`; lets errors through."""
        pod = self.desk.registry.pods.get(uid)
        for _ in range(ROUNDS_MAX):
            row = self.desk.book.rows.get(uid)
            actions = self._actions(uid, row, pod, fresh=fresh)
            if not actions:
                return
            for action in actions:
                if isinstance(action, Advance):
                    await self._advance(uid, pod, action)
                else:
                    pod, fresh = await self._ask_server(uid, pod, row, action), True
                    break
        self._later(uid, "not settled in several rounds")

    async def _ask_server(self, uid: str, pod: Pod | None, row: Row | None, action: Action) -> Pod | None:
        """Read the pod from the API server, or touch it, and return it as it is now; None = this pod is gone."""
        namespace, name = (pod.request.namespace, pod.request.name) if pod else (row.namespace, row.name)  # type: ignore[union-attr]
        try:
            async with asyncio.timeout(ASK_S):  # both may be repeated: what a touch left unclear is read back first
                if isinstance(action, Touch):
                    await fault("settle.touch.before")
                    body = {"metadata": {"uid": uid, "annotations": {TOUCH: str(action.epoch)}}}
                    raw = await self.cluster.patch("pods", namespace, name, body)
                else:
                    assert isinstance(action, ReadBack)
                    raw = await self.cluster.get("pods", namespace, name)
        except NotFound:
            return None
        except TimeoutError:
            raise UnknownOutcome(f"pod {namespace}/{name}: no answer within {ASK_S:.0f} s") from None
        now = read_pod(raw)
        return now if now.uid == uid else None

    async def _advance(self, uid: str, pod: Pod | None, action: Advance) -> None:
        desk, row = self.desk, self.desk.book.rows.get(uid)
        change = advance(
            row,
            action.event,
            now_us=self.clock.wall_us(),
            fence=desk.fence,
            reason=action.reason,
            node=action.node,
            allocation=action.allocation,
            born=newborn(pod.request, fence=desk.fence, now_us=self.clock.wall_us()) if pod else None,
            credit=desk.book.credits.get(row.workload if row else pod.request.workload if pod else ""),
        )
        desk.book.apply((change,))
        if action.event is Event.ADOPT and pod is not None:
            desk.hold_claim(change.after, pod, pod.allocation)
        try:
            await self.writer.commit((change,))
        except Exception as error:
            desk.book.revert((change,))
            if action.event is Event.ADOPT and (row is None or row.state not in HOLDING):
                desk.let_go(uid)  # what was adopted: the pod itself says so while it lives
            if row is not None and row.state in HOLDING and desk.book.rows.get(uid) == row:
                desk.order.charging.take(row)  # the queues may have changed, and been summed without it
            if row is None and isinstance(error, ConflictError) and (ended := self.recall(uid)) is not None:
                desk.book.remember(ended)  # it ended so long ago that memory had dropped it
            raise
        if action.event in {Event.SUBMIT, Event.HOLD} and pod is not None:
            desk.arrivals.learn(pod.request, self.clock.wall_us())
        await fault("settle.committed")
        now = desk.book.rows.get(uid)
        given_up = row is not None and row.state in HOLDING and change.after.state not in HOLDING
        if given_up and (now is None or now.state not in HOLDING):  # nobody has reserved for it meanwhile
            desk.let_go(uid)
        if change.after.state not in HOLDING:
            self.stirred()
        if change.after.state in TERMINAL:
            desk.drop_intent(uid)
            desk.forget(uid)
