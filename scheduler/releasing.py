"""Reservations let go: nominate the pod, then take the gate away, so that kube-scheduler executes what was decided.

Both writes may be repeated and carry the pod's uid. Only so many pods are out at a time, and none while kube-scheduler
is not there to take them; see `queueing.release`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from scheduler import GATE, PREFIX
from scheduler.clock import Clock
from scheduler.desk import Desk
from scheduler.faults import fault
from scheduler.kube.port import ApiError, Cluster, NotFound, Object, UnknownOutcome
from scheduler.ledger.lifecycle import HOLDING
from scheduler.model.pod import Pod
from scheduler.model.reservation import Row, State
from scheduler.queueing.release import Heard, Window, may_release
from scheduler.settling import Settler

log = structlog.get_logger(__name__)

ADMITTED = PREFIX + "Admitted"
LEASE = "tessera-kube-scheduler"
AT_ONCE = 24
ASK_S = 5.0
RETRY_S = 1.0
LEASE_EVERY_S, LEASE_S = 5.0, 15.0
BUSY, BUSY_S = 429, 0.1
AHEAD = 4  # windows that may be reserved and not bound

_OUT = frozenset({State.RESERVED, State.BINDING})


@dataclass(slots=True)
class Releaser:
    """Lets committed reservations go, oldest first.

    Attributes:
        namespace: where kube-scheduler keeps its Lease.
        window: how many may be out.
        pending: requests whose reservation is committed and not let go yet.
        out: requests that were let go and are not bound, with the epoch of their reservation.
        bell: rings when something became pending.
    """

    desk: Desk
    cluster: Cluster
    clock: Clock
    settler: Settler
    namespace: str = "tessera-system"
    window: Window = field(default_factory=Window)
    pending: dict[str, None] = field(default_factory=dict)
    out: dict[str, int] = field(default_factory=dict)
    bell: asyncio.Event = field(default_factory=asyncio.Event)
    _begun: bool = False
    _later: dict[str, float] = field(default_factory=dict)  # uid -> not tried again before, monotonic
    _lease: bool | None = None
    _renewed: tuple[str, float] = ("", 0.0)  # as written, and when that was first seen
    _looked_s: float = -LEASE_EVERY_S

    def add(self, uid: str) -> None:
        """Let this reservation go as soon as may be; it is committed."""
        self.pending[uid] = None
        self.bell.set()

    def room(self) -> int:
        """Return how many more pods may be reserved now; 0 while enough are out, or nobody is there."""
        return may_release(AHEAD * self.window.size, len(self.pending.keys() | self.out.keys()), self.heard())

    def heard(self) -> Heard:
        """Return what is known of kube-scheduler."""
        called_s = self.desk.called_s
        return Heard(self._lease, None if called_s is None else self.clock.monotonic() - called_s)

    def alone(self) -> bool:
        """Say whether nothing may be let go because no kube-scheduler is heard of."""
        return may_release(1, 0, self.heard()) == 0

    async def step(self) -> None:
        """Take stock, then let go what may go."""
        if not self._begun:
            self._begin()
        await self._look()
        for uid, (epoch, _) in list(self.desk.order.astray.items()):
            row = self.desk.book.rows.get(uid)
            if row is not None and row.state is State.RESERVED and row.epoch == epoch:
                self.settler.mark(uid)
            else:
                del self.desk.order.astray[uid]
        stray = [uid for uid in list(self.out) if self._taken_stock(uid)]
        now_s = self.clock.monotonic()
        room = may_release(self.window.size, len(self.out), self.heard())
        due = [uid for uid in self.pending if self._later.get(uid, 0.0) <= now_s][:room]
        if not stray and not due:
            return
        gate = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as sending:
            for uid in stray:
                sending.create_task(self._clear(uid, gate))
            for uid in due:
                sending.create_task(self._release(uid, gate))

    def _begin(self) -> None:
        """Go on where the last process ended: what is reserved may be nominated or not, gated or not."""
        self._begun = True
        reserved = [row for row in self.desk.book.live() if row.state is State.RESERVED]
        before = {row.id: None for row in sorted(reserved, key=lambda row: (row.updated_us, row.id))}
        self.pending = before | self.pending
        for row in self.desk.book.live():
            pod = self.desk.registry.pods.get(row.id)
            if row.state is State.QUEUED and pod is not None and pod.nominated:
                self.out[row.id] = row.epoch - 1  # voided, and its nomination may still hold room

    def _taken_stock(self, uid: str) -> bool:
        """Note what became of a pod that was let go; True = its nomination is void and has to be cleared."""
        row, epoch = self.desk.book.rows.get(uid), self.out[uid]
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
        now_s = self.clock.monotonic()
        if now_s - self._looked_s < LEASE_EVERY_S:
            return
        self._looked_s = now_s
        try:
            async with asyncio.timeout(ASK_S):
                lease = await self.cluster.get("leases", self.namespace, LEASE)
        except (ApiError, UnknownOutcome, TimeoutError):
            self._lease = None
            return
        spec = lease.get("spec") or {}
        renewed, lasts_s = str(spec.get("renewTime") or ""), int(spec.get("leaseDurationSeconds") or LEASE_S)
        known, since_s = self._renewed
        if renewed != known:
            since_s = now_s if known else now_s - _age_s(renewed, self.clock.wall_us())
            self._renewed = renewed, since_s
        self._lease = now_s - since_s <= lasts_s + LEASE_EVERY_S

    async def _release(self, uid: str, gate: asyncio.Semaphore) -> None:
        """Nominate and ungate one pod, unless that is no longer wanted."""
        row, pod = self.desk.book.rows.get(uid), self.desk.registry.pods.get(uid)
        if row is None or pod is None or row.state is not State.RESERVED:
            self.pending.pop(uid, None)
            self._later.pop(uid, None)
            return
        self.out[uid] = row.epoch  # from here on it may be bound at any moment
        async with gate:
            sent = await self._send(uid, self._writes(pod, row))
        if sent:
            self.pending.pop(uid, None)
            self._later.pop(uid, None)
        else:
            self.out.pop(uid, None)
            self._later[uid] = self.clock.monotonic() + RETRY_S

    async def _writes(self, pod: Pod, row: Row) -> None:
        namespace, name = pod.request.namespace, pod.request.name
        await fault("release.nominate.before")
        await self.cluster.patch(
            "pods", namespace, name, self._nomination(row), patch_type="strategic", subresource="status"
        )
        await fault("release.ungate.before")
        if GATE in pod.gates:
            body = {"metadata": {"uid": pod.uid}, "spec": {"schedulingGates": [{"$patch": "delete", "name": GATE}]}}
            await self.cluster.patch("pods", namespace, name, body, patch_type="strategic")
        await fault("release.ungate.after")

    def _nomination(self, row: Row) -> Object:
        """Return the status: the node, and a condition that differs for each attempt and so always wakes the pod."""
        at = datetime.fromtimestamp(self.clock.wall_us() // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {
            "type": ADMITTED,
            "status": "True",
            "reason": "Reserved",
            "message": f"Room and quota are reserved on node {row.node} (attempt {row.attempts + 1}).",
            "lastTransitionTime": at,
        }
        return {"metadata": {"uid": row.id}, "status": {"nominatedNodeName": row.node, "conditions": [condition]}}

    async def _clear(self, uid: str, gate: asyncio.Semaphore) -> None:
        """Take back a void nomination: kube-scheduler would go on holding room for it."""
        row, pod = self.desk.book.rows.get(uid), self.desk.registry.pods.get(uid)
        if row is None or pod is None or row.state in HOLDING:
            return
        body: Object = {"metadata": {"uid": uid}, "status": {"nominatedNodeName": None}}
        request = pod.request
        patch = self.cluster.patch("pods", request.namespace, request.name, body, subresource="status")
        async with gate:
            if not await self._send(uid, patch):
                self.out[uid] = -1  # the next step looks again

    async def _send(self, uid: str, writes: Awaitable[object]) -> bool:
        """Do these writes and say whether they are certainly done; a busy server is given the time it asks for."""
        try:
            async with asyncio.timeout(ASK_S):
                await writes
        except NotFound:
            self.settler.mark(uid)
        except ApiError as error:
            if error.status == BUSY:
                await self.clock.sleep(max(error.retry_after_s, BUSY_S))
            else:
                log.warning("release.refused", request=uid, error=str(error))
                self.settler.mark(uid)
        except (UnknownOutcome, TimeoutError) as error:
            log.info("release.unclear", request=uid, error=str(error) or "no answer in time")
        else:
            return True
        return False


def _age_s(written: str, now_us: int) -> float:
    """Return how old an instant is, at least 0; what is no instant is very old."""
    try:
        then = datetime.fromisoformat(written).timestamp()
    except ValueError:
        return LEASE_S * 1000
    return max(now_us / 1_000_000 - then, 0.0)
