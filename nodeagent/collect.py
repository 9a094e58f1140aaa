"""From NVML's answers to a Report: who the devices are, how they are divided, how they fare.

Identity, links, profiles and MIG layout change seldom and cost many calls: they are read on a *deep* round, and when a
shallow one finds that they changed. Time is passed in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from nodeagent.attribution import Running
from nodeagent.nvml import (
    GAUGES,
    Absent,
    Gpu,
    Instance,
    Memory,
    Nvml,
    Process,
    Why,
    gpm_between,
    gpm_free,
    gpm_new,
    known,
)  # fmt: skip
from nodeagent.report import (
    DEVICES_MAX,
    LINKS_MAX,
    MEBIBYTES_MAX,
    MIG_NONE,
    MIG_OFF,
    MIG_ON,
    PROFILES_MAX,
    REASONS_MAX,
    SLICES_MAX,
    SMALL_MAX,
    SWITCH,
    Activity,
    Device,
    Link,
    Lost,
    Profile,
    Report,
    Sensors,
    Slice,
    plain,
    within,
)  # fmt: skip

UNKNOWN_END = "unknown"
_CODECS = {"encoder_ratio": "DeviceGetEncoderUtilization", "decoder_ratio": "DeviceGetDecoderUtilization"}


@dataclass(frozen=True, slots=True)
class Round:
    """What one look at the machine found: the report without uses, and the processes to find their owners."""

    report: Report
    running: tuple[Running, ...] = ()


@dataclass(slots=True)
class _Card:
    """A GPU as the last deep round found it."""

    gpu: Gpu
    fixed: Device
    instances: list[Instance]
    gpm: bool


class Collector:
    """Looks at all GPUs of the machine again and again; keeps handles, and the last GPM sample of each."""

    def __init__(
        self, nvml: Nvml, *, node: str, agent: str, numa: Callable[[str], int | None] = lambda _bus: None
    ) -> None:
        """Look at nothing yet.

        Args:
            nvml: the library; started by the first round, and anew when the driver forgot us.
            node: name of the Kubernetes node.
            agent: our version.
            numa: NUMA node of a PCI address as the kernel has it; NVML's own answer is used where it says None.
        """
        self._nvml, self._node, self._agent, self._numa = nvml, node, agent, numa
        self._cards: list[_Card] = []
        self._missed: list[Lost] = []
        self._places: dict[str, int] = {}  # UUID -> the index where it was last, since the boot
        self._expected, self._boot = 0, ""
        self._samples = _Samples()
        self._since_us = 0
        self._fresh = False

    @property
    def gpus(self) -> list[Gpu]:
        """The GPUs that answer, for listening to their events."""
        return [card.gpu for card in self._cards if card.gpu.lost is None]

    def look(self, *, boot: str, seq: int, at_us: int, deep: bool = False) -> Round:
        """Return how the machine is now; NVML's failures become the report's `problem`, `lost` and `missing`."""
        if boot != self._boot:
            self._boot, self._expected, self._places = boot, 0, {}
        blank = Report(node=self._node, boot=boot, seq=seq, at_us=at_us, agent=self._agent)
        for _ in range(2):  # once more, from the ground, when an instance or the driver's memory of us is gone
            if (problem := self._find(deep=deep)) is not None:
                self._drop_all()
                return Round(replace(blank, problem=str(problem), expected=self._expected))
            found = [self._device(card) for card in self._cards]
            if self._fresh:
                break
        answering = [one for one, card in zip(found, self._cards, strict=True) if card.gpu.lost is None]
        self._since_us = at_us
        self._samples.sweep()
        driver, library, cuda = self._nvml.versions()
        lost = [Lost(one.gpu.index, one.gpu.uuid, str(one.gpu.lost)) for one in self._cards if one.gpu.lost is not None]
        report = replace(
            blank,
            driver=driver,
            nvml=library,
            cuda=cuda,
            expected=self._expected,
            devices=tuple(device for device, _ in answering),
            lost=tuple(sorted([*lost, *self._missed], key=lambda one: one.index)[:DEVICES_MAX]),
        )
        return Round(report, tuple(one for _, processes in answering for one in processes))

    def close(self) -> None:
        """Let go of everything, so that others may reset or divide the GPUs."""
        self._drop_all()
        self._nvml.stop()

    def _drop_all(self) -> None:
        self._samples.sweep()
        self._samples.sweep()  # twice: what was not read between two sweeps goes
        self._cards, self._missed, self._fresh = [], [], False

    def _find(self, *, deep: bool) -> Absent | None:
        """Have the cards at hand; return why there are none."""
        if (problem := self._nvml.start()) is not None:
            return problem
        if self._fresh and not deep and not self._redivided():
            return None
        found = self._nvml.find()
        if isinstance(found, Absent) and found.why is Why.STALE:  # the driver was loaded anew below us
            self._drop_all()
            self._nvml.stop()
            found = self._nvml.start() or self._nvml.find()
        if isinstance(found, Absent):
            return found
        self._cards, silent = [], []
        for one in found[:DEVICES_MAX]:
            if isinstance(one, Gpu):
                self._places[one.uuid] = one.index
                self._cards.append(self._identify(one))
            else:
                silent.append(one)
        self._link()
        self._expected = max(self._expected, len(found), len(self._places))
        self._missed = missed(self._places, {card.fixed.uuid for card in self._cards}, silent)
        self._fresh = True
        return None

    def _redivided(self) -> bool:
        """Say whether a GPU's MIG mode is another than when it was identified, or its layout was not known."""
        modes = ((card, card.gpu.mig_mode()) for card in self._cards)
        return any(card.fixed.reconfiguring for card in self._cards) or any(
            (mode[0] == 1) != (card.fixed.mig_mode == MIG_ON) for card, mode in modes if not isinstance(mode, Absent)
        )

    def _identify(self, gpu: Gpu) -> _Card:
        """Read what seldom changes. What is not there stays at its default."""
        mode = gpu.mig_mode()
        pci, memory = known(gpu.ask("DeviceGetPciInfo")), known(gpu.memory())
        profiles, parts = self._divided(gpu, mode)
        bus = str(pci.busId) if pci else ""
        numa, serial = self._numa(bus), known(gpu.ask("DeviceGetSerial"))
        numa = known(gpu.ask("DeviceGetNumaNodeId")) if numa is None else numa
        fixed = Device(
            index=gpu.index,
            uuid=gpu.uuid,
            name=plain(str(known(gpu.ask("DeviceGetName")) or "")),
            bus=bus,
            pci_id=pci.pciDeviceId if pci else 0,
            memory_mib=min(memory.total, MEBIBYTES_MAX) if memory else 0,
            serial=None if serial is None else plain(str(serial)),
            minor=_small(known(gpu.ask("DeviceGetMinorNumber"))),
            numa=_small(numa),
            architecture=_small(known(gpu.ask("DeviceGetArchitecture"))),
            mig_mode=MIG_NONE if isinstance(mode, Absent) else MIG_ON if mode[0] else MIG_OFF,
            mig_pending=not isinstance(mode, Absent) and mode[0] != mode[1],
            profiles=tuple(known(profiles) or ()),
            reconfiguring=isinstance(parts, Absent),
        )
        return _Card(gpu, fixed, known(parts) or [], gpu.gpm_supported())

    @staticmethod
    def _divided(gpu: Gpu, mode: tuple[int, int] | Absent) -> tuple[list[Profile] | Absent, list[Instance] | Absent]:
        """Return profiles and instances; both empty only where there are none for certain."""
        if isinstance(mode, Absent):
            return ([], []) if mode.why is Why.NOT_SUPPORTED else (mode, mode)
        for _ in range(2):  # once more when an instance went away between two calls
            profiles = gpu.profiles()
            if isinstance(profiles, Absent):
                continue
            parts = gpu.instances(profiles) if mode[0] else []
            if not isinstance(parts, Absent):
                return profiles[:PROFILES_MAX], parts[:SLICES_MAX]
        return profiles, profiles if isinstance(profiles, Absent) else parts

    def _link(self) -> None:
        """Name the far ends of NVLink by UUID, which takes every card."""
        at = {card.fixed.bus.lower(): card.fixed.uuid for card in self._cards}
        for card in self._cards:
            lanes = known(card.gpu.links()) or []
            card.fixed = replace(card.fixed, links=links(lanes, at))

    def _device(self, card: _Card) -> tuple[Device, list[Running]]:
        """Read what moves."""
        gpu = card.gpu
        divided = card.fixed.mig_mode == MIG_ON
        memory = self._memory(gpu)
        gpm = self._samples.read(gpu, gpu.uuid, None) if card.gpm else {}
        processes = self._processes(card)
        use = {} if divided else gpu.process_use(self._since_us)
        parts = [self._slice(card, one) for one in card.instances]
        if not gpm and divided:
            gpm = whole_of_parts(parts, card.fixed.profiles)
        device = replace(
            card.fixed,
            slices=tuple(parts),
            activity=activity(memory, gpm, self._rates(gpu)),
            sensors=self._sensors(gpu),
            missing=tuple(f"{call}: {why.why.text}" for call, why in sorted(gpu.denied.items()))[:REASONS_MAX],
        )
        gpu.denied.clear()
        return device, running(gpu.uuid, processes, use, card.instances)

    @staticmethod
    def _processes(card: _Card) -> list[Process]:
        """Return who runs; where we may not ask the GPU, its instances say who runs on each."""
        found = card.gpu.processes()
        if not isinstance(found, Absent):
            return found
        parts = [known(card.gpu.processes(one.handle)) or [] for one in card.instances if one.uuid is not None]
        return [process for part in parts for process in part]

    def _memory(self, gpu: Gpu, handle: Any = None) -> Memory | None:
        """Return the memory, and notice a handle that has become void."""
        found = gpu.memory(handle)
        if isinstance(found, Absent):
            self._fresh = self._fresh and found.why is not Why.STALE
            return None
        return found

    @staticmethod
    def _rates(gpu: Gpu) -> dict[str, float]:
        """Return busy, copy, encoder and decoder ratios; none with MIG on."""
        found: dict[str, int] = {}
        if (rates := known(gpu.ask("DeviceGetUtilizationRates"))) is not None:
            found |= {"busy_ratio": rates.gpu, "copy_ratio": rates.memory}
        for name, call in _CODECS.items():
            if (codec := known(gpu.ask(call))) is not None:
                found[name] = codec[0]
        return {name: min(percent, 100) / 100 for name, percent in found.items()}

    @staticmethod
    def _sensors(gpu: Gpu) -> Sensors:
        found: dict[str, Any] = {name: known(gpu.gauge(name)) for name in GAUGES} | gpu.fields()
        if (mode := known(gpu.ask("DeviceGetEccMode"))) is not None:
            found["ecc_on"] = bool(mode[0])
        if (rows := known(gpu.ask("DeviceGetRemappedRows"))) is not None:
            found |= {"rows_corrected": rows[0], "rows_uncorrected": rows[1], "rows_pending": bool(rows[2]),
                      "rows_failed": bool(rows[3])}  # fmt: skip
        else:  # before Ampere pages were retired, not rows remapped
            pages = [known(gpu.ask("DeviceGetRetiredPages", cause)) for cause in (0, 1)]
            found["retired_pages"] = None if pages[0] is None else sum(len(one or ()) for one in pages)
        return within(Sensors, found)

    def _slice(self, card: _Card, one: Instance) -> Slice:
        memory = self._memory(card.gpu, one.handle) if one.uuid is not None else None
        gpm = self._samples.read(card.gpu, one.uuid, one.gi) if card.gpm and one.uuid else {}
        return Slice(
            gi=one.gi,
            ci=one.ci,
            uuid=one.uuid,
            profile=one.name,
            start=one.start,
            size=one.size,
            memory_mib=one.memory_mib,
            activity=activity(memory, gpm),
        )


