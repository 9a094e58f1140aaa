"""A node as its Node object describes it: capacities, labels, taints and the devices it is said to have."""

from __future__ import annotations

from dataclasses import dataclass

from policies.columns import Mode

from .pod import Amounts


@dataclass(frozen=True, slots=True)
class Taint:
    """A node's taint."""

    key: str
    value: str
    effect: str


@dataclass(frozen=True, slots=True)
class Device:
    """One physical GPU in a slot of its node."""

    model: str  # key of the geometry table, or the product label as it is
    memory_mib: int = 0  # 0 = not known
    mig_mode: bool = False
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `uid` tells a re-created node of the same name from the old one.

    Attributes:
        amounts: allocatable cpu, memory, ephemeral-storage and other extended resources.
        pods: allocatable pods.
        gpus: allocatable `nvidia.com/gpu` (tokens).
        slices: allocatable `nvidia.com/mig-*` by profile name (with "+"), sorted.
        shares: allocatable `tessera.dev/share`.
        whole_gpus: `nvidia.com/gpu` is a whole GPU here.
        product: label nvidia.com/gpu.product as it is, or empty.
    """

    uid: str
    name: str
    resource_version: str
    mode: Mode
    amounts: Amounts
    pods: int
    gpus: int = 0
    slices: tuple[tuple[str, int], ...] = ()
    shares: int = 0
    whole_gpus: bool = True
    product: str = ""
    devices: tuple[Device, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()  # sorted
    taints: tuple[Taint, ...] = ()
    unschedulable: bool = False
    zone: str = ""
    rack: str = ""
    warnings: tuple[str, ...] = ()  # what could not be read, one sentence each
