"""An API server in memory: the same port as the real one, with the behaviour measured on Kubernetes 1.36.

The demo, the simulation tests and `--embedded` run on it. Objects are kept as bytes and parsed for each reader, so no
caller can change another's. Invariant: one counter numbers every change of every kind; a change that changes nothing
gets no number and tells nobody.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

import orjson

from scheduler.clock import Clock
from scheduler.ids import NewId
from scheduler.kube.port import (
    ApiError,
    Conflict,
    Gone,
    Kind,
    NotFound,
    Object,
    Page,
    PatchBody,
    PatchType,
    UnknownOutcome,
    WatchEvent,
)

from .injected import Faults, Verb
from .objects import API_VERSIONS, bound, created, deleted, invalid, updated
from .patching import patched
from .watching import Happening, History, stream

KINDS: tuple[Kind, ...] = (
    "pods",
    "nodes",
    "leases",
    "events",
    "secrets",
    "mutatingwebhookconfigurations",
    "namespaces",
    "queues",
)
UNNAMESPACED = frozenset({"nodes", "namespaces", "queues", "mutatingwebhookconfigurations"})
_OPEN_LISTS = 64  # lists whose further pages may still be asked for


@dataclass(frozen=True, slots=True)
class _Stored:
    raw: bytes
    object: Object  # never handed out, never changed


class EmbeddedCluster:
    """Kubernetes objects in memory.

    Attributes:
        faults: what goes wrong with its calls; None = nothing.
        latency_s: how long every call takes before it has its effect. At 0 a loop of calls takes no virtual time.
    """

    def __init__(
        self,
        clock: Clock,
        new_id: NewId,
        *,
        faults: Faults | None = None,
        latency_s: float = 0.001,
        history: int = 50_000,
    ) -> None:
        """Start empty; `history` is how many events of each kind a watch may go back."""
        self._clock = clock
        self._new_id = new_id
        self._version = 1
        self._objects: dict[Kind, dict[str, _Stored]] = {kind: {} for kind in KINDS}
        self._history = {kind: History(history) for kind in KINDS}
        self._lists: dict[tuple[str, int], list[bytes]] = {}
        self.faults = faults
        self.latency_s = latency_s

    # what only the owner of the cluster does

    def preload(self, kind: Kind, objects: Iterable[Object]) -> None:
        """Put objects in at once, with the uid, times and status they bring; for the start of a run.

        Raises:
            ApiError: one is not valid or its name is taken.
        """
        for given in objects:
            body = orjson.loads(orjson.dumps(given))
            metadata = body.setdefault("metadata", {})
            metadata.pop("resourceVersion", None)
            namespace = "" if kind in UNNAMESPACED else metadata.get("namespace", "default")
            fresh = created(kind, namespace, body, metadata.get("uid") or self._new_id(), self._clock.wall_us())
            for key in ("creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"):
                if key in metadata:
                    fresh["metadata"][key] = metadata[key]
            if "status" in body:
                fresh["status"] = {**fresh.get("status", {}), **body["status"]}
            self._add(kind, fresh)

    def snapshot(self, kind: Kind) -> list[Object]:
        """Return all objects of a kind, by namespace and name, as a list would; takes no time and never fails."""
        return [orjson.loads(stored.raw) for _, stored in sorted(self._objects[kind].items())]

    def compact(self) -> None:
        """Forget all history: older watches and the further pages of older lists answer 410."""
        for history in self._history.values():
            history.forget(self._version)
        self._lists.clear()

    # the port

    async def list(self, kind: Kind, *, limit: int = 500, after: str = "") -> Page:
        """Return one page by namespace and name; all pages of a list show the same moment."""
        await self._arrive("list")
        if after:
            version, offset = self._continued(kind, after)
            raws = self._lists[kind, version]
        else:
            version, offset = self._version, 0
            raws = [stored.raw for _, stored in sorted(self._objects[kind].items())]
        end = offset + limit if limit > 0 else len(raws)
        if end < len(raws):
            self._lists[kind, version] = raws
            while len(self._lists) > _OPEN_LISTS:
                del self._lists[next(iter(self._lists))]
        following = f"{kind}:{version}:{end}" if end < len(raws) else ""
        return Page([orjson.loads(raw) for raw in raws[offset:end]], str(version), following)

    async def watch(self, kind: Kind, resource_version: str, *, timeout_s: float) -> AsyncGenerator[WatchEvent, None]:
        """Yield what happens to a kind after a resourceVersion."""
        await self._arrive("watch")
        history = self._history[kind]
        follower = history.follow(int(resource_version or 0))
        events = stream(
            follower,
            clock=self._clock,
            faults=self.faults,
            bookmark=lambda: self._bookmark(kind),
            timeout_s=timeout_s,
        )
        try:
            async for event in events:
                yield event
        finally:
            history.leave(follower)

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """Return one object."""
        await self._arrive("get")
        return _copy(self._stored(kind, namespace, name))

    async def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        """Create and return."""
        sent = _plain(body)
        lost = await self._arrive("create")
        stored = self._add(kind, created(kind, namespace, sent, self._new_id(), self._clock.wall_us()))
        return self._reply(stored, lost=lost)

    async def replace(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        """PUT; a uid or resourceVersion in the body is a precondition. A Lease that is absent is created."""
        sent = _plain(body)
        lost = await self._arrive("replace")
        metadata = sent.get("metadata") or {}
        if kind == "leases" and _key(namespace, name) not in self._objects[kind]:
            metadata.pop("resourceVersion", None)
            fresh = created(kind, namespace, sent, self._new_id(), self._clock.wall_us())
            return self._reply(self._add(kind, fresh), lost=lost)
        before = self._stored(kind, namespace, name)
        _check_uid(kind, before.object, metadata.get("uid", ""))
        if kind == "leases" and not metadata.get("resourceVersion"):
            raise invalid(kind, name, "metadata.resourceVersion: must be specified for an update")
        return self._reply(self._change(kind, before, updated(kind, before.object, sent, "")), lost=lost)

    async def patch(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        body: PatchBody,
        *,
        patch_type: PatchType = "merge",
        subresource: str = "",
    ) -> Object:
        """Patch the object or its status; one that changes nothing keeps the resourceVersion."""
        if subresource not in ("", "status"):
            raise NotFound(404, "NotFound", f"{kind} have no subresource {subresource}")
        sent: PatchBody = orjson.loads(orjson.dumps(body))
        lost = await self._arrive("patch")
        before = self._stored(kind, namespace, name)
        if kind == "queues" and patch_type == "strategic":
            raise ApiError(415, "UnsupportedMediaType", "custom resources know no strategic merge patch")
        wanted = patched(before.object, sent, patch_type)
        return self._reply(self._change(kind, before, updated(kind, before.object, wanted, subresource)), lost=lost)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str = "", grace_s: int | None = None) -> None:
        """Delete; a bound pod that is given time gets a deletionTimestamp and waits for its kubelet."""
        lost = await self._arrive("delete")
        before = self._stored(kind, namespace, name)
        _check_uid(kind, before.object, uid)
        last, at_once = before, True
        if kind == "pods":
            marked, at_once = deleted(before.object, grace_s, self._clock.wall_us())
            last = self._change(kind, before, marked)
        if at_once:
            del self._objects[kind][_key(namespace, name)]
            self._tell(kind, "DELETED", last.object)
        self._reply(before, lost=lost)

    async def bind(self, namespace: str, name: str, body: Object) -> None:
        """Bind a pod, its annotations and labels in the same update."""
        sent = _plain(body)
        lost = await self._arrive("bind")
        before = self._stored("pods", namespace, name)
        if (sent.get("metadata") or {}).get("name", name) != name:
            raise ApiError(400, "BadRequest", "name in URL does not match name in Binding object")
        after = self._change("pods", before, bound(before.object, sent, self._clock.wall_us()))
        self._reply(after, lost=lost)

    async def close(self) -> None:
        """Do nothing: there are no connections."""

    # inside

    async def _arrive(self, verb: Verb) -> bool:
        """Take the call's time and draw its fate; return whether its reply will be lost."""
        await self._clock.sleep(self.latency_s)
        return self.faults is not None and self.faults.strike(verb)

    def _reply(self, stored: _Stored, *, lost: bool) -> Object:
        if lost:
            raise UnknownOutcome("injected: done, and the reply was lost")
        return _copy(stored)

    def _stored(self, kind: Kind, namespace: str, name: str) -> _Stored:
        stored = self._objects[kind].get(_key(namespace, name))
        if stored is None:
            raise NotFound(404, "NotFound", f'{kind} "{name}" not found')
        return stored

    def _add(self, kind: Kind, fresh: Object) -> _Stored:
        metadata = fresh["metadata"]
        key = _key(metadata.get("namespace", ""), metadata["name"])
        if key in self._objects[kind]:
            raise Conflict(409, "AlreadyExists", f'{kind} "{metadata["name"]}" already exists')
        if kind == "pods":
            self._inhabit(metadata["namespace"])
        stored = self._tell(kind, "ADDED", fresh)
        self._objects[kind][key] = stored
        return stored

    def _inhabit(self, namespace: str) -> None:
        """Make a pod's namespace, where nobody did: a real API server would refuse the pod."""
        if _key("", namespace) not in self._objects["namespaces"]:
            body = {"metadata": {"name": namespace}}
            self._add("namespaces", created("namespaces", "", body, f"namespace-{namespace}", self._clock.wall_us()))

    def _change(self, kind: Kind, before: _Stored, after: Object) -> _Stored:
        """Store the new state, unless it is the old one."""
        if after == before.object:
            return before
        metadata = after["metadata"]
        stored = self._tell(kind, "MODIFIED", after)
        self._objects[kind][_key(metadata.get("namespace", ""), metadata["name"])] = stored
        return stored

    def _tell(self, kind: Kind, event: str, changed: Object) -> _Stored:
        """Number a change and tell it to the watches."""
        self._version += 1
        numbered = {**changed, "metadata": {**changed["metadata"], "resourceVersion": str(self._version)}}
        raw = orjson.dumps(numbered)
        self._history[kind].add(Happening(self._version, event, raw))
        return _Stored(raw, numbered)

    def _continued(self, kind: Kind, after: str) -> tuple[int, int]:
        """Read a page token."""
        try:
            of, version, offset = after.split(":")
            key = (int(version), int(offset))
        except ValueError:
            of, key = "", (0, 0)
        if of != kind:
            raise ApiError(400, "BadRequest", "continue key is not valid")
        if (kind, key[0]) not in self._lists:
            raise Gone(410, "Expired", "The provided continue parameter is too old to display a consistent list result")
        return key

    def _bookmark(self, kind: Kind) -> WatchEvent:
        api_version, name = API_VERSIONS[kind]
        metadata = {"resourceVersion": str(self._version)}
        return WatchEvent("BOOKMARK", {"apiVersion": api_version, "kind": name, "metadata": metadata})


def _key(namespace: str, name: str) -> str:
    return f"{namespace}/{name}"


def _plain(body: Object) -> Object:
    """Return the body as it would arrive, so that the caller may change his copy at once."""
    sent: Object = orjson.loads(orjson.dumps(body))
    return sent


def _copy(stored: _Stored) -> Object:
    copy: Object = orjson.loads(stored.raw)
    return copy


def _check_uid(kind: Kind, before: Object, uid: str) -> None:
    actual = before["metadata"]["uid"]
    if uid and uid != actual:
        why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {actual}"
        raise Conflict(
            409, "Conflict", f'Operation cannot be fulfilled on {kind} "{before["metadata"]["name"]}": {why}'
        )
