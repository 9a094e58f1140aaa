from __future__ import annotations

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench.oracle
from bench.devices import GPU, SHARE
from bench.kube_objects import node_object
from bench.oracle import Json, demand, device_ask, init_only, model_matches, observe, quantity
from tests.bench.dumps import EXACT, OBSERVED, gpu_node, pod


@pytest.mark.parametrize(
    ("text", "whole", "milli"),
    [
        ("1", 1, 1000),
        ("100m", 1, 100),
        ("1500u", 1, 2),
        ("1.5", 2, 1500),
        (".5Gi", 1 << 29, 1000 << 29),
        ("2k", 2000, 2_000_000),
        ("1e3", 1000, 1_000_000),
        ("12E", 12 * 10**18, 12 * 10**21),
        ("3Ti", 3 << 40, 3000 << 40),
    ],
)
def test_quantities(text: str, whole: int, milli: int) -> None:
    assert (quantity(text), quantity(text, milli=True)) == (whole, milli)


@pytest.mark.parametrize("text", ["", "one", "1 Gi", "1KiB", "0x10", "1e"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        quantity(text)


@given(st.decimals(min_value=0, max_value=10**6, places=4), st.sampled_from(["Ki", "Mi", "Gi"]))
def test_quantities_round_up(number: Decimal, suffix: str) -> None:
    scale = Decimal(1024) ** ("Ki Mi Gi".split().index(suffix) + 1)
    assert quantity(f"{number}{suffix}") == math.ceil(number * scale)


def container(name: str, gpus: int, *, sidecar: bool = False) -> Json:
    asks = {"cpu": "100m", GPU: str(gpus)}
    return {"name": name, "resources": {"requests": asks}, **({"restartPolicy": "Always"} if sidecar else {})}


def shaped(apps: list[int], inits: list[tuple[int, bool]]) -> Json:
    made = pod("shaped")
    made["spec"]["containers"] = [container(f"app-{place}", gpus) for place, gpus in enumerate(apps)]
    made["spec"]["initContainers"] = [
        container(f"init-{place}", gpus, sidecar=sidecar) for place, (gpus, sidecar) in enumerate(inits)
    ]
    return made


@pytest.mark.parametrize(
    ("apps", "inits", "total"),
    [
        pytest.param([1, 2], [], 3, id="containers add up"),
        pytest.param([1], [(4, False), (2, False)], 4, id="inits run one after the other"),
        pytest.param([2], [(1, True)], 3, id="a sidecar runs beside"),
        pytest.param([1], [(1, True), (4, False)], 5, id="an init runs beside earlier sidecars"),
        pytest.param([1], [(4, False), (1, True)], 4, id="and not beside later ones"),
        pytest.param([0], [(2, False)], 2, id="only an init asks"),
    ],
)
def test_demand_of_gpus(apps: list[int], inits: list[tuple[int, bool]], total: int) -> None:
    assert demand(shaped(apps, inits))[GPU] == total


def test_pod_level_amounts_replace_and_overhead_adds() -> None:
    made = pod("level", 1, cpu="4")
    made["spec"]["resources"] = {"requests": {"cpu": "2"}}
    made["spec"]["overhead"] = {"cpu": "250m"}
    assert demand(made) == {"cpu": 2250, "memory": 1 << 30, GPU: 1}


def test_a_resize_counts_the_larger() -> None:
    made = pod("resized", cpu="1")
    made["status"] = {"containerStatuses": [{"name": "main", "allocatedResources": {"cpu": "3"}}]}
    assert demand(made)["cpu"] == 3000


def test_an_ended_pod_takes_nothing() -> None:
    made = pod("ended", 2)
    made["status"] = {"phase": "Failed"}
    assert not demand(made)


@pytest.mark.parametrize(
    ("entry", "product", "matches"),
    [
        ("H100", "NVIDIA-H100-80GB-HBM3", True),
        ("h100-80", "NVIDIA-H100-80GB-HBM3", True),
        ("A100-40", "NVIDIA-A100-SXM4-80GB", False),
        ("A100-80", "NVIDIA-A100-SXM4-80GB", True),
        ("nvidia-a100-sxm4-80gb", "NVIDIA-A100-SXM4-80GB", True),
        ("T4", "Tesla-T4", True),
        ("L4", "NVIDIA-L40S", False),
        ("H1", "NVIDIA-H100-80GB-HBM3", False),
    ],
)
def test_models(entry: str, product: str, matches: bool) -> None:
    assert model_matches(entry, product) is matches


def forbidden(asks: Json, node: Json) -> str:
    return bench.oracle.forbidden(asks, node)


def require(pod_: Json, *terms: Json) -> Json:
    required = {"nodeSelectorTerms": list(terms)}
    pod_["spec"]["affinity"] = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    return pod_


def expression(key: str, operator: str, *values: str) -> Json:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}


@pytest.mark.parametrize(
    ("terms", "passes"),
    [
        ([expression("zone", "In", "a", "b")], True),
        ([expression("zone", "In", "c")], False),
        ([expression("zone", "In", "c"), expression("zone", "Exists")], True),
        ([expression("zone", "NotIn", "a")], False),
        ([expression("other", "NotIn", "a")], True),
        ([expression("zone", "DoesNotExist")], False),
        ([expression("size", "Gt", "9")], True),
        ([expression("size", "Lt", "10")], False),
        ([expression("zone", "Gt", "1")], False),
        ([{}], False),
        ([], False),
        ([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["exact-1"]}]}], True),
        ([{"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["exact-1"]}]}], False),
    ],
)
def test_required_affinity(terms: list[Json], passes: bool) -> None:
    node = gpu_node(EXACT, 4, "exact", zone="a", size="10")
    assert (forbidden(require(pod("picky"), *terms), node) == "") is passes


TAINT = {"key": "dedicated", "value": "research", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("toleration", "passes"),
    [
        ({}, False),
        ({"operator": "Exists"}, True),
        ({"key": "dedicated", "operator": "Exists"}, True),
        ({"key": "dedicated", "value": "research"}, True),
        ({"key": "dedicated", "value": "sales"}, False),
        ({"key": "dedicated", "value": "research", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_taints(toleration: Json, passes: bool) -> None:
    tainted, tolerant = node_object("tainted", taints=[TAINT]), pod("tolerant")
    tolerant["spec"]["tolerations"] = [toleration]
    assert (forbidden(tolerant, tainted) == "") is passes


def test_a_preference_excludes_nobody_and_a_cordon_does() -> None:
    node = node_object("soft", taints=[{**TAINT, "effect": "PreferNoSchedule"}])
    assert forbidden(pod("any"), node) == ""
    node["spec"]["unschedulable"] = True
    assert forbidden(pod("any"), node) == "taint"


def test_shared_gpus_are_not_whole() -> None:
    node = gpu_node(OBSERVED, 4, "observed", **{"nvidia.com/gpu.replicas": "4"})
    assert forbidden(pod("whole", 1), node) == "not whole"
    assert forbidden(pod("plain"), node) == ""


def test_an_ask_of_an_init_container_alone_needs_an_observed_node() -> None:
    asks = shaped([0], [(1, False)])
    assert init_only(asks)
    assert forbidden(asks, gpu_node(EXACT, 4, "exact")) == "init only"
    assert forbidden(asks, gpu_node(OBSERVED, 4, "observed")) == ""


def test_a_stranger_on_an_exact_node_closes_it_for_gpus_alone() -> None:
    stranger = pod("stranger", 1)
    stranger["spec"] |= {"nodeName": EXACT, "schedulerName": "default-scheduler"}
    oracle = observe([gpu_node(EXACT, 4, "exact")], [stranger], {})
    assert oracle.judge(pod("asks", 1)) == []
    assert oracle.judge(pod("plain")) == [EXACT]


def test_every_resource_and_the_number_of_pods_count() -> None:
    node = gpu_node(OBSERVED, 2, "observed")
    node["status"]["allocatable"] |= {"pods": "1", "example.com/dongle": "1"}
    oracle = observe([node], [], {})
    asks = pod("asks", 2)
    asks["spec"]["containers"][0]["resources"]["requests"]["example.com/dongle"] = "1"
    assert oracle.judge(asks) == [OBSERVED]
    asks["spec"]["nodeName"] = OBSERVED
    assert observe([node], [asks], {}).judge(pod("next")) == []
    assert oracle.judge(pod("greedy", 3)) == []
    assert oracle.judge(pod("busy", cpu="17")) == []


def sharing(apps: list[int], inits: list[tuple[int, bool]]) -> Json:
    made = shaped(apps, inits)
    made["metadata"]["annotations"] = {"tessera.dev/gpu-milli": "400"}
    for one in [*made["spec"]["containers"], *made["spec"]["initContainers"]]:
        one["resources"]["requests"][SHARE] = one["resources"]["requests"].pop(GPU)
    return made


@pytest.mark.parametrize(
    ("apps", "inits", "parts", "devices"),
    [
        pytest.param([2], [], (2,), 2, id="shares of one container are on different devices"),
        pytest.param([1, 1], [], (1, 1), 1, id="two containers meet on one device"),
        pytest.param([1, 1, 1], [], (1, 1, 1), 2, id="as long as it has room"),
        pytest.param([1, 0], [(1, True)], (1, 1), 1, id="a sidecar is a container like others"),
        pytest.param([1, 1], [(1, False)], (), 2, id="with an init container that asks all are apart"),
    ],
)
def test_shares_of_containers(
    apps: list[int], inits: list[tuple[int, bool]], parts: tuple[int, ...], devices: int
) -> None:
    made = sharing(apps, inits)
    assert device_ask(made).parts == parts
    for count in (devices - 1, devices):
        node = gpu_node(EXACT, count, "exact")
        node["status"]["allocatable"][SHARE] = "64"
        assert observe([node], [], {}).judge(made) == [EXACT] * (count == devices)
