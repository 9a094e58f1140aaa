"""`tessera-agent doctor`: is the machine as the agent needs it? One answer to each question, and what to do."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nodeagent.agent import Places
from nodeagent.collect import Collector
from nodeagent.kubelet import DEVICE_PLUGINS, KubeletError, PodResources
from nodeagent.nvml import Nvml
from nodeagent.report import MIG_NONE, MIG_ON, Device, Report

OK, WARN, FAIL = "ok", "warn", "fail"
OBSERVED, EXACT = MODES = ("observed", "exact")
_OWN_SOCKET = "tessera-"


@dataclass(frozen=True, slots=True)
class Check:
    """One question: what it is about, how it stands (ok, warn, fail), what was found, and what to do about it."""

    check: str
    status: str
    text: str
    do: str = ""


def examine(places: Places, *, mode: str = OBSERVED) -> list[Check]:
    """Look at everything; `mode` is the one that the node runs or shall run."""
    try:
        boot = Check("boot id", OK, places.boot_id())
    except OSError as error:
        boot = Check("boot id", FAIL, str(error), "mount the host's /proc and name it with --proc")
    collector = Collector(Nvml(), node="doctor", agent="", numa=places.numa)
    report = collector.look(boot=boot.text, seq=1, at_us=0, deep=True).report
    collector.close()
    return [
        boot,
        *driver(report),
        *devices(report),
        pod_resources(PodResources(places.kubelet)),
        *plugins(places.kubelet / DEVICE_PLUGINS, mode),
        processes(places),
    ]


def driver(report: Report) -> list[Check]:
    """Library and driver."""
    if report.problem is None:
        cuda = f"CUDA {report.cuda // 1000}.{report.cuda % 1000 // 10}" if report.cuda else "CUDA unknown"
        return [Check("driver", OK, f"{report.driver}, NVML {report.nvml}, {cuda}")]
    if "libnvidia-ml" in report.problem:
        do = "give the container the NVIDIA runtime (runtimeClassName: nvidia), or install the driver's libraries"
    elif "changed under" in report.problem:
        do = "start the agent again: the driver was upgraded while it ran"
    else:
        do = "load the NVIDIA kernel module on the host (nvidia-smi must work there)"
    return [Check("driver", FAIL, report.problem, do)]


def devices(report: Report) -> list[Check]:
    """GPUs, MIG and permissions."""
    if report.problem is not None:
        return []
    found = [
        Check("GPUs", FAIL, f"GPU {one.index} ({one.uuid or 'unknown'}): {one.why}", "drain the node; restart it")
        for one in report.lost
    ]
    if not report.devices and not found:
        found.append(Check("GPUs", FAIL, "the driver has no GPU", "set NVIDIA_VISIBLE_DEVICES=all on the agent"))
    names = sorted({device.name for device in report.devices})
    if report.devices:
        found.insert(0, Check("GPUs", OK, f"{len(report.devices)} answer: {', '.join(names)}"))
    return [*found, *_mig(report.devices)]


def _mig(found: Sequence[Device]) -> list[Check]:
    able = [device for device in found if device.mig_mode != MIG_NONE]
    if not able:
        return [Check("MIG", OK, "no GPU here can be divided")] if found else []
    on = sum(device.mig_mode == MIG_ON for device in able)
    checks = [Check("MIG", OK, f"{len(able)} GPUs can be divided, {on} are in MIG mode")]
    pending = [str(device.index) for device in able if device.mig_pending]
    if pending:
        do = "drain these GPUs and reset them (nvidia-smi --gpu-reset), or restart the node"
        checks.append(Check("MIG mode", WARN, f"waits for a reset on GPU {', '.join(pending)}", do))
    if any(not profile.starts for device in able for profile in device.profiles):
        do = (
            "set NVIDIA_MIG_MONITOR_DEVICES=all (to see instances) and NVIDIA_MIG_CONFIG_DEVICES=all (to create them) "
            "on the agent, or give it CAP_SYS_ADMIN"
        )
        checks.append(Check("MIG permission", WARN, "placements may not be read, so slices have no place", do))
    else:
        checks.append(Check("MIG permission", OK, "instances and placements may be read"))
    return checks


def pod_resources(resources: PodResources) -> Check:
    """The kubelet's list of who holds which device."""
    name = "pod-resources"
    try:
        grants = resources.list()
    except KubeletError as error:
        return Check(
            name,
            FAIL,
            str(error),
            "mount /var/lib/kubelet/pod-resources of the host, and name its parent with --kubelet",
        )
    finally:
        resources.close()
    return Check(name, OK, f"{resources.socket} answers; {len(grants)} containers hold devices")


def plugins(folder: Path, mode: str) -> list[Check]:
    """The kubelet's device-plugin socket, and who else serves GPUs: of two plugins for one resource the last wins."""
    try:
        sockets = sorted(one.name for one in folder.iterdir() if stat.S_ISSOCK(one.lstat().st_mode))
    except OSError as error:
        do = f"mount {folder} of the host"
        return [Check("device plugins", FAIL if mode == EXACT else WARN, f"{folder}: {error.strerror}", do)]
    foreign = [one for one in sockets if one.startswith("nvidia") and not one.startswith(_OWN_SOCKET)]
    checks = []
    if mode == EXACT:
        if "kubelet.sock" in sockets:
            checks.append(Check("kubelet", OK, "takes device plugins"))
        else:
            checks.append(Check("kubelet", FAIL, f"{folder}/kubelet.sock is not there", "is the kubelet running?"))
    return [*checks, _second_plugin(foreign, mode)]


def _second_plugin(foreign: Iterable[str], mode: str) -> Check:
    name, named = "second device plugin", ", ".join(foreign)
    if mode == EXACT and named:
        do = "keep NVIDIA's device plugin off this node: the last to register wins and the other is told nothing"
        return Check(name, FAIL, f"{named} serves GPUs here too", do)
    if mode == OBSERVED and not named:
        do = "install NVIDIA's device plugin, or label the node tessera.dev/mode=exact"
        return Check(name, WARN, "no plugin of NVIDIA serves this node, so no pod gets a GPU", do)
    return Check(name, OK, f"{named} serves the GPUs" if named else "none")


def processes(places: Places) -> Check:
    """Whether processes can be told apart: they are the host's, and their pods have names."""
    name = "processes"
    if not os.access(places.proc / "1" / "cgroup", os.R_OK):
        do = "mount the host's /proc read-only and name it with --proc, or set hostPID"
        return Check(name, WARN, f"{places.proc} shows no processes of the host: use counts as external", do)
    if not places.logs.is_dir():
        do = f"mount {places.logs} of the host read-only"
        return Check(name, WARN, f"{places.logs} is not there: pods on a shared GPU have no names", do)
    return Check(name, OK, "owners of processes can be found")
