"""`/metrics`: the last report as Prometheus reads it, with names of our own and the few of DCGM that its board needs.

A device or slice carries the names of its pod where exactly one pod holds it; several on one device have series of
their own, so that no sum counts anything twice. What was not read has no series. Rendering is pure and takes one pass.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nodeagent.health import SLOW_BITS
from nodeagent.report import BAD, HEALTHY, POD, PROBATION, Activity, Device, Report, Sensors, Slice, Use

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MIB = 1 << 20
_SCRAPERS_MAX = 4
_PATIENCE_S = 5.0  # with a scraper that says nothing
_WHOLE_S = 10.0  # for a scrape from its first byte to its last, so that nobody drips for ever
STALE_S = 60.0
_ROOM_S = 1.0

_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
Sample = tuple[str, float]  # labels with braces, value


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name, kind, what it says, how it is read, and whether it carries the names of the owner's pod."""

    name: str
    kind: str
    text: str
    read: Callable[[Any], float | None]
    factor: float = 1.0
    owned: bool = False


def _of(field: str) -> Callable[[Any], float | None]:
    def read(source: Activity | Sensors) -> float | None:
        value: float | None = getattr(source, field)
        return value

    return read


_G = "tessera_agent_gpu_"
ACTIVITY = (
    Family(f"{_G}memory_bytes", "gauge", "Memory of the device or slice.", _of("memory_mib"), _MIB),
    Family(f"{_G}memory_used_bytes", "gauge", "Memory in use.", _of("memory_used_mib"), _MIB, owned=True),
    Family(f"{_G}memory_reserved_bytes", "gauge", "Memory that the driver keeps.", _of("memory_reserved_mib"), _MIB),
    Family(f"{_G}busy_ratio", "gauge", "Share of time in which anything ran.", _of("busy_ratio"), owned=True),
    Family(f"{_G}copy_ratio", "gauge", "Share of time in which memory was read or written.", _of("copy_ratio")),
    Family(f"{_G}sm_ratio", "gauge", "Share of multiprocessors at work.", _of("sm_ratio"), owned=True),
    Family(f"{_G}sm_occupancy_ratio", "gauge", "Warps at work of those that fit.", _of("occupancy_ratio")),
    Family(f"{_G}tensor_ratio", "gauge", "Share of time in which tensor cores work.", _of("tensor_ratio"), owned=True),
    Family(f"{_G}dram_ratio", "gauge", "Share of memory bandwidth in use.", _of("dram_ratio"), owned=True),
    Family(f"{_G}encoder_ratio", "gauge", "Share of time in which the encoder works.", _of("encoder_ratio")),
    Family(f"{_G}decoder_ratio", "gauge", "Share of time in which the decoder works.", _of("decoder_ratio")),
)
SENSORS = (
    Family(f"{_G}power_watts", "gauge", "Power drawn.", _of("power_mw"), 1e-3),
    Family(f"{_G}power_limit_watts", "gauge", "Most power it may draw.", _of("power_limit_mw"), 1e-3),
    Family(f"{_G}energy_joules_total", "counter", "Energy since the driver was loaded.", _of("energy_mj"), 1e-3),
    Family(f"{_G}temperature_celsius", "gauge", "Temperature of the GPU.", _of("temperature_c")),
    Family(f"{_G}memory_temperature_celsius", "gauge", "Temperature of its memory.", _of("memory_temperature_c")),
    Family(f"{_G}sm_clock_hertz", "gauge", "Clock of the multiprocessors.", _of("sm_clock_mhz"), 1e6),
    Family(f"{_G}memory_clock_hertz", "gauge", "Clock of the memory.", _of("memory_clock_mhz"), 1e6),
    Family(f"{_G}pcie_transmit_bytes_per_second", "gauge", "Sent over PCIe.", _of("pcie_tx_kib_s"), 1024),
    Family(f"{_G}pcie_receive_bytes_per_second", "gauge", "Received over PCIe.", _of("pcie_rx_kib_s"), 1024),
    Family(f"{_G}pcie_replays_total", "counter", "Repeated PCIe packets.", _of("pcie_replays")),
    Family(f"{_G}nvlink_transmit_bytes_total", "counter", "Sent over NVLink.", _of("nvlink_tx_kib"), 1024),
    Family(f"{_G}nvlink_receive_bytes_total", "counter", "Received over NVLink.", _of("nvlink_rx_kib"), 1024),
    Family(f"{_G}ecc_corrected_total", "counter", "Corrected memory errors since the driver was loaded.",
           _of("ecc_corrected")),
    Family(f"{_G}ecc_uncorrected_total", "counter", "Uncorrected memory errors since the driver was loaded.",
           _of("ecc_uncorrected")),
    Family(f"{_G}remapped_rows", "gauge", "Memory rows remapped after uncorrected errors.", _of("rows_uncorrected")),
    Family(f"{_G}row_remap_pending", "gauge", "1 = rows wait for a reset.", _of("rows_pending")),
    Family(f"{_G}row_remap_failed", "gauge", "1 = rows could not be remapped.", _of("rows_failed")),
    Family(f"{_G}slowed", "gauge", "1 = heat, power brake or hardware hold the clocks down.",
           lambda one: None if one.throttle_bits is None else bool(one.throttle_bits & sum(SLOW_BITS))),
)  # fmt: skip
DCGM_ACTIVITY = (
    Family("DCGM_FI_DEV_GPU_UTIL", "gauge", "GPU utilization (in %).", _of("busy_ratio"), 100),
    Family("DCGM_FI_DEV_FB_USED", "gauge", "Framebuffer memory used (in MiB).", _of("memory_used_mib")),
    Family("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "gauge", "Ratio of cycles the tensor pipe is active.",
           _of("tensor_ratio")),
)  # fmt: skip
DCGM_SENSORS = (
    Family("DCGM_FI_DEV_GPU_TEMP", "gauge", "GPU temperature (in C).", _of("temperature_c")),
    Family("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw (in W).", _of("power_mw"), 1e-3),
    Family("DCGM_FI_DEV_SM_CLOCK", "gauge", "SM clock frequency (in MHz).", _of("sm_clock_mhz")),
)
"""All that Grafana board 12239 reads."""
WORKABLE = (HEALTHY, PROBATION)


