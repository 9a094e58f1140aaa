from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.devices import GPU, devices_of
from bench.oracle import device_ask, labels, model_matches, quantity
from bench.trace import Machine, Task, Trace, TraceError, arrivals, at, load, node_of, pod_of

NODES = "sn,cpu_milli,memory_mib,gpu,model\nopenb-node-0000,64000,262144,2,P100\nopenb-node-0001,96000,393216,8,G2\n"
PODS = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos\n"
    "openb-pod-0000,12000,16384,1,1000,,LS\n"
    "openb-pod-0001,6000,12288,1,460,G2|P100,LS\n"
    "openb-pod-0002,8000,30517,0,0,,BE\n"
    "openb-pod-0003,88000,327680,8,1000,,LS\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "openb").mkdir()
    (tmp_path / "openb" / "openb_node_list_gpu_node.csv").write_text(NODES)
    (tmp_path / "openb" / "openb_pod_list_default.csv").write_text(PODS)
    short = "\n".join(",".join(line.split(",")[:5]) for line in PODS.splitlines())
    (tmp_path / "openb" / "openb_pod_list_multigpu50.csv").write_text(short)
    return tmp_path


def test_a_trace_is_read_as_it_lies_there(folder: Path) -> None:
    trace = load("openb:default", folder)
    assert trace.machines[1] == Machine("openb-node-0001", 96000, 393216, 8, "G2")
    assert trace.tasks[1] == Task("openb-pod-0001", 6000, 12288, 1, 460, ("G2", "P100"))
    assert trace.gpu_milli == 10_000
    assert [task.gpu_milli for task in trace.tasks] == [1000, 460, 0, 8000]
    assert load("openb:multigpu50", folder).tasks[1].models == ()


@pytest.mark.parametrize("name", ["philly:default", "openb", "openb:", "openb:../../etc", "openb:nowhere"])
def test_another_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(TraceError):
        load(name, folder)


def test_without_a_folder_a_stand_in_says_so() -> None:
    trace = load("openb:default", None)
    assert "stand-in" in trace.source
    models = Counter[str]()
    for machine in trace.machines:
        models[machine.model] += machine.gpus
    assert models == {"G2": 4392, "T4": 842, "G3": 312, "P100": 265, "V100M32": 204, "V100M16": 195, "A10": 2}
    assert (len(trace.machines), len(trace.tasks)) == (1213, 8152)
    assert 0.97 < sum(task.gpu_milli for task in trace.tasks) / trace.gpu_milli < 0.99
    assert load("openb:default", None) == trace
    with pytest.raises(TraceError, match="--traces"):
        load("openb:cpu250", None)


def test_arrivals_are_the_whole_list_shuffled_and_then_others_again() -> None:
    trace = load("openb:default", None)
    drawn = arrivals(trace, 42)
    names = [task.name for task in drawn]
    assert sorted(names[:8152]) == sorted(task.name for task in trace.tasks)
    assert names[:8152] != sorted(names[:8152])
    asked = sum(task.gpu_milli for task in drawn)
    assert asked - drawn[-1].gpu_milli < 1.3 * trace.gpu_milli <= asked
    assert arrivals(trace, 42) == drawn
    assert arrivals(trace, 43) != drawn


def test_a_trace_above_the_load_is_cut() -> None:
    machine, task = Machine("m", 1000, 1000, 1, "T4"), Task("t", 1, 1, 1, 100)
    assert len(arrivals(Trace([machine], [task] * 100, ""), 1)) == 13


def test_the_allocation_at_a_load_is_the_mean_over_its_arrivals() -> None:
    asked, allocated = [9960, 10_000, 10_040, 10_060, 13_000], [9000, 9100, 9100, 9100, 9500]
    assert at(100, asked, allocated, 10_000) == pytest.approx(90.667)
    assert at(130, asked, allocated, 10_000) == 95.0
    assert at(120, asked, allocated, 10_000) is None


def test_a_machine_is_an_exact_node_and_a_task_a_pod(folder: Path) -> None:
    trace = load("openb:default", folder)
    node = node_of(trace.machines[1])
    assert labels(node)["tessera.dev/mode"] == "exact"
    assert len(devices_of(labels(node), 8)) == 8
    assert quantity(node["status"]["allocatable"]["memory"]) == 393216 << 20
    whole, part, none, eight = (device_ask(pod_of(task, task.name)) for task in trace.tasks)
    assert [ask.kind for ask in (whole, part, none, eight)] == ["whole", "share", "", "whole"]
    assert (part.milli, part.mib, eight.count) == (460, 0, 8)
    wish = pod_of(trace.tasks[1], "p")["metadata"]["annotations"]["tessera.dev/gpu-model"]
    assert all(any(model_matches(one, product) for one in wish.split(",")) for product in ("G2", "P100"))
    assert not any(model_matches(one, "G3") for one in wish.split(","))
    assert node["status"]["allocatable"][GPU] == "8"
