"""The audit finds what is planted, and nothing in a clean cluster."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from scheduler.embedded import audit
from scheduler.kube.port import Object


def node(name: str = "n", *, mode: str = "exact", **allocatable: str) -> Object:
    labels = {"tessera.dev/mode": mode, "nvidia.com/gpu.count": "4", "nvidia.com/gpu.memory": "81920"}
    amounts = {"cpu": "16", "memory": "64Gi", "pods": "10", "nvidia.com/gpu": "4", "tessera.dev/share": "256"}
    amounts["nvidia.com/mig-1g.10gb"] = "28"
    amounts["nvidia.com/mig-3g.40gb"] = "28"
    return {"metadata": {"name": name, "labels": labels}, "status": {"allocatable": amounts | allocatable}}


def pod(name: str, grants: list[Object] | None = None, *, on: str = "n", said: str = "n", **asked: str) -> Object:
    requests = {"cpu": "1", "memory": "1Gi"} | {key.replace("__", "/"): value for key, value in asked.items()}
    metadata: Object = {"name": name, "namespace": "default", "uid": f"uid-{name}"}
    if grants is not None:
        allocation = {"v": 1, "id": f"uid-{name}", "epoch": 1, "fence": 1, "node": said, "mode": "exact"}
        metadata["annotations"] = {"tessera.dev/allocation": json.dumps(allocation | {"containers": {"main": grants}})}
    spec = {"schedulerName": "tessera", "nodeName": on}
    spec["containers"] = [{"name": "main", "resources": {"requests": requests}}]  # type: ignore[assignment]
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Running"}}


def whole(*devices: int) -> list[Object]:
    return [{"dev": dev, "kind": "whole"} for dev in devices]


def slice_of(dev: int, start: int, size: int = 4, profile: str = "3g.40gb") -> Object:
    return {"dev": dev, "kind": "mig", "profile": profile, "start": start, "size": size}


def gpus(count: int) -> dict[str, str]:
    return {"nvidia.com/gpu": str(count)}


CLEAN = [
    pod("a", whole(0, 1), **gpus(2)),
    pod("b", [slice_of(2, 0), slice_of(2, 4)], **{"nvidia.com/mig-3g.40gb": "2"}),
    pod("c", [{"dev": 3, "kind": "share", "milli": 600, "mib": 40000}], **{"tessera.dev/share": "1"}),
    pod("d", [{"dev": 3, "kind": "share", "milli": 400, "mib": 40000}], **{"tessera.dev/share": "1"}),
    pod("e", []),
]


def changed(at: int, **parts: Any) -> list[Object]:
    pods = copy.deepcopy(CLEAN)
    pods[at] = pods[at] | parts
    return pods


def test_a_clean_cluster_has_no_findings() -> None:
    assert audit.look([node()], CLEAN) == []
    assert audit.unannotated(CLEAN) == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (pod("x", whole(1), **gpus(1)), "n device 1: held by default/a, default/x at once"),
        (pod("x", whole(2), **gpus(1)), "n device 2: held by default/b, default/x at once"),
        (pod("x", [{"dev": 0, "kind": "share", "milli": 1}]), "n device 0: held by default/a, default/x at once"),
        (pod("x", [{"dev": 3, "kind": "share", "milli": 1}]), "the shares of default/c, default/d, default/x are more"),
        (
            pod("x", [{"dev": 3, "kind": "share", "mib": 1921}]),
            "the shares of default/c, default/d, default/x are more",
        ),
        (pod("x", whole(4), **gpus(1)), "n device 4: held by default/x, and the node has 4 devices"),
        (pod("x", **gpus(3)), "n: 5 nvidia.com/gpu asked of 4"),
        (pod("x", cpu="13"), "n: 18 cpu asked of 16"),
        (pod("x", memory="61Gi"), "memory asked of 68719476736"),
        (pod("x", **{"example.com/fpga": "1"}), "n: 1 example.com/fpga asked of 0"),
    ],
)
def test_over_allocation_is_found(extra: Object, said: str) -> None:
    (finding,) = audit.over_allocations([node()], [*CLEAN, extra])
    assert said in finding
    assert finding in audit.look([node()], [*CLEAN, extra])


def test_too_many_pods_are_found() -> None:
    assert audit.over_allocations([node(pods="4")], CLEAN) == ["n: 5 pods asked of 4"]


def test_ended_pods_and_unknown_nodes_hold_nothing() -> None:
    ended = pod("x", whole(0), **gpus(4)) | {"status": {"phase": "Succeeded"}}
    elsewhere = pod("y", whole(0), on="other", **gpus(4))
    assert audit.look([node()], [*CLEAN, ended, elsewhere]) == []


def test_a_pod_being_deleted_still_holds() -> None:
    leaving = pod("x", whole(0), **gpus(1))
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert audit.over_allocations([node()], [*CLEAN, leaving])


def test_devices_are_not_judged_on_observed_nodes_and_counts_are() -> None:
    counted = [{"kind": "whole", "count": 4}]
    pods = [pod("a", counted, **gpus(4)), pod("b", counted, **gpus(4))]
    assert audit.over_allocations([node(mode="observed")], pods) == ["n: 8 nvidia.com/gpu asked of 4"]
    assert audit.unannotated(pods) == []


@pytest.mark.parametrize(("start", "found"), [(0, 1), (3, 2), (6, 1), (8, 0)])
def test_overlapping_slices_are_found(start: int, found: int) -> None:
    extra = pod("x", [slice_of(2, start, 2, "1g.10gb")], **{"nvidia.com/mig-1g.10gb": "1"})
    assert len(audit.slice_overlaps([node()], [*CLEAN, extra])) == found


@pytest.mark.parametrize(
    "grants",
    [
        whole(0, 0),
        [slice_of(0, 0), slice_of(0, 2)],
        [{"dev": 0, "kind": "share", "milli": 1}, {"dev": 0, "kind": "share", "milli": 1}],
    ],
)
def test_a_device_held_twice_by_one_pod_is_found(grants: list[Object]) -> None:
    assert audit.doubled([pod("x", grants)]) == ["default/x: holds device 0 twice"]


def test_an_allocation_on_two_pods_is_found() -> None:
    twin = pod("a", whole(0, 1))
    twin["metadata"]["name"] = "twin"
    assert audit.doubled([CLEAN[0], twin]) == ["default/twin: carries the allocation uid-a, as default/a does"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (pod("x", **gpus(1)), "has no readable allocation"),
        (pod("x", whole(0), said="other", **gpus(1)), "names another node"),
        (pod("x", whole(0), **gpus(2)), "does not grant what it asks"),
        (pod("x", whole(0)), "does not grant what it asks"),
        (pod("x", [slice_of(0, 0)], **gpus(1)), "does not grant what it asks"),
    ],
)
def test_a_pod_without_its_allocation_is_found(bad: Object, said: str) -> None:
    (finding,) = audit.unannotated([*CLEAN, bad])
    assert said in finding


@pytest.mark.parametrize("written", ["", "{", "[]", '{"v":2}', '{"v":1,"containers":{"main":[{"dev":"0"}]}}'])
def test_an_unreadable_allocation_is_none(written: str) -> None:
    bad = pod("x")
    bad["metadata"]["annotations"] = {"tessera.dev/allocation": written}
    assert audit.unannotated([bad]) == ["default/x: has no readable allocation"]


def test_pods_of_others_and_unbound_ones_need_no_allocation() -> None:
    other = pod("x")
    other["spec"]["schedulerName"] = "default-scheduler"
    assert audit.unannotated([other, pod("y", on="")]) == []


def test_demand_counts_init_containers_sidecars_and_overhead() -> None:
    def asks(cpu: str, **more: str) -> Object:
        return {"name": "c", "resources": {"requests": {"cpu": cpu}}, **more}

    body: Object = {
        "spec": {
            "initContainers": [asks("3"), asks("500m", restartPolicy="Always"), asks("4")],
            "containers": [asks("1"), {"name": "l", "resources": {"limits": {"nvidia.com/gpu": "2"}}}],
            "overhead": {"cpu": "250m", "memory": "1Mi"},
        }
    }
    found = {key: float(amount) for key, amount in audit.demand(body).items()}
    assert found == {"cpu": 4.75, "nvidia.com/gpu": 2.0, "memory": 1048576.0}
