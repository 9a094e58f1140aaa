"""THE wire format between node agent and Tessera: what one machine's GPUs are, how they fare and who uses them.

Invariant: what `decode` returns keeps every bound that is written at its field, so nobody behind it checks again; and
`encode` never makes what `decode` refuses. A field may be added with a default within a version, and an older decoder
passes over it; anything else is a new `VERSION`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson

VERSION = 1
BYTES_MAX = 1 << 20
DEVICES_MAX, SLICES_MAX, PROFILES_MAX, LINKS_MAX, REASONS_MAX, USES_MAX = 32, 16, 32, 36, 8, 1024
XIDS_MAX = 32
SMALL_MAX, MEBIBYTES_MAX = 2**31 - 1, 2**24
MEMORY_SLICES_MAX = 16  # an occupancy mask has as many bits
SENTENCE_MAX = 300
_SHOWN_MAX = 40


class BadReport(ValueError):  # noqa: N818 - it says what the report is
    """A report that cannot be taken; the message names the field, what it must be, and what it is."""


@dataclass(frozen=True, slots=True)
class Text:
    """A string no longer than this; `least` = 1 forbids an empty one."""

    most: int
    least: int = 0


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number, ends included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Real:
    """A number, ends included; what is not a number lies in no bounds."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Most:
    """A list with at most so many entries."""

    count: int


_Read = Callable[[object, str], object]
_Part = TypeVar("_Part")
Ratio = Annotated[float, Real(0.0, 1.0)]
Count = Annotated[int, Whole(0, 2**63 - 65)]  # DCGM's and NVML's markers for blank lie above
Small = Annotated[int, Whole(0, SMALL_MAX)]
Mebibytes = Annotated[int, Whole(0, MEBIBYTES_MAX)]
Uuid = Annotated[str, Text(63, 1)]
Name = Annotated[str, Text(253)]
Word = Annotated[str, Text(95)]
Sentence = Annotated[str, Text(SENTENCE_MAX)]
Start = Annotated[int, Whole(0, MEMORY_SLICES_MAX - 1)]

HEALTHY, SUSPECT, DRAINING, RESETTING, PROBATION, BAD = STATES = (
    "HEALTHY", "SUSPECT", "DRAINING", "RESETTING", "PROBATION", "BAD"
)  # fmt: skip
MIG_NONE, MIG_OFF, MIG_ON = MIG_MODES = ("none", "off", "on")
POD, SQUATTER, EXTERNAL = KINDS = ("pod", "squatter", "external")
SWITCH = "switch"


