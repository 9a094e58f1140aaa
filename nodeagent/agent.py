"""One look at the machine after the other: devices, their health, and who uses them, joined into a Report."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nodeagent import health
from nodeagent.attribution import Grant, Held, held, uses
from nodeagent.collect import Collector
from nodeagent.health import Record, Signs
from nodeagent.kubelet import KubeletError, PodResources
from nodeagent.mig import Divider
from nodeagent.nvml import XID_EVENT, Event, Gpu, Nvml
from nodeagent.owners import Owners
from nodeagent.report import POD, REASONS_MAX, SENTENCE_MAX, USES_MAX, XIDS_MAX, Device, Report, Use, Xid, plain

_MADE_UP = re.compile(r"(-([bcdfghjklmnpqrstvwxz2456789]{5}|[bcdfghjklmnpqrstvwxz2456789]{8,10}|[0-9]+))+$")
"""What controllers put behind a name: Kubernetes' random letters, the hash of a template, an index, a time."""
_GRANTS_KEPT_S = 60  # a kubelet that restarts is away for seconds; what it gave out stays given


@dataclass(frozen=True, slots=True)
class Places:
    """Where the host's own files are: mounted somewhere when the agent runs in a container."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    kubelet: Path = Path("/var/lib/kubelet")
    logs: Path = Path("/var/log/containers")

    def boot_id(self) -> str:
        """Return the kernel's name of this start of the machine. Raises OSError."""
        return (self.proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()

    def numa(self, bus: str) -> int | None:
        """Return the NUMA node of a PCI address as NVML writes it; None where the kernel names none."""
        domain, _, rest = bus.lower().partition(":")
        path = self.sys / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node"
        try:
            node = int(path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None


class Agent:
    """Keeps what one look cannot know: sequence, health, XIDs, and what the kubelet said last."""

    def __init__(
        self, *, node: str, version: str, places: Places, wall_us: Callable[[], int], monotonic: Callable[[], float]
    ) -> None:
        """Look at nothing yet."""
        self.collector = Collector(Nvml(), node=node, agent=version, numa=places.numa)
        self._places, self._wall_us, self._monotonic = places, wall_us, monotonic
        self._owners = Owners(places.proc, places.logs)
        self._kubelet = PodResources(places.kubelet)
        self._grants: Sequence[Grant] = ()
        self._granted_s: float | None = None
        self._records: dict[tuple[str, int | None], Record] = {}
        self._xids: dict[tuple[str, int], Xid] = {}
        self._boot, self._seq = "", 0
        self._uses: Sequence[Use] = ()
        self.divider: Divider | None = None
        """Changes MIG layouts, in exact mode; a device in change is reported as such."""
        self._changes = 0
        self.tokens: Mapping[str, Sequence[str]] = {}
        """Devices and slices behind Tessera's own tokens, in exact mode."""

    @property
    def gpus(self) -> list[Gpu]:
        """The GPUs that answered last, for listening to their events."""
        return self.collector.gpus

    def hear(self, event: Event) -> None:
        """Take in what the driver told by itself. A verdict is the whole GPU's unless the event names an instance."""
        if event.uuid is None or event.kind != XID_EVENT:
            return
        key = event.uuid, event.data
        count = self._xids[key].count if key in self._xids else 0
        self._xids[key] = Xid(event.data, min(count + 1, 2**31 - 1), self._wall_us())
        scope = event.uuid, event.gi
        record = self._records.get(scope, Record())
        self._records[scope] = health.hear(record, event.data, self._now_s(), workload=self._workload(event.uuid))

    def look(self, *, deep: bool = False) -> Report:
        """Return the next report."""
        boot = self._places.boot_id()
        self._seq = self._seq + 1 if boot == self._boot else 1
        if self._boot not in {"", boot}:
            self._records = {key: health.boot(one, self._now_s()) for key, one in self._records.items()}
        self._boot = boot
        if self.divider is not None and self.divider.count != self._changes:
            deep, self._changes = True, self.divider.count  # handles of instances that went are void
        seen = self.collector.look(boot=boot, seq=self._seq, at_us=self._wall_us(), deep=deep)
        for lost in seen.report.lost:
            if lost.uuid is not None:
                self._observe((lost.uuid, None), Signs(lost=True))
        changing = self.divider.changing(one.uuid for one in seen.report.devices) if self.divider else ()
        devices = tuple(
            replace(one, reconfiguring=one.reconfiguring or one.uuid in changing)
            for one in map(self._judged, seen.report.devices)
        )
        notes: list[str] = []
        holding = self._holding(devices, notes)
        found = uses(devices, seen.running, self._owners.of(one.pid for one in seen.running), holding)
        self._uses = found
        return replace(
            seen.report,
            devices=devices,
            uses=tuple(found[:USES_MAX]),
            uses_left_out=max(len(found) - USES_MAX, 0),
            notes=tuple(plain(one, SENTENCE_MAX) for one in notes[:REASONS_MAX]),
        )

    def close(self) -> None:
        """Let go of the driver and the kubelet."""
        self.collector.close()
        self._kubelet.close()

    def _now_s(self) -> int:
        return int(self._monotonic())

    def _workload(self, uuid: str) -> str:
        """Say whose process an XID was, where only one pod is on the device: one that comes back is no other."""
        pods = {(use.namespace, use.pod) for use in self._uses if use.device == uuid and use.kind == POD}
        if len(pods) != 1:
            return ""
        namespace, pod = pods.pop()
        return f"{namespace}/{_MADE_UP.sub('', pod)}"

    def _observe(self, key: tuple[str, int | None], signs: Signs) -> Record:
        self._records[key] = health.observe(self._records.get(key, Record()), signs, self._now_s())
        return self._records[key]

    def _judged(self, device: Device) -> Device:
        """Put health and XIDs into a device; a record of an instance that is gone goes too."""
        record = self._observe((device.uuid, None), health.signs_of(device))
        alive = {part.gi for part in device.slices}
        for key in [key for key in self._records if key[0] == device.uuid and key[1] not in {None, *alive}]:
            del self._records[key]
        own = {
            key[1]: self._observe(key, Signs())
            for key in list(self._records)
            if key[0] == device.uuid and key[1] is not None
        }
        slices = tuple(
            replace(part, health=health.verdict(record, *([own[part.gi]] if part.gi in own else [])))
            for part in device.slices
        )
        xids = sorted((one for (uuid, _), one in self._xids.items() if uuid == device.uuid), key=lambda one: -one.at_us)
        return replace(device, health=health.verdict(record), slices=slices, xids=tuple(xids[:XIDS_MAX]))

    def _holding(self, devices: Sequence[Device], notes: list[str]) -> Held:
        """Say who holds what; while the kubelet is away, as it said last."""
        try:
            self._grants, self._granted_s = self._kubelet.list(), self._monotonic()
        except KubeletError as error:
            notes.append(str(error))
            if self._granted_s is None or self._monotonic() - self._granted_s > _GRANTS_KEPT_S:
                self._grants = ()
        found = held(self._grants, devices, self.tokens)
        if found.unknown:
            few = ", ".join(found.unknown[:3])
            notes.append(f"the kubelet gave out {len(found.unknown)} device ids that name no device here ({few}).")
        return found