@dataclass(frozen=True, slots=True)
class _Subject:
    """A device or slice with its labels: short ones, and those with pod names."""

    activity: Activity
    sensors: Sensors | None
    labels: str
    owned: str
    dcgm: str
    healthy: bool


def render(report: Report, *, age_s: float = 0.0, dcgm: bool = True) -> bytes:
    """Return the exposition of a report that is `age_s` seconds old; `dcgm` adds DCGM's names."""
    subjects = list(_subjects(report))
    lines: list[str] = []
    for family in ACTIVITY:
        chosen = ((one.owned if family.owned else one.labels, family.read(one.activity)) for one in subjects)
        _write(lines, family, chosen)
    for family in SENSORS:
        _write(lines, family, ((one.labels, family.read(one.sensors)) for one in subjects if one.sensors))
    if dcgm:
        for family in DCGM_ACTIVITY:
            _write(lines, family, ((one.dcgm, family.read(one.activity)) for one in subjects))
        for family in DCGM_SENSORS:
            _write(lines, family, ((one.dcgm, family.read(one.sensors)) for one in subjects if one.sensors))
    for name, kind, text, samples in _others(report, subjects, age_s):
        _write(lines, Family(name, kind, text, float), samples)
    return ("\n".join(lines) + "\n").encode()


def _write(lines: list[str], family: Family, samples: Iterable[tuple[str, float | None]]) -> None:
    """Write a family, each set of labels once: two of the same would spoil the whole scrape."""
    rows: dict[str, str] = {}
    for labels, value in samples:
        if value is not None:
            rows[labels] = f"{family.name}{labels} {_number(value * family.factor)}"
    if rows:
        lines += (f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}", *rows.values())


def _number(value: float) -> str:
    rounded = round(value, 6)
    return str(int(rounded)) if rounded == int(rounded) else repr(rounded)


def _labels(**values: object) -> str:
    return "{" + ",".join(f'{name}="{str(value).translate(_ESCAPED)}"' for name, value in values.items()) + "}"


def _subjects(report: Report) -> Iterator[_Subject]:
    pods: dict[str, list[Use]] = {}
    for use in report.uses:
        if use.kind == POD:
            pods.setdefault(use.slice or use.device, []).append(use)
    for device in report.devices:
        yield _subject(report, device, None, pods.get(device.uuid, ()))
        for part in device.slices:
            yield _subject(report, device, part, pods.get(part.uuid or "", ()))


def _subject(report: Report, device: Device, part: Slice | None, uses: Sequence[Use]) -> _Subject:
    identity = {"gpu": device.index, "uuid": device.uuid, "model": device.name}
    dcgm = {"gpu": device.index, "UUID": device.uuid, "device": f"nvidia{device.index}", "modelName": device.name}
    if part is not None:
        identity |= {"uuid": part.uuid or f"{device.uuid}/{part.gi}", "mig": part.profile}
        dcgm |= {"GPU_I_PROFILE": part.profile, "GPU_I_ID": part.gi}
    dcgm["Hostname"] = report.node
    owner = uses[0] if len({(use.namespace, use.pod, use.container) for use in uses}) == 1 else None
    pod = {"namespace": owner.namespace, "pod": owner.pod, "container": owner.container} if owner else {}
    return _Subject(
        activity=part.activity if part else device.activity,
        sensors=None if part else device.sensors,
        labels=_labels(**identity),
        owned=_labels(**identity, **pod),
        dcgm=_labels(**dcgm, **pod),
        healthy=(part or device).health.state in WORKABLE,
    )


