"""What the agent reads of machines with GPUs, through the real pynvml."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fakenvml.box import GIB, HERE, MODELS, Box, build, geometry, load
from nodeagent.collect import Collector, Round, links, whole_of_parts
from nodeagent.nvml import Events, Gpu, Nvml, Why, ask
from nodeagent.report import Activity, Profile, Slice, decode, encode
from tests.nodeagent.parts import divide

Machine = Callable[..., Box]
VALUES = re.findall(r"X\((\w+)\)", (HERE / "box.h").read_text().partition("VALUES(X)")[2].partition("enum")[0])
NUMBERS = st.integers(-30, 2**63 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])


class Eyes:
    """A collector with its clock."""

    def __init__(self, box: Box, **how: Any) -> None:
        self.box, self.seq = box, 0
        self.collector = Collector(Nvml(), node="gpu-1", agent="1.0.0", **how)

    def look(self, *, deep: bool = False) -> Round:
        self.seq += 1
        self.box.wait(5)
        boot = self.box.boot_id.read_text().strip()
        found = self.collector.look(boot=boot, seq=self.seq, at_us=self.seq * 5_000_000, deep=deep)
        assert decode(encode(found.report)) == found.report
        return found


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_reported_whole(machine: Machine, model: str) -> None:
    eyes = Eyes(machine(model))
    report = eyes.look().report
    known = geometry()["gpus"][model]
    family = geometry()["families"][known["family"]]
    assert (report.expected, len(report.devices), report.lost, report.problem) == (8, 8, (), None)
    assert (report.driver, report.cuda) == ("580.95.05", 13040)
    first = report.devices[0]
    assert (first.uuid, first.bus, first.serial, first.pci_id) == (
        Box.uuid(0), "00000000:18:00.0", "1652423000000", known["pci"][0]
    )  # fmt: skip
    assert [device.numa for device in report.devices] == [0] * 4 + [1] * 4
    assert first.mig_mode == "off"
    shapes = {row[1]: (row[3], row[4], row[5], tuple(row[6])) for row in family["shapes"] if row[0] in known["names"]}
    assert {p.id: (p.g, p.size, p.max, p.starts) for p in first.profiles} == shapes
    assert first.missing == ()
    assert first.sensors.power_limit_mw == MODELS[model][3] * 1000
    assert (first.sensors.recovery_action is None) == (MODELS[model][1] < 9)
    assert first.sensors.ecc_on is True
    assert first.sensors.retired_pages is None


def test_nvlink_leads_to_the_switch_or_to_the_neighbour(machine: Machine) -> None:
    device = Eyes(machine("H100-80", 2)).look().report.devices[0]
    assert [(link.to, link.lanes, link.up) for link in device.links] == [("switch", 18, 18)]


def test_nvlink_bridges_are_named_by_uuid_and_a_lane_may_be_down(machine: Machine) -> None:
    box = machine("A30-24", 4)
    box.set(2, nvlink_down=0b101)
    third = Eyes(box).look().report.devices[2]
    assert [(link.to, link.lanes, link.up) for link in third.links] == [(Box.uuid(3), 4, 2)]
    assert [(one.to, one.lanes) for one in links([("", True), ("00000000:AA:00.0", True)], {})] == [
        ("00000000:AA:00.0", 1), ("unknown", 1)
    ]  # fmt: skip


def test_utilisation_and_memory(machine: Machine) -> None:
    box = machine("A100-80", 1)
    box.set(0, util_gpu=73, util_mem=20, util_enc=5, mem_used=1 * GIB)
    box.run(0, 42, 3 * GIB, sm=60)
    box.run(0, 43, 1 * GIB, mps=True)
    seen = Eyes(box).look()
    activity = seen.report.devices[0].activity
    assert (activity.busy_ratio, activity.copy_ratio, activity.encoder_ratio) == (0.73, 0.2, 0.05)
    assert (activity.memory_mib, activity.memory_used_mib, activity.memory_reserved_mib) == (81920, 5 * 1024, 640)
    assert activity.sm_ratio is None  # before Hopper nothing measures them
    assert {(one.pid, one.memory_mib, one.busy_ratio) for one in seen.running} == {(42, 3072, 0.6), (43, 1024, 0.0)}


def test_gpm_of_a_device_comes_with_the_second_look(machine: Machine) -> None:
    box = machine("H100-80", 1)
    eyes = Eyes(box)
    for metric, percent in ((2, 61.5), (3, 40.0), (5, 33.0), (10, 12.0)):
        box.gpm(0, metric, percent)
    assert eyes.look().report.devices[0].activity.sm_ratio is None
    activity = eyes.look().report.devices[0].activity
    assert (activity.sm_ratio, activity.occupancy_ratio, activity.tensor_ratio, activity.dram_ratio) == (
        0.615, 0.4, 0.33, 0.12
    )  # fmt: skip


def test_gpm_is_not_asked_before_there_are_two_samples(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.gpm(0, 2, 50.0)
    box.fault("nvmlGpmMetricsGet", times=1, code=999)
    eyes = Eyes(box)
    assert [eyes.look().report.devices[0].activity.sm_ratio for _ in range(3)] == [None, None, 0.5]


def test_a_divided_device(machine: Machine) -> None:
    box = machine("H100-80", 2)
    box.mig(0)
    large, small = divide(0, "3g.40gb", 4), divide(0, "1g.10gb", 0)
    eyes = Eyes(box)
    eyes.look()
    box.gpm(0, 1, 50.0, gi=large.gi)
    box.gpm(0, 2, 80.0, gi=large.gi)
    box.run(0, 42, 2 * GIB, gi=large.gi, ci=0)
    eyes.look()
    seen = eyes.look()
    whole, other = seen.report.devices
    assert (whole.mig_mode, other.mig_mode) == ("on", "off")
    assert [(one.profile, one.start, one.size, one.uuid) for one in whole.slices] == [
        ("1g.10gb", 0, 1, small.uuid), ("3g.40gb", 4, 4, large.uuid)
    ]  # fmt: skip
    part = whole.slices[1]
    assert (part.activity.busy_ratio, part.activity.sm_ratio, part.activity.memory_used_mib) == (0.5, 0.8, 2048)
    assert whole.activity.copy_ratio is None  # no utilisation rates under MIG
    assert [(one.slice, one.pid, one.busy_ratio) for one in seen.running] == [(large.uuid, 42, None)]


def test_the_layout_is_read_anew_when_an_instance_is_gone(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.mig(0)
    old = divide(0, "3g.40gb", 4)
    eyes = Eyes(box)
    assert [one.uuid for one in eyes.look().report.devices[0].slices] == [old.uuid]
    old.destroy()
    new = divide(0, "3g.40gb", 4)
    assert new.gi == old.gi
    assert [one.uuid for one in eyes.look().report.devices[0].slices] == [new.uuid]
    divide(0, "1g.10gb", 0)
    assert len(eyes.look(deep=True).report.devices[0].slices) == 2


def test_a_mode_that_changes_is_seen_at_once(machine: Machine) -> None:
    box = machine("H100-80", 1)
    eyes = Eyes(box)
    assert eyes.look().report.devices[0].activity.busy_ratio is not None
    box.mig(0)
    assert eyes.look().report.devices[0].mig_mode == "on"
    box.mig(0, on=False)
    found = eyes.look().report.devices[0]
    assert (found.mig_mode, found.activity.copy_ratio) == ("off", 0.0)  # what was not supported is asked again


def test_mig_on_ampere_says_that_a_reset_is_pending(machine: Machine) -> None:
    box = machine("A100-40", 1)
    box.set(0, mig_pending=1)
    found = Eyes(box).look().report.devices[0]
    assert (found.mig_mode, found.mig_pending) == ("off", True)


def test_an_instance_without_compute_instance_is_reported_and_usable_by_nobody(machine: Machine) -> None:
    machine("A100-40", 1).mig(0)
    pynvml.nvmlInit()
    pynvml.nvmlDeviceCreateGpuInstance(pynvml.nvmlDeviceGetHandleByIndex(0), 19)
    (part,) = Eyes(Box.__new__(Box)).collector.look(boot="b", seq=1, at_us=1).report.devices[0].slices
    assert (part.profile, part.start, part.ci, part.uuid) == ("1g.5gb", 6, None, None)


def test_several_compute_instances_of_one_gpu_instance(machine: Machine) -> None:
    box = machine("A100-40", 1)
    box.mig(0)
    divide(0, "3g.20gb", 0, computes=(0, 1))
    parts = Eyes(box).look().report.devices[0].slices
    assert [(one.gi, one.ci, one.start, one.size) for one in parts] == [(2, 0, 0, 4), (2, 1, 0, 4)]


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_lost_gpu_leaves_the_others(machine: Machine, when: str) -> None:
    box = machine("H100-80", 8)
    eyes = Eyes(box)
    eyes.look()
    box.lose(3)
    report = eyes.look(deep=when == "before").report
    assert [device.index for device in report.devices] == [0, 1, 2, 4, 5, 6, 7]
    assert [(one.index, one.uuid) for one in report.lost] == [(3, Box.uuid(3))]
    assert "lost" in report.lost[0].why
    assert report.expected == 8
    assert all(device.sensors.power_mw for device in report.devices)
    box.lose(3, 0)
    assert len(eyes.look(deep=True).report.devices) == 8


def test_a_lost_gpu_is_not_asked_again(machine: Machine) -> None:
    box = machine("H100-80", 1)
    eyes = Eyes(box)
    eyes.look()
    box.lose(0)
    eyes.look()
    before = box.calls
    eyes.look()
    assert box.calls - before <= 4  # versions of driver, library, CUDA


def test_a_gpu_that_falls_off_the_bus_is_missed(machine: Machine) -> None:
    box = machine("H100-80", 4)
    eyes = Eyes(box)
    eyes.look()
    box.remove_last()
    report = eyes.look(deep=True).report
    assert (report.expected, len(report.devices), [one.uuid for one in report.lost]) == (4, 3, [Box.uuid(3)])


def test_the_gpus_behind_one_that_fell_off_move_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is loaded anew counts those that are left."""
    eyes, gone = Eyes(machine("H100-80", 4)), Box.uuid(1)
    eyes.look()
    find = Nvml.find

    def counted_anew(nvml: Nvml) -> list[Any]:
        left = [one for one in find(nvml) if not isinstance(one, Gpu) or one.uuid != gone]
        for index, one in enumerate(left):
            assert isinstance(one, Gpu)
            one.index = index
        return left

    monkeypatch.setattr(Nvml, "find", counted_anew)
    for _ in range(2):
        report = eyes.look(deep=True).report
        assert [(one.index, one.uuid) for one in report.devices] == [
            (0, Box.uuid(0)), (1, Box.uuid(2)), (2, Box.uuid(3))
        ]  # fmt: skip
        assert (report.expected, [one.uuid for one in report.lost]) == (4, [gone])


