"""A whole cluster in one process: API server, kube-scheduler and kubelets, joined; Tessera is all that is missing.

`extender` is where kube-scheduler's calls go. While it is None they fail as calls to a port on which nobody listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeAlias

import orjson

from scheduler.clock import Clock
from scheduler.errors import ConfigError
from scheduler.ids import NewId
from scheduler.kube.port import ApiError, Kind, Object

from .cluster import EmbeddedCluster
from .kube_scheduler import KubeScheduler
from .kubelet import Kubelet

FILES: tuple[tuple[Kind, str], ...] = (("nodes", "Node"), ("pods", "Pod"))


Answer: TypeAlias = Callable[[bytes], Awaitable[tuple[int, bytes]]]


class Verbs(Protocol):
    """The extender's answers: body in, HTTP status and body out."""

    async def filter(self, body: bytes) -> tuple[int, bytes]:
        """Answer POST /filter."""
        ...

    async def prioritize(self, body: bytes) -> tuple[int, bytes]:
        """Answer POST /prioritize."""
        ...

    async def bind(self, body: bytes) -> tuple[int, bytes]:
        """Answer POST /bind."""
        ...


class World:
    """An embedded cluster with its kube-scheduler and kubelets.

    Attributes:
        cluster: the API server.
        extender: whom kube-scheduler asks; None = nobody answers.
    """

    def __init__(self, clock: Clock, new_id: NewId, rng: Random) -> None:
        """Join the parts; nothing runs yet. `rng` draws kube-scheduler's ties."""
        self.cluster = EmbeddedCluster(clock, new_id)
        self.extender: Verbs | None = None
        self.kube_scheduler = KubeScheduler(self.cluster, clock, self._ask, rng=rng)
        self.kubelet = Kubelet(self.cluster, clock)

    def load(self, folder: Path) -> None:
        """Fill the cluster from `nodes.json` and `pods.json`, lists as `kubectl get -o json` writes them.

        Raises:
            ConfigError: a file is missing, is no such list, or holds an object the API server would refuse.
        """
        for kind, name in FILES:
            path = folder / f"{kind}.json"
            try:
                self.cluster.preload(kind, _items(path, name))
            except ApiError as error:
                raise ConfigError(f"{path}: {error.message}; correct the object and start again") from error

    def dump(self, folder: Path) -> None:
        """Write `nodes.json` and `pods.json` as they are now; makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, _ in FILES:
            items = self.cluster.snapshot(kind)
            body = {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": items}
            (folder / f"{kind}.json").write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2))

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Let kube-scheduler and kubelets run for as long as this is open; one that breaks ends it, loudly."""
        owner = asyncio.current_task()
        assert owner is not None, "only a task can be told that a part has broken"
        tasks = [asyncio.create_task(part.run()) for part in (self.kube_scheduler, self.kubelet)]
        for task in tasks:
            task.add_done_callback(lambda done: None if done.cancelled() else owner.cancel())
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):
                    raise end

    async def _ask(self, verb: str, body: bytes) -> tuple[int, bytes]:
        if self.extender is None:
            raise ConnectionRefusedError("nobody listens on the extender's port")
        answer: Answer = getattr(self.extender, verb)
        return await answer(body)


def _items(path: Path, kind: str) -> list[Object]:
    """Read one list of objects."""
    try:
        body: Any = orjson.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); it must hold a Kubernetes list") from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    items = body.get("items") if isinstance(body, dict) else None
    if not isinstance(items, list):
        raise ConfigError(f'{path}: must be a Kubernetes list, {{"kind": "List", "items": [..]}}')
    for index, item in enumerate(items):
        if not isinstance(item, dict) or item.get("kind", kind) != kind or not isinstance(item.get("metadata"), dict):
            raise ConfigError(f"{path}: item {index} is no {kind} object")
    return items
