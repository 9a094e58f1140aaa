"""Whether a device or slice may be given work: what the driver says, judged with patience, and the way back.

Pure: one `Record` for each device, and one for each GPU instance that an event named; time is passed in, in seconds of
any clock that never goes back. A slice is as bad as the worse of its own record and its device's.

    HEALTHY ──► SUSPECT ──► DRAINING ──► RESETTING ──► PROBATION ──► HEALTHY      BAD: only people help, or a GPU that
       ▲───────────┘  ten quiet minutes      ▲──────────────┘                          fell off the bus and came back
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from nodeagent.report import BAD, DRAINING, HEALTHY, PROBATION, REASONS_MAX, RESETTING, STATES, SUSPECT, Device, Health

QUIET_S = 600  # without a new sign before a device is trusted again
HOLD_S = 60  # a soft condition must last so long before it counts
CONTAIN_S = 10  # in which 94 may still say that a double-bit error (48) stayed in one application
APP_WINDOW_S = 3600
APP_WORKLOADS = 3  # as many different ones with the same XID are no bug of theirs
BOOTS_MAX = 3  # an XID in as many boots is no accident
RESETS_MAX = 3
_APP_KEPT = 64

DOUBLE_BIT, CONTAINED = 48, 94
RESET_XIDS = frozenset({46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158})
GONE_XIDS = frozenset({79, 151})
LINK_XIDS = frozenset({74, *range(144, 151)})
PEOPLE_XIDS = frozenset({54, 78, 142})
APP_XIDS = frozenset({13, 31, 32, 45, 68, 69, CONTAINED})
IGNORED_XIDS = frozenset({37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 154, 157, 160, 161})
"""NVIDIA's catalogue. 154 only says that the recovery action changed, which `observe` reads."""

SLOW_BITS = {0x08: "hardware slowdown", 0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown",
             0x80: "power brake"}  # fmt: skip
"""Clock event reasons that point at the machine; power caps and idle clocks are ordinary."""
RECOVERY = {1: "GPU reset", 2: "node reboot", 3: "drain peer-to-peer", 4: "drain and reset", 5: "recover IMEX domain",
            6: "bus reset", 7: "system reboot"}  # fmt: skip
"""NVML's recovery actions; 0 is none."""
_SOFT_RECOVERY, _REBOOT_RECOVERY = frozenset({3, 5}), frozenset({2, 7})
_BUSY = 0.1


class Needs(Enum):
    """What brings a device back, strongest last."""

    NOTHING = 0
    RESET = 1
    REBOOT = 2
    PEOPLE = 3


class Step(Enum):
    """What was done about a device, by the agent or by people."""

    DRAINED = "nobody uses it any more and its reset began"
    RESET = "its reset is done"
    FAILED = "its reset failed"
    REPAIRED = "people say that it is good"


MOVES = frozenset({
    (HEALTHY, SUSPECT), (HEALTHY, DRAINING), (HEALTHY, BAD), (SUSPECT, HEALTHY), (SUSPECT, DRAINING), (SUSPECT, BAD),
    (DRAINING, RESETTING), (DRAINING, PROBATION), (DRAINING, BAD), (RESETTING, PROBATION), (RESETTING, DRAINING),
    (RESETTING, BAD), (PROBATION, HEALTHY), (PROBATION, SUSPECT), (PROBATION, DRAINING), (PROBATION, BAD),
    (BAD, PROBATION),
})  # fmt: skip
"""Every change of state there is."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one device or GPU instance.

    Attributes:
        state: one of report.STATES.
        since_s: when it came about.
        sign_s: when the last sign against the device was seen.
        reasons: of this state, newest last.
        needs: what brings it back.
        contain_by_s: until when a double-bit error may turn out to be contained.
        soft: conditions that hold and since when; they count after HOLD_S.
        app: application XIDs of the last hour: when, which, of which workload.
        boots: machine starts seen; `xids`: in which of them each resetting XID came.
        resets: resets that failed in a row.
        lost: it is BAD because it does not answer, and for nothing else.
    """

    state: str = HEALTHY
    since_s: int = 0
    sign_s: int = 0
    reasons: tuple[str, ...] = ()
    needs: Needs = Needs.NOTHING
    contain_by_s: int | None = None
    soft: tuple[tuple[str, int], ...] = ()
    app: tuple[tuple[int, int, str], ...] = ()
    boots: int = 0
    xids: tuple[tuple[int, int], ...] = ()
    resets: int = 0
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Signs:
    """What one look at a device shows.

    Attributes:
        lost: it does not answer; then nothing else counts.
        recovery: NVML's recovery action, 0 = none.
        rows_failed: memory rows could not be remapped.
        rows_pending: a reset would remap rows.
        soft: conditions that matter when they last, in words.
    """

    lost: bool = False
    recovery: int = 0
    rows_failed: bool = False
    rows_pending: bool = False
    soft: tuple[str, ...] = ()


