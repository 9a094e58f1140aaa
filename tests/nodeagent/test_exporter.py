"""`/metrics`: Prometheus can read it, nothing is there twice, and it stays small and quick."""

from __future__ import annotations

import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.exporter import ACTIVITY, SENSORS, STALE_S, Exporter, render
from nodeagent.report import Activity, Device, Health, Lost, Report, Sensors, Slice, Use, Xid

PROMTOOL = shutil.which("promtool")
BYTES_MAX = 60_000
BOARD_12239 = {
    "DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_DEV_FB_USED", "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
}  # fmt: skip
FULL = Activity(81559, 61234, 640, 0.8731, 0.4211, 0.7712, 0.3314, 0.2218, 0.5512, 0.05, 0.01)
ALL = Sensors(
    **{one.name: one.name.startswith("rows_") if one.type == "bool | None" else 123456 for one in fields(Sensors)}
)


def uuid(index: int) -> str:
    return f"GPU-{index:08x}-0000-5000-8000-0123456789ab"


def box(count: int = 8, *, slices: int = 0) -> Report:
    """A machine where nothing is absent and each device or slice belongs to a pod."""

    def part(device: int, at: int) -> Slice:
        return Slice(
            7 + at, 0, f"MIG-{device:08x}-{at:04x}-5000-8000-0123456789ab", "1g.10gb", at, 1, 9728, activity=FULL
        )  # fmt: skip

    devices = tuple(
        Device(
            at, uuid(at), "NVIDIA H100 80GB HBM3", "00000000:18:00.0", 1, 81559, activity=FULL, sensors=ALL,
            mig_mode="on" if slices else "off", slices=tuple(part(at, one) for one in range(slices)),
            xids=(Xid(31, 3, 1),),
        )
        for at in range(count)
    )  # fmt: skip
    places = [(one.uuid, part.uuid) for one in devices for part in one.slices] or [(one.uuid, None) for one in devices]
    uses = tuple(
        Use(device, slice_, "pod", 61234, 0.87, "team-vision", f"llama-pretrain-worker-{at}", "pytorch", processes=1)
        for at, (device, slice_) in enumerate(places)
    )
    return Report("gpu-1", "boot", 7, 1, "0.1.0", driver="580.95.05", expected=count, devices=devices, uses=uses)


def samples(body: bytes) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for one in family.samples:
            found.setdefault(one.name, []).append((one.labels, one.value))
    return found


def test_all_that_the_board_reads_is_there_with_pods() -> None:
    found = samples(render(box(1)))
    assert set(found) >= BOARD_12239
    ((labels, value),) = found["DCGM_FI_DEV_FB_USED"]
    assert value == 61234
    assert labels == {
        "gpu": "0", "UUID": uuid(0), "device": "nvidia0", "modelName": "NVIDIA H100 80GB HBM3", "Hostname": "gpu-1",
        "namespace": "team-vision", "pod": "llama-pretrain-worker-0", "container": "pytorch",
    }  # fmt: skip
    assert not any(name.startswith("DCGM") for name in samples(render(box(1), dcgm=False)))


def test_units_are_base_units() -> None:
    found = samples(render(box(1)))
    values = {name: rows[0][1] for name, rows in found.items()}
    assert values["tessera_agent_gpu_memory_used_bytes"] == 61234 * 2**20
    assert values["tessera_agent_gpu_power_watts"] == 123.456
    assert values["tessera_agent_gpu_sm_clock_hertz"] == 123456e6
    assert values["tessera_agent_gpu_busy_ratio"] == 0.8731
    assert values["tessera_agent_gpu_row_remap_failed"] == 1


def test_every_field_has_a_series() -> None:
    found = samples(render(box(1)))
    assert {family.name for family in (*ACTIVITY, *SENSORS)} <= set(found)


def test_what_is_absent_has_no_series() -> None:
    report = box(1)
    device = replace(report.devices[0], sensors=Sensors(), activity=Activity(memory_mib=5))
    found = samples(render(replace(report, devices=(device,))))
    assert "tessera_agent_gpu_power_watts" not in found
    assert "tessera_agent_gpu_memory_bytes" in found


def test_a_shared_device_names_no_pod_and_its_pods_have_series_that_sum_to_it() -> None:
    report = box(1)
    second = replace(report.uses[0], pod="other", memory_mib=1000, busy_ratio=0.0031)
    rest = Use(uuid(0), None, "external", 234, 0.0)
    first = replace(report.uses[0], memory_mib=60000)
    found = samples(render(replace(report, uses=(first, second, rest))))
    assert "pod" not in found["tessera_agent_gpu_memory_used_bytes"][0][0] | found["DCGM_FI_DEV_FB_USED"][0][0]
    shares = {labels.get("pod", labels["kind"]): value for labels, value in found["tessera_agent_use_memory_bytes"]}
    assert shares == {
        "llama-pretrain-worker-0": 60000 * 2**20, "other": 1000 * 2**20, "unattributed": 234 * 2**20
    }  # fmt: skip
    assert sum(shares.values()) == found["tessera_agent_gpu_memory_used_bytes"][0][1]


