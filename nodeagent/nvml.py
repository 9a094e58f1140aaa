"""NVML as values: each call returns what it found or an Absent that says why not. The only importer of pynvml.

Invariant: no NVMLError leaves this module, and what one GPU answers changes nothing for another. What a GPU does not
support is asked once, and one that is lost nothing more, until `find` meets it anew.

One thread makes all calls but `Events.wait`, which may wait in a thread of its own.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import pynvml

from nodeagent.report import Profile

MIB = 1 << 20
NO_INSTANCE = 0xFFFFFFFF
XID_EVENT, LAYOUT_EVENT = int(pynvml.nvmlEventTypeXidCriticalError), int(pynvml.nvmlEventMigConfigChange)
GONE_EVENT, RECOVERY_EVENT = 0x4000, 0x8000
_DEVICES_MAX = 32
_LINKS_MAX = 36
_INSTANCES_MAX = 16
_CI_SLICES = (1, 2, 3, 4, 7, 8, 6)  # compute slices by NVML_COMPUTE_INSTANCE_PROFILE_*; 7 is a variant of the first
_BUSY, _OCCUPANCY, _TENSOR, _DRAM = 2, 3, 5, 10
GPM_METRICS = {"busy_ratio": 1, "sm_ratio": _BUSY, "occupancy_ratio": _OCCUPANCY, "tensor_ratio": _TENSOR,
               "dram_ratio": _DRAM}  # fmt: skip
"""Fields of an Activity by the GPM metric that fills them, in percent there."""

GAUGES: dict[str, tuple[str, *tuple[int, ...]]] = {
    "power_mw": ("DeviceGetPowerUsage",),
    "power_limit_mw": ("DeviceGetEnforcedPowerLimit",),
    "energy_mj": ("DeviceGetTotalEnergyConsumption",),
    "temperature_c": ("DeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
    "slowdown_c": ("DeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
    "sm_clock_mhz": ("DeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
    "memory_clock_mhz": ("DeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
    "performance_state": ("DeviceGetPerformanceState",),
    "throttle_bits": ("DeviceGetCurrentClocksEventReasons",),
    "pcie_tx_kib_s": ("DeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_TX_BYTES),
    "pcie_rx_kib_s": ("DeviceGetPcieThroughput", pynvml.NVML_PCIE_UTIL_RX_BYTES),
    "pcie_generation": ("DeviceGetCurrPcieLinkGeneration",),
    "pcie_generation_max": ("DeviceGetMaxPcieLinkGeneration",),
    "pcie_width": ("DeviceGetCurrPcieLinkWidth",),
    "pcie_width_max": ("DeviceGetMaxPcieLinkWidth",),
    "pcie_replays": ("DeviceGetPcieReplayCounter",),
    "ecc_corrected": ("DeviceGetTotalEccErrors", 0, 0),
    "ecc_uncorrected": ("DeviceGetTotalEccErrors", 1, 0),
    "ecc_corrected_total": ("DeviceGetTotalEccErrors", 0, 1),
    "ecc_uncorrected_total": ("DeviceGetTotalEccErrors", 1, 1),
}
"""Fields of Sensors that are one number of one call."""

FIELDS = {
    "memory_temperature_c": pynvml.NVML_FI_DEV_MEMORY_TEMP,
    "nvlink_tx_kib": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
    "nvlink_rx_kib": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
    "recovery_action": pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION,
}
"""Fields of Sensors that come together in one call."""
_ALL_LINKS = 0xFFFFFFFF  # scope of the NVLink fields: the sum over all lanes


class Why(Enum):
    """Why there is no value: in words, and which of NVML's codes say so."""

    NOT_SUPPORTED = "not supported", pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, 25
    NO_PERMISSION = "no permission", pynvml.NVML_ERROR_NO_PERMISSION
    LOST = "GPU is lost", pynvml.NVML_ERROR_GPU_IS_LOST
    RESET_REQUIRED = "GPU needs a reset", pynvml.NVML_ERROR_RESET_REQUIRED
    NO_DRIVER = "the NVIDIA driver is not loaded", pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    NO_LIBRARY = "libnvidia-ml.so.1 is not there", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    MISMATCH = "the driver was changed under this process", pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    STALE = "it is gone", pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_INVALID_ARGUMENT
    IN_USE = "in use", pynvml.NVML_ERROR_IN_USE
    FULL = "no room", pynvml.NVML_ERROR_INSUFFICIENT_RESOURCES
    NOTHING = "nothing there", pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_TIMEOUT
    FAILED = ("the driver failed",)

    @property
    def text(self) -> str:
        """The words."""
        return str(self.value[0])


