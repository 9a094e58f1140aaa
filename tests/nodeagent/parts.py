"""MIG instances, made and destroyed with the real pynvml."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pynvml

_ROWS = {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}


@dataclass
class Part:
    handle: Any
    computes: list[Any]
    gi: int
    uuid: str

    def destroy(self) -> None:
        for one in self.computes:
            pynvml.nvmlComputeInstanceDestroy(one)
        pynvml.nvmlGpuInstanceDestroy(self.handle)


def divide(index: int, name: str, start: int, *, computes: Sequence[int] | None = None) -> Part:
    """Make a GPU instance of a profile and one compute instance as large, or these."""
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
    for row in range(pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT):
        try:
            profile = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(gpu, row)
        except pynvml.NVMLError:
            continue
        if profile.name == f"MIG {name}":
            break
    else:
        raise LookupError(name)
    count = ctypes.c_uint(16)
    spans = (pynvml.c_nvmlGpuInstancePlacement_t * 16)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, profile.id, spans, ctypes.byref(count))
    span = pynvml.c_nvmlGpuInstancePlacement_t(start, spans[0].size)
    handle = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, profile.id, ctypes.byref(span))
    rows = (_ROWS[profile.sliceCount],) if computes is None else computes
    made = [pynvml.nvmlGpuInstanceCreateComputeInstance(handle, row) for row in rows]
    uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlComputeInstanceGetInfo(made[0]).device)
    return Part(handle, made, pynvml.nvmlGpuInstanceGetInfo(handle).id, uuid)