def test_a_reboot_starts_anew(machine: Machine) -> None:
    box = machine("H100-80", 2)
    box.mig(0)
    divide(0, "7g.80gb", 0)
    eyes = Eyes(box)
    assert len(eyes.look().report.devices[0].slices) == 1
    box.reboot()
    box.remove_last()
    report = eyes.look().report
    assert (report.devices[0].mig_mode, report.devices[0].slices, report.expected) == ("off", (), 1)


def test_what_is_not_supported_is_asked_once(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.set(0, power_mw=-3, throttle=-3)
    eyes = Eyes(box)
    assert eyes.look().report.devices[0].sensors.power_mw is None
    box.set(0, power_mw=1000, throttle=0)
    assert eyes.look().report.devices[0].sensors.power_mw is None
    assert eyes.look(deep=True).report.devices[0].sensors.power_mw == 1000


def test_a_failure_of_one_call_is_one_hole(machine: Machine) -> None:
    box = machine("H100-80", 2)
    box.fault("nvmlDeviceGetPowerUsage", gpu=1, times=1, code=999)
    eyes = Eyes(box)
    first, second = eyes.look().report.devices
    assert first.sensors.power_mw == second.sensors.power_limit_mw * 150 // 1000  # type: ignore[operator]
    assert (second.sensors.power_mw, second.missing) == (None, ("DeviceGetPowerUsage: the driver failed",))
    assert second.sensors.temperature_c == 35
    again = eyes.look().report.devices[1]
    assert (again.sensors.power_mw, again.missing) == (105000, ())


@pytest.mark.parametrize("code", [3, 4, 15, 999])
def test_any_call_may_fail_and_there_is_a_report(machine: Machine, code: int) -> None:
    box = machine("H100-80", 2)
    box.mig(0)
    divide(0, "3g.40gb", 4)
    eyes = Eyes(box)
    eyes.look()
    before = box.calls
    eyes.look(deep=True)
    calls = box.calls - before
    assert calls > 100
    for nth in range(1, calls, 3):
        box.fault("*", nth=nth, times=1, code=code)
        eyes.look(deep=True)
        box.heal()
    assert eyes.look(deep=True).report.lost == ()


def test_without_permission_slices_have_no_place(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.mig(0)
    made = divide(0, "3g.40gb", 4)
    box.privileged(yes=False)
    found = Eyes(box).look().report.devices[0]
    assert [(one.uuid, one.profile, one.gi, one.start) for one in found.slices] == [
        (made.uuid, "3g.40gb", made.gi, None)
    ]
    assert {(one.size, one.starts) for one in found.profiles} == {(0, ())}
    assert any("no permission" in one for one in found.missing)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(VALUES), st.integers(-30, 2**63 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1]))
)
def test_whatever_the_driver_says_there_is_a_report(machine: Machine, values: dict[str, int]) -> None:
    box = machine("H100-80", 1)
    box.set(0, **values)
    eyes = Eyes(box)
    eyes.look()
    eyes.look()


