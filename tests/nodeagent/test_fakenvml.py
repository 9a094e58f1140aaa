"""The make-believe NVML answers as NVIDIA's does, seen through the real pynvml."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from bench.fakenvml.box import LIBRARY, MODELS, Box, build, geometry, load

ROOT = Path(__file__).resolve().parents[2]
Machine = Callable[..., Box]
FULL, IN_USE, INVALID, LOST = 23, 19, 2, 15


def gpu(index: int = 0) -> Any:
    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def code(call: Callable[..., object], *arguments: object) -> int:
    """The error code of a call, 0 when it works."""
    try:
        call(*arguments)
    except pynvml.NVMLError as error:
        return int(error.value)
    return 0


def profiles(handle: Any) -> dict[str, Any]:
    found = {}
    for row in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        if code(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, handle, row) == 0:
            known = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(handle, row)
            found[known.name.removeprefix("MIG ")] = known
    return found


def placements(handle: Any, profile: int) -> list[tuple[int, int]]:
    count = ctypes.c_uint(0)
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile, None, ctypes.byref(count))
    spans = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(handle, profile, spans, ctypes.byref(count))
    return [(span.start, span.size) for span in spans]


def create(handle: Any, profile: int, start: int, size: int) -> Any:
    span = pynvml.c_nvmlGpuInstancePlacement_t(start, size)
    return pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(handle, profile, ctypes.byref(span))


@pytest.mark.parametrize(("model", "family"), [("H100-80", "eight"), ("A30-24", "a30"), ("RTXPRO6000", "gb202")])
def test_every_reachable_layout_is_that_of_the_geometry(machine: Machine, model: str, family: str) -> None:
    machine(model, 1).mig(0)
    handle = gpu()
    spots = [(p.id, *span) for p in profiles(handle).values() for span in placements(handle, p.id)]
    seen: set[frozenset[tuple[int, int, int]]] = set()
    maximal = 0

    def visit(state: frozenset[tuple[int, int, int]]) -> None:
        nonlocal maximal
        seen.add(state)
        stuck = True
        for spot in spots:
            try:
                made = create(handle, *spot)
            except pynvml.NVMLError as error:
                assert error.value == FULL  # noqa: PT017 - most attempts work
                continue
            stuck = False
            if state | {spot} not in seen:
                visit(state | {spot})
            pynvml.nvmlGpuInstanceDestroy(made)
        maximal += stuck

    visit(frozenset())
    expected = geometry()["families"][family]["expect"]
    assert (len(seen), maximal) == (expected["states"], expected["maximal"])


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_the_basics(machine: Machine, model: str) -> None:
    machine(model, 2)
    handle = gpu(1)
    known = geometry()["gpus"][model]
    assert pynvml.nvmlDeviceGetName(handle).replace(" ", "-") == known["product"][0]
    assert pynvml.nvmlDeviceGetPciInfo(handle).pciDeviceId == known["pci"][0]
    assert pynvml.nvmlDeviceGetUUID(handle) == Box.uuid(1)
    assert pynvml.nvmlDeviceGetHandleByUUID(Box.uuid(1)).contents is not None
    assert set(profiles(handle)) == {n if isinstance(n, str) else n[0] for n in known["names"].values()}
    assert pynvml.nvmlDeviceGetMigMode(handle) == [0, 0]
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    assert memory.total == memory.reserved + memory.free + memory.used


def test_errors_of_instances(machine: Machine) -> None:
    box = machine("H100-80", 1)
    handle = gpu()
    profile = profiles(handle)["3g.40gb"].id
    assert code(create, handle, profile, 0, 4) == pynvml.NVML_ERROR_NOT_SUPPORTED  # MIG is off
    box.mig(0)
    assert code(create, handle, profile, 1, 4) == INVALID
    assert code(create, handle, profile, 0, 3) == INVALID
    made = create(handle, profile, 0, 4)
    assert code(create, handle, profile, 0, 4) == FULL
    part = pynvml.nvmlGpuInstanceCreateComputeInstance(made, pynvml.NVML_COMPUTE_INSTANCE_PROFILE_3_SLICE)
    assert code(pynvml.nvmlGpuInstanceCreateComputeInstance, made, 0) == FULL
    assert code(pynvml.nvmlGpuInstanceDestroy, made) == IN_USE
    gi, ci = pynvml.nvmlGpuInstanceGetInfo(made), pynvml.nvmlComputeInstanceGetInfo(part)
    assert (gi.placement.start, gi.placement.size, gi.profileId) == (0, 4, profile)
    mig = ci.device
    assert pynvml.nvmlDeviceGetUUID(mig).startswith("MIG-")
    assert pynvml.nvmlDeviceGetGpuInstanceId(mig) == gi.id
    assert pynvml.nvmlDeviceIsMigDeviceHandle(mig).value == 1
    box.run(0, 4711, 2**30, gi=gi.id, ci=ci.id)
    assert code(pynvml.nvmlComputeInstanceDestroy, part) == IN_USE
    assert [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(mig)] == [4711]
    assert pynvml.nvmlDeviceGetMemoryInfo(mig).used == 2**30
    box.end(0, 4711, gi=gi.id, ci=ci.id)
    pynvml.nvmlComputeInstanceDestroy(part)
    pynvml.nvmlGpuInstanceDestroy(made)
    assert code(pynvml.nvmlDeviceGetUUID, mig) == INVALID
    box.privileged(yes=False)
    assert code(create, handle, profile, 0, 4) == pynvml.NVML_ERROR_NO_PERMISSION


def test_a_driver_that_chooses_can_dead_end(machine: Machine) -> None:
    machine("A100-40", 1).mig(0)
    handle = gpu()
    known = {name: profile.id for name, profile in profiles(handle).items()}
    for name in ("1g.5gb", "1g.5gb", "2g.10gb"):
        pynvml.nvmlDeviceCreateGpuInstance(handle, known[name])
    assert code(pynvml.nvmlDeviceCreateGpuInstance, handle, known["3g.20gb"]) == FULL


def test_mig_mode_of_ampere_waits_for_a_reset_and_survives_a_reboot(machine: Machine) -> None:
    box = machine("A100-80", 1)
    assert pynvml.nvmlDeviceSetMigMode(gpu(), 1) == pynvml.NVML_ERROR_RESET_REQUIRED
    assert pynvml.nvmlDeviceGetMigMode(gpu()) == [0, 1]
    box.reset(0)
    assert pynvml.nvmlDeviceGetMigMode(gpu()) == [1, 1]
    pynvml.nvmlDeviceCreateGpuInstance(gpu(), 19)
    box.reboot()
    assert code(pynvml.nvmlDeviceGetCount) == pynvml.NVML_ERROR_UNINITIALIZED
    assert pynvml.nvmlDeviceGetMigMode(gpu()) == [1, 1]
    assert code(create, gpu(), 0, 0, 8) == 0  # the instance is gone


def test_mig_mode_of_hopper_is_immediate_and_ends_with_a_reboot(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.set(0, clients=1)
    assert pynvml.nvmlDeviceSetMigMode(gpu(), 1) == IN_USE
    box.set(0, clients=0)
    assert pynvml.nvmlDeviceSetMigMode(gpu(), 1) == 0
    assert pynvml.nvmlDeviceGetMigMode(gpu()) == [1, 1]
    assert code(pynvml.nvmlDeviceGetUtilizationRates, gpu()) == pynvml.NVML_ERROR_NOT_SUPPORTED
    box.reboot()
    assert pynvml.nvmlDeviceGetMigMode(gpu()) == [0, 0]


def test_a_lost_gpu_leaves_the_others(machine: Machine) -> None:
    box = machine("H100-80", 2)
    first, second = gpu(0), gpu(1)
    box.lose(0)
    assert code(pynvml.nvmlDeviceGetPowerUsage, first) == LOST
    assert code(pynvml.nvmlDeviceGetHandleByIndex, 0) == LOST
    assert pynvml.nvmlDeviceGetPowerUsage(second) > 0


def test_gpm_needs_two_samples_of_the_same_instance(machine: Machine) -> None:
    box = machine("H100-80", 1)
    box.gpm(0, 2, 61.5)
    handle = gpu()
    first, second = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
    get = pynvml.c_nvmlGpmMetricsGet_t()
    get.version, get.numMetrics, get.sample1, get.sample2 = 1, 1, first, second
    get.metrics[0].metricId = 2
    pynvml.nvmlGpmSampleGet(handle, first)
    pynvml.nvmlGpmSampleGet(handle, second)
    assert code(pynvml.nvmlGpmMetricsGet, get) == INVALID
    box.wait(0.2)
    pynvml.nvmlGpmSampleGet(handle, second)
    pynvml.nvmlGpmMetricsGet(get)
    assert (get.metrics[0].nvmlReturn, get.metrics[0].value) == (0, 61.5)


def test_an_event_reaches_the_thread_that_waits(machine: Machine) -> None:
    box = machine("H100-80", 2)
    events = pynvml.nvmlEventSetCreate() if pynvml.nvmlInit() is None else None
    pynvml.nvmlDeviceRegisterEvents(gpu(1), 8, events)
    heard: list[Any] = []
    thread = threading.Thread(target=lambda: heard.append(pynvml.nvmlEventSetWait(events, 5000)))
    thread.start()
    box.event(0, data=13)  # not listened to
    box.event(1, data=79)
    thread.join(5)
    assert [(one.eventData, one.gpuInstanceId) for one in heard] == [(79, 0xFFFFFFFF)]
    assert code(pynvml.nvmlEventSetWait, events, 0) == pynvml.NVML_ERROR_TIMEOUT


def test_topology_of_a_mixed_box(machine: Machine) -> None:
    box = machine("H100-80", 2).add("A30-24", 2)
    box.set(3, retired_sbe=2, retired_dbe=0, remap_corrected=-3)
    one = [gpu(index) for index in range(4)]
    assert pynvml.nvmlDeviceGetTopologyCommonAncestor(one[0], one[1]) == pynvml.NVML_TOPOLOGY_SYSTEM  # one on each node
    linked = [pynvml.nvmlDeviceGetP2PStatus(one[a], one[b], 2) == 0 for a, b in ((0, 1), (2, 3), (1, 2), (0, 0))]
    assert linked == [True, True, True, False]
    box.mig(1)
    assert pynvml.nvmlDeviceGetP2PStatus(one[0], one[1], 2) != 0
    assert pynvml.nvmlDeviceGetNvLinkRemotePciInfo(one[2], 0).busId == pynvml.nvmlDeviceGetPciInfo(one[3]).busId
    fabric = pynvml.c_nvmlGpuFabricInfo_v2_t()
    pynvml.nvmlDeviceGetGpuFabricInfoV(one[0], ctypes.byref(fabric))
    assert fabric.state == pynvml.NVML_GPU_FABRIC_STATE_COMPLETED
    assert pynvml.nvmlDeviceGetRetiredPages(one[3], 0) == [0x1000, 0x2000]
    assert code(pynvml.nvmlDeviceGetRemappedRows, one[3]) == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_the_nth_call_fails_and_the_machine_can_refuse(machine: Machine) -> None:
    box = machine("H100-80", 2)
    box.fault("nvmlDeviceGetPowerUsage", gpu=1, nth=2, times=1, code=999)
    assert code(pynvml.nvmlDeviceGetPowerUsage, gpu(0)) == 0
    assert [code(pynvml.nvmlDeviceGetPowerUsage, gpu(1)) for _ in range(3)] == [0, 999, 0]
    box.set(0, power_mw=-3)
    assert code(pynvml.nvmlDeviceGetPowerUsage, gpu(0)) == pynvml.NVML_ERROR_NOT_SUPPORTED


def test_a_function_that_the_driver_lacks(tmp_path: Path) -> None:
    old = build(tmp_path, without=["nvmlDeviceGetMemoryInfo_v2"])
    pynvml.nvmlLib = load(old)
    pynvml._nvmlGetFunctionPointer_cache.clear()
    try:
        Box(pynvml.nvmlLib, tmp_path).add("A30-24", 1)
        assert code(pynvml.nvmlDeviceGetMemoryInfo, gpu(), pynvml.nvmlMemory_v2) == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND
        assert pynvml.nvmlDeviceGetMemoryInfo(gpu()).total > 0
    finally:
        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()


def test_processes_share_the_machine_and_one_that_dies_leaves_it_usable(machine: Machine, library: Path) -> None:
    box = machine("H100-80", 1)
    box.mig(0)
    box.fault("nvmlGpuInstanceDestroy", die=True)
    code_of_other = (
        "import pynvml as n; n.nvmlInit(); d = n.nvmlDeviceGetHandleByIndex(0);"
        "g = n.nvmlDeviceCreateGpuInstance(d, 9); n.nvmlGpuInstanceDestroy(g)"
    )
    assert library.name == LIBRARY
    environment = {**os.environ, **box.environment, "LD_LIBRARY_PATH": str(library.parent)}
    died = subprocess.run([sys.executable, "-c", code_of_other], env=environment, cwd=ROOT, check=False)
    assert died.returncode == -9
    count = ctypes.c_uint(14)
    found = (pynvml.c_nvmlGpuInstance_t * 14)()
    pynvml.nvmlDeviceGetGpuInstances(gpu(), 9, found, ctypes.byref(count))
    assert count.value == 1


def test_no_driver(loaded: ctypes.CDLL) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(loaded._name).parent)}
    environment.pop("FAKENVML_STATE", None)
    probe = "import pynvml\ntry:\n    pynvml.nvmlInit()\nexcept pynvml.NVMLError as e:\n    print(e.value)"
    said = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["9"]
