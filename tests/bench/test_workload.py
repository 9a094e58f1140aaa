from __future__ import annotations

import json
from collections import Counter

import pytest

from bench.oracle import device_ask, exact, observe
from bench.workload import UnreachableError, plan

SIZES = [(3, 20, 1), (8, 48, 3), (10, 60, 2), (40, 150, 1), (200, 1000, 1), (200, 1500, 2)]


@pytest.mark.parametrize(("nodes", "pods", "seed"), SIZES)
def test_the_demand_is_that_of_the_cluster(nodes: int, pods: int, seed: int) -> None:
    drawn = plan(nodes=nodes, pods=pods, seed=seed)
    whole = sum(1000 * ask.count for ask in map(device_ask, drawn.pods) if ask.kind == "whole")
    assert 0 < whole <= drawn.asked
    assert 0.9 * drawn.gpus <= drawn.asked <= 1.1 * drawn.gpus
    assert (len(drawn.nodes), len(drawn.pods)) == (nodes, pods)


def test_what_is_drawn_can_be_left_out() -> None:
    drawn = plan(nodes=40, pods=150, seed=1, kinds=("none", "whole"))
    asks = [device_ask(pod) for pod in drawn.pods]
    assert {ask.kind for ask in asks} == {"", "whole"}
    assert drawn.asked == sum(1000 * ask.count for ask in asks)
    assert [node["metadata"]["name"] for node in drawn.nodes] == [f"node-{n:05}" for n in range(1, 41)]


def test_the_same_seed_draws_the_same_plan_and_another_another() -> None:
    plans = [plan(nodes=20, pods=80, seed=seed) for seed in (5, 5, 6)]
    texts = [json.dumps([one.nodes, one.pods, one.strangers]) for one in plans]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_names_sort_in_arrival_order() -> None:
    names = [pod["metadata"]["name"] for pod in plan(nodes=40, pods=150, seed=1).pods]
    assert names == sorted(names)
    assert len(set(names)) == 150


def test_the_mix_has_every_kind_of_ask() -> None:
    drawn = plan(nodes=200, pods=1500, seed=2)
    asks = [device_ask(pod) for pod in drawn.pods]
    kinds = Counter(ask.kind for ask in asks)
    assert all(kinds[kind] > 200 for kind in ("", "whole", "mig", "share")), kinds
    assert {1, 2, 4, 8} <= {ask.count for ask in asks if ask.kind == "whole"}
    profiles = {ask.resource for ask in asks if ask.kind == "mig"}
    for family in ("3g.40gb", "2g.12gb", "2g.48gb", "1g.10gb.me", "1g.24gb.me", "1g.24gb-me"):
        assert f"nvidia.com/mig-{family}" in profiles
    sizes = Counter((bool(ask.milli), bool(ask.mib)) for ask in asks if ask.kind == "share" and not ask.flaw)
    assert len(sizes) == 3, "shares by milli, by memory, by both"
    texts = [json.dumps(pod) for pod in drawn.pods]
    words = "gpu-model nodeSelector nodeAffinity tolerations initContainers restartPolicy priorityClassName"
    for word in words.split():
        assert 5 < sum(word in text for text in texts) < 700, word
    assert 200 < len(drawn.endings) < 400
    assert {ending.phase for ending in drawn.endings.values()} == {"Succeeded", "Failed", "deleted"}


def test_the_nodes_offer_gpus_in_every_way() -> None:
    drawn = plan(nodes=200, pods=1500, seed=2)
    gpu_nodes = [node for node in drawn.nodes if "nvidia.com/gpu.product" in node["metadata"]["labels"]]
    assert 0.35 < sum(map(exact, gpu_nodes)) / len(gpu_nodes) < 0.65
    assert len(gpu_nodes) < 200
    assert any(node["spec"]["taints"] for node in drawn.nodes)
    divided = Counter(
        exact(node) for node in gpu_nodes if any("mig-" in name for name in node["status"]["allocatable"])
    )
    assert divided[True] > 15
    assert divided[False] > 15
    texts = json.dumps(drawn.nodes)
    for word in ("mig-devices", '"0.2-3"', "-SHARED", "-MIG-", '"mixed"', '"single"', "tessera.dev/share"):
        assert word in texts
    assert any("nvidia.com/mig-" in json.dumps(pod) for pod in drawn.strangers)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nearly_every_pod_could_run_somewhere_and_some_nowhere(seed: int) -> None:
    drawn = plan(nodes=60, pods=300, seed=seed)
    empty = observe(drawn.nodes, [], {})
    nowhere = sum(not empty.judge(pod) for pod in drawn.pods)
    assert 1 <= nowhere <= 30


def test_strangers_fit_where_they_are_and_close_some_exact_nodes() -> None:
    drawn = plan(nodes=200, pods=1000, seed=4)
    for pod in drawn.strangers:
        pod["metadata"]["uid"] = pod["metadata"]["name"]
    rooms = observe(drawn.nodes, drawn.strangers, {}).rooms
    assert all(left >= 0 for room in rooms.values() for left in room.free.values())
    assert 1 <= sum(room.strangers for room in rooms.values()) <= 10


def test_too_few_pods_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(UnreachableError, match="use --pods") as refusal:
        plan(nodes=200, pods=10, seed=1)
    assert plan(nodes=200, pods=int(str(refusal.value).split()[-1]), seed=1).asked > 0
