"""Nodes and pods of a bench run, drawn by seed: every kind of ask, 90-110 % of the cluster's GPUs.

Invariant: the same seed and sizes give the same plan, whatever the machine; nothing here looks at a clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.devices import GPU, MIG_DEVICES, SHARE, mig_devices
from bench.geometry import MIG, Card, card, resource_of
from bench.kube_objects import pod_object
from bench.machines import TAINT, ZONES, draw_nodes, draw_strangers

Json = dict[str, Any]
Rng = np.random.Generator

NAMESPACE = "default"
CLASSES = {"bench-high": 1000, "bench-low": -10}
KINDS_OF_ASK = ("none", "whole", "mig", "share")
SIZES = (0, 1, 2, 4, 8)
DEMAND = (1.0, 1.08)  # where the total is drawn; rounding to whole pods stays within 0.9 and 1.1
ENDING = 0.2  # share of pods that may end during the run; few enough that some of the rest must wait to its end
MILLI = 1000
MIG_PODS, SHARE_PODS = 0.33, 0.16  # how many of the pods ask so, as far as there is room

WEIGHTS = {  # how often each shape is asked, by memory slices of the model
    8: {"1g": 30, "1g+me": 5, "1gx2": 12, "2g": 22, "3g": 17, "4g": 8, "7g": 6},
    4: {"1g": 45, "1g+me": 8, "2g": 25, "2g+me": 7, "4g": 15},
    12: {"1g": 25, "1g+me": 5, "1g+gfx": 10, "1g+me.all": 3, "1g-me": 15, "2g": 15, "2g+gfx": 6, "2g+me.all": 2}
    | {"2g-me": 10, "4g": 6, "4g+gfx": 3},
}
SHARE_SIZES = (  # gpu-milli, gpu-memory, milli-GPU as far as demand is counted
    *((milli, "", milli) for milli in (100, 200, 250, 300, 500, 700, 810)),
    *((0, f"{gib}Gi", 20 * gib) for gib in (4, 8, 12, 20)),
    (300, "10Gi", 300),
    (500, "6Gi", 500),
)
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
    "A30": 1,
    "RTXPRO6000": 1,
}
"""Asks for models and how often each comes: some are wanted more than there are."""
LARGEST = {"T4": 2, "NVIDIA-L4": 2, "L4,T4": 2, "A100-40": 4, "A30": 4}
NOWHERE = ("model", "zone", "size", "profile", "unsized")  # asks that no node can ever meet


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
        gpus: GPUs our pods can have, in thousandths, those in MIG mode included.
        asked: what they ask in all, in thousandths of a GPU.
    """

    nodes: list[Json]
    strangers: list[Json]
    pods: list[Json]
    endings: dict[str, Ending]
    gpus: int
    asked: int


class UnreachableError(ValueError):
    """So few pods cannot ask for 90 % of so many GPUs."""


@dataclass(frozen=True, slots=True)
class Want:
    """What one pod shall ask: so many of a resource, worth so many milli-GPU, with these annotations."""

    resource: str = ""
    count: int = 0
    milli: int = 0
    annotations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """The MIG slices of one node: its card, devices in MIG mode, and counts of each profile."""

    model: Card
    devices: int
    profiles: dict[str, int]


def plan(*, nodes: int, pods: int, seed: int, kinds: Sequence[str] = KINDS_OF_ASK) -> Plan:
    """Draw a run.

    Args:
        nodes: how many nodes, at least 1.
        pods: how many pods of ours, at least 1.
        seed: of everything drawn.
        kinds: which of `KINDS_OF_ASK` are asked; the nodes are the same.

    Raises:
        UnreachableError: even eight GPUs a pod would not reach the demand; the sentence says how many pods would.
    """
    rng = np.random.default_rng(seed)
    made = draw_nodes(rng, nodes)
    strangers = draw_strangers(rng, made)
    wants, gpus = _wants(rng, made, strangers, pods, kinds)
    width = len(str(pods))
    mine = [_pod(rng, f"pod-{number:0{width}}", want) for number, want in enumerate(wants, start=1)]
    endings = {pod["metadata"]["name"]: _ending(rng, tick, pods) for tick, pod in enumerate(mine)}
    kept = {name: ending for name, ending in endings.items() if ending is not None}
    return Plan(made, strangers, mine, kept, gpus, sum(want.milli for want in wants))


def _usable(nodes: Sequence[Json], strangers: Sequence[Json]) -> list[Json]:
    """Return the nodes whose devices our pods can have: not cordoned, no stranger's unnamed device on an exact one."""
    closed = {
        pod["spec"]["nodeName"]
        for pod in strangers
        if any(name.startswith("nvidia.com/") for name in _amounts(_main(pod)))
    }
    return [
        node
        for node in nodes
        if not node["spec"].get("unschedulable")
        and not (_labels(node).get("tessera.dev/mode") == "exact" and node["metadata"]["name"] in closed)
    ]