class _Samples:
    """The last GPM sample of each device and slice, and room for the next."""

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[Any, Any]] = {}
        self._filled: set[str] = set()
        self._read: set[str] = set()

    def read(self, gpu: Gpu, key: str, gi: int | None) -> Mapping[str, float]:
        """Return what happened since the last read; nothing at the first."""
        if key not in self._pairs:
            pair = (gpm_new(), gpm_new())
            if any(isinstance(one, Absent) for one in pair):
                return {}
            self._pairs[key] = pair
        before, now = self._pairs[key]
        self._read.add(key)
        if gpu.gpm_sample(now, gi) is not None:
            self._filled.discard(key)
            return {}
        self._pairs[key] = (now, before)
        found = gpm_between(before, now) if key in self._filled else {}
        self._filled.add(key)
        return found

    def sweep(self) -> None:
        """Give back the room of what was not read since the last sweep."""
        for key in self._pairs.keys() - self._read:
            for sample in self._pairs.pop(key):
                gpm_free(sample)
            self._filled.discard(key)
        self._read.clear()


def activity(
    memory: Memory | None,
    gpm: Mapping[str, float],
    rates: Mapping[str, float] = MappingProxyType({}),
) -> Activity:
    """Join what memory, GPM and utilisation rates say; the rates' own `busy` wins, for it covers all engines."""
    found: dict[str, object] = {name: round(value, 4) for name, value in {**gpm, **rates}.items()}
    if memory is not None:
        found |= {"memory_mib": memory.total, "memory_used_mib": memory.used, "memory_reserved_mib": memory.reserved}
    return within(Activity, found)


