"""What `bench latency` asks about: a cluster, the pods that run on it, the pods that ask, and who may take them.

Both sides of the bench draw the same world from the same seed: the server fills its desk with it through the product's
own readers, the client keeps a `Spot` per node and judges every answer by it, one node at a time, with no code of the
product. Invariant: the oracle knows where a pod fits and who is named best of what was offered, not by which taste.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

Json = dict[str, Any]
Rng = np.random.Generator

GPU = "nvidia.com/gpu"
GPUS = 8
PRODUCTS = {
    "NVIDIA-H100-80GB-HBM3": ("h100", 81559),
    "NVIDIA-A100-SXM4-80GB": ("a100", 81920),
    "NVIDIA-L40S": ("l40s", 46068),
    "NVIDIA-H200": ("h200", 143771),
}
SIZES = (0, 1, 2, 4, 8)
SHARES = (0.2, 0.4, 0.2, 0.1, 0.1)  # how often each size is asked for
WISHES = ("", "", "H100", "A100", "H100,H200", "L40S")
FILLS = (0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8)  # GPUs in use per node, drawn evenly
STRANGERS = 0.02  # exact nodes on which a pod of another scheduler holds a GPU nobody named
DIVIDED = 0.02  # observed nodes whose nvidia.com/gpu is no whole GPU


@dataclass(slots=True)
class Spot:
    """One node as the oracle sees it: what it is, and how many GPUs a whole ask can have there."""

    exact: bool
    model: str
    divided: bool
    stranger: bool
    free: int

    def takes(self, ask: Ask) -> bool:
        """Say whether /filter may name this node: devices only, for place, cpu and memory are kube-scheduler's."""
        if not ask.gpus:
            return True
        if self.divided or self.stranger or (ask.models and self.model not in ask.models):
            return False
        return self.free >= ask.gpus


@dataclass(frozen=True, slots=True)
class Ask:
    """What one pod asks, and its JSON."""

    uid: str
    gpus: int
    models: frozenset[str]
    pod: bytes


