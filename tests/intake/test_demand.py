"""The demand of a pod against a simulation that starts its containers one after the other."""

from __future__ import annotations

import random
from fractions import Fraction
from math import ceil
from typing import Any

import pytest

from scheduler.intake.pod import read_pod
from scheduler.model.pod import Amounts, Pod

Spec = dict[str, Any]

SPECS = 100_000
# text -> exact units; written by hand, so that the reader of quantities is not its own judge
TEXTS = {
    "cpu": {
        "100m": Fraction(1, 10),
        "1": Fraction(1),
        "0.1m": Fraction(1, 10_000),
        "2500m": Fraction(5, 2),
        "0": Fraction(0),
    },
    "memory": {"128Mi": Fraction(128 << 20), "1G": Fraction(10**9), "1500m": Fraction(3, 2), "1e3": Fraction(1000)},
    "ephemeral-storage": {"1Ki": Fraction(1024), "7": Fraction(7)},
    "hugepages-2Mi": {"2Mi": Fraction(2 << 20), "4Mi": Fraction(4 << 20)},
    "example.com/fpga": {"1": Fraction(1), "3": Fraction(3), "0": Fraction(0)},
    "nvidia.com/gpu": {"1": Fraction(1), "2": Fraction(2), "8": Fraction(8), "0": Fraction(0)},
}
POD_LEVEL = ("cpu", "memory")


def draw_list(rng: random.Random, names: tuple[str, ...]) -> dict[str, str]:
    return {name: rng.choice(list(TEXTS[name])) for name in names if rng.random() < 0.5}


def draw_container(rng: random.Random, name: str) -> Spec:
    requests = draw_list(rng, tuple(TEXTS))
    limits = {n: requests.get(n, rng.choice(list(TEXTS[n]))) for n in TEXTS if rng.random() < 0.3}
    limits.update({n: rng.choice(list(TEXTS[n])) for n in limits if "/" not in n and rng.random() < 0.3})
    return {"name": name, "resources": {"requests": requests, "limits": limits}}


def draw_pod(rng: random.Random) -> Spec:
    spec: Spec = {"containers": [draw_container(rng, f"app{i}") for i in range(rng.randint(1, 3))]}
    inits = [draw_container(rng, f"init{i}") for i in range(rng.choice([0, 0, 1, 2, 3]))]
    for init in inits:
        if rng.random() < 0.5:
            init["restartPolicy"] = rng.choice(["Always", "Always", "OnFailure"])
    if inits:
        spec["initContainers"] = inits
    if rng.random() < 0.3:
        spec["overhead"] = draw_list(rng, ("cpu", "memory"))
    if rng.random() < 0.2:
        spec["resources"] = {"requests": draw_list(rng, POD_LEVEL), "limits": draw_list(rng, POD_LEVEL)}
    status: Spec = {"phase": rng.choice(["Pending", "Running", "Running", "Succeeded", "Failed", "Unknown"])}
    if rng.random() < 0.3:
        for key, containers in (("containerStatuses", spec["containers"]), ("initContainerStatuses", inits)):
            status[key] = [
                {
                    "name": container["name"],
                    "allocatedResources": draw_list(rng, POD_LEVEL),
                    "resources": {"requests": draw_list(rng, POD_LEVEL)},
                }
                for container in containers
                if rng.random() < 0.7
            ]
    return {"metadata": {"uid": "u"}, "spec": spec, "status": status}


def exact(listed: dict[str, str]) -> dict[str, Fraction]:
    return {name: TEXTS[name][written] for name, written in listed.items()}


def taken(container: Spec, statuses: list[Spec], *, resizes: bool) -> dict[str, Fraction]:
    """What one container holds while it runs."""
    resources = container["resources"]
    holds = {**exact(resources["limits"]), **exact(resources["requests"])}
    for status in statuses:
        if resizes and status["name"] == container["name"]:
            for listed in (status["allocatedResources"], status["resources"]["requests"]):
                for name, amount in exact(listed).items():
                    holds[name] = max(holds.get(name, Fraction(0)), amount)
    return holds