_WHY = {code: why for why in Why for code in why.value[1:]}
_VARYING = frozenset({"DeviceGetProcessUtilization"})  # their arguments are never the same twice
_GONE = (Why.LOST, Why.RESET_REQUIRED)


@dataclass(frozen=True, slots=True)
class Absent:
    """No value: why, NVML's own code, and the call that said so."""

    why: Why
    code: int
    call: str

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.why.text} ({self.call} answered {self.code})"


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB; `reserved` is the driver's own, absent where an old driver counts it as used."""

    total: int
    used: int
    reserved: int | None


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a GPU; `gi` and `ci` absent without MIG, memory absent where the driver does not say."""

    pid: int
    memory_mib: int | None
    gi: int | None
    ci: int | None


@dataclass(slots=True)
class Instance:
    """A GPU instance and one compute instance of it, or none: with the handle for calls about it."""

    gi: int
    ci: int | None
    uuid: str | None
    profile: int | None
    name: str
    start: int | None
    size: int | None
    memory_mib: int
    handle: Any = field(repr=False, default=None)


@dataclass(frozen=True, slots=True)
class Event:
    """What the driver told by itself; `uuid` absent when a GPU that fell off the bus said nothing of itself."""

    uuid: str | None
    kind: int
    data: int
    gi: int | None
    ci: int | None


Value = TypeVar("Value")


def ask(name: str, *arguments: object) -> Any:
    """Call `nvml<name>` and return its value, or Absent."""
    try:
        return getattr(pynvml, f"nvml{name}")(*arguments)
    except pynvml.NVMLError as error:
        code = int(error.value)
        return Absent(_WHY.get(code, Why.FAILED), code, name)
    except AttributeError:  # an older pynvml
        return Absent(Why.NOT_SUPPORTED, int(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND), name)


def known(value: Any) -> Any:
    """Return the value, None for an absence."""
    return None if isinstance(value, Absent) else value


def _lacking(value: Absent) -> bool:
    """Say whether this card has no such profile, rather than that it could not say."""
    return value.why is Why.NOT_SUPPORTED or value.code == pynvml.NVML_ERROR_INVALID_ARGUMENT


class Gpu:
    """One GPU: its handle, and what it is known not to support."""

    def __init__(self, index: int, handle: Any, uuid: str) -> None:
        """Keep the handle: finding it again can take seconds under load."""
        self.index, self.handle, self.uuid = index, handle, uuid
        self.lost: Absent | None = None
        self.denied: dict[str, Absent] = {}
        self._unsupported: dict[tuple[object, ...], Absent] = {}

    def ask(self, name: str, *arguments: object, handle: Any = None) -> Any:
        """Call a function about this GPU, or about an instance of it, by its handle; remember what it lacks."""
        if self.lost is not None:
            return self.lost
        key = (name,) if name in _VARYING else (name, *arguments)
        if handle is None and (lacking := self._unsupported.get(key)) is not None:
            return lacking
        value = ask(name, self.handle if handle is None else handle, *arguments)
        if isinstance(value, Absent):
            if value.why in _GONE:
                self.lost = value
            elif value.why is Why.NOT_SUPPORTED and handle is None:
                self._unsupported[key] = value
            elif value.why in {Why.NO_PERMISSION, Why.FAILED}:
                self.denied[name] = value
        return value

    def mig_mode(self) -> tuple[int, int] | Absent:
        """Return (current, pending), 1 = on. It decides what else is supported: after a change `find` the GPU anew."""
        found = self.ask("DeviceGetMigMode")
        return found if isinstance(found, Absent) else (found[0], found[1])

    def gauge(self, name: str) -> int | Absent:
        """Return one number of GAUGES."""
        call, *arguments = GAUGES[name]
        value = self.ask(call, *arguments)
        if isinstance(value, Absent) and name == "throttle_bits" and value.why is Why.NOT_SUPPORTED:
            value = self.ask("DeviceGetCurrentClocksThrottleReasons")  # its name in drivers before R535
        return value if isinstance(value, Absent) else int(value)

    def fields(self) -> dict[str, int]:
        """Return those of FIELDS that the GPU has."""
        asked = tuple((number, _ALL_LINKS if name.startswith("nvlink") else 0) for name, number in FIELDS.items())
        values = self.ask("DeviceGetFieldValues", asked)
        if isinstance(values, Absent):
            return {}
        return {
            name: int(one.value.uiVal if one.valueType == pynvml.NVML_VALUE_TYPE_UNSIGNED_INT else one.value.ullVal)
            for name, one in zip(FIELDS, values, strict=True)
            if one.nvmlReturn == pynvml.NVML_SUCCESS
        }

    def memory(self, handle: Any = None) -> Memory | Absent:
        """Return the memory of the GPU or of an instance."""
        found = self.ask("DeviceGetMemoryInfo", pynvml.nvmlMemory_v2, handle=handle)
        if isinstance(found, Absent) and found.why is Why.NOT_SUPPORTED:
            found = self.ask("DeviceGetMemoryInfo", handle=handle)
        if isinstance(found, Absent):
            return found
        reserved = getattr(found, "reserved", None)
        return Memory(found.total // MIB, found.used // MIB, None if reserved is None else reserved // MIB)

    def processes(self, handle: Any = None) -> list[Process] | Absent:
        """Return who runs on the GPU, or on an instance of it; MPS clients too."""
        found = self.ask("DeviceGetComputeRunningProcesses", handle=handle)
        if isinstance(found, Absent):
            return found
        clients = self.ask("DeviceGetMPSComputeRunningProcesses_v3", handle=handle)
        rows = {(one.pid, one.gpuInstanceId, one.computeInstanceId): one for one in [*found, *(known(clients) or ())]}
        return [
            Process(pid, None if one.usedGpuMemory is None else one.usedGpuMemory // MIB, _instance(gi), _instance(ci))
            for (pid, gi, ci), one in rows.items()
        ]

    def process_use(self, since_us: int) -> dict[int, float]:
        """Return pid -> share of the multiprocessors' time since then; empty where nobody ran or nothing is said."""
        samples = self.ask("DeviceGetProcessUtilization", since_us)
        if isinstance(samples, Absent):  # raised also when there is nothing to report
            self.denied.pop("DeviceGetProcessUtilization", None)
            return {}
        latest = {one.pid: one for one in sorted(samples, key=lambda one: int(one.timeStamp))}
        return {pid: min(one.smUtil, 100) / 100 for pid, one in latest.items()}

    def profiles(self) -> list[Profile] | Absent:
        """Return the MIG profiles of this GPU, with placements where we may read them; all of them or none."""
        found = []
        for row in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
            one = self.ask("DeviceGetGpuInstanceProfileInfo", row)
            if not isinstance(one, Absent):
                found.append(self._profile(one))
            elif not _lacking(one):
                return one
        return found

    def _profile(self, one: Any) -> Profile:
        starts, size = self._placements(one.id)
        return Profile(
            id=one.id,
            name=str(one.name).removeprefix("MIG "),
            g=one.sliceCount,
            size=size,
            max=min(one.instanceCount, len(starts) or one.instanceCount),  # one card is known to count wrongly
            memory_mib=one.memorySizeMB,
            starts=starts,
        )

    def _placements(self, profile: int) -> tuple[tuple[int, ...], int]:
        count = ctypes.c_uint(0)
        if isinstance(self._possible(profile, None, count), Absent) or not count.value:
            return (), 0
        spans = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
        if isinstance(self._possible(profile, spans, count), Absent):
            return (), 0
        return tuple(sorted(span.start for span in spans)), spans[0].size

    def _possible(self, profile: int, spans: Any, count: ctypes.c_uint) -> Any:
        call = "DeviceGetGpuInstancePossiblePlacements"
        value = ask(call, self.handle, profile, spans, ctypes.byref(count))
        if isinstance(value, Absent) and value.why is Why.NO_PERMISSION:
            self.denied[call] = value
        return value

    def instances(self, profiles: Sequence[Profile]) -> list[Instance] | Absent:
        """Return every MIG instance, also GPU instances in which nothing was made yet; all of them or none."""
        found: list[Instance] = []
        for profile in profiles:
            handles = self._listed("DeviceGetGpuInstances", self.handle, profile.id, pynvml.c_nvmlGpuInstance_t)
            if isinstance(handles, Absent):
                return self._walk() if handles.why is Why.NO_PERMISSION else handles
            for handle in handles:
                parts = self._instance(handle, profile)
                if isinstance(parts, Absent):
                    return parts
                found += parts
        return sorted(found, key=lambda one: (one.start or 0, one.ci or 0))

    def _instance(self, handle: Any, profile: Profile) -> list[Instance] | Absent:
        seen = self.ask("GpuInstanceGetInfo", handle=handle)
        if isinstance(seen, Absent):
            return seen
        place = seen.placement
        common = (profile.id, profile.name, place.start, place.size, profile.memory_mib)
        parts: list[Instance] = []
        left = profile.g
        for row in sorted(range(len(_CI_SLICES)), key=lambda row: -_CI_SLICES[row]):
            if not 0 < _CI_SLICES[row] <= left:
                continue
            listed = self._listed("GpuInstanceGetComputeInstances", handle, row, pynvml.c_nvmlComputeInstance_t)
            if isinstance(listed, Absent) and not _lacking(listed):
                return listed
            for ci in known(listed) or ():
                told = self.ask("ComputeInstanceGetInfo", handle=ci)
                uuid = told if isinstance(told, Absent) else self.ask("DeviceGetUUID", handle=told.device)
                if isinstance(uuid, Absent):
                    return uuid
                parts.append(Instance(seen.id, told.id, uuid, *common, told.device))
                left -= _CI_SLICES[row]
        return parts or [Instance(seen.id, None, None, *common)]

    def _listed(self, call: str, handle: Any, profile: int, kind: Any) -> list[Any] | Absent:
        count = ctypes.c_uint(_INSTANCES_MAX)
        handles = (kind * _INSTANCES_MAX)()
        value = self.ask(call, profile, handles, ctypes.byref(count), handle=handle)
        return value if isinstance(value, Absent) else list(handles[: count.value])

    def divide(self, profile: int, start: int, size: int) -> Any:
        """Make a GPU instance at this place, never where the driver would put it; return its handle, or Absent."""
        span = pynvml.c_nvmlGpuInstancePlacement_t(start, size)
        return self.ask("DeviceCreateGpuInstanceWithPlacement", profile, ctypes.byref(span), handle=self.handle)

    def _walk(self) -> list[Instance] | Absent:
        """List MIG devices by index: all that a process without permission sees, and without placements."""
        found: list[Instance] = []
        if isinstance(most := self.ask("DeviceGetMaxMigDeviceCount"), Absent):
            return most
        for index in range(most):
            handle = self.ask("DeviceGetMigDeviceHandleByIndex", index, handle=self.handle)
            if isinstance(handle, Absent):
                if handle.why is not Why.NOTHING:
                    return handle
                continue
            calls = "UUID", "GpuInstanceId", "ComputeInstanceId", "Name", "Attributes"
            told = [self.ask(f"DeviceGet{call}", handle=handle) for call in calls]
            if (hole := next((one for one in told if isinstance(one, Absent)), None)) is not None:
                return hole
            uuid, gi, ci, name, extent = told
            profile = name.rpartition("MIG ")[2]
            found.append(Instance(gi, ci, uuid, None, profile, None, None, extent.memorySizeMB, handle))
        return found

    def links(self) -> list[tuple[str, bool]] | Absent:
        """Return for each NVLink lane its far end (a PCI address, `switch`, or nothing) and whether it is up."""
        found = []
        for lane in range(_LINKS_MAX):
            up = self.ask("DeviceGetNvLinkState", lane, handle=self.handle)
            if isinstance(up, Absent):
                break  # there are no more
            kind = self.ask("DeviceGetNvLinkRemoteDeviceType", lane)
            far = self.ask("DeviceGetNvLinkRemotePciInfo", lane)
            switch = not isinstance(kind, Absent) and kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
            found.append(("switch" if switch else "" if isinstance(far, Absent) else str(far.busId), bool(up)))
        return found

    def gpm_supported(self) -> bool:
        """Say whether this GPU measures its multiprocessors."""
        found = self.ask("GpmQueryDeviceSupport")
        return not isinstance(found, Absent) and bool(found.isSupportedDevice)

    def gpm_sample(self, sample: Any, gi: int | None) -> Absent | None:
        """Take a sample of the GPU, or of one GPU instance, into one that `gpm_new` made."""
        if gi is None:
            value = self.ask("GpmSampleGet", sample, handle=self.handle)
        else:
            value = self.ask("GpmMigSampleGet", gi, sample, handle=self.handle)
        return value if isinstance(value, Absent) else None


