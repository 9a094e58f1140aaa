"""Which pod uses which device or slice, and how much: shares and what is left over are exactly the device's figures.

Pure: what the kubelet lists and what the processes' cgroups say is read elsewhere and passed in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Running:
    """A process on a device, or on a slice of it; `busy_ratio` is its share of the device's time where known."""

    device: str
    slice: str | None
    pid: int
    memory_mib: int
    busy_ratio: float | None