def test_slices_say_who_runs_on_them_where_the_gpu_does_not(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.mig(0)
    part = divide(0, "3g.40gb", 4)
    box.run(0, 42, GIB, gi=part.gi, ci=0)
    box.fault("nvmlDeviceGetComputeRunningProcesses_v3", nth=1, times=1, code=4)
    eyes = Eyes(box)
    assert [(one.slice, one.pid) for one in eyes.look().running] == [(part.uuid, 42)]


def test_what_is_never_supported_is_not_remembered_for_ever(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.fault("nvmlDeviceGetProcessUtilization", code=3)
    eyes = Eyes(box)
    eyes.look()
    before = len(eyes.collector.gpus[0]._unsupported)
    calls = box.calls
    for _ in range(5):
        eyes.look()
    assert len(eyes.collector.gpus[0]._unsupported) == before
    assert box.calls > calls


def test_a_slow_call_is_waited_for(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.fault("nvmlDeviceGetPowerUsage", times=1, sleep_ms=60)
    began = time.monotonic()
    assert Eyes(box).look().report.devices[0].sensors.power_mw
    assert time.monotonic() - began >= 0.06


def test_an_older_driver_has_fewer_functions(tmp_path: Path) -> None:
    newer = "nvmlDeviceGetCurrentClocksEventReasons nvmlDeviceGetMemoryInfo_v2 nvmlDeviceGetFieldValues"
    more = "nvmlGpmQueryDeviceSupport nvmlDeviceGetGpuInstanceProfileInfoV nvmlDeviceGetNumaNodeId"
    pynvml.nvmlLib = load(build(tmp_path, without=f"{newer} {more}".split()))
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        box = Box(pynvml.nvmlLib, tmp_path).add("H100-80", 1)
        box.set(0, throttle=4, mem_used=GIB)
        device = Eyes(box).look().report.devices[0]
    finally:
        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()
    assert (device.sensors.throttle_bits, device.sensors.recovery_action, device.numa) == (4, None, None)
    assert (device.activity.memory_used_mib, device.activity.memory_reserved_mib) == (1024 + 640, None)
    assert device.profiles == ()  # their names came with a later driver, and a profile without a name serves nobody


def test_without_a_driver_the_report_says_so(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.fault("nvmlInitWithFlags", times=1, code=9)
    eyes = Eyes(box)
    report = eyes.look().report
    assert (report.devices, report.problem) == ((), "the NVIDIA driver is not loaded (Init answered 9)")
    assert len(eyes.look().report.devices) == 1


def test_a_driver_that_forgot_us_is_started_anew(machine: Machine) -> None:
    box = machine("A30-24", 1)
    eyes = Eyes(box)
    eyes.look()
    pynvml.nvmlShutdown()
    assert len(eyes.look().report.devices) == 1


def test_closing_lets_go_of_the_driver(machine: Machine) -> None:
    eyes = Eyes(machine("H100-80", 1))
    eyes.look()
    eyes.look()
    eyes.collector.close()
    assert ask("DeviceGetCount").why is Why.STALE


def test_the_kernel_knows_the_numa_node_better(machine: Machine) -> None:
    asked: list[str] = []

    def numa(bus: str) -> int:
        asked.append(bus)
        return 5

    assert Eyes(machine("H100-80", 1), numa=numa).look().report.devices[0].numa == 5
    assert asked == ["00000000:18:00.0"]


def test_events(machine: Machine) -> None:
    box = machine("H100-80", 2)
    box.set(0, event_types=-3)
    eyes = Eyes(box)
    eyes.look()
    events = Events(eyes.collector.gpus)
    assert list(events.deaf) == [Box.uuid(0)]
    box.event(1, data=79)
    heard = events.wait(0)
    assert (heard.uuid, heard.kind, heard.data, heard.gi) == (Box.uuid(1), 8, 79, None)  # type: ignore[union-attr]
    box.event(1, data=94, gi=2, ci=0)
    assert events.wait(0).gi == 2  # type: ignore[union-attr]
    assert events.wait(0).why is Why.NOTHING  # type: ignore[union-attr]
    events.close()
    assert events.wait(0).why is Why.STALE  # type: ignore[union-attr]


def test_busy_of_a_divided_device_counts_each_instance_once() -> None:
    profiles = [Profile(9, "3g", 3, 4, 2, 1), Profile(0, "7g", 7, 8, 1, 1)]
    busy = [Slice(1, ci, f"u{ci}", "3g", 0, 4, 1, activity=Activity(busy_ratio=0.7)) for ci in (0, 1)]
    assert whole_of_parts(busy, profiles) == {"busy_ratio": pytest.approx(0.3)}
    assert whole_of_parts([], profiles) == {}


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetGpuInstanceProfileInfoV",
        "nvmlDeviceGetGpuInstances",
        "nvmlGpuInstanceGetInfo",
        "nvmlGpuInstanceGetComputeInstances",
        "nvmlComputeInstanceGetInfo_v2",
    ],
)
def test_a_layout_that_cannot_be_read_is_in_change_and_not_free(machine: Machine, call: str) -> None:
    box = machine("H100-80", 1)
    box.mig(0)
    divide(0, "3g.40gb", 4)
    collector = Collector(Nvml(), node="n", agent="1")
    box.fault(call, code=999)
    first = collector.look(boot="b", seq=1, at_us=1).report.devices[0]
    assert (first.reconfiguring, first.slices) == (True, ())
    box.heal()
    second = collector.look(boot="b", seq=2, at_us=2).report.devices[0]
    assert (second.reconfiguring, [one.start for one in second.slices]) == (False, [4])
    collector.close()
