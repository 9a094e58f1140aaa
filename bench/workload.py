"""Nodes and pods of a bench run, drawn by seed: every kind of ask that is built, 90-110 % of the cluster's GPUs.

Invariant: the same seed and sizes give the same plan, whatever the machine; nothing here looks at a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.kube_objects import node_object, pod_object

Json = dict[str, Any]
Rng = np.random.Generator

GPU = "nvidia.com/gpu"
NAMESPACE = "default"
ZONES = ("zone-a", "zone-b", "zone-c")
TAINT = {"key": "dedicated", "value": "research", "effect": "NoSchedule"}
CLASSES = {"bench-high": 1000, "bench-low": -10}
SIZES = (0, 1, 2, 4, 8)
DEMAND = (1.0, 1.08)  # where the total is drawn; rounding to whole pods stays within 0.9 and 1.1
ENDING = 0.2  # share of pods that may end during the run; few enough that some of the rest must wait to its end


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of node: its share of the cluster, GPUs and what it is labelled with."""

    share: float
    gpus: int
    product: str
    memory_mib: int
    cpu: int
    memory_gib: int


KINDS = (
    Kind(0.20, 8, "NVIDIA-H100-80GB-HBM3", 81559, 96, 1024),
    Kind(0.20, 8, "NVIDIA-A100-SXM4-80GB", 81920, 96, 1024),
    Kind(0.20, 4, "NVIDIA-A100-SXM4-40GB", 40960, 48, 512),
    Kind(0.12, 2, "Tesla-T4", 15360, 24, 128),
    Kind(0.10, 2, "NVIDIA-L4", 23034, 32, 192),
    Kind(0.18, 0, "", 0, 64, 256),
)
"""The first is the first node's, so that a cluster of any size has a node for the largest ask."""

MODELS = {
    "H100": 6,
    "A100": 1,
    "A100-80": 1,
    "A100-40": 2,
    "H100-80,A100-80": 1,
    "T4": 3,
    "NVIDIA-L4": 2,
    "nvidia-a100-sxm4-80gb": 1,
    "L4,T4": 1,
}
"""Asks for models and how often each comes: some are wanted more than there are."""
NOWHERE = ("model", "zone", "size")  # asks that no node can ever meet