def _whole(node: Json) -> int:
    """Return the devices of a node that serve whole GPUs or shares."""
    tokens, labels = int(node["status"]["allocatable"].get(GPU, 0)), _labels(node)
    if labels.get(f"{GPU}.replicas", "1") != "1" or labels.get("nvidia.com/mig.strategy") == "single":
        return 0
    return tokens - len(mig_devices(labels.get(MIG_DEVICES, "none"), tokens))


def _offer(node: Json) -> Offer | None:
    """Return the MIG slices of a node, None where there are none."""
    labels, amounts = _labels(node), node["status"]["allocatable"]
    known = card(labels.get(f"{GPU}.product", ""))
    counts = {name: int(amounts.get(resource_of(name), 0)) for name in known.names} if known else {}
    if known is None or not any(counts.values()):
        return None
    total = int(labels[f"{GPU}.count"])
    exact = MIG_DEVICES in labels
    devices = len(mig_devices(labels[MIG_DEVICES], total)) if exact else total - int(amounts[GPU])
    return Offer(known, devices, {name: count for name, count in counts.items() if count})


def _wants(
    rng: Rng, nodes: Sequence[Json], strangers: Sequence[Json], pods: int, kinds: Sequence[str]
) -> tuple[list[Want], int]:
    """Return what each pod asks, 90-110 % of the cluster in all, and what the cluster has, in milli-GPU."""
    usable = _usable(nodes, strangers)
    offers = [offer for node in usable if (offer := _offer(node))] if "mig" in kinds else []
    whole = MILLI * sum(map(_whole, usable))
    divided = MILLI * sum(offer.devices for offer in offers)
    draws = rng.random(pods)
    wants: list[Want | None] = [None] * pods
    taken = {"mig": 0, "share": 0}
    for place, draw in enumerate(draws):
        kind = "mig" if draw < MIG_PODS else "share" if draw < MIG_PODS + SHARE_PODS else ""
        if kind not in kinds or (kind == "mig" and not offers):
            continue
        want = _slices(rng, offers) if kind == "mig" else _shares(rng)
        if taken[kind] + want.milli <= (1.06 * divided if kind == "mig" else 0.25 * whole):
            taken[kind] += want.milli
            wants[place] = want
    rest = [place for place, want in enumerate(wants) if want is None]
    others = sum(taken.values())
    for place, size in zip(rest, _sizes(rng, len(rest), others, whole + divided, none="none" in kinds), strict=True):
        wants[place] = Want(GPU, size, MILLI * size) if size else Want()
    return [want or Want() for want in wants], whole + divided


