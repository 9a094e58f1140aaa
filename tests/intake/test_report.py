"""Reports to the model: slots, health, MIG mode, what is close to what."""

from __future__ import annotations

import pytest

from nodeagent.report import STATES, SWITCH, Device, Health, Link, Lost, Report
from policies.columns import Health as Verdict
from scheduler.intake.report import gpus_told, read_report
from scheduler.model.node import Sighting


def device(index: int, *links: Link, **how: object) -> Device:
    return Device(
        index=index, uuid=f"GPU-{index}", name="H100", bus=f"0000000{index}:1B:00.0", pci_id=1, memory_mib=81559,
        links=links, **how,  # type: ignore[arg-type]
    )  # fmt: skip


def read(*devices: Device, **how: object) -> Sighting:
    return read_report(Report(node="a", boot="b", seq=1, at_us=1, agent="1", devices=devices, **how))  # type: ignore[arg-type]


def groups(*devices: Device) -> list[int]:
    return [one.link_group for one in read(*devices).devices]


def test_slots_are_the_drivers_indices_in_order() -> None:
    found = read(device(3, numa=1), device(1), driver="580.1")
    assert [(one.slot, one.uuid, one.numa) for one in found.devices] == [(1, "GPU-1", -1), (3, "GPU-3", 1)]
    assert found.driver == "580.1"


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_a_verdict_and_probation_works(state: str) -> None:
    (seen,) = read(device(0, health=Health(state))).devices
    assert seen.health is (Verdict.HEALTHY if state == "PROBATION" else Verdict[state])


def test_a_gpu_whose_layout_is_being_changed_is_not_given_away() -> None:
    assert [one.health for one in read(device(0, reconfiguring=True)).devices] == [Verdict.RESETTING]


def test_mig_mode_is_the_current_one() -> None:
    modes = [device(0, mig_mode="on"), device(1, mig_mode="off", mig_pending=True), device(2, mig_mode="none")]
    assert [one.mig_mode for one in read(*modes).devices] == [True, False, False]


def test_a_numa_node_wider_than_the_column_is_not_known() -> None:
    assert [one.numa for one in read(device(0, numa=127), device(1, numa=128)).devices] == [127, -1]


def test_link_groups_are_what_working_lanes_join() -> None:
    assert groups(device(0), device(1)) == [-1, -1]
    pairs = [device(0, Link("GPU-1", 4, 4)), device(1), device(2), device(3, Link("00000002:1B:00.0", 4, 1))]
    assert groups(*pairs) == [0, 0, 2, 2]
    assert groups(device(0, Link("GPU-1", 4, 0)), device(1)) == [-1, -1], "lanes that are down join nothing"
    assert groups(device(0, Link("GPU-9", 4, 4)), device(1)) == [-1, -1], "nor do those to a GPU that is not there"
    switched = [device(at, Link(SWITCH, 18, 18)) for at in range(3)]
    assert groups(*switched, device(3)) == [0, 0, 0, -1]
    chain = [device(at, Link(f"GPU-{at + 1}", 1, 1)) for at in range(5)]
    assert groups(*reversed(chain), device(5)) == [0] * 6


def test_lost_gpus_are_told_of_and_not_seen() -> None:
    report = Report(
        node="a", boot="b", seq=1, at_us=1, agent="1", devices=(device(0),), lost=(Lost(1, "GPU-1", "gone"),)
    )
    assert gpus_told(report) == 2
    assert [one.slot for one in read_report(report).devices] == [0]