@dataclass(frozen=True, slots=True)
class Health:
    """Whether work may be given, and why not. Only HEALTHY and PROBATION take new work."""

    state: Annotated[str, OneOf(STATES)] = HEALTHY
    reasons: Annotated[tuple[Sentence, ...], Most(REASONS_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Activity:
    """Memory and utilisation of a device or a slice; absent = this driver or model does not say.

    `busy_ratio` is the share of time in which anything ran; `sm_ratio` the share of multiprocessors that did work.
    """

    memory_mib: Mebibytes | None = None
    memory_used_mib: Mebibytes | None = None
    memory_reserved_mib: Mebibytes | None = None
    busy_ratio: Ratio | None = None
    copy_ratio: Ratio | None = None
    sm_ratio: Ratio | None = None
    occupancy_ratio: Ratio | None = None
    tensor_ratio: Ratio | None = None
    dram_ratio: Ratio | None = None
    encoder_ratio: Ratio | None = None
    decoder_ratio: Ratio | None = None


@dataclass(frozen=True, slots=True)
class Sensors:
    """What only a whole device has; `_total` counters live as long as the device, others start with the driver."""

    power_mw: Small | None = None
    power_limit_mw: Small | None = None
    energy_mj: Count | None = None
    temperature_c: Small | None = None
    memory_temperature_c: Small | None = None
    slowdown_c: Small | None = None
    sm_clock_mhz: Small | None = None
    memory_clock_mhz: Small | None = None
    performance_state: Small | None = None
    throttle_bits: Count | None = None
    pcie_tx_kib_s: Small | None = None
    pcie_rx_kib_s: Small | None = None
    pcie_generation: Small | None = None
    pcie_generation_max: Small | None = None
    pcie_width: Small | None = None
    pcie_width_max: Small | None = None
    pcie_replays: Count | None = None
    nvlink_tx_kib: Count | None = None
    nvlink_rx_kib: Count | None = None
    ecc_on: bool | None = None
    ecc_corrected: Count | None = None
    ecc_uncorrected: Count | None = None
    ecc_corrected_total: Count | None = None
    ecc_uncorrected_total: Count | None = None
    rows_corrected: Small | None = None
    rows_uncorrected: Small | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    retired_pages: Small | None = None
    recovery_action: Small | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A MIG profile as the driver gives it; `size` 0 and no starts where it does not tell us (no permission)."""

    id: Small
    name: Word
    g: Annotated[int, Whole(1, MEMORY_SLICES_MAX)]
    size: Annotated[int, Whole(0, MEMORY_SLICES_MAX)]
    max: Annotated[int, Whole(0, MEMORY_SLICES_MAX)]
    memory_mib: Mebibytes
    starts: Annotated[tuple[Start, ...], Most(MEMORY_SLICES_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Slice:
    """A MIG instance that exists: GPU instance `gi` and in it compute instance `ci`.

    Without `ci` and `uuid` it is a GPU instance that nobody can use yet; without `start` and `size` the driver does
    not tell us where it lies (no permission).
    """

    gi: Small
    ci: Small | None
    uuid: Uuid | None
    profile: Word
    start: Start | None
    size: Annotated[int, Whole(1, MEMORY_SLICES_MAX)] | None
    memory_mib: Mebibytes
    health: Health = Health()
    activity: Activity = Activity()


@dataclass(frozen=True, slots=True)
class Link:
    """NVLink lanes to another device (its UUID, or PCI address where that is unknown) or to the switch."""

    to: Uuid
    lanes: Annotated[int, Whole(1, 255)]
    up: Annotated[int, Whole(0, 255)]


@dataclass(frozen=True, slots=True)
class Xid:
    """How often the driver reported an error number since the agent started, and when last."""

    code: Small
    count: Small
    at_us: Count


@dataclass(frozen=True, slots=True)
class Device:
    """One physical GPU that answers. `missing` says what could not be read though the device has it, and why.

    `reconfiguring`: its MIG layout is being changed or could not be read. All of it counts as used, whatever `slices`
    says, until a report without it.
    """

    index: Annotated[int, Whole(0, 255)]
    uuid: Uuid
    name: Word
    bus: Word
    pci_id: Annotated[int, Whole(0, 2**32 - 1)]
    memory_mib: Mebibytes
    serial: Word | None = None
    minor: Small | None = None
    numa: Small | None = None
    architecture: Small | None = None
    links: Annotated[tuple[Link, ...], Most(LINKS_MAX)] = ()
    mig_mode: Annotated[str, OneOf(MIG_MODES)] = MIG_NONE
    mig_pending: bool = False
    profiles: Annotated[tuple[Profile, ...], Most(PROFILES_MAX)] = ()
    slices: Annotated[tuple[Slice, ...], Most(SLICES_MAX)] = ()
    health: Health = Health()
    activity: Activity = Activity()
    sensors: Sensors = Sensors()
    missing: Annotated[tuple[Word, ...], Most(REASONS_MAX)] = ()
    xids: Annotated[tuple[Xid, ...], Most(XIDS_MAX)] = ()
    reconfiguring: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """A device that was there and no longer answers; `uuid` where it was ever read."""

    index: Annotated[int, Whole(0, 255)]
    uuid: Uuid | None
    why: Sentence


@dataclass(frozen=True, slots=True)
class Use:
    """Who uses a device or a slice, and how much.

    `pod`: a container on a device that it holds; `squatter`: a pod's process on a device that the pod does not hold;
    `external`: processes outside every pod, and memory that no process owns. Together they are the device's figures.
    """

    device: Uuid
    slice: Uuid | None
    kind: Annotated[str, OneOf(KINDS)]
    memory_mib: Mebibytes
    busy_ratio: Ratio | None = None
    namespace: Name = ""
    pod: Name = ""
    container: Name = ""
    uid: Word = ""
    processes: Small = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One machine at one instant. (node, boot, seq) orders reports: seq grows by one and starts anew with a boot id.

    `expected` is the most devices seen since the boot; `problem` says why there are none (no driver, no library);
    `notes` say what else could not be read, and what to do.
    """

    node: Annotated[str, Text(253, 1)]
    boot: Annotated[str, Text(63, 1)]
    seq: Count
    at_us: Count
    agent: Word
    v: Annotated[int, Whole(VERSION, VERSION)] = VERSION
    driver: Word | None = None
    nvml: Word | None = None
    cuda: Small | None = None
    problem: Sentence | None = None
    expected: Annotated[int, Whole(0, 255)] = 0
    devices: Annotated[tuple[Device, ...], Most(DEVICES_MAX)] = ()
    lost: Annotated[tuple[Lost, ...], Most(DEVICES_MAX)] = ()
    uses: Annotated[tuple[Use, ...], Most(USES_MAX)] = ()
    uses_left_out: Small = 0
    notes: Annotated[tuple[Sentence, ...], Most(REASONS_MAX)] = ()


def encode(report: Report) -> bytes:
    """Return the report as one line of JSON. Raises BadReport when a bound is broken, which is the caller's bug."""
    body = orjson.dumps(report)
    decode(body)
    return body


def decode(body: bytes) -> Report:
    """Return the report. Raises BadReport with a sentence that says which field is wrong and what it must be."""
    if len(body) > BYTES_MAX:
        raise BadReport(f"the report has {len(body)} bytes and may have {BYTES_MAX}; send fewer uses.")
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadReport(f"the report is no JSON ({error}); send one object.") from None
    if not isinstance(raw, dict):
        raise BadReport(f"the report must be an object; it is {_shown(raw)}.")
    if (version := raw.get("v")) != VERSION or isinstance(version, bool):
        raise BadReport(
            f"the report has version {_shown(version)} and this side reads version {VERSION}; "
            "run agent and Tessera of the same release."
        )
    report = read(Report, raw)
    _check(report)
    return report


def read(kind: type[_Part], raw: object, where: str = "") -> _Part:
    """Read one object into a dataclass whose fields carry their bounds. Raises BadReport."""
    cls: type = kind
    found = _reader(cls)(raw, where)
    assert isinstance(found, kind)
    return found


def within(cls: type[_Part], values: Mapping[str, object]) -> _Part:
    """Make a part of a report of measured values without those that break a bound: drivers have markers for blank."""
    kind: type = cls
    hints, found = _hints(kind), {}
    for name, value in values.items():
        try:
            found[name] = _reader_of(hints[name])(value, name)
        except BadReport:
            continue
    return cls(**found)


def plain(text: str, most: int = 95) -> str:
    """Return a text as a report may carry it: printable and not too long."""
    return "".join(one for one in text if one.isprintable())[:most]


def _check(report: Report) -> None:
    """Hold fields against each other. Raises BadReport."""
    _distinct([device.uuid for device in report.devices] + [one.uuid for one in report.lost if one.uuid], "devices")
    _distinct([device.index for device in report.devices], "device indices")
    _distinct([part.uuid for device in report.devices for part in device.slices if part.uuid], "slices")
    named = {device.uuid for device in report.devices}
    for at, use in enumerate(report.uses):
        if use.device not in named:
            raise BadReport(f"uses[{at}].device must be one of the report's devices; it is {_shown(use.device)}.")
    for at, device in enumerate(report.devices):
        if device.slices and device.mig_mode != MIG_ON:
            raise BadReport(f"devices[{at}] has slices and its mig_mode is {device.mig_mode!r}; it must be 'on'.")
        _spans(device, f"devices[{at}]")


def _distinct(values: Sequence[object], what: str) -> None:
    if len(set(values)) != len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise BadReport(f"two {what} are called {_shown(twice)}; each must have a name of its own.")


def _spans(device: Device, where: str) -> None:
    """Compute instances of one GPU instance share its slices; nothing else may."""
    taken = 0
    for gi, start, size in {(part.gi, part.start, part.size) for part in device.slices}:
        if start is None or size is None:
            continue
        bits = ((1 << size) - 1) << start
        if bits & taken or bits >> MEMORY_SLICES_MAX:
            raise BadReport(f"{where}: instance {gi} at {start}:{size} overlaps another or ends behind the device.")
        taken |= bits


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def _reader(cls: type) -> _Read:
    """Return what reads one object into a dataclass, each field by its annotation."""
    hints = _hints(cls)
    rows = [(one.name, _reader_of(hints[one.name]), one.default is MISSING) for one in fields(cls)]

    def read(value: object, where: str) -> object:
        if not isinstance(value, dict):
            raise BadReport(f"{where} must be an object; it is {_shown(value)}.")
        found = {}
        for name, read_field, needed in rows:
            at = f"{where}.{name}" if where else name
            if name in value:
                found[name] = read_field(value[name], at)
            elif needed:
                raise BadReport(f"{at} is missing; a report of version {VERSION} has it.")
        return cls(**found)

    return read


@cache
def _reader_of(hint: Any) -> _Read:
    """Return what reads a value of this annotation."""
    if get_origin(hint) in {Union, types.UnionType}:
        inner = _reader_of(next(one for one in get_args(hint) if one is not types.NoneType))
        return lambda value, where: None if value is None else inner(value, where)
    if get_origin(hint) is Annotated:
        kind, bound = get_args(hint)
        return _list(_reader_of(get_args(kind)[0]), bound.count) if isinstance(bound, Most) else _bounded(bound)
    if hint is bool:
        return _flag
    assert is_dataclass(hint), hint
    assert isinstance(hint, type)
    return _reader(hint)


def _list(inner: _Read, most: int) -> _Read:
    def read(value: object, where: str) -> object:
        if not isinstance(value, list) or len(value) > most:
            size = f"{len(value)} entries" if isinstance(value, list) else _shown(value)
            raise BadReport(f"{where} must be a list of at most {most} entries; it is {size}.")
        return tuple(inner(one, f"{where}[{at}]") for at, one in enumerate(value))

    return read


def _flag(value: object, where: str) -> object:
    if not isinstance(value, bool):
        raise BadReport(f"{where} must be true or false; it is {_shown(value)}.")
    return value


def _bounded(bound: object) -> _Read:
    """Return what reads a text, number or word within its bound."""
    holds, must = _rule(bound)

    def read(value: object, where: str) -> object:
        if not holds(value):
            raise BadReport(f"{where} must be {must}; it is {_shown(value)}.")
        return value

    return read


def _rule(bound: object) -> tuple[Callable[[object], bool], str]:
    """Return the test of a bound and how a sentence says it."""
    match bound:
        case Text(most, least):
            return (
                lambda value: isinstance(value, str) and least <= len(value) <= most and value.isprintable(),
                f"a printable string of {least} to {most} characters",
            )
        case Whole(low, high):
            return (
                lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
                f"a whole number between {low} and {high}",
            )
        case Real(low, high):
            return (
                lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high,
                f"a number between {low:g} and {high:g}",
            )
        case OneOf(words):
            return lambda value: isinstance(value, str) and value in words, f"one of {', '.join(words)}"
    raise AssertionError(bound)


def _shown(value: object) -> str:
    """Return a value as it may stand in a sentence: short, and what is nested only named."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "..."
