"""Signs, patience and the way back: single rules, and properties over drawn histories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.health import (
    APP_XIDS,
    CONTAIN_S,
    GONE_XIDS,
    HOLD_S,
    IGNORED_XIDS,
    LINK_XIDS,
    MOVES,
    PEOPLE_XIDS,
    QUIET_S,
    RESET_XIDS,
    Needs,
    Record,
    Signs,
    Step,
    act,
    boot,
    hear,
    observe,
    signs_of,
    verdict,
)
from nodeagent.report import Activity, Device, Link, Sensors

FINE = Signs()


def after(record: Record, seconds: int, *, every: int = 5, start: int = 0, signs: Signs = FINE) -> Record:
    """Look every few seconds for so long."""
    for now in range(start, start + seconds + 1, every):
        record = observe(record, signs, now)
    return record


@pytest.mark.parametrize(
    ("xid", "state", "needs"),
    [
        *[(xid, "DRAINING", Needs.RESET) for xid in sorted(RESET_XIDS)],
        *[(xid, "BAD", Needs.REBOOT) for xid in sorted(GONE_XIDS)],
        *[(xid, "BAD", Needs.PEOPLE) for xid in sorted(PEOPLE_XIDS)],
        *[(xid, "SUSPECT", Needs.NOTHING) for xid in sorted(LINK_XIDS | {48, 9999})],
        *[(xid, "HEALTHY", Needs.NOTHING) for xid in sorted(IGNORED_XIDS | APP_XIDS)],
    ],
)
def test_classes_of_xids(xid: int, state: str, needs: Needs) -> None:
    record = hear(Record(), xid, 100, workload="job-1")
    assert (record.state, record.needs) == (state, needs)


def test_no_xid_is_in_two_classes() -> None:
    classes = [RESET_XIDS, GONE_XIDS, PEOPLE_XIDS, LINK_XIDS, IGNORED_XIDS, APP_XIDS]
    assert sum(len(one) for one in classes) == len(frozenset().union(*classes))


@pytest.mark.parametrize(
    ("action", "state", "needs"),
    [(0, "HEALTHY", Needs.NOTHING), (1, "DRAINING", Needs.RESET), (2, "DRAINING", Needs.REBOOT),
     (3, "SUSPECT", Needs.RESET), (4, "DRAINING", Needs.RESET), (5, "SUSPECT", Needs.RESET),
     (6, "DRAINING", Needs.RESET), (7, "DRAINING", Needs.REBOOT), (42, "DRAINING", Needs.RESET)],
)  # fmt: skip
def test_recovery_actions(action: int, state: str, needs: Needs) -> None:
    record = observe(Record(), Signs(recovery=action), 0)
    assert (record.state, record.needs) == (state, needs)


def test_a_double_bit_error_that_is_contained_is_the_applications() -> None:
    assert after(hear(Record(), 48, 0), CONTAIN_S).state == "DRAINING"
    contained = hear(hear(Record(), 48, 0), 94, 3, workload="job-1")
    assert after(contained, QUIET_S + 5).state == "HEALTHY"


def test_three_workloads_with_one_xid_are_no_bug_of_theirs() -> None:
    record = Record()
    for at, (xid, who) in enumerate([(31, "a"), (31, "a"), (13, "b"), (31, "b"), (31, "")]):
        record = hear(record, xid, at, workload=who)
    assert record.state == "HEALTHY"
    assert hear(record, 31, 3601, workload="c").state == "HEALTHY"  # an hour later the first two are forgotten
    assert hear(record, 31, 3500, workload="c").state == "SUSPECT"


def test_trust_comes_back_after_ten_quiet_minutes_and_not_before() -> None:
    suspect = hear(Record(), 9999, 0)
    assert after(suspect, QUIET_S - 1).state == "SUSPECT"
    assert after(suspect, QUIET_S).state == "HEALTHY"
    again = hear(after(suspect, 400), 9999, 400)
    assert after(again, QUIET_S - 1, start=400).state == "SUSPECT"


def test_the_way_through_a_reset() -> None:
    record = hear(Record(), 95, 0)
    record = act(record, Step.DRAINED, 30)
    assert record.state == "RESETTING"
    record = act(record, Step.RESET, 60)
    assert (record.state, verdict(record).reasons) == ("PROBATION", ("XID 95",))
    assert after(record, QUIET_S - 1, start=60).state == "PROBATION"
    assert after(record, QUIET_S, start=60) == Record(since_s=660, sign_s=0, xids=((95, 0),))


def test_three_resets_that_fail_are_for_people() -> None:
    record = hear(Record(), 95, 0)
    for at in range(3):
        assert record.state == "DRAINING"
        record = act(act(record, Step.DRAINED, at), Step.FAILED, at)
    assert (record.state, record.needs) == ("BAD", Needs.PEOPLE)
    assert act(record, Step.REPAIRED, 9).state == "PROBATION"


def test_what_needs_a_reboot_is_not_done_with_a_reset() -> None:
    record = observe(Record(), Signs(recovery=2), 0)
    assert act(record, Step.RESET, 5).state == "DRAINING"
    assert boot(record, 5).state == "PROBATION"


def test_an_xid_in_three_starts_of_the_machine_is_for_people() -> None:
    record = Record()
    for at in range(2):
        record = boot(hear(hear(record, 119, at), 119, at), at)
        assert record.state == "PROBATION"
    assert (hear(record, 119, 9).state, hear(record, 120, 9).state) == ("BAD", "DRAINING")


def test_a_gpu_that_comes_back_is_on_probation_only_when_it_stays() -> None:
    record = observe(Record(), Signs(lost=True), 0)
    assert (record.state, record.needs) == ("BAD", Needs.REBOOT)
    record = after(record, 1000, signs=Signs(lost=True))
    assert record.state == "BAD"
    assert after(record, HOLD_S - 10, start=1005).state == "BAD"
    assert after(record, HOLD_S, start=1005).state == "PROBATION"


def test_a_gpu_for_people_does_not_come_back_by_answering() -> None:
    record = observe(hear(Record(), 54, 0), Signs(lost=True), 5)
    assert after(record, 5000, start=10).state == "BAD"
    late = hear(observe(Record(), Signs(lost=True), 0), 54, 5)
    assert after(late, 5000, start=10).state == "BAD"


def test_soft_conditions_count_when_they_last() -> None:
    hot = Signs(soft=("hardware thermal slowdown",))
    assert after(Record(), HOLD_S - 5, signs=hot).state == "HEALTHY"
    flickering = after(after(Record(), HOLD_S - 5, signs=hot), 5, start=60)
    assert after(flickering, HOLD_S - 5, start=70, signs=hot).state == "HEALTHY"
    assert after(Record(), HOLD_S, signs=hot).state == "SUSPECT"


def test_rows_that_wait_for_a_reset_keep_the_device_in_use() -> None:
    record = observe(Record(), Signs(rows_pending=True), 0)
    assert (record.state, record.needs) == ("HEALTHY", Needs.RESET)
    assert verdict(record).reasons == ("memory rows wait for a reset", "needs: reset")
    assert verdict(observe(record, FINE, 5)).reasons == ()


def test_rows_that_failed_are_for_people() -> None:
    assert observe(Record(), Signs(rows_failed=True), 0).needs is Needs.PEOPLE


def device(busy: float = 0.5, links: tuple[Link, ...] = (), **sensors: Any) -> Device:
    activity = Activity(busy_ratio=busy)
    return Device(0, "GPU-0", "H100", "bus", 1, 1, links=links, activity=activity, sensors=Sensors(**sensors))


def test_signs_of_a_device() -> None:
    assert signs_of(device()) == FINE
    assert signs_of(device(throttle_bits=0x1 | 0x4, pcie_generation=5, pcie_generation_max=5, pcie_width=16,
                           pcie_width_max=16, recovery_action=0, rows_pending=False)) == FINE  # fmt: skip
    assert signs_of(device(throttle_bits=0x8 | 0x80)).soft == ("hardware slowdown", "power brake")
    slow = {"pcie_generation": 1, "pcie_generation_max": 5}
    assert signs_of(device(**slow)).soft == ("PCIe link runs as generation 1 of 5",)
    assert signs_of(device(busy=0.0, **slow)).soft == ()
    assert signs_of(device(pcie_width=8, pcie_width_max=16)).soft == ("PCIe link is 8 lanes wide of 16",)
    assert signs_of(device(links=(Link("switch", 18, 16),))).soft == ("2 NVLink lanes are down",)
    assert signs_of(device(recovery_action=1, rows_pending=True, rows_failed=True)) == Signs(
        recovery=1, rows_pending=True, rows_failed=True
    )


def test_a_slice_is_as_bad_as_the_worse_of_it_and_its_device() -> None:
    good, bad = Record(), hear(Record(), 95, 0)
    assert verdict(good, bad).state == "DRAINING"
    assert verdict(good).state == "HEALTHY"
    assert verdict(hear(Record(), 9999, 0), bad).reasons == ("XID 95", "needs: reset")


SIGN = st.one_of(
    st.tuples(st.just("xid"), st.sampled_from(sorted(RESET_XIDS | APP_XIDS | {48, 74, 79, 54, 43, 9999}))),
    st.tuples(st.just("app"), st.sampled_from(["a", "b", "c", "d"])),
    st.tuples(st.just("look"), st.builds(
        Signs, lost=st.booleans(), recovery=st.integers(0, 8), rows_failed=st.just(False), rows_pending=st.booleans(),
        soft=st.sampled_from([(), ("hot",), ("hot", "narrow")]),
    )),
    st.tuples(st.just("fine"), st.integers(1, 300)),
    st.tuples(st.just("act"), st.sampled_from(list(Step))),
    st.tuples(st.just("boot"), st.none()),
)  # fmt: skip
BAD_NEWS = {"xid", "app"}


def play(record: Record, kind: str, what: Any, now: int) -> Record:
    match kind:
        case "xid":
            return hear(record, what, now, workload="w")
        case "app":
            return hear(record, 31, now, workload=what)
        case "look":
            return observe(record, what, now)
        case "act":
            return act(record, what, now)
        case "boot":
            return boot(record, now)
    return observe(record, FINE, now)


RANK = {"HEALTHY": 0, "PROBATION": 1, "SUSPECT": 2, "DRAINING": 3, "RESETTING": 4, "BAD": 5}


@given(st.lists(SIGN, max_size=40))
def test_every_history_keeps_the_rules_and_ends_well(history: list[tuple[str, Any]]) -> None:
    record, now, signed = Record(), 0, -QUIET_S
    for kind, what in history:
        now += what if kind == "fine" else 5
        before = record
        record = play(record, kind, what, now)
        if record.state != before.state:
            # one call may pass through PROBATION and on; each single move is asserted inside
            assert (before.state, record.state) in MOVES | {("BAD", "DRAINING"), ("BAD", "SUSPECT")}
        if kind in BAD_NEWS:
            assert RANK[record.state] >= RANK[before.state]
        if record.sign_s != before.sign_s:
            signed = now
        if record.state == "HEALTHY" and before.state != "HEALTHY":
            assert now - signed >= QUIET_S
        assert (record.state == "BAD") >= (record.needs is Needs.PEOPLE)
    for _ in range(4):  # whatever happened: what people, resets and quiet can mend is mended
        for step in (Step.DRAINED, Step.RESET, Step.REPAIRED):
            record = act(record, step, now)
        record = boot(record, now)
        record = after(record, 2 * QUIET_S, every=60, start=now)
        now += 2 * QUIET_S
    assert (record.state, record.reasons, record.needs) == ("HEALTHY", (), Needs.NOTHING)


@given(st.lists(SIGN, max_size=20), st.sampled_from(sorted(IGNORED_XIDS)))
def test_what_is_ignored_changes_nothing_ever(history: list[tuple[str, Any]], xid: int) -> None:
    record = Record()
    for now, (kind, what) in enumerate(history):
        record = play(record, kind, what, now)
    assert hear(record, xid, 1000) == record


@given(st.lists(SIGN, max_size=300))
def test_a_record_stays_small(history: list[tuple[str, Any]]) -> None:
    record = Record()
    for now, (kind, what) in enumerate(history):
        record = play(record, kind, what, now)
    assert len(record.app) <= 64
    assert len(record.xids) <= 64
    assert len(record.reasons) <= 8
    assert replace(record, since_s=0).state in RANK