def signs_of(device: Device) -> Signs:
    """Read a device of a report. A link's generation drops when idle, so it counts only under load."""
    sensors, busy = device.sensors, device.activity.busy_ratio or 0.0
    soft = [words for bit, words in SLOW_BITS.items() if (sensors.throttle_bits or 0) & bit]
    if (sensors.pcie_width or 0) < (sensors.pcie_width_max or 0) and sensors.pcie_width is not None:
        soft.append(f"PCIe link is {sensors.pcie_width} lanes wide of {sensors.pcie_width_max}")
    slow = (sensors.pcie_generation or 0) < (sensors.pcie_generation_max or 0) and sensors.pcie_generation is not None
    if slow and busy >= _BUSY:
        soft.append(f"PCIe link runs as generation {sensors.pcie_generation} of {sensors.pcie_generation_max}")
    down = sum(link.lanes - link.up for link in device.links)
    if down:
        soft.append(f"{down} NVLink lanes are down")
    return Signs(
        recovery=sensors.recovery_action or 0,
        rows_failed=bool(sensors.rows_failed),
        rows_pending=bool(sensors.rows_pending),
        soft=tuple(soft),
    )


def hear(record: Record, xid: int, now_s: int, *, workload: str = "") -> Record:
    """Take in an XID; `workload` says whose process it was, empty where nobody knows."""
    if xid in IGNORED_XIDS:
        return record
    if xid in APP_XIDS:
        return _app(record, xid, now_s, workload)
    if xid in RESET_XIDS:
        return _reset(record, xid, now_s)
    if xid in GONE_XIDS:
        return _gone(record, f"XID {xid}: fell off the bus", now_s)
    if xid in PEOPLE_XIDS:
        return _worse(record, BAD, f"XID {xid}", Needs.PEOPLE, now_s)
    words = ": double-bit ECC error" if xid == DOUBLE_BIT else ": NVLink" if xid in LINK_XIDS else ""
    suspect = _worse(record, SUSPECT, f"XID {xid}{words}", Needs.NOTHING, now_s)
    return replace(suspect, contain_by_s=now_s + CONTAIN_S) if xid == DOUBLE_BIT else suspect


def observe(record: Record, signs: Signs, now_s: int) -> Record:
    """Take in how a device looks, and let time do its work: conditions that last, and trust that comes back."""
    if signs.lost:
        return _gone(record, "does not answer", now_s)
    record = _heed(_settle(record, now_s), signs, now_s)
    began = dict(record.soft)
    record = replace(record, soft=tuple((words, began.get(words, now_s)) for words in signs.soft))
    for words, since_s in record.soft:
        if now_s - since_s >= HOLD_S:
            record = _worse(record, SUSPECT, words, Needs.NOTHING, now_s)
    if record.state in {SUSPECT, PROBATION} and now_s - max(record.sign_s, record.since_s) >= QUIET_S:
        record = _move(replace(record, resets=0), HEALTHY, now_s, (), Needs.NOTHING)
    if record.state == HEALTHY:  # it works, and a reset is due when nobody is on it anyway
        record = replace(record, needs=Needs.RESET if signs.rows_pending else Needs.NOTHING,
                         reasons=("memory rows wait for a reset",) if signs.rows_pending else ())  # fmt: skip
    return record


def _settle(record: Record, now_s: int) -> Record:
    """Decide what only waited for time: a GPU that came back and stayed, a double-bit error that nothing contained."""
    if record.lost and record.state == BAD and now_s - record.sign_s >= HOLD_S:
        record = _move(replace(record, lost=False), PROBATION, now_s, ("answers again",), Needs.NOTHING)
    if record.contain_by_s is not None and now_s >= record.contain_by_s:
        record = _reset(replace(record, contain_by_s=None), DOUBLE_BIT, now_s)
    return record


def _heed(record: Record, signs: Signs, now_s: int) -> Record:
    """Take in what the driver itself demands."""
    if signs.rows_failed:
        record = _worse(record, BAD, "memory rows could not be remapped", Needs.PEOPLE, now_s)
    if signs.recovery in _SOFT_RECOVERY:
        record = _worse(record, SUSPECT, f"driver asks: {RECOVERY[signs.recovery]}", Needs.RESET, now_s)
    elif signs.recovery:
        said = RECOVERY.get(signs.recovery, f"recovery action {signs.recovery}")
        needs = Needs.REBOOT if signs.recovery in _REBOOT_RECOVERY else Needs.RESET
        record = _worse(record, DRAINING, f"driver asks: {said}", needs, now_s)
    return record


