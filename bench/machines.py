"""Nodes of a bench run and the strangers on them: every way in which a node may offer its GPUs, mixed by seed.

Exact nodes advertise tokens for whatever their devices could serve; observed ones what NVIDIA's plugin would: whole
GPUs, static MIG slices (strategy mixed), or parts of GPUs (replicas, strategy single) that no whole ask may take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.devices import GPU, MIG_DEVICES, SHARE, mig_devices
from bench.geometry import card, resource_of
from bench.kube_objects import node_object, pod_object

Json = dict[str, Any]
Rng = np.random.Generator

ZONES = ("zone-a", "zone-b", "zone-c")
TAINT = {"key": "dedicated", "value": "research", "effect": "NoSchedule"}
SHARES = 64  # tokens of tessera.dev/share per device
FIRST = "node-00001"


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
    Kind(0.17, 8, "NVIDIA-H100-80GB-HBM3", 81559, 112, 1024),
    Kind(0.16, 8, "NVIDIA-A100-SXM4-80GB", 81920, 112, 1024),
    Kind(0.14, 4, "NVIDIA-A100-SXM4-40GB", 40960, 56, 512),
    Kind(0.10, 2, "Tesla-T4", 15360, 24, 128),
    Kind(0.08, 2, "NVIDIA-L4", 23034, 32, 192),
    Kind(0.11, 4, "NVIDIA-A30", 24576, 48, 384),
    Kind(0.09, 8, "NVIDIA-RTX-PRO-6000-Blackwell-Server-Edition", 97887, 112, 1024),
    Kind(0.15, 0, "", 0, 64, 256),
)
"""The first is the first node's, so that a cluster of any size has a node for the largest whole ask."""

MIG_EXACT, MIG_OBSERVED, DIVIDED = 0.4, 0.4, 0.16  # chances that a node of a divisible model is used so
SPANS = ("all", "0", "1", "0-1", "0.2-3", "0_3", "2-3", "4-7", "0-2.5_7")
LAYOUTS = {  # what an administrator has cut one card into, by memory slices of the model
    8: (
        ("3g", "2g", "1g", "1g"),
        ("1g",) * 7,
        ("3g", "3g"),
        ("4g", "1gx2", "1g"),
        ("7g",),
        ("2g", "2g", "2g", "1g+me"),
    ),
    4: (("2g", "1g", "1g"), ("1g",) * 4, ("4g",), ("2g+me", "2g")),
    12: (("2g", "1g", "1g"), ("1g",) * 4, ("4g",), ("2g-me", "1g+me", "1g"), ("1g+gfx", "1g+gfx", "2g")),
}


def draw_nodes(rng: Rng, count: int) -> list[Json]:
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
    extended: dict[str, str] = {}
    if kind.gpus:
        labels |= {
            f"{GPU}.product": kind.product,
            f"{GPU}.count": str(kind.gpus),
            f"{GPU}.memory": str(kind.memory_mib),
            f"{GPU}.replicas": "1",
            "nvidia.com/mig.strategy": "none",
        }
        offer = _exact if mode == "exact" else _observed
        offered, more = offer(rng, kind, divisible=name != FIRST and card(kind.product) is not None)
        extended |= {resource: str(count) for resource, count in offered.items()}
        labels |= more
    taints = []
    if name != FIRST and rng.random() < 0.1:
        taints.append({**TAINT, "effect": str(rng.choice(["NoSchedule", "NoExecute", "PreferNoSchedule"]))})
    memory = f"{kind.memory_gib}Gi"
    return node_object(name, cpu=str(kind.cpu), memory=memory, extended=extended, labels=labels, taints=taints)


def _exact(rng: Rng, kind: Kind, *, divisible: bool) -> tuple[dict[str, int], dict[str, str]]:
    """Return tokens and labels of an exact node: of each profile as many as its MIG devices could ever hold."""
    written = "none"
    if divisible and rng.random() < MIG_EXACT:
        fitting = [span for span in SPANS if span == "all" or max(mig_devices(span, kind.gpus)) < kind.gpus]
        written = str(rng.choice(fitting))
    divided = len(mig_devices(written, kind.gpus))
    tokens = {GPU: kind.gpus}
    if divided < kind.gpus:
        tokens[SHARE] = SHARES * (kind.gpus - divided)
    known = card(kind.product)
    if known and divided:
        tokens |= {resource_of(name): divided * known.profiles[name].most for name in known.names}
    return tokens, {} if written == "none" else {MIG_DEVICES: written}


def _observed(rng: Rng, kind: Kind, *, divisible: bool) -> tuple[dict[str, int], dict[str, str]]:
    """Return resources and labels of an observed node as NVIDIA's plugin and GPU Feature Discovery write them."""
    known = card(kind.product)
    if not divisible or known is None:
        return {GPU: kind.gpus}, {}
    draw = rng.random()
    if draw < MIG_OBSERVED:
        names = {known.profiles[name].name: name for name in known.names}
        divided = int(rng.integers(1, kind.gpus + 1))
        layouts = LAYOUTS[known.slices]
        cut = Counter(shape for _ in range(divided) for shape in layouts[int(rng.integers(len(layouts)))])
        slices = {resource_of(names[shape]): count for shape, count in sorted(cut.items())}
        return {GPU: kind.gpus - divided, **slices}, {"nvidia.com/mig.strategy": "mixed"}
    if draw < MIG_OBSERVED + DIVIDED / 2:
        shared = {f"{GPU}.product": f"{kind.product}-SHARED", f"{GPU}.replicas": "4"}
        return {GPU: 4 * kind.gpus}, shared
    if draw < MIG_OBSERVED + DIVIDED:
        first = known.names[0]
        labels = {f"{GPU}.product": f"{kind.product}-MIG-{first}", "nvidia.com/mig.strategy": "single"}
        return {GPU: known.profiles[first].most * kind.gpus}, labels
    return {GPU: kind.gpus}, {}


def draw_strangers(rng: Rng, nodes: Sequence[Json]) -> list[Json]:
    """Return pods of another scheduler: CPU on some nodes, a GPU or a slice on a few whose plugin chooses the device.

    On a few exact nodes too, where nobody says which device that is.
    """
    made = []
    for node in nodes[1:]:
        if rng.random() >= 0.1:
            continue
        requests = {"cpu": str(rng.integers(1, 9)), "memory": f"{rng.integers(1, 33)}Gi"}
        offered = [
            name
            for name, count in node["status"]["allocatable"].items()
            if name.startswith("nvidia.com/") and int(count)
        ]
        exact = node["metadata"]["labels"].get("tessera.dev/mode") == "exact"
        often = 0.15 if exact else 0.9 if len(offered) > 1 else 0.3
        if offered and rng.random() < often:
            requests[GPU if exact else str(rng.choice(offered))] = "1"
        pod = pod_object(f"stranger-{node['metadata']['name']}", requests=requests, scheduler="default-scheduler")
        pod["spec"]["nodeName"] = node["metadata"]["name"]
        made.append(pod)
    return made