def simulated(pod: Spec) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    """The most each resource has in use at any step of the pod's start, and the devices among them."""
    spec, status = pod["spec"], pod["status"]
    if status["phase"] in {"Succeeded", "Failed"}:
        return {}, {}
    statuses = status.get("containerStatuses", []) + status.get("initContainerStatuses", [])
    inits = [("sidecar" if c.get("restartPolicy") == "Always" else "init", c) for c in spec.get("initContainers", [])]
    in_use: dict[str, Fraction] = {}
    most: dict[str, Fraction] = {}
    for role, container in [*inits, *(("app", c) for c in spec["containers"])]:
        holds = taken(container, statuses, resizes=role != "init")
        for name, amount in holds.items():
            in_use[name] = in_use.get(name, Fraction(0)) + amount
            most[name] = max(most.get(name, Fraction(0)), in_use[name])
        if role == "init":  # it ends before the next one starts
            for name, amount in holds.items():
                in_use[name] -= amount
    devices = {name: most[name] for name in most if name == "nvidia.com/gpu"}
    level = spec.get("resources", {"requests": {}, "limits": {}})
    defaults = {name: amount for name, amount in exact(level["limits"]).items() if name not in most}
    most.update({**defaults, **exact(level["requests"])})
    for name, amount in exact(spec.get("overhead", {})).items():
        most[name] = most.get(name, Fraction(0)) + amount
    return most, devices


def test_demand_equals_the_simulated_start() -> None:
    rng = random.Random(3)
    kinds = {"overhead": 0, "resources": 0, "initContainers": 0}
    for number in range(SPECS):
        raw = draw_pod(rng)
        for key in kinds:
            kinds[key] += key in raw["spec"]
        pod = read_pod(raw)
        most, devices = simulated(raw)
        amounts = pod.request.amounts
        counted = {name: ceil(amount) for name, amount in most.items()}
        expected = Amounts(
            cpu_milli=ceil(most.get("cpu", Fraction(0)) * 1000),
            memory_bytes=counted.get("memory", 0),
            storage_bytes=counted.get("ephemeral-storage", 0),
            extended=tuple((n, counted[n]) for n in ("example.com/fpga", "hugepages-2Mi") if counted.get(n)),
        )
        assert amounts == expected, (number, raw)
        assert dict(pod.tokens).get("nvidia.com/gpu", 0) == devices.get("nvidia.com/gpu", 0), (number, raw)
        if not pod.terminal:
            assert pod.request.devices.count == devices.get("nvidia.com/gpu", 0), (number, raw)
        assert pod.request.refusal is None, (number, raw, pod.request.refusal)
    assert min(kinds.values()) > SPECS // 10  # the draw reaches every part of the formula


def container(name: str, **requests: str) -> Spec:
    return {"name": name, "resources": {"requests": {key.replace("_", "-"): value for key, value in requests.items()}}}


def read(spec: Spec, status: Spec | None = None, **metadata: object) -> Pod:
    return read_pod({"metadata": {"uid": "u", **metadata}, "spec": spec, "status": status or {}})


def test_documented_example() -> None:
    sidecar = {**container("log", cpu="1"), "restartPolicy": "Always"}
    spec = {
        "initContainers": [container("fetch", cpu="5"), sidecar, container("check", cpu="6")],
        "containers": [container("main", cpu="2"), container("helper", cpu="1")],
        "overhead": {"cpu": "250m"},
    }
    assert read(spec).request.amounts.cpu_milli == 7250  # check (6) beside log (1), and the overhead


def test_small_requests_are_rounded_once() -> None:
    spec = {"containers": [container(f"c{i}", cpu="0.1m", memory="100m") for i in range(10)]}
    assert read(spec).request.amounts == Amounts(cpu_milli=1, memory_bytes=1)


def test_pod_level_keeps_what_it_is_resized_from() -> None:
    spec = {"containers": [container("main", cpu="1")], "resources": {"requests": {"cpu": "2"}}}
    status = {"allocatedResources": {"cpu": "3", "memory": "9Gi"}, "resources": {"requests": {"cpu": "4"}}}
    assert read(spec, status).request.amounts == Amounts(cpu_milli=4000)
    assert read(spec).request.amounts == Amounts(cpu_milli=2000)


def test_pod_level_devices_are_not_a_thing() -> None:
    spec = {
        "containers": [container("main")],
        "resources": {"requests": {"nvidia.com/gpu": "2", "hugepages-2Mi": "4Mi"}},
    }
    pod = read(spec)
    assert pod.tokens == ()
    assert pod.request.amounts.extended == (("hugepages-2Mi", 4 << 20),)


@pytest.mark.parametrize(
    ("phase", "deleting", "cpu_milli"), [("Failed", False, 0), ("Running", True, 1000), ("Pending", True, 1000)]
)
def test_terminal_pods_take_nothing_and_terminating_ones_all(phase: str, deleting: bool, cpu_milli: int) -> None:
    stamp = {"deletionTimestamp": "2026-11-21T01:13:33Z"} if deleting else {}
    pod = read({"containers": [container("main", cpu="1")]}, {"phase": phase}, **stamp)
    assert (pod.request.amounts.cpu_milli, pod.deleting) == (cpu_milli, deleting)
