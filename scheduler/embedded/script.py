"""The demo's play: machines, people who send pods, change their minds and leave, and one machine that breaks.

All of it goes through the API server's own verbs, so Tessera sees nothing that a real cluster would not show it.
Everything is drawn from one seeded source in a fixed order: the same seed plays the same piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from scheduler import GPU, PREFIX, SCHEDULER_NAME, SHARE
from scheduler.clock import Clock
from scheduler.ids import NewId
from scheduler.kube.port import Cluster, Conflict, NotFound, Object

from .kubelet import RUNTIME

GPUS = 8
POOLS = (  # product label, memory in MiB, mode, share of the nodes
    ("NVIDIA-H100-80GB-HBM3", 81_559, "exact", 3),
    ("NVIDIA-A100-SXM4-80GB", 81_920, "observed", 3),
    ("NVIDIA-L40S", 46_068, "exact", 2),
)
SIZES = ((1, 40), (2, 22), (4, 14), (8, 8), (0, 16))  # GPUs of a pod, and how often of 100
WISHES = (("H100", 10), ("A100", 8), ("L40S,A100", 6), ("", 76))  # gpu-model, and how often of 100
MORE_ARRIVALS = 0.2  # chance of a second pod within one second
WISH = PREFIX + "gpu-model"
NOBODYS, NOBODYS_EVERY = "B200", 97  # now and then somebody asks for a model that is not there, and gives up
LIFE_S = (40.0, 380.0)
PATIENCE = 0.04  # how many take their pod back early
NAMESPACES = ("vision", "speech", "robotics", "default")
BREAKS_AT, DOWN_S, EVICTED_S = 0.45, 150.0, 20.0
UNREACHABLE = "node.kubernetes.io/unreachable"
TICK_S = 1.0

_Value = TypeVar("_Value")


def machines(count: int) -> list[Object]:
    """Return Node objects with 8 GPUs each: pools of three models, two of them exact, one observed."""
    total = sum(share for *_, share in POOLS)
    limits = [round(count * sum(share for *_, share in POOLS[: pool + 1]) / total) for pool in range(len(POOLS))]
    pools = [next(pool for pool, limit in enumerate(limits) if number < limit) for number in range(count)]
    return [_machine(number, pool) for number, pool in enumerate(pools)]


def _machine(number: int, pool: int) -> Object:
    product, memory_mib, mode, _ = POOLS[pool]
    amounts = {"cpu": "128", "memory": "1Ti", "ephemeral-storage": "4Ti", "pods": "110", GPU: str(GPUS)}
    if mode == "exact":
        amounts[SHARE] = str(64 * GPUS)
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": f"gpu-{number:03}",
            "labels": {
                "kubernetes.io/hostname": f"gpu-{number:03}",
                "topology.kubernetes.io/zone": f"zone-{'abc'[number % 3]}",
                PREFIX + "mode": mode,
                "nvidia.com/gpu.product": product,
                "nvidia.com/gpu.count": str(GPUS),
                "nvidia.com/gpu.memory": str(memory_mib),
            },
        },
        "status": {
            "capacity": dict(amounts),
            "allocatable": dict(amounts),
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    }


@dataclass(slots=True)
class Script:
    """Plays on one cluster.

    Attributes:
        submitted: uid -> namespace/name of every pod that was sent, in order.
        broken: name of the machine that is out of order now, else empty.
        notes: what happened beside the usual, as (virtual second, sentence).
    """

    cluster: Cluster
    clock: Clock
    rng: Random
    new_id: NewId
    submitted: dict[str, str] = field(default_factory=dict)
    broken: str = ""
    notes: list[tuple[float, str]] = field(default_factory=list)
    _departing: dict[str, float] = field(default_factory=dict)  # uid -> when its owner takes it back
    _sent: int = 0

    async def arrivals(self, seconds: float) -> None:
        """Send at least one pod each second, for so many seconds."""
        end_s = self.clock.monotonic() + seconds
        while self.clock.monotonic() < end_s:
            for _ in range(1 + (self.rng.random() < MORE_ARRIVALS)):
                await self._send()
            await self.clock.sleep(TICK_S)

    async def breakdown(self, after_s: float) -> None:
        """Let one machine fail after so many seconds: tainted, gone with its pods, and back under the same name."""
        await self.clock.sleep(after_s)
        nodes = [node for node in (await self.cluster.list("nodes")).items if not node.get("spec", {}).get("taints")]
        node = self.rng.choice(nodes)
        name = self.broken = node["metadata"]["name"]
        self._note(f"{name} stops answering")
        taints = [{"key": UNREACHABLE, "effect": effect} for effect in ("NoSchedule", "NoExecute")]
        await self.cluster.patch("nodes", "", name, {"spec": {"taints": taints}})
        await self.clock.sleep(EVICTED_S)
        await self.cluster.delete("nodes", "", name, uid=node["metadata"]["uid"])
        lost = [pod for pod in await self._pods() if pod["spec"].get("nodeName") == name]
        self._note(f"{name} is removed; what still ran there is sent anew")
        for pod in lost:
            await self._take_back(pod, grace_s=0)
            if pod["status"].get("phase") not in ("Succeeded", "Failed"):
                await self._send(again=pod)
        await self.clock.sleep(DOWN_S)
        fresh = {**node, "metadata": {key: node["metadata"][key] for key in ("name", "labels")}, "spec": {}}
        await self.cluster.create("nodes", "", fresh)
        await self.cluster.patch("nodes", "", name, {"status": node["status"]}, subresource="status")
        self.broken = ""
        self._note(f"{name} is back, a new node of the old name")

    async def departures(self, pods: Iterable[Object]) -> None:
        """Take away what has ended or is no longer wanted.

        Args:
            pods: all pods as they are now; call it once a second.
        """
        now_s = self.clock.monotonic()
        for pod in pods:
            metadata, phase = pod["metadata"], pod["status"].get("phase")
            uid = metadata["uid"]
            if phase in ("Succeeded", "Failed"):
                await self._take_back(pod)
            elif "deletionTimestamp" in metadata:
                continue
            elif self._departing.get(uid, now_s + 1) <= now_s:
                self._departing.pop(uid)
                await self._take_back(pod, grace_s=1)

    # inside

    async def _pods(self) -> list[Object]:
        pods: list[Object] = []
        after = ""
        while True:
            page = await self.cluster.list("pods", after=after)
            pods += page.items
            after = page.next
            if not after:
                return pods

    async def _send(self, again: Object | None = None) -> None:
        """Create one pod, or the successor of one that was lost."""
        self._sent += 1
        if again is None:
            namespace = self.rng.choice(NAMESPACES)
            body = self._pod()
        else:
            old = again["metadata"]
            namespace = old["namespace"]
            name = f"{old['name'].rpartition('-')[0]}-{self._sent:05}"
            metadata = {key: old[key] for key in ("labels", "ownerReferences") if key in old} | {"name": name}
            if wish := old.get("annotations", {}).get(WISH):
                metadata["annotations"] = {WISH: wish}
            kept = ("containers", "schedulerName", "restartPolicy")
            body = {"metadata": metadata, "spec": {key: again["spec"][key] for key in kept}}
        body["metadata"].setdefault("annotations", {})[RUNTIME] = f"{self.rng.uniform(*LIFE_S):.1f}"
        leaves_s = self.rng.uniform(5.0, LIFE_S[0]) if self.rng.random() < PATIENCE else 0.0
        if body["metadata"]["annotations"].get(WISH) == NOBODYS:
            leaves_s = LIFE_S[0]
        pod = await self.cluster.create("pods", namespace, body)
        uid = pod["metadata"]["uid"]
        self.submitted[uid] = f"{namespace}/{pod['metadata']['name']}"
        if leaves_s:
            self._departing[uid] = self.clock.monotonic() + leaves_s

    def _pod(self) -> Object:
        gpus = _drawn(self.rng, SIZES)
        wish = _drawn(self.rng, WISHES) if gpus else ""
        if gpus and self._sent % NOBODYS_EVERY == 0:
            wish = NOBODYS
        what = ("web", "tune", "train", "train", "train")[gpus.bit_length()] if gpus else "prepare"
        requests = {"cpu": str(4 * gpus or self.rng.choice((2, 8, 16))), "memory": f"{32 * gpus or 8}Gi"}
        resources: Object = {"requests": requests}
        if gpus:
            resources["limits"] = {GPU: str(gpus)}
        metadata: Object = {
            "name": f"{what}-{self._sent:05}",
            "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": what, "uid": self.new_id(), "controller": True}
            ],
        }
        if wish:
            metadata["annotations"] = {WISH: wish}
        container = {"name": "main", "image": "registry.local/job:1", "resources": resources}
        spec = {"schedulerName": SCHEDULER_NAME, "restartPolicy": "Never", "containers": [container]}
        return {"metadata": metadata, "spec": spec}

    async def _take_back(self, pod: Object, *, grace_s: int | None = None) -> None:
        metadata = pod["metadata"]
        self._departing.pop(metadata["uid"], None)
        with contextlib.suppress(NotFound, Conflict):  # somebody was faster
            await self.cluster.delete(
                "pods", metadata["namespace"], metadata["name"], uid=metadata["uid"], grace_s=grace_s
            )

    def _note(self, sentence: str) -> None:
        self.notes.append((self.clock.monotonic(), sentence))


def _drawn(rng: Random, weighted: Sequence[tuple[_Value, int]]) -> _Value:
    return rng.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]
