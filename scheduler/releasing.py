"""Reservations let go: nominate the pod, then take the gate away, so that kube-scheduler executes what was decided.

Both writes may be repeated and carry the pod's uid. Only so many pods are out at a time, and none while kube-scheduler
is not there to take them; see `queueing.release`. Each pod that is written to has a slot of its own: a write that hangs
costs that slot and delays nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import structlog

from scheduler import ADMITTED, AUTOSCALE, GATE
from scheduler.clock import Clock
from scheduler.decision.reasons import REASONS
from scheduler.desk import Desk
from scheduler.faults import fault
from scheduler.kube.port import ApiError, Cluster, NotFound, Object, Unavailable, UnknownOutcome
from scheduler.ledger.ledger import NOBODY_THERE, NOT_LET_GO
from scheduler.ledger.lifecycle import HOLDING
from scheduler.model.pod import Pod
from scheduler.model.reservation import Row, State
from scheduler.queueing.release import CALLED_S, Heard, Window, may_release
from scheduler.settling import Settler

log = structlog.get_logger(__name__)

LEASE = "tessera-kube-scheduler"
SLOTS = 24
LOOK = "lease"  # the slot of whoever reads the Lease
ASK_S = 5.0
RETRY_S = 1.0
PAUSE_S = 0.5
LEASE_EVERY_S, LEASE_S = 5.0, 15.0
BACK_S = 30.0  # a kube-scheduler that is there so long has seen all that was let go before
BUSY, BUSY_S, BUSY_S_MAX = 429, 0.1, 30.0
AHEAD = 4  # windows that may be reserved and not bound

_OUT = frozenset({State.RESERVED, State.BINDING})


@dataclass(frozen=True, slots=True)
class Out:
    """A reservation that was let go: its epoch, and since when, on the monotonic clock."""

    epoch: int
    since_s: float


@dataclass(slots=True)
class Releaser:
    """Lets committed reservations go, oldest first.

    Attributes:
        namespace: where kube-scheduler keeps its Lease.
        window: how many may be out.
        pending: requests whose reservation is committed and not let go yet.
        asking: requests let go without a reservation, and since when a new node is asked for them, microseconds.
        out: requests that were let go and are not bound.
        bell: rings when something became pending, or a slot free.
    """

    desk: Desk
    cluster: Cluster
    clock: Clock
    settler: Settler
    namespace: str = "tessera-system"
    window: Window = field(default_factory=Window)
    pending: dict[str, None] = field(default_factory=dict)
    asking: dict[str, int] = field(default_factory=dict)
    out: dict[str, Out] = field(default_factory=dict)
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    _begun: bool = False
    _slots: set[str] = field(default_factory=set)  # uids that are written to
    _void: dict[str, None] = field(default_factory=dict)  # uids whose nomination has to be cleared
    _later: dict[str, float] = field(default_factory=dict)  # uid -> not tried again before, monotonic
    _overdue: dict[str, int] = field(default_factory=dict)  # uid -> epoch whose time is over, said once
    _quiet_s: float = 0.0  # nothing is written before, because the API server is busy
    _lease: bool | None = None
    _absent_s: float = -BACK_S  # when the Lease was last found stale
    _renewed: tuple[str, float] = ("", 0.0)  # as written, and when that was first seen
    _looked_s: float = -LEASE_EVERY_S

    def add(self, uid: str) -> None:
        """Let this reservation go as soon as may be; it is committed."""
        self.pending[uid] = None
        self.bell.set()

    def ask(self, since_us: Mapping[str, int]) -> None:
        """Let these go without a reservation, so that whoever adds nodes sees them."""
        if since_us:
            self.asking |= since_us
            self.bell.set()

    def room(self) -> int:
        """Return how many more pods may be reserved now; 0 while enough are out, or nobody is there."""
        return may_release(AHEAD * self.window.size, len(self.pending.keys() | self.out.keys()), self.heard())

    def heard(self) -> Heard:
        """Return what is known of kube-scheduler."""
        called_s = self.desk.called_s
        return Heard(self._lease, None if called_s is None else self.clock.monotonic() - called_s)

    def alone(self) -> bool:
        """Say whether nothing more is let go because no kube-scheduler is heard of."""
        if self.heard().there or (self._lease is None and not self.out):
            return False
        now_s = self.clock.monotonic()
        return self._lease is False or any(now_s - one.since_s >= CALLED_S for one in self.out.values())

    def excuse(self, uid: str) -> str:
        """Return why a reservation that ran into its deadline costs no attempt; empty = it does.

        Nobody was there to take it, or it was never let go, because too many others were out.
        """
        out, called_s = self.out.get(uid), self.desk.called_s
        if self._lease is not None:
            absent = not self._lease or self.clock.monotonic() - self._absent_s < BACK_S
        else:
            absent = called_s is None or (out is not None and called_s < out.since_s)
        if absent:
            return NOBODY_THERE
        return NOT_LET_GO if out is None and uid in self.pending and uid not in self._later else ""

    async def run(self) -> None:
        """Let go what may go, for ever."""
        self._slots.clear()
        async with asyncio.TaskGroup() as slots:
            while True:
                self.bell.clear()
                for uid, work in self.step().items():
                    self._slots.add(uid)
                    slots.create_task(work).add_done_callback(partial(self._done, uid))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_S):
                        await self.bell.wait()

    def _done(self, uid: str, _: object) -> None:
        self._slots.discard(uid)
        self.bell.set()

    def step(self) -> dict[str, Coroutine[None, None, None]]:
        """Take stock, and return what is to be done now, by uid, each in a slot that is free."""
        if not self._begun:
            self._begin()
        self._watch_time()
        now_s, works = self.clock.monotonic(), dict[str, Coroutine[None, None, None]]()
        self._mark_astray()
        self._void |= dict.fromkeys(uid for uid in list(self.out) if uid not in self._slots and self._taken_stock(uid))
        behind = self.desk.dependencies
        if not (calls := behind.api.room()):
            return works
        every_s = LEASE_EVERY_S if behind.api.closed else PAUSE_S  # a probe, where nothing else is to be sent
        if LOOK not in self._slots and now_s - self._looked_s >= every_s:
            self._looked_s = now_s
            works[LOOK] = self._look()
        if now_s < self._quiet_s or not behind.store.closed:
            return works
        free = min(SLOTS - len(self._slots), calls - len(works))
        for uid in [uid for uid in self._void if uid not in self._slots][: max(free, 0)]:
            works[uid] = self._clear(uid)
        free = min(SLOTS - len(self._slots), calls) - len(works)
        room = min(may_release(self.window.size, len(self.out), self.heard()), free)
        for uid in list(self.pending):
            if room > 0 and uid not in self._slots and uid not in works and self._later.get(uid, 0.0) <= now_s:
                row, pod = self.desk.book.rows.get(uid), self.desk.registry.pods.get(uid)
                if row is None or pod is None or row.state is not State.RESERVED:
                    self._sent(uid)
                    continue
                self.out[uid] = Out(row.epoch, now_s)  # from here on it may be bound at any moment
                works[uid] = self._release(pod, row)
                room -= 1
        works |= self._showings(SLOTS - len(self._slots) - len(works), works.keys(), now_s)
        return works

    def _showings(self, free: int, busy: Collection[str], now_s: float) -> dict[str, Coroutine[None, None, None]]:
        """Return the writes that let pods go without a reservation, as many as there are free slots."""
        works: dict[str, Coroutine[None, None, None]] = {}
        for uid in [uid for uid in self.asking if self._later.get(uid, 0.0) <= now_s]:
            row, pod = self.desk.book.rows.get(uid), self.desk.registry.pods.get(uid)
            if row is None or pod is None or row.state is not State.QUEUED:
                del self.asking[uid]
            elif len(works) < free and uid not in self._slots and uid not in busy:
                works[uid] = self._show(pod, self.asking[uid])
        return works

    def _mark_astray(self) -> None:
        """Have the reservations given up that must be."""
        for uid, (epoch, _) in list(self.desk.order.astray.items()):
            row = self.desk.book.rows.get(uid)
            if row is not None and row.state is State.RESERVED and row.epoch == epoch:
                self.settler.mark(uid)
            else:
                del self.desk.order.astray[uid]

    def _watch_time(self) -> None:
        """Have reservations looked at as soon as their time is over; forget who was pending and is no more."""
        now_us, rows, before = self.clock.wall_us(), self.desk.book.rows, self._overdue
        self._overdue = {
            uid: row.epoch
            for uid in self.out.keys() | self.pending.keys()
            if (row := rows.get(uid)) is not None and row.state is State.RESERVED and 0 < row.deadline_us <= now_us
        }
        for uid in sorted(uid for uid, epoch in self._overdue.items() if before.get(uid) != epoch):
            self.settler.mark(uid)
        for uid in [uid for uid in self.pending if uid not in self._slots]:
            row, pod = rows.get(uid), self.desk.registry.pods.get(uid)
            if row is None or row.state is not State.RESERVED:
                self._sent(uid)
                if pod is not None and pod.nominated:
                    self._void[uid] = None  # a former process let it go

    def _begin(self) -> None:
        """Go on where the last process ended: what is reserved may be nominated or not, gated or not."""
        self._begun = True
        reserved = [row for row in self.desk.book.live() if row.state is State.RESERVED]
        before = {row.id: None for row in sorted(reserved, key=lambda row: (row.updated_us, row.id))}
        self.pending = before | self.pending
        for row in self.desk.book.live():
            pod = self.desk.registry.pods.get(row.id)
            if row.state is State.QUEUED and pod is not None and pod.nominated:
                self.out[row.id] = Out(row.epoch - 1, self.clock.monotonic())  # its void nomination may hold room

    def _taken_stock(self, uid: str) -> bool:
        """Note what became of a pod that was let go; True = its nomination is void and has to be cleared."""
        row, epoch = self.desk.book.rows.get(uid), self.out[uid].epoch
        if row is not None and row.state in _OUT and row.epoch == epoch:
            return False
        del self.out[uid]
        if row is None:
            return False
        if row.state in HOLDING - _OUT:
            self.window.bound()
            return False
        if row.reason == "ReservationTimedOut":
            self.window.expired()
        pod = self.desk.registry.pods.get(uid)
        return row.state not in HOLDING and pod is not None and bool(pod.nominated)

    async def _look(self) -> None:
        """See whether kube-scheduler renews its Lease: what counts is that it changes, on our own clock."""
        try:
            async with asyncio.timeout(ASK_S):
                lease = await self.cluster.get("leases", self.namespace, LEASE)
        except (ApiError, UnknownOutcome, TimeoutError):
            self._lease = None
            return
        now_s, spec = self.clock.monotonic(), lease.get("spec") or {}
        renewed, lasts_s = str(spec.get("renewTime") or ""), int(spec.get("leaseDurationSeconds") or LEASE_S)
        known, since_s = self._renewed
        if renewed != known:
            since_s = now_s if known else now_s - _age_s(renewed, self.clock.wall_us())
            self._renewed = renewed, since_s
        self._lease = now_s - since_s <= lasts_s + LEASE_EVERY_S
        if not self._lease:
            self._absent_s = now_s

    def _sent(self, uid: str) -> None:
        self.pending.pop(uid, None)
        self._later.pop(uid, None)

    async def _release(self, pod: Pod, row: Row) -> None:
        """Nominate and ungate one pod."""
        uid = pod.uid
        if not await self._send(uid, self._nominate(pod, row)):
            self.out.pop(uid, None)
            self._later[uid] = self.clock.monotonic() + RETRY_S
            return
        now = self.desk.book.rows.get(uid)
        if now is not None and now.epoch == row.epoch:
            self._sent(uid)
        else:  # it was given up meanwhile: what is reserved since stays pending, else the nomination is void
            self._void[uid] = None

    async def _show(self, pod: Pod, since_us: int) -> None:
        """Let one pod go without a nomination; its condition tells the next process since when."""
        if await self._send(pod.uid, self._ask(pod, since_us)):
            self.asking.pop(pod.uid, None)
            self._later.pop(pod.uid, None)
        else:
            self._later[pod.uid] = self.clock.monotonic() + RETRY_S

    async def _nominate(self, pod: Pod, row: Row) -> None:
        await fault("release.nominate.before")
        message = f"Room and quota are reserved on node {row.node} (attempt {row.attempts + 1})."
        # the condition differs for each attempt and so always wakes the pod
        admitted = _admitted("True", "Reserved", message, self.clock.wall_us())
        await self._writes(pod, {"nominatedNodeName": row.node, "conditions": [admitted]})

    async def _ask(self, pod: Pod, since_us: int) -> None:
        await fault("release.ask.before")
        await self._writes(pod, {"conditions": [_admitted("False", AUTOSCALE, REASONS[AUTOSCALE].text, since_us)]})

    async def _writes(self, pod: Pod, status: Object) -> None:
        namespace, name = pod.request.namespace, pod.request.name
        body: Object = {"metadata": {"uid": pod.uid}, "status": status}
        await self.cluster.patch("pods", namespace, name, body, patch_type="strategic", subresource="status")
        await fault("release.ungate.before")
        if GATE in pod.gates:
            body = {"metadata": {"uid": pod.uid}, "spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]}}
            await self.cluster.patch("pods", namespace, name, body, patch_type="strategic")
        await fault("release.ungate.after")

    async def _clear(self, uid: str) -> None:
        """Take back a void nomination: kube-scheduler would go on holding room for it."""
        row, pod = self.desk.book.rows.get(uid), self.desk.registry.pods.get(uid)
        self._void.pop(uid, None)
        if row is None or pod is None or row.state in HOLDING:
            return
        body: Object = {"metadata": {"uid": uid}, "status": {"nominatedNodeName": None}}
        request = pod.request
        patch = self.cluster.patch("pods", request.namespace, request.name, body, subresource="status")
        if not await self._send(uid, patch):
            self.out[uid] = Out(-1, self.clock.monotonic())  # the next step looks again

    async def _send(self, uid: str, writes: Awaitable[object]) -> bool:
        """Do these writes and say whether they are certainly done; a busy server is given the time it asks for."""
        try:
            async with asyncio.timeout(ASK_S):
                await writes
        except NotFound:
            self.settler.mark(uid)
        except Unavailable:
            pass  # it was not sent, and is as soon as the API server is back
        except ApiError as error:
            if error.status == BUSY:
                self._quiet_s = self.clock.monotonic() + min(max(error.retry_after_s, BUSY_S), BUSY_S_MAX)
            else:
                log.warning("release.refused", request=uid, error=str(error))
                self.settler.mark(uid)
        except (UnknownOutcome, TimeoutError) as error:
            log.info("release.unclear", request=uid, error=str(error) or "no answer in time")
        else:
            return True
        return False


def _admitted(status: str, reason: str, message: str, since_us: int) -> Object:
    """Return our condition as it is since then."""
    since = datetime.fromtimestamp(since_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": ADMITTED, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}


def _age_s(written: str, now_us: int) -> float:
    """Return how old an instant is, at least 0; what is no instant is very old."""
    try:
        then = datetime.fromisoformat(written).timestamp()
    except ValueError:
        return LEASE_S * 1000
    return max(now_us / 1_000_000 - then, 0.0)