def _slices(rng: Rng, offers: Sequence[Offer]) -> Want:
    """Ask for slices as some node has them: never more than one node could hold."""
    weights = np.array([offer.devices for offer in offers], float)
    offer = offers[int(rng.choice(len(offers), p=weights / weights.sum()))]
    model, names = offer.model, list(offer.profiles)
    often = np.array([WEIGHTS[model.slices][model.profiles[name].name] for name in names], float)
    name = str(rng.choice(names, p=often / often.sum()))
    count = min(int(rng.choice([1, 2, 3], p=[0.75, 0.17, 0.08])), offer.profiles[name])
    wish = (("tessera.dev/gpu-model", model.key),) if rng.random() < 0.2 else ()
    return Want(resource_of(name), count, count * MILLI * model.profiles[name].size // model.slices, wish)


def _shares(rng: Rng) -> Want:
    milli, memory, worth = SHARE_SIZES[int(rng.integers(len(SHARE_SIZES)))]
    count = int(rng.choice([1, 2, 4], p=[0.82, 0.14, 0.04]))
    sizes = (("tessera.dev/gpu-milli", str(milli or "")), ("tessera.dev/gpu-memory", memory))
    return Want(SHARE, count, count * worth, tuple((key, value) for key, value in sizes if value))


def _sizes(rng: Rng, pods: int, others: int, milli: int, *, none: bool) -> list[int]:
    """Return the other pods' whole GPUs: a mix of all sizes that makes 90-110 % of the cluster of all that is asked."""
    gpus, asked = milli / MILLI, others / MILLI
    target = max(float(rng.uniform(*DEMAND)) * gpus - asked, 0.0)
    low, high = max(0.9 * gpus - asked, 0.0), 1.1 * gpus - asked
    if pods * SIZES[-1] < low:
        least = -int(-0.9 * gpus // SIZES[-1]) * 2
        raise UnreachableError(f"so few pods cannot ask for 90 % of {gpus:.0f} GPUs; use --pods {least}")
    weights = np.array([0.55, 0.22, 0.14, 0.09])
    mean = float(weights @ SIZES[1:])
    nothing = min(max(1 - target / max(pods, 1) / mean, 0.2 if none else 0.0), 1.0)
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


def _pod(rng: Rng, name: str, want: Want) -> Json:
    """Return one pod of ours."""
    cpu, memory = (int(rng.integers(1, 9)), int(rng.integers(1, 33)))
    if want.resource == GPU:
        cpu, memory = want.count * int(rng.integers(2, 11)), want.count * int(rng.integers(8, 61))
    elif want.resource:
        cpu, memory = want.count, want.count * int(rng.integers(1, 9))
    asked = {want.resource: str(want.count)} if want.resource else {}
    pod = pod_object(
        name, requests={"cpu": str(cpu), "memory": f"{memory}Gi", **asked}, annotations=dict(want.annotations)
    )
    if rng.random() < 0.2:
        _amounts(_main(pod))["ephemeral-storage"] = f"{rng.integers(1, 21)}Gi"
    if want.resource:
        _spread_over_containers(rng, pod, want)
        if want.resource in {GPU, SHARE} and rng.random() < (0.5 if want.resource == GPU else 0.15):
            _small_enough(rng, pod, want.count)
    _selection(rng, pod, want)
    if rng.random() < 0.1:
        pod["metadata"]["labels"]["tessera.dev/queue"] = "default"
    if rng.random() < 0.15:
        pod["spec"]["priorityClassName"] = str(rng.choice(list(CLASSES)))
    return pod


def _labels(node: Json) -> dict[str, str]:
    labels: dict[str, str] = node["metadata"]["labels"]
    return labels


def _main(pod: Json) -> Json:
    container: Json = pod["spec"]["containers"][0]
    return container


def _amounts(container: Json) -> dict[str, str]:
    amounts: dict[str, str] = container["resources"]["requests"]
    return amounts


def _small_enough(rng: Rng, pod: Json, size: int) -> None:
    """Ask for a model; one that comes with enough GPUs, so that no-one waits for a node that cannot exist."""
    models = [model for model in MODELS if size <= LARGEST.get(model, 8)]
    weights = np.array([MODELS[model] for model in models], float)
    pod["metadata"]["annotations"]["tessera.dev/gpu-model"] = str(rng.choice(models, p=weights / weights.sum()))


def _spread_over_containers(rng: Rng, pod: Json, want: Want) -> None:
    """Express the same total in another way, for some of the pods."""
    main, size = _main(pod), want.count
    way = str(rng.choice(["plain", "two", "reuse", "beyond", "sidecar", "init"], p=[0.6, 0.1, 0.08, 0.08, 0.1, 0.04]))
    if way in {"two", "beyond", "sidecar"} and size < 2:
        return
    if way == "two":
        _set_devices(main, want.resource, size // 2)
        pod["spec"]["containers"].append(_container("second", want.resource, size - size // 2))
    elif way == "reuse":
        pod["spec"]["initContainers"] = [_container("prepare", want.resource, size)]
    elif way == "beyond":
        _set_devices(main, want.resource, size // 2)
        pod["spec"]["initContainers"] = [_container("prepare", want.resource, size)]
    elif way == "sidecar":
        _set_devices(main, want.resource, size - 1)
        pod["spec"]["initContainers"] = [{**_container("beside", want.resource, 1), "restartPolicy": "Always"}]
    elif way == "init" and want.resource == GPU:
        _set_devices(main, want.resource, 0)
        pod["spec"]["initContainers"] = [_container("prepare", want.resource, size)]


def _set_devices(container: Json, resource: str, count: int) -> None:
    for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
        amounts.pop(resource, None)
        amounts.update({resource: str(count)} if count else {})


def _container(name: str, resource: str, count: int) -> Json:
    amounts = {"cpu": "500m", "memory": "256Mi", resource: str(count)}
    return {"name": name, "image": "pause:3.10", "resources": {"requests": amounts, "limits": dict(amounts)}}


def _selection(rng: Rng, pod: Json, want: Want) -> None:
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
    elif draw < 0.20 and want.resource:
        _require(spec, [_expression(f"{GPU}.memory", "Gt", "40000" if want.resource == GPU else "20000")])
    elif draw < 0.22 and not want.resource:
        _require(spec, [_expression(f"{GPU}.product", "DoesNotExist")])
    elif draw < 0.24:
        _nowhere(rng, pod, want)


def _nowhere(rng: Rng, pod: Json, want: Want) -> None:
    way, annotations = str(rng.choice(NOWHERE)), pod["metadata"]["annotations"]
    if way == "model" and "tessera.dev/gpu-model" in annotations:
        annotations["tessera.dev/gpu-model"] = "B200"
    elif way == "size":
        for amounts in _main(pod)["resources"].values():
            amounts["cpu"] = "500"
    elif way == "profile" and want.resource.startswith(MIG):
        pod["spec"].pop("initContainers", None)
        pod["spec"]["containers"] = [_container("main", f"{MIG}1g.45gb", want.count)]
    elif way == "unsized" and want.resource == SHARE:
        for key, _ in want.annotations:
            del annotations[key]
    else:
        pod["spec"]["nodeSelector"] = {"topology.kubernetes.io/zone": "zone-z"}


def _expression(key: str, operator: str, *values: str) -> Json:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


def _require(spec: Json, expressions: list[Json]) -> None:
    required = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    spec["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
