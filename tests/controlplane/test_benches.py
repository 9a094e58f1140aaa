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
    assert all(report[arm.name] > 0 for arm in throughput.ARMS)
    assert report["tessera_cpu_ms_per_pod"] > 0


async def test_a_trace_runs_to_its_end_and_is_audited(tmp_path: Path) -> None:
    said: list[str] = []
    settings = trace_run.Settings("openb:default", None, 42, tmp_path, most=60)
    report = await trace_run.run_trace(settings, said.append)
    assert report["ok"], report["findings"]
    assert (report["nodes"], report["pods"], report["refused"]) == (1213, 60, 0)
    assert "stand-in" in report["source"]
    assert report["offline_at_100"] is None
