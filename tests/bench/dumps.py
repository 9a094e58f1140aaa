"""Small hand-made dumps of a run: one without a fault, and the tools to plant one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.auditor import Audit, Dump
from bench.devices import GPU
from bench.geometry import card, resource_of
from bench.kube_objects import node_object, pod_object
from bench.replay import GENESIS, line_hash

Json = dict[str, Any]

EXACT, OBSERVED = "exact-1", "observed-1"
ALLOCATION = "tessera.dev/allocation"


def gpu_node(name: str, gpus: int, mode: str, **labels: str) -> Json:
    product = {"nvidia.com/gpu.product": "Tesla-T4", "tessera.dev/mode": mode}
    return node_object(name, cpu="16", extended={GPU: str(gpus)}, labels={**product, **labels})


def pod(name: str, gpus: int = 0, *, cpu: str = "1", asked: dict[str, int] | None = None, **annotations: str) -> Json:
    devices = {GPU: gpus, **(asked or {})}
    asks = {"cpu": cpu, "memory": "1Gi", **{resource: str(count) for resource, count in devices.items() if count}}
    made = pod_object(name, requests=asks, annotations=annotations)
    made["metadata"]["uid"] = f"uid-{name}"
    made["status"] = {"phase": "Pending"}
    return made


def mig_node(name: str, gpus: int, mode: str, product: str, **more: str) -> Json:
    """A node whose last `gpus - 1` devices are in MIG mode when it is exact; one of observed mode has static slices."""
    made = gpu_node(name, gpus, mode, **{"nvidia.com/gpu.product": product, "nvidia.com/gpu.memory": "81920", **more})
    known = card(product)
    assert known is not None
    tokens = {resource_of(profile): "0" for profile in known.names}
    if mode == "exact":
        made["metadata"]["labels"] |= {"tessera.dev/mig-devices": f"1-{gpus - 1}"}
        tokens = {resource_of(p): str(known.profiles[p].most * (gpus - 1)) for p in known.names}
        tokens["tessera.dev/share"] = "64"
    made["status"]["allocatable"] |= tokens
    return made


def piece(dev: int, profile: str, start: int, size: int) -> Json:
    return {"dev": dev, "kind": "mig", "profile": profile, "start": start, "size": size}


def share(dev: int, milli: int, mib: int) -> Json:
    return {"dev": dev, "kind": "share", "milli": milli, "mib": mib}


def slices(profile: str, count: int = 1) -> dict[str, int]:
    return {resource_of(profile): count}


SHARES = {"tessera.dev/share": 1}


def grants(*devices: int) -> list[Json]:
    return [{"dev": dev, "kind": "whole"} for dev in devices]


def allocation(of: Json, node: str, held: list[Json], **changes: Any) -> Json:
    mode = "exact" if node == EXACT else "observed"
    containers = {"main": held} if held else {}
    said = {"v": 1, "id": of["metadata"]["uid"], "epoch": 1, "fence": 1, "node": node, "mode": mode}
    return {**said, "containers": containers, **changes}


@dataclass
class Fake:
    """A run's dump while it is made; `audit` reads it as the auditor would."""

    nodes: list[Json] = field(default_factory=list)
    pods: list[Json] = field(default_factory=list)
    journal: list[Json] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    run: Json = field(default_factory=lambda: {"seed": 7, "kills": 0, "quiet_begin": 1000.0, "quiet_end": 1030.0})

    def tell(
        self,
        event: str,
        of: Json,
        source: str | None,
        target: str,
        *,
        node: str = "",
        said: Json | None = None,
        at: int = 1_000_000,
    ) -> None:
        """Append a well-formed journal line."""
        meta = of["metadata"]
        text = json.dumps(said, separators=(",", ":")) if said else ""
        line: Json = {
            "seq": len(self.journal) + 1,
            "at": at,
            "request": meta["uid"],
            "workload": meta["uid"],
            "epoch": 1,
            "fence": 1,
            "event": event,
            "from": source,
            "to": target,
            "node": node,
            "namespace": meta["namespace"],
            "name": meta["name"],
            "reason": "GPU가 없음",
            "allocation": text,
            "prev": self.journal[-1]["hash"] if self.journal else GENESIS,
        }
        line["hash"] = line_hash(line)
        self.journal.append(line)

    def arrive(self, of: Json) -> Json:
        """A pod that waits."""
        self.pods.append(of)
        self.tell("submit", of, None, "QUEUED")
        return of

    def bind(self, of: Json, node: str, held: list[Json]) -> Json:
        """A pod that went all the way to RUNNING."""
        self.arrive(of)
        said = allocation(of, node, held)
        of["metadata"]["annotations"][ALLOCATION] = json.dumps(said, separators=(",", ":"))
        of["spec"]["nodeName"] = node
        of["status"] = {"phase": "Running"}
        self.tell("reserve", of, "QUEUED", "RESERVED", node=node, said=said)
        self.tell("bind", of, "RESERVED", "BINDING", node=node)
        self.tell("post", of, "BINDING", "BOUND", node=node)
        self.tell("start", of, "BOUND", "RUNNING", node=node)
        return of

    def finish(self, of: Json) -> None:
        """The pod ends and the ledger frees it."""
        of["status"] = {"phase": "Succeeded"}
        self.tell("finish", of, "RUNNING", "RELEASED", node=of["spec"]["nodeName"])

    def rewrite(self, of: Json, **changes: Any) -> None:
        """Change the pod's annotation as a forger would, the journal untouched."""
        said = json.loads(of["metadata"]["annotations"][ALLOCATION])
        of["metadata"]["annotations"][ALLOCATION] = json.dumps({**said, **changes})

    def call(self, of: Json, at: float, verb: str = "filter") -> None:
        name = f"{of['metadata']['namespace']}/{of['metadata']['name']}"
        self.calls.append({"t": at, "verb": verb, "pod": name, "nodes": 2, "answer": {}, "ms": 1.0})

    def audit(self) -> Json:
        return Audit(Dump(self.nodes, self.pods, self.journal, self.calls, self.run)).report()

    def write(self, folder: Path) -> None:
        (folder / "nodes.json").write_text(json.dumps({"items": self.nodes}))
        (folder / "pods.json").write_text(json.dumps({"items": self.pods}))
        for name, lines in (("journal.jsonl", self.journal), ("calls.jsonl", self.calls)):
            (folder / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        (folder / "run.json").write_text(json.dumps(self.run))


def good_run() -> tuple[Fake, dict[str, Json]]:
    """An exact node of four GPUs and an observed one of two; devices 0 and 1 are used twice, one after the other."""
    fake = Fake(nodes=[gpu_node(EXACT, 4, "exact"), gpu_node(OBSERVED, 2, "observed")])
    ended = fake.bind(pod("ended", 2), EXACT, grants(0, 1))
    fake.finish(ended)
    pods = {
        "ended": ended,
        "train": fake.bind(pod("train", 2), EXACT, grants(0, 1)),
        "notebook": fake.bind(pod("notebook", 1), OBSERVED, [{"kind": "whole", "count": 1}]),
        "web": fake.bind(pod("web"), EXACT, []),
        "large": fake.arrive(pod("large", 4)),
    }
    for at in (1001.0, 1001.5, 1010.0):
        fake.call(pods["large"], at)
    return fake, pods
