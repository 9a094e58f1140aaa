"""The benches on a real control plane, small: they end, their figures are there, and their own checks find nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import throughput, trace_run

pytestmark = [pytest.mark.controlplane, pytest.mark.usefixtures("real_cluster")]


async def test_throughput_measures_every_arm_and_one_write_a_pod() -> None:
    said: list[str] = []
    report = await throughput.run_throughput(throughput.Settings(nodes=20, pods=30, rounds=1), said.append)
    assert report["ok"], report
    assert report["api_writes_per_pod"] == 1.0
    assert report["checked"] == 4 * 30
    assert all(report[arm.name] > 0 for arm in throughput.ARMS["direct"])
    assert report["tessera_cpu_ms_per_pod"] > 0


async def test_a_trace_runs_to_its_end_and_is_audited(tmp_path: Path) -> None:
    said: list[str] = []
    settings = trace_run.Settings("openb:default", None, 42, tmp_path, most=60)
    report = await trace_run.run_trace(settings, said.append)
    assert report["ok"], report["findings"]
    assert (report["nodes"], report["pods"], report["refused"]) == (1213, 60, 0)
    assert "stand-in" in report["source"]
    assert report["offline_at_100"] is None


async def test_a_trace_by_the_queue_way_drops_whom_a_turn_finds_no_node_for(tmp_path: Path) -> None:
    lines = ["sn,cpu_milli,memory_mib,gpu,model", *(f"node-{n},64000,262144,8,T4" for n in range(2))]
    pods = ["name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos"]
    pods += [f"large-{n},8000,16384,8,1000,,LS" for n in range(2)]
    pods += [f"small-{n},4000,8192,1,{1000 if n % 2 else 500},,LS" for n in range(8)]
    (tmp_path / "openb").mkdir()
    (tmp_path / "openb" / "openb_node_list_gpu_node.csv").write_text("\n".join(lines))
    (tmp_path / "openb" / "openb_pod_list_tiny.csv").write_text("\n".join(pods))
    said: list[str] = []
    settings = trace_run.Settings("openb:tiny", tmp_path, 42, tmp_path / "dump", held=True)
    report = await trace_run.run_trace(settings, said.append)
    assert report["ok"], report["findings"]
    assert report["over_allocations"] == 0
    assert 1 <= report["refused"] < report["pods"], "more is asked than there is, and there is something"