@dataclass(frozen=True, slots=True)
class Ending:
    """When and how a pod's life ends once it is bound: at this tick (one pod arrives per tick), by this phase.

    `phase` is `Succeeded`, `Failed` or `deleted` (from the API server, while it runs).
    """

    tick: int
    phase: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does.

    Attributes:
        nodes: Node objects.
        strangers: pods of another scheduler that run before ours come; they name their node.
        pods: our pods in arrival order, which is also that of their names.
        endings: by pod name; a pod without one stays.
        gpus: GPUs our pods can have, and what they ask in all: `asked`.
    """

    nodes: list[Json]
    strangers: list[Json]
    pods: list[Json]
    endings: dict[str, Ending]
    gpus: int
    asked: int


class UnreachableError(ValueError):
    """So few pods cannot ask for 90 % of so many GPUs."""


def plan(*, nodes: int, pods: int, seed: int) -> Plan:
    """Draw a run.

    Args:
        nodes: how many nodes, at least 1.
        pods: how many pods of ours, at least 1.
        seed: of everything drawn.

    Raises:
        UnreachableError: even eight GPUs a pod would not reach the demand; the sentence says how many pods would.
    """
    rng = np.random.default_rng(seed)
    made = _nodes(rng, nodes)
    strangers = _strangers(rng, made)
    gpus = sum(_gpus(node) for node in made if not node["spec"].get("unschedulable"))
    gpus -= sum(_asked_by(pod) for pod in strangers)
    sizes = _sizes(rng, pods, gpus)
    width = len(str(pods))
    mine = [_pod(rng, f"pod-{number:0{width}}", size) for number, size in enumerate(sizes, start=1)]
    endings = {pod["metadata"]["name"]: _ending(rng, tick, pods) for tick, pod in enumerate(mine)}
    kept = {name: ending for name, ending in endings.items() if ending is not None}
    return Plan(made, strangers, mine, kept, gpus, sum(sizes))


def _nodes(rng: Rng, count: int) -> list[Json]:
    """Return nodes whose kinds come in their shares, whose order is drawn after the first."""
    edges = np.cumsum([kind.share for kind in KINDS])
    places = (np.arange(count) + 0.5) / count
    kinds = np.minimum(np.searchsorted(edges, places), len(KINDS) - 1)
    kinds[1:] = rng.permutation(kinds[1:])
    kinds[0] = 0
    made = [_node(rng, f"node-{number:05}", KINDS[kind]) for number, kind in enumerate(kinds, start=1)]
    plain = [node for node in made[1:] if not node["spec"]["taints"]]
    for node in plain[: count // 40]:
        node["spec"]["unschedulable"] = True
    return made


def _node(rng: Rng, name: str, kind: Kind) -> Json:
    labels = {"topology.kubernetes.io/zone": str(rng.choice(ZONES))}
    mode = rng.choice(["exact", "observed", ""], p=[0.5, 0.25, 0.25])
    if mode:
        labels["tessera.dev/mode"] = str(mode)
    extended = {}
    if kind.gpus:
        extended[GPU] = str(kind.gpus)
        labels |= {
            f"{GPU}.product": kind.product,
            f"{GPU}.count": str(kind.gpus),
            f"{GPU}.memory": str(kind.memory_mib),
            f"{GPU}.replicas": "1",
            "nvidia.com/mig.strategy": "none",
        }
    taints = []
    if name != "node-00001" and rng.random() < 0.1:
        taints.append({**TAINT, "effect": str(rng.choice(["NoSchedule", "NoExecute", "PreferNoSchedule"]))})
    memory = f"{kind.memory_gib}Gi"
    return node_object(name, cpu=str(kind.cpu), memory=memory, extended=extended, labels=labels, taints=taints)


def _gpus(node: Json) -> int:
    return int(node["status"]["allocatable"].get(GPU, 0))


def _strangers(rng: Rng, nodes: Sequence[Json]) -> list[Json]:
    """Return pods of another scheduler: CPU on some nodes, one GPU on a few whose plugin chooses the device."""
    made = []
    for node in nodes[1:]:
        if rng.random() >= 0.1:
            continue
        requests = {"cpu": str(rng.integers(1, 9)), "memory": f"{rng.integers(1, 33)}Gi"}
        if _gpus(node) and node["metadata"]["labels"].get("tessera.dev/mode") != "exact" and rng.random() < 0.3:
            requests[GPU] = "1"
        pod = pod_object(f"stranger-{node['metadata']['name']}", requests=requests, scheduler="default-scheduler")
        pod["spec"]["nodeName"] = node["metadata"]["name"]
        made.append(pod)
    return made


def _asked_by(pod: Json) -> int:
    return int(pod["spec"]["containers"][0]["resources"]["requests"].get(GPU, 0))


def _sizes(rng: Rng, pods: int, gpus: int) -> list[int]:
    """Return each pod's GPUs: a mix of all sizes whose total is 90-110 % of the cluster's."""
    target = float(rng.uniform(*DEMAND)) * gpus
    low, high = 0.9 * gpus, 1.1 * gpus
    if pods * SIZES[-1] < low:
        raise UnreachableError(f"{pods} pods cannot ask for 90 % of {gpus} GPUs; use --pods {-int(-low // SIZES[-1])}")
    weights = np.array([0.55, 0.22, 0.14, 0.09])
    mean = float(weights @ SIZES[1:])
    nothing = min(max(1 - target / pods / mean, 0.2), 1.0)
    rungs = rng.choice(len(SIZES), size=pods, p=[nothing, *((1 - nothing) * weights)])
    total = sum(SIZES[rung] for rung in rungs)
    while not low <= total <= high:
        one, step = int(rng.integers(pods)), 1 if total < low else -1
        rung = min(max(int(rungs[one]) + step, 0), len(SIZES) - 1)
        total += SIZES[rung] - SIZES[rungs[one]]
        rungs[one] = rung
    return [SIZES[rung] for rung in rungs]


def _ending(rng: Rng, tick: int, pods: int) -> Ending | None:
    life = int(rng.uniform(0.15, 0.8) * pods)
    phase = str(rng.choice(["Succeeded", "Failed", "deleted"], p=[0.7, 0.15, 0.15]))
    return Ending(tick + life, phase) if rng.random() < ENDING else None


def _pod(rng: Rng, name: str, size: int) -> Json:
    """Return one pod of ours that asks for `size` GPUs in all."""
    cpu, memory = (int(rng.integers(1, 9)), int(rng.integers(1, 33)))
    if size:
        cpu, memory = size * int(rng.integers(2, 11)), size * int(rng.integers(8, 61))
    pod = pod_object(name, requests={"cpu": str(cpu), "memory": f"{memory}Gi", **_gpu_request(size)})
    if rng.random() < 0.2:
        _amounts(pod["spec"]["containers"][0])["ephemeral-storage"] = f"{rng.integers(1, 21)}Gi"
    if size:
        _spread_over_containers(rng, pod, size)
        if rng.random() < 0.5:
            _small_enough(rng, pod, size)
    _selection(rng, pod, size)
    if rng.random() < 0.1:
        pod["metadata"]["labels"]["tessera.dev/queue"] = "default"
    if rng.random() < 0.15:
        pod["spec"]["priorityClassName"] = str(rng.choice(list(CLASSES)))
    return pod


def _gpu_request(size: int) -> dict[str, str]:
    return {GPU: str(size)} if size else {}


def _amounts(container: Json) -> dict[str, str]:
    amounts: dict[str, str] = container["resources"]["requests"]
    return amounts


def _small_enough(rng: Rng, pod: Json, size: int) -> None:
    """Ask for a model; one that comes with enough GPUs, so that no-one waits for a node that cannot exist."""
    largest = {"T4": 2, "NVIDIA-L4": 2, "L4,T4": 2, "A100-40": 4}
    models = [model for model in MODELS if size <= largest.get(model, 8)]
    weights = np.array([MODELS[model] for model in models], float)
    pod["metadata"]["annotations"]["tessera.dev/gpu-model"] = str(rng.choice(models, p=weights / weights.sum()))


def _spread_over_containers(rng: Rng, pod: Json, size: int) -> None:
    """Express the same total in another way, for some of the pods."""
    main = pod["spec"]["containers"][0]
    way = str(rng.choice(["plain", "two", "reuse", "beyond", "sidecar", "init"], p=[0.6, 0.1, 0.08, 0.08, 0.1, 0.04]))
    if way in {"two", "beyond", "sidecar"} and size < 2:
        return
    if way == "two":
        _set_gpus(main, size // 2)
        pod["spec"]["containers"].append(_container("second", size - size // 2))
    elif way == "reuse":
        pod["spec"]["initContainers"] = [_container("prepare", size)]
    elif way == "beyond":
        _set_gpus(main, size // 2)
        pod["spec"]["initContainers"] = [_container("prepare", size)]
    elif way == "sidecar":
        _set_gpus(main, size - 1)
        pod["spec"]["initContainers"] = [{**_container("beside", 1), "restartPolicy": "Always"}]
    elif way == "init":
        _set_gpus(main, 0)
        pod["spec"]["initContainers"] = [_container("prepare", size)]


def _set_gpus(container: Json, count: int) -> None:
    for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
        amounts.pop(GPU, None)
        amounts.update(_gpu_request(count))


def _container(name: str, gpus: int) -> Json:
    amounts = {"cpu": "500m", "memory": "256Mi", **_gpu_request(gpus)}
    return {"name": name, "image": "pause:3.10", "resources": {"requests": amounts, "limits": dict(amounts)}}


def _selection(rng: Rng, pod: Json, size: int) -> None:
    """Narrow or widen where the pod may run; one in fifty can run nowhere and must wait in peace."""
    spec = pod["spec"]
    if rng.random() < 0.15:
        exists = {"key": TAINT["key"], "operator": "Exists"}
        spec["tolerations"] = [exists if rng.random() < 0.5 else {**TAINT, "operator": "Equal"}]
    draw = rng.random()
    if draw < 0.10:
        spec["nodeSelector"] = {"topology.kubernetes.io/zone": str(rng.choice(ZONES))}
    elif draw < 0.16:
        _require(spec, [_expression("topology.kubernetes.io/zone", "In", *ZONES[:2])])
    elif draw < 0.18:
        _require(spec, [_expression("topology.kubernetes.io/zone", "NotIn", ZONES[0])])
    elif draw < 0.20 and size:
        _require(spec, [_expression(f"{GPU}.memory", "Gt", "40000")])
    elif draw < 0.22 and not size:
        _require(spec, [_expression(f"{GPU}.product", "DoesNotExist")])
    elif draw < 0.24:
        _nowhere(rng, pod)


def _nowhere(rng: Rng, pod: Json) -> None:
    way = str(rng.choice(NOWHERE))
    if way == "model" and "tessera.dev/gpu-model" in pod["metadata"]["annotations"]:
        pod["metadata"]["annotations"]["tessera.dev/gpu-model"] = "B200"
    elif way == "size":
        for amounts in pod["spec"]["containers"][0]["resources"].values():
            amounts["cpu"] = "500"
    else:
        pod["spec"]["nodeSelector"] = {"topology.kubernetes.io/zone": "zone-z"}


def _expression(key: str, operator: str, *values: str) -> Json:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


def _require(spec: Json, expressions: list[Json]) -> None:
    required = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
