from __future__ import annotations

import json
from collections import Counter

import pytest

from bench.oracle import GPU, demand, exact, observe
from bench.workload import UnreachableError, plan

SIZES = [(3, 20, 1), (10, 60, 2), (40, 150, 1), (200, 1000, 1), (200, 1000, 2)]


@pytest.mark.parametrize(("nodes", "pods", "seed"), SIZES)
def test_the_demand_is_that_of_the_cluster(nodes: int, pods: int, seed: int) -> None:
    drawn = plan(nodes=nodes, pods=pods, seed=seed)
    asked = sum(demand(pod)[GPU] for pod in drawn.pods)
    assert asked == drawn.asked
    assert 0.9 * drawn.gpus <= asked <= 1.1 * drawn.gpus
    assert (len(drawn.nodes), len(drawn.pods)) == (nodes, pods)


def test_the_same_seed_draws_the_same_plan_and_another_another() -> None:
    plans = [plan(nodes=20, pods=80, seed=seed) for seed in (5, 5, 6)]
    texts = [json.dumps([one.nodes, one.pods, one.strangers]) for one in plans]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_names_sort_in_arrival_order() -> None:
    names = [pod["metadata"]["name"] for pod in plan(nodes=40, pods=150, seed=1).pods]
    assert names == sorted(names)
    assert len(set(names)) == 150


def test_the_mix_has_every_kind() -> None:
    drawn = plan(nodes=200, pods=1000, seed=1)
    gpu_nodes = [node for node in drawn.nodes if node["status"]["allocatable"].get(GPU)]
    assert 0.35 < sum(map(exact, gpu_nodes)) / len(gpu_nodes) < 0.65
    assert len(gpu_nodes) < 200
    assert any(node["spec"]["taints"] for node in drawn.nodes)
    sizes = Counter(demand(pod)[GPU] for pod in drawn.pods)
    assert {0, 1, 2, 4, 8} == set(sizes)
    texts = [json.dumps(pod) for pod in drawn.pods]
    kinds = "gpu-model nodeSelector nodeAffinity tolerations initContainers restartPolicy priorityClassName"
    for word in kinds.split():
        assert 5 < sum(word in text for text in texts) < 700, word
    assert 150 < len(drawn.endings) < 250
    assert {ending.phase for ending in drawn.endings.values()} == {"Succeeded", "Failed", "deleted"}
    assert drawn.strangers


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nearly_every_pod_could_run_somewhere_and_some_nowhere(seed: int) -> None:
    drawn = plan(nodes=60, pods=300, seed=seed)
    empty = observe(drawn.nodes, [], {})
    nowhere = sum(not empty.judge(pod) for pod in drawn.pods)
    assert 1 <= nowhere <= 30


def test_strangers_fit_where_they_are() -> None:
    drawn = plan(nodes=200, pods=1000, seed=4)
    for pod in drawn.strangers:
        pod["metadata"]["uid"] = pod["metadata"]["name"]
    rooms = observe(drawn.nodes, drawn.strangers, {}).rooms
    assert all(left >= 0 for room in rooms.values() for left in room.free.values())
    assert not any(room.strangers for room in rooms.values())


def test_too_few_pods_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(UnreachableError, match="use --pods") as refusal:
        plan(nodes=200, pods=10, seed=1)
    assert plan(nodes=200, pods=int(str(refusal.value).split()[-1]), seed=1).asked > 0
