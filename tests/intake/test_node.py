"""Nodes to the model: observed and exact ones, labels of GPU Feature Discovery, and no exception for any JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import Mode
from scheduler.geometry import products
from scheduler.intake.node import read_node
from scheduler.model.node import Device, Node, Taint
from scheduler.model.pod import AMOUNT_MAX, Amounts

Json = dict[str, Any]
PRODUCT = "NVIDIA-H100-80GB-HBM3"


def node(
    *, exact: bool = False, gpus: object = "8", spec: Json | None = None, more: Json | None = None, **labels: str
) -> Json:
    names = {
        "mig_devices": "tessera.dev/mig-devices",
        "mode": "tessera.dev/mode",
        "strategy": "nvidia.com/mig.strategy",
    }
    said = {names.get(key, f"nvidia.com/gpu.{key}"): value for key, value in labels.items()}
    if exact:
        said["tessera.dev/mode"] = "exact"
    return {
        "metadata": {"name": "gpu-1", "uid": "u", "resourceVersion": "5", "labels": said},
        "spec": spec or {},
        "status": {
            "allocatable": {"cpu": "64", "memory": "1Gi", "pods": "110", "nvidia.com/gpu": gpus, **(more or {})}
        },
    }


def read(raw: Json) -> Node:
    found = read_node(raw, products())
    assert found is not None
    return found


def test_observed_node() -> None:
    more = {
        "ephemeral-storage": "10Gi",
        "nvidia.com/mig-1g.10gb.me": "2",
        "nvidia.com/mig-3g.40gb": "1",
        "hugepages-2Mi": "4Mi",
    }
    found = read(node(product=PRODUCT, count="8", memory="81559", more={**more, "example.com/fpga": "1"}))
    assert found.mode is Mode.OBSERVED
    assert (found.uid, found.name, found.resource_version) == ("u", "gpu-1", "5")
    assert found.amounts == Amounts(64_000, 1 << 30, 10 << 30, (("example.com/fpga", 1), ("hugepages-2Mi", 4 << 20)))
    assert (found.pods, found.gpus, found.shares) == (110, 8, 0)
    assert found.slices == (("1g.10gb+me", 2), ("3g.40gb", 1))
    assert found.whole_gpus
    assert found.product == PRODUCT
    assert found.devices == (Device(model="H100-80", memory_mib=81_559),) * 8
    assert found.warnings == ()


def test_exact_node() -> None:
    found = read(node(exact=True, product=PRODUCT, count="4", mig_devices="0,2-3", more={"tessera.dev/share": "64"}))
    assert found.mode is Mode.EXACT
    assert [device.mig_mode for device in found.devices] == [True, False, True, True]
    assert (found.shares, found.whole_gpus) == (64, True)
    assert len(read(node(exact=True, gpus="3")).devices) == 3


@pytest.mark.parametrize(
    ("written", "expected", "warned"),
    [
        ("all", {0, 1, 2, 3}, False),
        ("none", set(), False),
        ("1", {1}, False),
        ("0.2-3", {0, 2, 3}, False),
        ("0_1", {0, 1}, False),
        ("2-2", {2}, False),
        *(
            (bad, {0, 1, 2, 3}, True)
            for bad in ("", "4", "0-4", "3-2", "0,,1", "ALL", "-1", "0-", "x", "9999-99999", "0 1", "\u00b2")
        ),
    ],
)
def test_mig_devices(written: str, expected: set[int], warned: bool) -> None:
    found = read(node(exact=True, count="4", mig_devices=written))
    assert {slot for slot, device in enumerate(found.devices) if device.mig_mode} == expected
    assert bool(found.warnings) is warned


def test_mig_devices_say_nothing_of_observed_nodes() -> None:
    assert not any(device.mig_mode for device in read(node(mig_devices="all")).devices)


@pytest.mark.parametrize(
    ("labels", "whole"),
    [
        ({}, True),
        ({"replicas": "1"}, True),
        ({"replicas": "0"}, True),
        ({"replicas": "4"}, False),
        ({"replicas": "many"}, False),
        ({"product": "NVIDIA-A30-SHARED"}, False),
        ({"product": "NVIDIA-A30-MIG-1g.6gb", "strategy": "single"}, False),
        ({"product": "NVIDIA-A30-MIG-1g.6gb"}, False),
        ({"strategy": "single"}, False),
        ({"product": "NVIDIA-A30", "strategy": "single"}, True),
        ({"product": "NVIDIA-A30", "strategy": "mixed"}, True),
    ],
)
def test_whole_gpus(labels: dict[str, str], whole: bool) -> None:
    assert read(node(**labels)).whole_gpus is whole
    assert read(node(exact=True, **labels)).whole_gpus  # there our own plugin counts devices


@pytest.mark.parametrize(
    ("product", "model"),
    [
        ("NVIDIA-A100-SXM4-80GB", "A100-80"),
        ("NVIDIA-A100-SXM4-80GB-SHARED", "A100-80"),
        ("Tesla-T4", "Tesla-T4"),
        ("Tesla-T4-SHARED", "Tesla-T4"),
        ("", ""),
    ],
)
def test_models(product: str, model: str) -> None:
    assert {device.model for device in read(node(product=product)).devices} == {model}


def test_how_many_devices() -> None:
    assert len(read(node(count="2", gpus="8", replicas="4")).devices) == 2
    assert len(read(node(gpus="8", replicas="4")).devices) == 2
    assert read(node(product="NVIDIA-A30-MIG-1g.6gb", count="28", gpus="28")).devices == ()
    assert len(read(node(count="0")).devices) == 0
    assert len(read(node(gpus="x")).devices) == 0
    many = read(node(count="65"))
    assert len(many.devices) == 64
    assert len(many.warnings) == 1


def test_places_taints_cordon() -> None:
    taints = [{"key": "k", "value": "v", "effect": "NoSchedule"}, {"key": "e", "effect": "NoExecute"}]
    raw = node(spec={"taints": taints, "unschedulable": True})
    raw["metadata"]["labels"] |= {"topology.kubernetes.io/zone": "z", "topology.kubernetes.io/rack": "r"}
    found = read(raw)
    assert (found.zone, found.rack, found.unschedulable) == ("z", "r", True)
    assert found.taints == (Taint("k", "v", "NoSchedule"), Taint("e", "", "NoExecute"))
    raw["metadata"]["labels"]["tessera.dev/rack"] = "ours"
    assert read(raw).rack == "ours"
    assert found.labels == tuple(sorted(found.labels))


@pytest.mark.parametrize(
    "raw",
    [
        node(mode="both"),
        node(gpus="-1"),
        node(gpus="99Ti"),
        node(gpus=[]),
        node(count="-1"),
        node(memory="80GB"),
        node(more={"nvidia.com/mig-big": "1"}),
        node(spec={"taints": {}}),
        node(spec={"taints": [{"key": 1}]}),
        {"metadata": {"name": "n", "uid": "u", "labels": {"a": 1}}},
        {"metadata": {"name": "n", "uid": "u", "labels": {str(i): "" for i in range(1025)}}},
        {"metadata": {"name": "n", "uid": "u"}, "status": []},
    ],
)
def test_what_cannot_be_read_is_a_warning(raw: Json) -> None:
    found = read(raw)
    assert len(found.warnings) == 1
    assert found.warnings[0].endswith(".")
    assert found.mode is Mode.OBSERVED


@pytest.mark.parametrize(
    ("conditions", "ready"),
    [
        ([{"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": "True"}], True),
        ([{"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": "False"}], False),
        ([{"type": "Ready", "status": "Unknown"}], False),
        ([{"type": "Ready"}, "Ready", None], False),
        ([], False),
        ("Ready", False),
        (None, False),
    ],
)
def test_ready_is_what_says_so(conditions: object, ready: bool) -> None:
    raw = node()
    raw["status"]["conditions"] = conditions
    assert read(raw).ready is ready


def test_what_cannot_be_read_is_not_there() -> None:
    assert read(node(gpus="-1")).gpus == 0
    assert read(node(more={"cpu": "many"})).amounts.cpu_milli == 0
    assert read(node(more={"pods": "99999"})).pods == 16_384
    assert read(node(spec={"taints": "none"})).taints[0].effect == "NoSchedule"


@pytest.mark.parametrize(
    "raw", [{}, [], {"metadata": {"name": "n"}}, {"metadata": {"uid": "u"}}, {"metadata": {"name": 1, "uid": "u"}}]
)
def test_without_name_or_uid_it_is_no_node(raw: Json) -> None:
    assert read_node(raw, products()) is None


RICH = node(
    exact=True,
    product=PRODUCT,
    count="8",
    memory="81559",
    replicas="1",
    strategy="mixed",
    mig_devices="0",
    spec={"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}], "unschedulable": False},
    more={"nvidia.com/mig-1g.10gb": "7", "tessera.dev/share": "1"},
)


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30) | st.from_regex(r"[0-9,-]{1,9}")
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(st.sampled_from(places(RICH)[1:]), ANY_JSON)
def test_any_json_in_any_place(place: tuple[Any, ...], value: object) -> None:
    raw = json.loads(json.dumps(RICH))
    where = raw
    for step in place[:-1]:
        where = where[step]
    where[place[-1]] = value
    found = read_node(raw, products())
    if found is None:
        assert place[0] == "metadata"
        return
    hash(found)
    numbers = [found.amounts.cpu_milli, found.amounts.memory_bytes, found.pods, found.gpus, found.shares]
    assert all(type(number) is int and 0 <= number <= AMOUNT_MAX for number in numbers)
    assert len(found.devices) <= 64


@given(ANY_JSON)
def test_any_json(value: object) -> None:
    assert read_node(value, products()) is None  # type: ignore[arg-type] - that is the point
