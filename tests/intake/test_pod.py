"""Pods to Requests: every kind of ask, every refusal with its code, and no exception for any JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import Kind
from scheduler.intake.pod import read_pod
from scheduler.model.allocation import Allocation, Grant
from scheduler.model.pod import (
    AMOUNT_MAX,
    ContainerAsk,
    DeviceAsk,
    Expression,
    Pod,
    Refusal,
    Selection,
    Term,
    Toleration,
)

Json = dict[str, Any]


def pod(*containers: Json, notes: Json | None = None, labels: Json | None = None, **spec: Any) -> Json:
    return {
        "metadata": {"uid": "u", "name": "p", "namespace": "n", "annotations": notes or {}, "labels": labels or {}},
        "spec": {"schedulerName": "tessera", "containers": list(containers), **spec},
    }


def asking(name: str = "main", *, restart: str | None = None, **limits: Any) -> Json:
    names = {"gpu": "nvidia.com/gpu", "share": "tessera.dev/share"}
    found = {names.get(key, key): value for key, value in limits.items()}
    container: Json = {"name": name, "resources": {"limits": found, "requests": found}}
    return container | ({"restartPolicy": restart} if restart else {})


def mig(profile: str, count: object = "1") -> Json:
    return asking(**{f"nvidia.com/mig-{profile}": count})


def refusal(raw: Json) -> Refusal:
    found = read_pod(raw).request.refusal
    assert found is not None
    return found


def note(**notes: str) -> Json:
    return {f"tessera.dev/{key.replace('_', '-')}": value for key, value in notes.items()}


def test_whole_gpus() -> None:
    read = read_pod(pod(asking(gpu="2", cpu="4"), asking("other", cpu="1"), notes=note(gpu_model=" H100, a100-80 ")))
    assert read.request.refusal is None
    assert read.request.devices == DeviceAsk(
        kind=Kind.WHOLE,
        count=2,
        resource="nvidia.com/gpu",
        models=("h100", "a100-80"),
        containers=(ContainerAsk("main", "app", 2),),
    )
    assert read.tokens == (("nvidia.com/gpu", 2),)
    assert read.ours


def test_cpu_only() -> None:
    read = read_pod(pod(asking(cpu="4", gpu="0"), notes=note(gpu_model="H100")))
    assert read.request.devices == DeviceAsk()
    assert read.request.refusal is None
    assert read.tokens == ()


@pytest.mark.parametrize(
    ("resource", "profile"),
    [
        ("1g.10gb", "1g.10gb"),
        ("1g.10gb.me", "1g.10gb+me"),
        ("1g.24gb.me.all", "1g.24gb+me.all"),
        ("1g.24gb.gfx", "1g.24gb+gfx"),
        ("1g.24gb-me", "1g.24gb-me"),
        ("7g.141gb", "7g.141gb"),
    ],
)
def test_mig_slices(resource: str, profile: str) -> None:
    read = read_pod(pod(mig(resource, 3)))
    assert read.request.refusal is None
    assert read.request.devices == DeviceAsk(
        kind=Kind.MIG,
        count=3,
        resource=f"nvidia.com/mig-{resource}",
        profile=profile,
        containers=(ContainerAsk("main", "app", 3),),
    )
    assert read.tokens == ((f"nvidia.com/mig-{resource}", 3),)


@pytest.mark.parametrize(
    "resource",
    ["", "1g", "1g.10", "0g.10gb", "1g.0gb", "1c.3g.40gb", "1g.10gb.", "1g.10gb+me", "1g.10gb.all", "1G.10GB"],
)
def test_no_such_profile(resource: str) -> None:
    read = read_pod(pod(mig(resource)))
    found = read.request.refusal
    assert found is not None
    assert (found.reason, found.code) == ("NoSuchMigProfile", "request.profile")
    assert read.tokens == ((f"nvidia.com/mig-{resource}", 1),)  # a bound foreign pod is booked all the same


@pytest.mark.parametrize(
    ("notes", "mib", "milli"),
    [
        (note(gpu_memory="10Gi"), 10_240, 0),
        (note(gpu_memory="1"), 1, 0),
        (note(gpu_memory="1048577"), 2, 0),
        (note(gpu_milli="250"), 0, 250),
        (note(gpu_memory="1Gi", gpu_milli="1000"), 1024, 1000),
    ],
)
def test_shares(notes: Json, mib: int, milli: int) -> None:
    devices = read_pod(pod(asking(share=2), notes=notes)).request.devices
    assert (devices.kind, devices.count, devices.memory_mib, devices.milli) == (Kind.SHARE, 2, mib, milli)


def test_roles_and_reuse() -> None:
    raw = pod(
        asking("main", gpu=2),
        initContainers=[asking("first", gpu=4), asking("side", gpu=1, restart="Always"), asking("late", gpu=1)],
    )
    devices = read_pod(raw).request.devices
    assert devices.count == 4
    assert [(ask.name, ask.role, ask.count) for ask in devices.containers] == [
        ("first", "init", 4),
        ("side", "sidecar", 1),
        ("late", "init", 1),
        ("main", "app", 2),
    ]
    assert not devices.init_only
    assert read_pod(pod(asking(cpu=1), initContainers=[asking("first", gpu=1)])).request.devices.init_only


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (pod(asking(gpu=1, share=1), notes=note(gpu_milli="1")), "request.mixed_devices"),
        (pod(asking(gpu=1), asking("b", **{"nvidia.com/mig-1g.5gb": 1})), "request.mixed_devices"),
        (pod(mig("1g.5gb"), mig("2g.10gb")), "request.mixed_devices"),
        (pod(asking(share=57), notes=note(gpu_milli="1")), "request.too_many_parts"),
        (
            pod(asking(**{"nvidia.com/mig-1g.5gb": 50}), asking("b", **{"nvidia.com/mig-1g.5gb": 7})),
            "request.too_many_parts",
        ),
        (pod(asking(share=1)), "request.share_without_size"),
        (pod(asking(gpu=1), notes=note(gpu_memory="1Gi")), "request.size_without_share"),
        (pod(asking(cpu=1), notes=note(gpu_milli="5")), "request.size_without_share"),
        *(
            (pod(asking(share=1), notes=note(gpu_memory=bad)), "request.share_size")
            for bad in ("", "0", "-1Gi", "x", "2Pi", "9E")
        ),
        *(
            (pod(asking(share=1), notes=note(gpu_milli=bad)), "request.share_size")
            for bad in ("", "0", "1001", "-1", "1.5", "1m", "\u00b2")
        ),
        *(
            (pod(asking(gpu=1), notes=note(gpu_model=bad)), "request.model")
            for bad in ("", ",", "H100,", "a,,b", " ", "x" * 300, "a," * 64 + "a")
        ),
        (pod(asking(gpu="-1")), "request.negative"),
        (pod(asking(cpu="-1m")), "request.negative"),
        (pod(asking(gpu="1500m")), "request.fractional"),
        (pod(asking(**{"example.com/x": "0.5"})), "request.fractional"),
        (pod(asking(gpu=(1 << 40) + 1)), "request.overflow"),
        (pod(asking(memory="3Ei"), asking("b", memory="3Ei")), "request.overflow"),
        (pod(asking(memory="99Ei")), "request.quantity"),
        (pod(asking(gpu="two")), "request.quantity"),
        (pod(asking(gpu=True)), "request.quantity"),
        (
            pod({"name": "a", "resources": {"requests": {"nvidia.com/gpu": 1}, "limits": {"nvidia.com/gpu": 2}}}),
            "request.limits_differ",
        ),
        (pod(asking(**{f"example.com/r{i}": 1 for i in range(65)})), "request.too_many_resources"),
        *(
            (pod(asking(cpu=1), labels={"tessera.dev/queue": bad}), "request.queue")
            for bad in ("", "A", "a_b", "-a", "a..b", "x" * 254)
        ),
        *((pod(notes=note(gang="g", gang_size=bad)), "request.gang") for bad in ("", "0", "10001", "-1", "2.0", "x")),
        (pod(notes=note(gang_size="2")), "request.gang"),
        (pod(notes=note(gang="g")), "request.gang"),
        *((pod(notes=note(gang=bad)), "request.gang") for bad in ("", " ", "a b", "x" * 254)),
        *((pod(notes=note(**{"class": bad})), "request.class") for bad in ("", "Batch", "best")),
        *((pod(notes=note(max_runtime=bad)), "request.max_runtime") for bad in ("", "0s", "90", "-1h", "1y")),
        (pod(nodeSelector={"a": 1}), "request.malformed"),
        (pod(nodeSelector=[]), "request.malformed"),
        (pod(affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}}), "request.malformed"),
        (pod(tolerations=[1]), "request.malformed"),
        (pod(tolerations=[{}] * 16_385), "request.selection"),
        (pod(priority="high"), "request.malformed"),
        (pod(priority=1 << 31), "request.malformed"),
        ({"metadata": [], "spec": {}}, "request.malformed"),
        ({"metadata": {"uid": 7}}, "request.malformed"),
        ({"metadata": {"creationTimestamp": "yesterday"}}, "request.malformed"),
        ({"metadata": {"annotations": {"tessera.dev/gang": 7}}}, "request.malformed"),
        ({"metadata": {"ownerReferences": {}}}, "request.malformed"),
        ({"spec": {"containers": {"main": {}}}}, "request.malformed"),
        ({"spec": {"containers": [[]]}}, "request.malformed"),
        ({"spec": {"schedulingGates": ["hold"]}}, "request.malformed"),
        ([], "request.malformed"),
    ],
)
def test_refusals(raw: Json, code: str) -> None:
    found = refusal(raw)
    assert (found.reason, found.code) == ("InvalidRequest", code)
    assert found.text.endswith(".")
    assert len(found.text) < 400


def test_half_a_gang_is_told_what_it_lacks() -> None:
    assert "add the annotation tessera.dev/gang," in refusal(pod(notes=note(gang_size="2"))).text
    assert "add the annotation tessera.dev/gang-size " in refusal(pod(notes=note(gang="g"))).text


def test_refused_asks_are_booked_as_far_as_they_can_be_read() -> None:
    read = read_pod(pod(asking(gpu="1500m", cpu="-1", memory="1Gi"), asking("b", share=3)))
    assert read.tokens == (("nvidia.com/gpu", 2), ("tessera.dev/share", 3))
    assert (read.request.amounts.cpu_milli, read.request.amounts.memory_bytes) == (0, 1 << 30)
    assert read_pod(pod(asking(memory="3Ei"), asking("b", memory="3Ei"))).request.amounts.memory_bytes == AMOUNT_MAX


def test_the_first_refusal_stays() -> None:
    assert refusal(pod(asking(gpu="-1"), notes=note(gpu_model=""), nodeSelector=[])).code == "request.negative"


def test_a_limit_alone_is_a_request() -> None:
    read = read_pod(pod({"name": "main", "resources": {"limits": {"nvidia.com/gpu": "1", "cpu": "2"}}}))
    assert read.request.refusal is None
    assert (read.request.devices.count, read.request.amounts.cpu_milli) == (1, 2000)


def test_identity_and_wishes() -> None:
    raw = pod(
        asking(cpu=1),
        notes=note(gang="g/1", gang_size="8", **{"class": "serving"}, max_runtime="1h30m", touch="4"),
        labels={"tessera.dev/queue": "team.vision"},
        priority=-5,
        nodeName="gpu-1",
        resourceClaims=[{"name": "x"}],
        schedulingGates=[{"name": "tessera.dev/hold"}, {"name": "other"}],
    )
    raw["metadata"] |= {
        "resourceVersion": "17",
        "creationTimestamp": "2026-11-21T01:13:33Z",
        "deletionTimestamp": "2026-11-21T01:14:33Z",
        "ownerReferences": [{"uid": "other"}, {"uid": "job", "controller": True}],
    }
    raw["status"] = {
        "phase": "Running",
        "nominatedNodeName": "gpu-2",
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}],
    }
    read = read_pod(raw)
    request = read.request
    assert request.refusal is None
    assert (request.id, request.namespace, request.name, request.workload) == ("u", "n", "p", "job")
    assert (request.queue, request.gang, request.gang_size) == ("team.vision", "g/1", 8)
    assert (request.workload_class, request.max_runtime_s, request.priority) == ("serving", 5400, -5)
    assert request.arrival_us == 1_795_223_613_000_000
    assert request.claims
    assert (read.resource_version, read.node, read.nominated, read.phase) == ("17", "gpu-1", "gpu-2", "Running")
    assert (read.gates, read.touch) == (("tessera.dev/hold", "other"), 4)
    assert read.deleting
    assert read.unschedulable
    assert not read.terminal


def test_defaults() -> None:
    read = read_pod({"metadata": {"uid": "u"}})
    assert (read.request.workload, read.request.queue, read.request.refusal) == ("u", "default", None)
    assert (read.phase, read.ours, read.node) == ("Pending", False, "")
    assert read_pod({}).uid == ""


@pytest.mark.parametrize(
    ("written", "epoch"), [("7", 7), ("", 0), ("x", 0), ("-1", 0), ("1.0", 0), ("9" * 19, 0), ("\u00b2", 0)]
)
def test_touch(written: str, epoch: int) -> None:
    assert read_pod(pod(notes=note(touch=written))).touch == epoch


def test_allocation_is_read_back() -> None:
    head = '{"v":1,"id":"u","epoch":1,"fence":1,"node":"n","mode":"exact",'
    written = head + '"containers":{"main":[{"dev":3,"kind":"whole"}]}}'
    expected = Allocation("u", 1, 1, "n", "exact", (("main", (Grant("whole", dev=3),)),))
    assert read_pod(pod(notes=note(allocation=written))).allocation == expected
    unreadable = read_pod(pod(notes=note(allocation="{}")))
    assert unreadable.allocation is None
    assert unreadable.request.refusal is None


def test_selection() -> None:
    terms = [
        {
            "matchExpressions": [
                {"key": "zone", "operator": "In", "values": ["a", "b"]},
                {"key": "gpu", "operator": "Exists"},
            ]
        },
        {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["n1"]}]},
        {},
    ]
    raw = pod(
        nodeSelector={"b": "2", "a": "1"},
        affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}},
        tolerations=[
            {"operator": "Exists"},
            {"key": "k", "value": "v", "effect": "NoSchedule", "tolerationSeconds": 3},
        ],
    )
    assert read_pod(raw).request.selection == Selection(
        labels=(("a", "1"), ("b", "2")),
        terms=(
            Term(labels=(Expression("zone", "In", ("a", "b")), Expression("gpu", "Exists"))),
            Term(fields=(Expression("metadata.name", "NotIn", ("n1",)),)),
            Term(),
        ),
        tolerations=(Toleration("", "Exists"), Toleration("k", "Equal", "v", "NoSchedule")),
    )
    assert read_pod(pod(affinity={"nodeAffinity": {}})).request.selection.terms is None


RICH: Json = {
    "metadata": {
        "uid": "u",
        "name": "p",
        "namespace": "n",
        "resourceVersion": "1",
        "creationTimestamp": "2026-11-21T01:13:33Z",
        "labels": {"tessera.dev/queue": "q"},
        "annotations": note(
            gpu_memory="1Gi", gpu_milli="5", gpu_model="H100", touch="1", gang="g", gang_size="2", allocation="{}"
        ),
        "ownerReferences": [{"uid": "o", "controller": True}],
    },
    "spec": {
        "schedulerName": "tessera",
        "nodeName": "n",
        "priority": 1,
        "containers": [{"name": "a", "resources": {"requests": {"cpu": "1"}, "limits": {"tessera.dev/share": "1"}}}],
        "initContainers": [{"name": "b", "restartPolicy": "Always", "resources": {"requests": {"cpu": "1"}}}],
        "overhead": {"cpu": "1"},
        "resources": {"requests": {"cpu": "1"}, "limits": {"memory": "1"}},
        "nodeSelector": {"a": "b"},
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}]
                }
            }
        },
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "resourceClaims": [{"name": "c"}],
        "schedulingGates": [{"name": "g"}],
    },
    "status": {
        "phase": "Running",
        "nominatedNodeName": "n",
        "allocatedResources": {"cpu": "1"},
        "resources": {"requests": {"cpu": "1"}},
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}],
        "containerStatuses": [
            {"name": "a", "allocatedResources": {"cpu": "2"}, "resources": {"requests": {"cpu": "1"}}}
        ],
    },
}


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def sound(read: Pod) -> bool:
    amounts = read.request.amounts
    counts = [count for _, count in (*amounts.extended, *read.tokens)]
    numbers = [amounts.cpu_milli, amounts.memory_bytes, amounts.storage_bytes, read.request.devices.count, *counts]
    hash(read)
    return all(type(number) is int and 0 <= number <= AMOUNT_MAX for number in numbers)


@settings(max_examples=400)
@given(st.sampled_from(places(RICH)), ANY_JSON)
def test_any_json_in_any_place(place: tuple[Any, ...], value: object) -> None:
    raw = json.loads(json.dumps(RICH))
    if not place:
        assert sound(read_pod(value))  # type: ignore[arg-type] - that is the point
        return
    where = raw
    for step in place[:-1]:
        where = where[step]
    where[place[-1]] = value
    assert sound(read_pod(raw))


@given(ANY_JSON)
def test_any_json(value: object) -> None:
    assert sound(read_pod(value))  # type: ignore[arg-type] - that is the point


@pytest.mark.parametrize("key", ["cpu", "nvidia.com/gpu"])
def test_deep_and_huge_values(key: str) -> None:
    deep: Any = []
    for _ in range(1500):
        deep = [deep]
    for value in (deep, 10**5000, -(10**5000), "9" * 10**6):
        assert refusal(pod(asking(**{key: value}))).code == "request.quantity"
        assert refusal(pod(priority=value)).code == "request.malformed"
        assert len(refusal(pod(asking(**{key: value}))).text) < 400


def test_the_rich_pod_itself_is_fine() -> None:
    assert read_pod(RICH).request.refusal is None
    assert len(places(RICH)) > 80


@pytest.mark.parametrize(
    ("labels", "notes", "words"),
    [
        ({"tessera.dev/queue": "a", "app": "x"}, {"tessera.dev/class": "batch", "tessera.dev/touch": "1"}, []),
        ({}, {"tessera.dev/gpu-modle": "A100"}, ["annotation 'tessera.dev/gpu-modle'", "mean tessera.dev/gpu-model?"]),
        ({"tessera.dev/gpu-model": "A100"}, {}, ["label 'tessera.dev/gpu-model'", "write it as an annotation"]),
        ({}, {"tessera.dev/queue": "a"}, ["annotation 'tessera.dev/queue'", "write it as a label"]),
        ({}, {"tessera.dev/" + "x" * 400: "1"}, ["xxx'...", "known are tessera.dev/class, "]),
    ],
)
def test_our_labels_and_annotations_that_nobody_knows_are_warned_of_and_refuse_nothing(
    labels: Json, notes: Json, words: list[str]
) -> None:
    found = read_pod(pod(asking(gpu="1"), notes=notes, labels=labels))
    assert found.request.refusal is None
    assert len(found.warnings) == bool(words)
    assert all(word in found.warnings[0] for word in words)


def test_warnings_are_bounded() -> None:
    found = read_pod(pod(asking(gpu="1"), notes={f"tessera.dev/odd-{number}": "" for number in range(100)}))
    assert len(found.warnings) == 8


@pytest.mark.parametrize(
    ("condition", "asked_us"),
    [
        pytest.param({}, 1_767_225_600_000_000, id="asked"),
        pytest.param({"status": "True", "reason": "Reserved"}, 0, id="nominated"),
        pytest.param({"reason": "Else"}, 0, id="another reason"),
        pytest.param({"type": "PodScheduled"}, 0, id="another condition"),
        pytest.param({"lastTransitionTime": "soon"}, 0, id="no instant"),
        pytest.param({"lastTransitionTime": 7}, 0, id="no text"),
        pytest.param({"lastTransitionTime": "1960-01-01T00:00:00Z"}, 0, id="before time"),
    ],
)
def test_a_pod_tells_since_when_a_node_is_asked_for_it(condition: dict[str, Any], asked_us: int) -> None:
    raw = pod(asking(gpu=1))
    asked = {"type": "tessera.dev/Admitted", "status": "False", "reason": "WaitingForAutoscale"}
    raw["status"] = {"conditions": [7, {**asked, "lastTransitionTime": "2026-01-01T00:00:00Z", **condition}]}
    assert read_pod(raw).asked_us == asked_us
