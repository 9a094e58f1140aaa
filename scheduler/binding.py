"""The bind of one pod: claim in memory, commit to the ledger, one Binding POST, confirm.

Invariant: a Binding is posted only for a committed BINDING row of this epoch, with the pod's uid and resourceVersion
as preconditions; what became of an unclear POST is read back before anything else happens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TypeAlias

import structlog

from scheduler import ALLOCATION
from scheduler.clock import Clock
from scheduler.decision.placing import DoesNotFit
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.faults import fault
from scheduler.intake.extender import BindArgs
from scheduler.intake.pod import read_pod
from scheduler.kube.port import ApiError, Cluster, Conflict, NotFound, Object, UnknownOutcome
from scheduler.ledger.ledger import advance
from scheduler.model.pod import Pod
from scheduler.model.reservation import Event, Row, State
from scheduler.settling import Settler, Writer

log = structlog.get_logger(__name__)

POSTS_MAX = 3
DRAIN_S = 3.0
BUSY, BUSY_S = 429, 0.1  # status of an API server that did nothing, and the shortest wait for it
BOUND = frozenset({State.BOUND, State.RUNNING, State.RECLAIMING})

_Answer: TypeAlias = asyncio.Future[None]


class BindRefused(Exception):  # noqa: N818 - an answer to kube-scheduler, not a failure of ours
    """The bind cannot be; kube-scheduler shows the sentence and tries the pod again."""


REFUSALS = (BindRefused, DoesNotFit, StoreError, ApiError, UnknownOutcome)
"""Ways for a bind to end without a Binding; any other is a bug."""


@dataclass(slots=True)
class Binder:
    """Runs binds, one per pod at a time; a repeated call for the same pod joins the one that runs.

    The answer is given as soon as the API server has the Binding; that the ledger knows follows.
    """

    desk: Desk
    cluster: Cluster
    writer: Writer
    settler: Settler
    clock: Clock
    deadline_s: float = 1.5
    _running: dict[str, tuple[str, asyncio.Task[None], _Answer]] = field(default_factory=dict)

    async def bind(self, args: BindArgs) -> str:
        """Bind and return an empty string, or the sentence that says why not (yet).

        Past the deadline the bind goes on in the background and its outcome is read back.
        """
        node, _, answer = self._running.get(args.uid, ("", None, None))
        if answer is None:
            until_s, loop = self.clock.monotonic() + self.deadline_s, asyncio.get_running_loop()
            answer = loop.create_future()
            task = loop.create_task(self._bind(args, until_s, answer))
            self._running[args.uid] = (args.node, task, answer)
            task.add_done_callback(lambda done: self._done(args.uid, done))
        elif node != args.node:
            return f"a bind to node {node} is in flight for this pod"
        try:
            async with asyncio.timeout(self.deadline_s):
                await asyncio.shield(answer)
        except TimeoutError:
            return "the bind takes longer than its deadline; its outcome is read back"
        except REFUSALS as error:
            return str(error) or type(error).__name__
        return ""

    async def drain(self) -> None:
        """Let the binds in flight end, for a while; the others are left to the next start, which reads them back."""
        running = [task for _, task, _ in self._running.values()]
        if running:
            _, late = await asyncio.wait(running, timeout=DRAIN_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _done(self, uid: str, task: asyncio.Task[None]) -> None:
        _, _, answer = self._running.pop(uid)
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            answer.cancel()
        elif error is None and not answer.done():
            answer.set_result(None)
        if error is not None:
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # whoever asked may be gone
            say = log.info if isinstance(error, REFUSALS) else log.error
            say("bind.refused", request=uid, error=str(error), kind=type(error).__name__)
            self.settler.mark(uid)

    async def _bind(self, args: BindArgs, until_s: float, answer: _Answer) -> None:
        async with self.settler.alone(args.uid):
            await self._bind_alone(args, until_s, answer)

    async def _bind_alone(self, args: BindArgs, until_s: float, answer: _Answer) -> None:
        row = self.desk.book.rows.get(args.uid)
        if row is not None and row.state is State.BINDING:
            await self.settler.resolve(args.uid)
            row = self.desk.book.rows.get(args.uid)
        if row is not None and row.state in BOUND:
            if row.node != args.node:
                raise BindRefused(f"this pod is already bound to node {row.node}")
            return
        if row is not None and row.state is State.FAILED:
            raise BindRefused("all attempts of this pod are spent: see why they failed, then make a new pod")
        pod = await self._live(args)
        if self.clock.monotonic() >= until_s:  # kube-scheduler no longer keeps the cpu and memory it chose
            raise BindRefused("the deadline passed before anything was claimed; kube-scheduler tries again")
        reserved = row is not None and row.state is State.RESERVED  # a claim of it judges nothing again
        if reserved and (word := self.desk.registry.unsound(pod.uid, args.node)):
            raise DoesNotFit(word)
        changes = self.desk.claim(pod, args.node)
        try:
            await fault("bind.commit.before")
            await self.writer.commit(changes)
        except Exception:
            self.desk.unclaim(changes)
            raise
        await fault("bind.commit.after")
        await self._post(pod, changes[-1].after)
        answer.set_result(None)
        await fault("bind.confirm.before")
        await self._confirm(args.uid)
        log.info("bound", pod=f"{args.namespace}/{args.name}", node=args.node, request=args.uid)

    async def _live(self, args: BindArgs) -> Pod:
        """Return the pod as the watch or the API server has it, if it may be bound."""
        pod = self.desk.registry.pods.get(args.uid)
        if pod is None:
            try:
                pod = read_pod(await self.cluster.get("pods", args.namespace, args.name))
            except NotFound:
                raise BindRefused("the pod is gone") from None
        if (pod.uid, pod.request.namespace, pod.request.name) != (args.uid, args.namespace, args.name):
            raise BindRefused("the pod of this name has another uid now")
        if not pod.ours:
            raise BindRefused("the pod does not name schedulerName tessera")
        if pod.node or pod.terminal or pod.deleting or pod.gates:
            raise BindRefused("the pod is bound, gated, ended or being deleted")
        if pod.request.refusal is not None:
            raise BindRefused(pod.request.refusal.text)
        return pod

    async def _post(self, pod: Pod, row: Row) -> None:
        """POST the Binding: again with a fresh resourceVersion after a stranger's touch, and later to a busy server."""
        version, posts = pod.resource_version, 0
        while posts < POSTS_MAX:
            posts += 1
            await fault("bind.post.before")
            try:
                await self.cluster.bind(row.namespace, row.name, _body(row, version))
            except Conflict:
                now = await self._read(row)
                if now is None or now.node or now.deleting or now.touch >= row.epoch:
                    break
                version = now.resource_version
            except ApiError as error:
                if error.status != BUSY:
                    break
                posts -= 1  # nothing was tried
                await self.clock.sleep(max(error.retry_after_s, BUSY_S))
            except UnknownOutcome:
                break
            else:
                await fault("bind.post.after")
                return
        await self.settler.resolve(row.id)
        now_row = self.desk.book.rows.get(row.id)
        if now_row is None or now_row.state not in BOUND or now_row.node != row.node:
            raise BindRefused("the Binding was not accepted; the reservation was given back")

    async def _read(self, row: Row) -> Pod | None:
        try:
            pod = read_pod(await self.cluster.get("pods", row.namespace, row.name))
        except NotFound:
            return None
        return pod if pod.uid == row.id else None

    async def _confirm(self, uid: str) -> None:
        """Move BINDING to BOUND; when the commit fails the row stays BINDING and is settled later."""
        row = self.desk.book.rows[uid]
        if row.state is not State.BINDING:
            return
        change = advance(row, Event.POST, now_us=self.clock.wall_us(), fence=self.desk.fence)
        self.desk.book.apply((change,))
        try:
            await self.writer.commit((change,))
        except StoreError as error:
            self.desk.book.revert((change,))
            self.settler.mark(uid)
            log.warning("bind.confirm_later", request=uid, error=str(error))


def _body(row: Row, resource_version: str) -> Object:
    """Return the Binding: node, devices and preconditions in one write."""
    return {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {
            "name": row.name,
            "namespace": row.namespace,
            "uid": row.id,
            "resourceVersion": resource_version,
            "annotations": {ALLOCATION: row.allocation},
        },
        "target": {"apiVersion": "v1", "kind": "Node", "name": row.node},
    }