def gpm_new() -> Any:
    """Return room for a sample, or Absent; give it back by `gpm_free`."""
    return ask("GpmSampleAlloc")


def gpm_free(sample: Any) -> None:
    """Give the room of a sample back."""
    ask("GpmSampleFree", sample)


def gpm_between(first: Any, second: Any) -> dict[str, float]:
    """Return ratios 0..1 by the names of GPM_METRICS; empty when the samples do not belong together."""
    get = pynvml.c_nvmlGpmMetricsGet_t()
    get.version, get.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, len(GPM_METRICS)
    get.sample1, get.sample2 = first, second
    for row, number in enumerate(GPM_METRICS.values()):
        get.metrics[row].metricId = number
    if isinstance(ask("GpmMetricsGet", get), Absent):
        return {}
    rows = ((name, get.metrics[row]) for row, name in enumerate(GPM_METRICS))
    return {
        name: min(one.value, 100.0) / 100
        for name, one in rows
        if one.nvmlReturn == pynvml.NVML_SUCCESS and one.value >= 0.0  # not a number compares false
    }


def _instance(number: int) -> int | None:
    return None if number == NO_INSTANCE else int(number)


class Nvml:
    """The library: its start and end, and the GPUs it finds."""

    def __init__(self) -> None:
        """Nothing is loaded before `start`."""
        self.started = False

    def start(self) -> Absent | None:
        """Load and initialise; return why not."""
        if self.started:
            return None
        value = ask("Init")
        self.started = not isinstance(value, Absent)
        return value if isinstance(value, Absent) else None

    def stop(self) -> None:
        """Let go of the driver; handles found before are void."""
        if self.started:
            ask("Shutdown")
        self.started = False

    def versions(self) -> tuple[str | None, str | None, int | None]:
        """Return versions of driver, library, and CUDA (13040 = 13.4)."""
        calls = ("SystemGetDriverVersion", "SystemGetNVMLVersion", "SystemGetCudaDriverVersion_v2")
        driver, library, cuda = (known(ask(call)) for call in calls)
        return driver, library, cuda

    def find(self) -> list[Gpu | tuple[int, Absent]] | Absent:
        """Return every GPU by index, or in its place why it does not answer."""
        count = ask("DeviceGetCount")
        if isinstance(count, Absent):
            return count
        found: list[Gpu | tuple[int, Absent]] = []
        for index in range(min(count, _DEVICES_MAX)):
            handle = ask("DeviceGetHandleByIndex", index)
            uuid = handle if isinstance(handle, Absent) else ask("DeviceGetUUID", handle)
            found.append((index, uuid) if isinstance(uuid, Absent) else Gpu(index, handle, uuid))
        return found


