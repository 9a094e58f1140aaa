"""Somebody who watches the cluster from outside and audits each node whenever its pods change.

It sees what any user with read rights sees, and knows nothing of ledger or inventory.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from scheduler.clock import Clock
from scheduler.kube.port import Cluster, Object

from . import audit
from .following import follow


@dataclass(slots=True)
class Witness:
    """Follows nodes and pods and keeps what was wrong at any moment.

    Attributes:
        nodes: by name.
        pods: by uid.
        over_allocations, slice_overlaps, unannotated: findings so far, a sentence each.
    """

    cluster: Cluster
    clock: Clock
    nodes: dict[str, Object] = field(default_factory=dict)
    pods: dict[str, Object] = field(default_factory=dict)
    over_allocations: list[str] = field(default_factory=list)
    slice_overlaps: list[str] = field(default_factory=list)
    unannotated: list[str] = field(default_factory=list)
    _on_node: dict[str, dict[str, Object]] = field(default_factory=dict)

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_nodes())
            tasks.create_task(self._follow_pods())

    def waiting(self) -> list[Object]:
        """Return the pods that are not bound and have not ended."""
        return [pod for pod in self.pods.values() if not pod["spec"].get("nodeName") and not ended(pod)]

    def bound(self) -> list[Object]:
        """Return the pods that are bound and have not ended."""
        return [pod for pod in self.pods.values() if pod["spec"].get("nodeName") and not ended(pod)]

    async def _follow_nodes(self) -> None:
        async for change, node in follow(self.cluster, "nodes", self.clock):
            if change == "SYNCED":
                continue
            name = node["metadata"]["name"]
            if change == "DELETED":
                self.nodes.pop(name, None)
            else:
                self.nodes[name] = node
                self._audit(name)

    async def _follow_pods(self) -> None:
        async for change, pod in follow(self.cluster, "pods", self.clock):
            if change == "SYNCED":
                continue
            uid, name = pod["metadata"]["uid"], pod["spec"].get("nodeName", "")
            here = self._on_node.setdefault(name, {})
            if change == "DELETED":
                self.pods.pop(uid, None)
                here.pop(uid, None)
                continue
            self.pods[uid] = pod
            if name and not ended(pod):
                here[uid] = pod
                self._audit(name)
            else:
                here.pop(uid, None)

    def _audit(self, name: str) -> None:
        node, pods = self.nodes.get(name), list(self._on_node.get(name, {}).values())
        nodes = [node] if node else []
        self.over_allocations += [*audit.over_allocations(nodes, pods), *audit.doubled(pods)]
        self.slice_overlaps += audit.slice_overlaps(nodes, pods)
        self.unannotated += audit.unannotated(pods)


def ended(pod: Object) -> bool:
    """Say whether a pod has ended: it holds nothing any more."""
    return pod["status"].get("phase") in {"Succeeded", "Failed"}