def sampled(nodes: int) -> int:
    """Return how many nodes kube-scheduler's default sampling sends when all are feasible."""
    if nodes < 100:
        return nodes
    return max(nodes * max(50 - nodes // 125, 5) // 100, 100)


def node_name(number: int) -> str:
    """Return a name of 45 characters, as cloud pools make them; not in the order of the numbers."""
    mixed = (number * 0x9E3779B1) % 2**32
    return f"gke-prod-eu-west-gpu-pool-{mixed:08x}-{number:010}"


def world(count: int, seed: int) -> Iterator[tuple[Json, list[Json], Spot]]:
    """Yield each node's object, the pods that run on it and what the oracle knows of it."""
    rng = np.random.default_rng([seed, count])
    products = list(PRODUCTS)
    kinds, fills = rng.integers(len(products), size=count), rng.choice(FILLS, size=count)
    exact, odd = rng.random(count) < 0.5, rng.random(count)
    for number in range(count):
        name, product = node_name(number), products[kinds[number]]
        mine = bool(exact[number])
        stranger, divided = mine and odd[number] < STRANGERS, not mine and odd[number] < DIVIDED
        used = int(fills[number])
        pods = [_running(name, used, exact=mine)] if used else []
        if stranger:
            pods.append(_running(f"{name}-x", 1, exact=False, on=name))
        spot = Spot(mine, PRODUCTS[product][0], bool(divided), bool(stranger), GPUS - used - stranger)
        yield _node(name, product, exact=mine, divided=bool(divided)), pods, spot


def _node(name: str, product: str, *, exact: bool, divided: bool) -> Json:
    labels = {
        "beta.kubernetes.io/arch": "amd64",
        "beta.kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "gpu-8x",
        "topology.kubernetes.io/region": "eu-west",
        "topology.kubernetes.io/zone": f"eu-west-{'abc'[int(name[-1], 16) % 3]}",
        "nvidia.com/cuda.driver.major": "580",
        "nvidia.com/gpu.compute.major": "9",
        "nvidia.com/gpu.count": str(GPUS),
        "nvidia.com/gpu.family": "hopper",
        "nvidia.com/gpu.memory": str(PRODUCTS[product][1]),
        "nvidia.com/gpu.present": "true",
        "nvidia.com/gpu.product": product,
        "nvidia.com/gpu.replicas": "4" if divided else "1",
        "nvidia.com/mig.strategy": "none",
    }
    if exact:
        labels["tessera.dev/mode"] = "exact"
    tokens = str(GPUS * 4 if divided else GPUS)
    there = {"cpu": "192", "memory": "2Ti", "ephemeral-storage": "10Ti", "pods": "256", GPU: tokens}
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": "1", "labels": labels},
        "spec": {},
        "status": {"allocatable": there, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def _running(name: str, gpus: int, *, exact: bool, on: str = "") -> Json:
    """Return a pod that runs on the node it is named after and holds its first GPUs, by name where it is exact."""
    uid, amounts = f"held-{name}", {"cpu": str(8 * gpus), "memory": f"{64 * gpus}Gi", GPU: str(gpus)}
    notes = {}
    if exact:
        grants = [{"dev": dev, "kind": "whole"} for dev in range(gpus)]
        allocation = {"v": 1, "id": uid, "epoch": 1, "fence": 1, "node": on or name, "mode": "exact"}
        notes["tessera.dev/allocation"] = orjson.dumps(allocation | {"containers": {"main": grants}}).decode()
    return {
        "metadata": {"name": uid, "namespace": "default", "uid": uid, "resourceVersion": "1", "annotations": notes},
        "spec": {
            "nodeName": on or name,
            "schedulerName": "tessera" if exact else "default-scheduler",
            "containers": [{"name": "main", "resources": {"requests": amounts, "limits": amounts}}],
        },
        "status": {"phase": "Running"},
    }


def ask(rng: Rng, number: int) -> Ask:
    """Draw one pod as kube-scheduler sends it: about 3.6 kB, another one at every call."""
    gpus = int(rng.choice(SIZES, p=SHARES))
    wish = str(rng.choice(WISHES)) if gpus else ""
    uid = f"{number:08x}-fdba-4624-9bb1-{int(rng.integers(2**48)):012x}"
    raw = _pod(f"train-{number:08}", uid, gpus, wish)
    models = frozenset(word.lower() for word in wish.split(",") if word)
    return Ask(uid, gpus, models, orjson.dumps(raw))


def _pod(name: str, uid: str, gpus: int, wish: str) -> Json:
    each = gpus or 1
    amounts = {"cpu": str(8 * each), "memory": f"{64 * each}Gi"} | ({GPU: str(gpus)} if gpus else {})
    notes = {"prometheus.io/scrape": "true", "prometheus.io/port": "9400", "team.example.com/cost-centre": "4711"}
    env = [{"name": f"TRAIN_SETTING_{key:02}", "value": f"s3://bucket/run/{name}/{key:04}"} for key in range(17)]
    mounts = [
        {"name": called, "mountPath": f"/mnt/{called}"} for called in ("dataset", "checkpoints", "scratch", "shm")
    ]
    volumes = [
        {"name": "dataset", "persistentVolumeClaim": {"claimName": "dataset-imagenet", "readOnly": True}},
        {"name": "checkpoints", "persistentVolumeClaim": {"claimName": f"{name}-checkpoints"}},
        {"name": "scratch", "emptyDir": {"sizeLimit": "100Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    gone = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": f"job-{uid}", "controller": True}
    container = {
        "name": "main",
        "image": "registry.example.com/train@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "command": ["python", "-m", "train", "--config", "/etc/train/config.yaml", "--resume", "auto"],
        "env": env,
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "volumeMounts": mounts,
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "File",
        "imagePullPolicy": "IfNotPresent",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    return {
        "metadata": {
            "name": name,
            "generateName": "train-",
            "namespace": "research",
            "uid": uid,
            "resourceVersion": "247011",
            "creationTimestamp": "2026-11-21T01:13:33Z",
            "labels": {"app": "train", "job-name": name, "batch.kubernetes.io/controller-uid": f"job-{uid}"},
            "annotations": notes | ({"tessera.dev/gpu-model": wish} if wish else {}),
            "ownerReferences": [owner],
        },
        "spec": {
            "containers": [container],
            "volumes": volumes,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 30,
            "dnsPolicy": "ClusterFirst",
            "serviceAccountName": "train",
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "schedulerName": "tessera",
            "tolerations": [
                {"key": "node.kubernetes.io/not-ready", **gone},
                {"key": "node.kubernetes.io/unreachable", **gone},
                {"key": GPU, "operator": "Exists", "effect": "NoSchedule"},
            ],
            "priority": 0,
            "enableServiceLinks": True,
            "preemptionPolicy": "PreemptLowerPriority",
        },
        "status": {"phase": "Pending", "qosClass": "Guaranteed"},
    }


def wrong_filter(asked: Ask, offered: Sequence[str], count: int, reply: Json, spots: dict[str, Spot]) -> str:
    """Return what is wrong with an answer of /filter, empty when nothing is.

    Args:
        asked: the pod.
        offered: the names that were sent.
        count: how many nodes may be named (K).
        reply: the parsed answer.
        spots: the cluster, with what earlier answers of this block took.
    """
    takers = {name for name in offered if spots[name].takes(asked)}
    named = reply["NodeNames"]
    if reply["Error"]:
        return f"an error: {reply['Error']}"
    if strange := [name for name in named if name not in takers]:
        return f"{strange[0]} was named for {asked.gpus} GPUs of {set(asked.models) or 'any model'} and does not fit"
    if len(set(named)) != len(named) or len(named) != min(count, len(takers)):
        return f"{len(set(named))} nodes were named, {len(takers)} of those offered fit and up to {count} are wanted"
    told = reply["FailedAndUnresolvableNodes"]
    if not named and (set(told) != set(offered) or len(set(told.values())) != 1):
        return "a refusal must give every offered node the same word"
    return ""


def wrong_scores(offered: Sequence[str], reply: list[Json]) -> str:
    """Return what is wrong with an answer of /prioritize to the names that /filter had named, best first."""
    if [score["Host"] for score in reply] != list(offered):
        return "the hosts scored are not the hosts offered"
    scores = [score["Score"] for score in reply]
    if any(type(score) is not int or not 0 <= score <= 10 for score in scores):
        return "a score is no whole number from 0 to 10"
    if scores.count(10) != 1 or scores[0] != 10 or sorted(scores, reverse=True) != scores:
        return "the order of /filter is not that of the scores, or its first node is not the only one with 10"
    return ""


def take(asked: Ask, reply: Json, spots: dict[str, Spot]) -> None:
    """Book what an answer intends: its first node for this pod."""
    if reply["NodeNames"]:
        spots[reply["NodeNames"][0]].free -= asked.gpus


def give_back(asked: Ask, reply: Json, spots: dict[str, Spot]) -> None:
    """Undo `take`."""
    if reply["NodeNames"]:
        spots[reply["NodeNames"][0]].free += asked.gpus