class Events:
    """The driver's own messages about some GPUs."""

    KINDS = XID_EVENT | LAYOUT_EVENT | GONE_EVENT | RECOVERY_EVENT | int(pynvml.nvmlEventTypeDoubleBitEccError)
    """XID, double-bit ECC, MIG layout, GPU unavailable, recovery action."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        """Listen to what each GPU offers of KINDS. `deaf` names the GPUs that offer nothing, and why."""
        self.deaf: dict[str, Absent] = {}
        self._lock = threading.Lock()
        self._uuids = {ctypes.cast(gpu.handle, ctypes.c_void_p).value: gpu.uuid for gpu in gpus}
        self._set = ask("EventSetCreate")
        for gpu in gpus:
            offered = self._set if isinstance(self._set, Absent) else gpu.ask("DeviceGetSupportedEventTypes")
            if not isinstance(offered, Absent):
                offered = gpu.ask("DeviceRegisterEvents", offered & self.KINDS, self._set, handle=gpu.handle)
            if isinstance(offered, Absent):
                self.deaf[gpu.uuid] = offered

    def wait(self, timeout_ms: int) -> Event | Absent:
        """Return the next event; Absent NOTHING when there was none in that time."""
        with self._lock:
            one = self._set if isinstance(self._set, Absent) else ask("EventSetWait", self._set, timeout_ms)
        if isinstance(one, Absent):
            return one
        uuid = self._uuids.get(ctypes.cast(one.device, ctypes.c_void_p).value)
        return Event(uuid, int(one.eventType), int(one.eventData), _instance(one.gpuInstanceId),
                     _instance(one.computeInstanceId))  # fmt: skip

    def close(self) -> None:
        """Stop listening; waits for a `wait` that is under way."""
        with self._lock:
            if not isinstance(self._set, Absent):
                ask("EventSetFree", self._set)
            self._set = Absent(Why.STALE, int(pynvml.NVML_ERROR_UNINITIALIZED), "EventSetFree")
