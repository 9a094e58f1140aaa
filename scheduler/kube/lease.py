"""One Lease that says which Tessera works on this cluster, so that a second one refuses to start.

It guards liveness and people's mistakes, not safety: what keeps two writers apart is the store's fence and the
preconditions of every write. Invariant: time is only ever measured on our own monotonic clock; another machine's clock
is never believed, so a Lease counts as left behind only after it was seen unchanged for `TERM_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import TypeVar

import structlog

from scheduler.clock import Clock
from scheduler.errors import ConfigError, OccupiedError
from scheduler.kube.port import ApiError, Cluster, Conflict, NotFound, Object, UnknownOutcome
from scheduler.kube.wire import advice

log = structlog.get_logger(__name__)

NAME = "tessera"
FENCE = "tessera.dev/fence"
TERM_S = 15
RENEW_S = 5.0
RETRY_S = 2.0
BACK_OFF_S = (0.5, 10.0)
_ROUNDS = 8

_Answer = TypeVar("_Answer")


class Occupancy:
    """Our hold on a cluster.

    Attributes:
        holder: who we say we are: `<database identity>_<process nonce>`.
        lost: another Tessera has it; never becomes false again.
        waits_for: what taking it waits for, in a sentence; empty once it was taken.
    """

    def __init__(self, cluster: Cluster, clock: Clock, *, namespace: str, database: str, nonce: str) -> None:
        """Hold nothing yet.

        Args:
            cluster: where the Lease is.
            clock: paces and measures.
            namespace: an existing namespace, where Tessera may create Leases and update this one.
            database: identity of the ledger's database: the same after a restart, never empty, without `_`.
            nonce: differs for each process.
        """
        assert database, "a database identity"
        assert "_" not in database, "the separator"
        self._cluster = cluster
        self._clock = clock
        self._namespace = namespace
        self._database = database
        self._lease: Object = {}
        self._renewed_s = float("-inf")
        self.holder = f"{database}_{nonce}"
        self.lost = False
        self.waits_for = "starting: the cluster's Lease is being taken"

    def missing(self) -> str:
        """Return why nothing may be decided on this cluster, in a sentence; empty = it is ours."""
        if self.waits_for or self.holds():
            return self.waits_for
        return "the cluster's Lease could not be renewed: another Tessera may take over"

    def holds(self) -> bool:
        """Whether nobody else can have it: not lost, and written less than `TERM_S` ago."""
        return not self.lost and self._clock.monotonic() - self._renewed_s < TERM_S

    async def acquire(self, *, fence: int) -> None:
        """Take the Lease, and while the API server is away or refuses, say so and try again, ever more slowly.

        Credentials are renewed and rights are granted while we run, so a refusal is waited out like silence.

        Raises:
            OccupiedError: another Tessera renews it.
            ConfigError: the namespace does not exist.
        """
        wait_s, most_s = BACK_OFF_S
        while True:
            try:
                await self.take(fence=fence)
            except (ApiError, UnknownOutcome, TimeoutError) as error:
                await self._wait_out(error, wait_s)
                wait_s = min(2 * wait_s, most_s)
            else:
                return

    async def take(self, *, fence: int) -> None:
        """Take the Lease, from our own database's last process at once, from another one's when it is left behind.

        Args:
            fence: the store's fencing epoch, kept in an annotation for people.

        Raises:
            OccupiedError: another Tessera renews it.
            ConfigError: the namespace does not exist.
            ApiError, UnknownOutcome, TimeoutError: the API server refuses or does not answer.
        """
        for last in [False] * (_ROUNDS - 1) + [True]:
            try:
                if await self._try(fence):
                    self.waits_for = ""
                    return
            except (UnknownOutcome, TimeoutError) as error:
                if last:
                    raise
                await self._wait_out(error, RETRY_S)
        raise OccupiedError(f"Lease {self._namespace}/{NAME} is fought over; see who else runs Tessera here.")

    async def _wait_out(self, error: Exception, wait_s: float) -> None:
        """Say what is waited for, and wait."""
        self.waits_for = f"starting: waiting for the API server: {advice(error)}"
        log.warning("start.waits", reason=self.waits_for, next_try_s=wait_s)
        await self._clock.sleep(wait_s)

    async def run(self) -> None:
        """Renew until cancelled.

        Raises:
            OccupiedError: it is lost.
        """
        while True:
            await self._clock.sleep(RENEW_S if await self.step() else RETRY_S)

    async def step(self) -> bool:
        """Renew once; return whether that worked, and when not, try again soon.

        Raises:
            OccupiedError: another Tessera has taken it; stop writing to the cluster.
        """
        try:
            if await self._put(self._lease, None):
                return True
            found = await self._read()
            if found is not None and _holder(found) not in {"", self.holder}:
                self.lost = True
                raise OccupiedError(self._sentence(found))
            return await self._put(found, None)
        except (ApiError, ConfigError, UnknownOutcome, TimeoutError):
            return False

    async def release(self) -> None:
        """Give it back, so that the next one need not wait; a failure only costs that wait."""
        spec = {**self._lease.get("spec", {}), "holderIdentity": ""}
        self._renewed_s = float("-inf")
        if self._lease and not self.lost:
            try:
                await self._bounded(
                    self._cluster.replace("leases", self._namespace, NAME, {**self._lease, "spec": spec})
                )
            except (ApiError, UnknownOutcome, TimeoutError):
                return

    async def _try(self, fence: int) -> bool:
        """Take the Lease as it is found, once the other's term is over; return whether it stayed as it was found."""
        found = await self._read()
        if found is not None and not self._may_take(found):
            found = await self._outwait(found)
        return await self._put(found, fence)

    def _may_take(self, lease: Object) -> bool:
        """Whether the holder is gone for sure: nobody, us, or the former process on our locked database."""
        return _holder(lease) in {"", self.holder} or _holder(lease).rpartition("_")[0] == self._database

    async def _outwait(self, first: Object) -> Object | None:
        """Return another's Lease when it stays unchanged for `TERM_S`, or what it has become that we may take.

        Raises:
            OccupiedError: it is being renewed.
        """
        since_s = self._clock.monotonic()
        found: Object | None = first
        while self._clock.monotonic() - since_s < TERM_S:
            await self._clock.sleep(RETRY_S)
            found = await self._read()
            if found is None or self._may_take(found):
                return found
            if _version(found) != _version(first):
                raise OccupiedError(self._sentence(found))
        return found

    async def _put(self, lease: Object | None, fence: int | None) -> bool:
        """Write ourselves into this state of the Lease; return whether it was still that state.

        Raises:
            ConfigError: the namespace does not exist.
            ApiError, UnknownOutcome, TimeoutError: the API server refuses or does not answer.
        """
        asked_s = self._clock.monotonic()
        body = self._body(lease or {}, fence)
        try:
            if lease:
                call = self._cluster.replace("leases", self._namespace, NAME, body)
            else:
                call = self._cluster.create("leases", self._namespace, body)
            self._lease = await self._bounded(call)
        except Conflict:
            return False
        except NotFound as error:
            if lease:
                return False
            raise ConfigError(f"Namespace {self._namespace} for Tessera's Lease does not exist; create it.") from error
        self._renewed_s = asked_s
        return True

    def _body(self, lease: Object, fence: int | None) -> Object:
        """Return this state of the Lease with us as its holder."""
        metadata = {"name": NAME, "namespace": self._namespace, **lease.get("metadata", {})}
        if fence is not None:
            metadata["annotations"] = {**metadata.get("annotations", {}), FENCE: str(fence)}
        before = lease.get("spec", {})
        now = datetime.fromtimestamp(self._clock.wall_us() / 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {**before, "holderIdentity": self.holder, "leaseDurationSeconds": TERM_S, "renewTime": now}
        if before.get("holderIdentity", "") != self.holder:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = before.get("leaseTransitions", 0) + (1 if lease else 0)
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

    async def _read(self) -> Object | None:
        """Return the Lease, None when there is none."""
        try:
            return await self._bounded(self._cluster.get("leases", self._namespace, NAME))
        except NotFound:
            return None

    async def _bounded(self, call: Awaitable[_Answer]) -> _Answer:
        """Await a call, but not so long that a renewal comes too late."""
        async with asyncio.timeout(RENEW_S):
            return await call

    def _sentence(self, lease: Object) -> str:
        database, _, process = _holder(lease).rpartition("_")
        fence = lease["metadata"].get("annotations", {}).get(FENCE, "?")
        return (
            f"Another Tessera works on this cluster: Lease {self._namespace}/{NAME} is held by process {process} on "
            f"database {database} (fence {fence}). Stop it first."
        )


def _holder(lease: Object) -> str:
    return lease.get("spec", {}).get("holderIdentity") or ""


def _version(lease: Object) -> str:
    version: str = lease["metadata"]["resourceVersion"]
    return version
