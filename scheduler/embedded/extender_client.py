"""kube-scheduler's side of the extender protocol: bodies out, answers in, every fault one error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import orjson

from scheduler.clock import Clock
from scheduler.kube.port import Object

Transport: TypeAlias = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
_OK = 200


class ExtenderError(Exception):
    """The extender was not there, was late, answered with `Error`, or answered something that is no answer."""


class ExtenderClient:
    """One extender with `nodeCacheCapable: true` and `ignorable: false`.

    A call that is given up goes on at the other end, as behind a real socket.
    """

    def __init__(self, transport: Transport, clock: Clock, *, timeout_s: float = 2.0, latency_s: float = 0.002) -> None:
        """Call through `transport(verb, body) -> (status, body)`; every call costs `latency_s` beside its answer."""
        self._transport = transport
        self._clock = clock
        self._timeout_s = timeout_s
        self._latency_s = latency_s
        self._open: set[asyncio.Task[tuple[int, bytes]]] = set()

    async def filter(self, pod: Object, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the nodes that are left, in the order of `names`, and the reason for each refused one that has any.

        Raises:
            ExtenderError: no usable answer; a name outside the request is one too.
        """
        answer = await self._call("filter", {"Pod": _bare(pod), "Nodes": None, "NodeNames": list(names)})
        if not isinstance(answer, Mapping):
            raise ExtenderError("filter: the answer is no object")
        parts = {str(key).lower(): value for key, value in answer.items()}
        if parts.get("error"):
            raise ExtenderError(str(parts["error"]))
        passed = set(parts.get("nodenames") or ())
        if not passed <= set(names):
            raise ExtenderError("filter: the extender claims a filtered node which is not found in the input node list")
        reasons = {**(parts.get("failednodes") or {}), **(parts.get("failedandunresolvablenodes") or {})}
        return [name for name in names if name in passed], reasons

    async def prioritize(self, pod: Object, names: Sequence[str]) -> dict[str, int]:
        """Return scores 0..10 by node name.

        Raises:
            ExtenderError: no usable answer.
        """
        answer = await self._call("prioritize", {"Pod": _bare(pod), "Nodes": None, "NodeNames": list(names)})
        try:
            return {one["Host"]: int(one["Score"]) for one in answer}
        except (KeyError, TypeError, ValueError) as error:
            raise ExtenderError("prioritize: the answer is no list of hosts and scores") from error

    async def bind(self, pod: Object, node: str) -> None:
        """Let the extender bind.

        Raises:
            ExtenderError: it did not, or nobody knows.
        """
        metadata = pod["metadata"]
        names = {"PodName": metadata["name"], "PodNamespace": metadata["namespace"], "PodUID": metadata["uid"]}
        answer = await self._call("bind", {**names, "Node": node})
        error = {str(key).lower(): value for key, value in answer.items()}.get("error")
        if error:
            raise ExtenderError(str(error))

    async def close(self) -> None:
        """Cancel the calls that were given up and still go on."""
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _call(self, verb: str, body: Object) -> Any:
        await self._clock.sleep(self._latency_s)
        task = asyncio.ensure_future(self._transport(verb, orjson.dumps(body)))
        self._open.add(task)
        task.add_done_callback(self._closed)
        done, _ = await asyncio.wait({task}, timeout=self._timeout_s)
        if not done:
            raise ExtenderError(f"{verb}: no answer within {self._timeout_s:g} s")
        try:
            status, answer = task.result()
        except (OSError, TimeoutError) as error:
            raise ExtenderError(f"{verb}: {error}") from error
        if status != _OK:
            raise ExtenderError(f"{verb}: failed with code {status}")
        try:
            return orjson.loads(answer)
        except orjson.JSONDecodeError as error:
            raise ExtenderError(f"{verb}: the answer is not JSON") from error

    def _closed(self, task: asyncio.Task[tuple[int, bytes]]) -> None:
        self._open.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more


def _bare(pod: Object) -> Object:
    """Return the pod as kube-scheduler sends it."""
    metadata = {key: value for key, value in pod["metadata"].items() if key != "managedFields"}
    sent = {"metadata": metadata, "spec": pod["spec"], "status": pod["status"]}
    return {key: value for key, value in sent.items() if value}
