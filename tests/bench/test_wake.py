"""The parts of `bench wake` that need no control plane: its cluster, its successions, its verdict."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bench.devices import GPU
from bench.oracle import demand, device_ask
from bench.queue_oracle import GATE, queue_of
from bench.wake import POOL, POOLS, End, Plan, Settings, Succession, plan, queues_text, waits_ms

Json = dict[str, Any]


def running(planned: Plan) -> list[Json]:
    """Return the pods as they are when the cluster is full: each runner on a device of its node."""
    places = {
        node["metadata"]["name"]: pool.fit
        for node in planned.nodes
        for pool in POOLS
        if pool.name == node["metadata"]["labels"][POOL]
    }
    slots = [(name, slot) for name, fit in places.items() for slot in range(fit)]
    pods = []
    for (name, slot), pod in zip(slots, planned.runners, strict=True):
        spec = {key: value for key, value in pod["spec"].items() if key != "schedulingGates"}
        pods.append({**pod, "spec": {**spec, "nodeName": name}, "status": {"phase": "Running"}})
        pods[-1]["metadata"] = {**pod["metadata"], "uid": pod["metadata"]["name"], "annotations": noted(pod, slot)}
    for pod in planned.waiters:
        meta = {**pod["metadata"], "uid": pod["metadata"]["name"], "creationTimestamp": "2026-01-01T00:00:00Z"}
        priority = 1000 if "priorityClassName" in pod["spec"] else 0
        pods.append({**pod, "metadata": meta, "spec": {**pod["spec"], "priority": priority}})
    return pods


def noted(pod: Json, slot: int) -> dict[str, str]:
    """Return annotations that give the pod devices of its own."""
    ask = device_ask(pod)
    if ask.kind == "mig":
        grant = f'[{{"dev":{slot // 7},"kind":"mig","profile":"1g.10gb","start":{slot % 7},"size":1}}]'
    elif ask.kind == "share":
        grant = f'[{{"dev":{slot // 2},"kind":"share","milli":500,"mib":40779}}]'
    else:
        first = slot * ask.count
        grant = "[" + ",".join(f'{{"dev":{dev},"kind":"whole"}}' for dev in range(first, first + ask.count)) + "]"
    return {**pod["metadata"]["annotations"], "tessera.dev/allocation": f'{{"containers":{{"main":{grant}}}}}'}


def test_the_cluster_is_full_of_every_kind_and_each_queue_has_nodes_of_its_own() -> None:
    planned = plan(Settings(300, 100, 1))
    assert planned.ends == Counter({pool.name: 25 for pool in POOLS})
    assert {device_ask(pod).kind for pod in planned.runners} == {"whole", "share", "mig"}
    names = [pod["metadata"]["name"] for pod in [*planned.runners, *planned.waiters]]
    assert len(set(names)) == len(names)
    for pool in POOLS:
        nodes = [node for node in planned.nodes if node["metadata"]["labels"][POOL] == pool.name]
        runners = [pod for pod in planned.runners if queue_of(pod) == pool.name]
        assert len(runners) == pool.fit * len(nodes) >= 25
        assert pool.name in queues_text()
        if GPU in pool.asks:
            assert sum(demand(pod)[GPU] for pod in runners) == 8 * len(nodes)
    assert all(pod["spec"]["schedulingGates"] == [{"name": GATE}] for pod in planned.waiters)
    assert Succession(planned.nodes, running(planned)).wrong == []


@pytest.fixture
def small() -> tuple[Plan, list[Json]]:
    planned = plan(Settings(40, 8, 1))
    return planned, running(planned)


def ends_of(pods: list[Json], queue: str, count: int) -> list[End]:
    names = [pod["metadata"]["uid"] for pod in pods if pod["spec"].get("nodeName") and queue_of(pod) == queue]
    return [End(uid, float(at)) for at, uid in enumerate(names[:count])]


@pytest.mark.parametrize("pool", [pool.name for pool in POOLS])
def test_who_comes_next_is_the_first_of_the_queue_whose_pod_ended(small: tuple[Plan, list[Json]], pool: str) -> None:
    planned, pods = small
    waiting = [pod for pod in pods if "nodeName" not in pod["spec"] and queue_of(pod) == pool]
    line = sorted(waiting, key=lambda pod: (-pod["spec"]["priority"], pod["metadata"]["name"]))
    model = Succession(planned.nodes, pods)
    heirs = [model.next(end.uid) for end in ends_of(pods, pool, 3)]
    assert heirs == [pod["metadata"]["uid"] for pod in line[:3]]
    assert line[0]["spec"]["priority"] == 1000
    assert model.wrong == []


def test_a_place_that_was_free_before_anybody_ended_is_found(small: tuple[Plan, list[Json]]) -> None:
    planned, pods = small
    assert len(Succession(planned.nodes, pods[1:]).wrong) == 1


def test_a_place_that_two_could_take_names_nobody(small: tuple[Plan, list[Json]]) -> None:
    """The head of another queue with the same nodes may take it too, so the bench could not tell who comes next."""
    planned, pods = small
    waiting = [pod for pod in pods if "nodeName" not in pod["spec"] and queue_of(pod) == "one"]
    waiting[1]["metadata"]["labels"] = {POOL: "one", "tessera.dev/queue": "other"}
    names = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}
    waits, wrong = waits_ms(ends_of(pods, "one", 1), Succession(planned.nodes, pods), {}, names)
    assert (waits, len(wrong)) == ([], 1)
    assert "let 2 pods run" in wrong[0]


def verdict(small: tuple[Plan, list[Json]], change: dict[str, float | None]) -> tuple[list[float], list[str]]:
    planned, pods = small
    names = {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}
    ends = ends_of(pods, "one", 2)
    model = Succession(planned.nodes, pods)
    heirs = [model.next(end.uid) for end in ends]
    bound = {heir: end.at_s + 0.05 for heir, end in zip(heirs, ends, strict=True)}
    told = {heirs[int(uid)] if uid.isdecimal() else uid: at for uid, at in change.items()}
    after = {uid: at for uid, at in {**bound, **told}.items() if at is not None}
    return waits_ms(ends, Succession(planned.nodes, pods), after, names)


def test_each_wait_is_measured_from_its_own_end(small: tuple[Plan, list[Json]]) -> None:
    waits, wrong = verdict(small, {})
    assert (waits, wrong) == (pytest.approx([50.0, 50.0]), [])
    waits, wrong = verdict(small, {"0": 0.5})
    assert (waits, wrong) == (pytest.approx([500.0, 50.0]), [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"1": None}, "was never bound"),
        ({"wait-00039": 3.0}, "wait-00039 was bound and it was not its turn"),
        ({"1": 0.5}, "before it was free"),
    ],
)
def test_whatever_the_rules_do_not_explain_is_wrong(
    small: tuple[Plan, list[Json]], change: dict[str, float | None], sentence: str
) -> None:
    _, wrong = verdict(small, change)
    assert len(wrong) == 1
    assert sentence in wrong[0]