def act(record: Record, step: Step, now_s: int) -> Record:
    """Take in what was done. A step that does not fit the state changes nothing."""
    if step is Step.DRAINED and record.state == DRAINING:
        return _move(record, RESETTING, now_s, record.reasons, record.needs)
    if step is Step.RESET and record.state in {DRAINING, RESETTING} and record.needs is not Needs.REBOOT:
        return _move(replace(record, contain_by_s=None), PROBATION, now_s, record.reasons, Needs.NOTHING)
    if step is Step.FAILED and record.state == RESETTING:
        failed = replace(record, resets=record.resets + 1)
        if failed.resets >= RESETS_MAX:
            return _worse(failed, BAD, f"{failed.resets} resets failed", Needs.PEOPLE, now_s)
        return _move(failed, DRAINING, now_s, record.reasons, record.needs)
    if step is Step.REPAIRED and record.state == BAD:
        return _move(replace(record, lost=False, xids=(), resets=0), PROBATION, now_s, (), Needs.NOTHING)
    return record


def boot(record: Record, now_s: int) -> Record:
    """Take in that the machine was started: as good as a reset, and it counts how often an XID survives one."""
    started = replace(record, boots=record.boots + 1, contain_by_s=None, soft=(), app=())
    if record.state in {DRAINING, RESETTING}:
        return _move(started, PROBATION, now_s, record.reasons, Needs.NOTHING)
    return started


def verdict(*records: Record) -> Health:
    """Return what to report: the worst of the records, its reasons, and what it needs."""
    worst = max(records, key=lambda one: _RANK[one.state])
    needs = () if worst.needs is Needs.NOTHING else (f"needs: {worst.needs.name.lower()}",)
    reasons = tuple(reason for one in records if one.state == worst.state for reason in one.reasons)
    return Health(worst.state, (*tuple(dict.fromkeys(reasons))[-REASONS_MAX + 1 :], *needs))


_RANK = {HEALTHY: 0, PROBATION: 1, SUSPECT: 2, DRAINING: 3, RESETTING: 4, BAD: 5}
assert set(_RANK) == set(STATES)


def _move(record: Record, state: str, now_s: int, reasons: Iterable[str], needs: Needs) -> Record:
    assert record.state == state or (record.state, state) in MOVES, f"{record.state} to {state}"
    since_s = record.since_s if record.state == state else now_s
    return replace(record, state=state, since_s=since_s, reasons=tuple(reasons)[-REASONS_MAX:], needs=needs)


def _worse(record: Record, state: str, reason: str, needs: Needs, now_s: int) -> Record:
    """Move to a worse state, or stay in one that is as bad; note the sign and the reason in either case."""
    record = replace(record, sign_s=max(record.sign_s, now_s))
    strongest = max(needs, record.needs, key=lambda one: one.value)
    target = state if _RANK[state] > _RANK[record.state] else record.state
    lost = record.lost and needs is not Needs.PEOPLE
    reasons = (*(one for one in record.reasons if one != reason), reason)
    return _move(replace(record, lost=lost), target, now_s, reasons, strongest)


def _gone(record: Record, reason: str, now_s: int) -> Record:
    """The device is off the bus: BAD until it answers again."""
    lost = record.state != BAD or record.lost
    return replace(_worse(record, BAD, reason, Needs.REBOOT, now_s), lost=lost)


def _reset(record: Record, xid: int, now_s: int) -> Record:
    """An XID that only a reset clears; one that comes back in boot after boot is for people."""
    xids = tuple(dict.fromkeys((*record.xids, (xid, record.boots))))[-_APP_KEPT:]
    record = replace(record, xids=xids)
    if sum(1 for code, _ in xids if code == xid) >= BOOTS_MAX:
        return _worse(record, BAD, f"XID {xid} in {BOOTS_MAX} starts of the machine", Needs.PEOPLE, now_s)
    return _worse(record, DRAINING, f"XID {xid}", Needs.RESET, now_s)


def _app(record: Record, xid: int, now_s: int, workload: str) -> Record:
    """An application's own fault, unless several have it."""
    if xid == CONTAINED:
        record = replace(record, contain_by_s=None)
    recent = [one for one in record.app if now_s - one[0] < APP_WINDOW_S]
    app = tuple(dict.fromkeys([*recent, (now_s, xid, workload)]))[-_APP_KEPT:]
    record = replace(record, app=app)
    who = {name for _, code, name in app if code == xid and name}
    if len(who) >= APP_WORKLOADS:
        return _worse(record, SUSPECT, f"XID {xid} from {len(who)} workloads within an hour", Needs.NOTHING, now_s)
    return record