def missed(places: Mapping[str, int], there: Collection[str], silent: Iterable[tuple[int, Absent]]) -> list[Lost]:
    """Name the GPUs that were seen and are not there, and those that do not even say who they are.

    Args:
        places: UUID -> index where it was seen last; a driver that was loaded anew may have given that to another.
        there: UUIDs of those that answer.
        silent: index and reason of those that do not.
    """
    gone = {uuid: index for uuid, index in places.items() if uuid not in there}
    found = []
    for index, why in silent:
        uuid = next((uuid for uuid, last in gone.items() if last == index), None)
        gone.pop(uuid or "", None)
        found.append(Lost(index, uuid, str(why)))
    return found + [Lost(at, uuid, str(Absent(Why.NOTHING, 0, "DeviceGetCount"))) for uuid, at in gone.items()]


def _small(number: int | None) -> int | None:
    return number if number is not None and 0 <= number < SMALL_MAX else None


def whole_of_parts(parts: Iterable[Slice], profiles: Sequence[Profile]) -> dict[str, float]:
    """Return a divided device's `busy_ratio` from its slices', weighted by compute slices; empty where none says.

    A slice counts once for each GPU instance: compute instances share its counters.
    """
    g = {one.name: one.g for one in profiles}
    total = max(g.values(), default=0)
    busy = {
        part.gi: part.activity.busy_ratio * g.get(part.profile, 1)
        for part in parts
        if part.activity.busy_ratio is not None
    }
    return {"busy_ratio": min(sum(busy.values()) / total, 1.0)} if busy and total else {}


def links(lanes: Iterable[tuple[str, bool]], at: Mapping[str, str]) -> tuple[Link, ...]:
    """Count lanes by their far end: a device's UUID where `at` knows the address, the switch, or unknown."""
    ends = [(end if end == SWITCH else at.get(end.lower(), end or UNKNOWN_END), up) for end, up in lanes]
    count, up = Counter(end for end, _ in ends), Counter(end for end, is_up in ends if is_up)
    return tuple(Link(end, count[end], up[end]) for end in sorted(count))[:LINKS_MAX]


def running(
    device: str, processes: Iterable[Process], use: Mapping[int, float], instances: Iterable[Instance]
) -> list[Running]:
    """Say for each process which device, and which slice of it, it runs on."""
    slices: dict[tuple[int | None, int | None], str | None] = {(one.gi, one.ci): one.uuid for one in instances}
    return [
        Running(device, slices.get((one.gi, one.ci)), one.pid, one.memory_mib or 0, use.get(one.pid))
        for one in processes
        if one.pid > 0
    ]