def test_two_generations_of_a_pod_are_one_series() -> None:
    report = box(1)
    twice = replace(report, uses=(report.uses[0], replace(report.uses[0], uid="another")))
    ((_, value),) = samples(render(twice))["tessera_agent_use_memory_bytes"]
    assert value == 2 * 61234 * 2**20


def test_nothing_is_there_twice() -> None:
    part = box(1, slices=1).devices[0].slices[0]
    twins = (replace(part, ci=0), replace(part, ci=1, uuid="MIG-twin"))
    report = replace(box(1, slices=1), devices=(replace(box(1, slices=1).devices[0], slices=twins),))
    lines = [line.rpartition(" ")[0] for line in render(report).decode().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines))


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "agent.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:tessera_agent|DCGM)_\w+)`", page)) == set(samples(render(box())))


def test_health_and_losses() -> None:
    report = box(2)
    sick = replace(report.devices[1], health=Health("DRAINING", ("XID 95",)))
    report = replace(report, devices=(report.devices[0], sick), lost=(Lost(2, None, "gone"),), expected=3)
    found = samples(render(report, age_s=1.5))
    assert [value for _, value in found["tessera_agent_gpu_healthy"]] == [1, 0]
    assert [labels["state"] for labels, _ in found["tessera_agent_gpu_state"]] == ["HEALTHY", "DRAINING", "BAD"]
    assert found["tessera_agent_gpus_expected"][0][1] == 3
    assert found["tessera_agent_gpus_working"][0][1] == 2
    assert found["tessera_agent_sample_age_seconds"][0][1] == 1.5


def test_labels_are_escaped() -> None:
    report = box(1)
    odd = replace(report.devices[0], name='a "b" \\ c')
    labels, _ = samples(render(replace(report, devices=(odd,))))["tessera_agent_gpu_power_watts"][0]
    assert labels["model"] == 'a "b" \\ c'


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not on the PATH (on Debian: apt-get install prometheus)")
def test_promtool_finds_no_fault_with_our_names() -> None:
    assert PROMTOOL is not None
    for report in (box(), box(slices=7)):
        body = render(report, dcgm=False)
        said = subprocess.run([PROMTOOL, "check", "metrics"], input=body, capture_output=True, check=False)
        assert said.returncode == 0, said.stdout + said.stderr


def test_eight_gpus_stay_small(capsys: pytest.CaptureFixture[str]) -> None:
    """The size is held; the time is only told, for machines differ."""
    report = box()
    body, took = render(report), []
    for _ in range(50):
        began = time.perf_counter()
        render(report)
        took.append(time.perf_counter() - began)
    took_ms, size = statistics.median(took) * 1000, len(render(box(slices=7)))
    with capsys.disabled():
        sys.stdout.write(f"\n/metrics: 8 GPUs {len(body)} bytes in {took_ms:.2f} ms; 56 slices {size} bytes\n")
    assert len(body) <= BYTES_MAX


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    made = Exporter("127.0.0.1", 0, monotonic=lambda: 5.0)
    yield made
    made.close()


def get(exporter: Exporter, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}{path}", timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_it_serves_the_last_report(exporter: Exporter) -> None:
    assert get(exporter, "/metrics")[0] == 503
    assert get(exporter, "/healthz")[0] == 503
    exporter.publish(box(1))
    assert get(exporter, "/metrics") == (200, render(box(1)))
    assert get(exporter, "/metrics?x=1")[0] == 200
    assert get(exporter, "/healthz") == (200, b"ok\n")
    assert get(exporter, "/etc/passwd")[0] == 404


def test_an_agent_whose_driver_hangs_is_not_well() -> None:
    now_s = 0.0
    exporter = Exporter("127.0.0.1", 0, monotonic=lambda: now_s)
    try:
        exporter.publish(box(1))
        now_s = STALE_S
        assert get(exporter, "/healthz")[0] == 200
        now_s += 1
        assert get(exporter, "/healthz")[0] == 503
        assert get(exporter, "/metrics")[0] == 200, "its age is among the figures"
    finally:
        exporter.close()


def test_a_scraper_that_drips_is_cut_off(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.exporter._WHOLE_S", 0.2)
    exporter.publish(box(1))
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=0.02) as slow:
        for _ in range(500):
            try:
                slow.sendall(b"x")
                if not slow.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("it may drip for ever")
    assert get(exporter, "/metrics")[0] == 200


def test_more_scrapers_than_it_serves_do_not_lock_it_up(exporter: Exporter) -> None:
    exporter.publish(box(1))
    idle = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(3)]
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(get(exporter, "/metrics")[0])) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(10)
    for one in idle:
        one.close()
    assert codes == [200] * 6