def _others(report: Report, subjects: Sequence[_Subject], age_s: float) -> Iterator[tuple[str, str, str, list[Sample]]]:
    yield f"{_G}healthy", "gauge", "1 = may be given work.", [(one.labels, one.healthy) for one in subjects]
    states = [_labels(gpu=one.index, uuid=one.uuid, state=one.health.state) for one in report.devices]
    states += [_labels(gpu=one.index, uuid=one.uuid or "", state=BAD) for one in report.lost]
    yield f"{_G}state", "gauge", "The state of a device, always 1.", [(labels, 1.0) for labels in states]
    xids = [
        (_labels(gpu=device.index, uuid=device.uuid, xid=one.code), float(one.count))
        for device in report.devices
        for one in device.xids
    ]
    yield f"{_G}xids_total", "counter", "Errors that the driver reported, by number.", xids
    memory: dict[str, float] = {}
    busy: dict[str, float] = {}
    for use in report.uses:
        labels = _use_labels(use)
        memory[labels] = memory.get(labels, 0.0) + use.memory_mib * _MIB
        if use.busy_ratio is not None:
            busy[labels] = busy.get(labels, 0.0) + use.busy_ratio
    text = "by who uses it; together the device's own"
    yield "tessera_agent_use_memory_bytes", "gauge", f"Memory of a device or slice {text}.", list(memory.items())
    yield "tessera_agent_use_busy_ratio", "gauge", f"Busy ratio of a device or slice {text}.", list(busy.items())
    expected, working = float(report.expected), float(len(report.devices))
    yield "tessera_agent_gpus_expected", "gauge", "Most GPUs seen since the machine was started.", [("", expected)]
    yield "tessera_agent_gpus_working", "gauge", "GPUs that answer.", [("", working)]
    yield "tessera_agent_reports_total", "counter", "Reports since the machine was started.", [("", float(report.seq))]
    yield "tessera_agent_sample_age_seconds", "gauge", "Age of all figures here.", [("", age_s)]
    info = _labels(version=report.agent, driver=report.driver or "", node=report.node)
    yield "tessera_agent_info", "gauge", "Versions, always 1.", [(info, 1.0)]


def _use_labels(use: Use) -> str:
    who = {"namespace": use.namespace, "pod": use.pod, "container": use.container} if use.pod else {"uid": use.uid}
    return _labels(uuid=use.slice or use.device, kind=use.kind if use.processes or use.pod else "unattributed", **who)


class Exporter:
    """Serves the last report on `/metrics`, and on `/healthz` whether there is one that is not too old."""

    def __init__(
        self, host: str, port: int, *, monotonic: Callable[[], float], dcgm: bool = True, stale_s: float = STALE_S
    ) -> None:
        """Listen; port 0 lets the machine choose. Raises OSError.

        A report older than `stale_s` is one too old: a call of the driver hangs, and only a new process gets away.
        """
        self._monotonic, self._dcgm, self._stale_s = monotonic, dcgm, stale_s
        self._last: tuple[Report, float] | None = None
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE_S

            def do_GET(self) -> None:
                status, kind, body = exporter.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Scrapes are not worth a line each."""

        self._server = _Server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.5,), name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.server_address[1])

    def publish(self, report: Report) -> None:
        """Serve this report from now on."""
        self._last = report, self._monotonic()

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Return status, content type and body of a request."""
        last = self._last
        if path.partition("?")[0] not in {"/metrics", "/healthz"}:
            return HTTPStatus.NOT_FOUND, "text/plain", b"look at /metrics or /healthz\n"
        if last is None:
            return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"the first look at the GPUs is not done\n"
        report, age_s = last[0], self._monotonic() - last[1]
        if path.startswith("/healthz"):
            if age_s > self._stale_s:
                return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"the last look at the GPUs is too old\n"
            return HTTPStatus.OK, "text/plain", b"ok\n"
        body = render(report, age_s=age_s, dcgm=self._dcgm)
        return HTTPStatus.OK, CONTENT_TYPE, body

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A few scrapers at a time; who comes on top of them waits a moment and is turned away."""

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._room = threading.BoundedSemaphore(_SCRAPERS_MAX)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(timeout=_ROOM_S):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        end = threading.Timer(_WHOLE_S, _cut, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._room.release()


def _cut(request: socket.socket) -> None:
    with suppress(OSError):  # it has just ended
        request.shutdown(socket.SHUT_RDWR)
