"""A node as its Node object describes it: capacities, labels, taints and the devices it is said to have."""

from __future__ import annotations

from dataclasses import dataclass

from policies.columns import Health, Mode

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
    health: Health = Health.HEALTHY
    numa: int = -1  # -1 = not known, as for the link group: devices of one group share NVLink
    link_group: int = -1


@dataclass(frozen=True, slots=True)
class Seen:
    """One GPU as its node's agent saw it, in the slot that the driver gives it."""

    slot: int
    uuid: str
    health: Health
    mig_mode: bool
    numa: int = -1
    link_group: int = -1


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the last report of a node says of its GPUs; equal ones change nothing.

    Attributes:
        devices: those that answer, by slot; a device that the node should have and that is not here is not well.
        driver: its version, empty where there is none.
    """

    devices: tuple[Seen, ...] = ()
    driver: str = ""


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
        gpus_most: more GPUs than these nobody can rightly say that the node has.
        silent: its agent has reported and does so no longer; nothing of what it has may be given away until it does.
        driver: version as the agent tells it, or empty.
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
    ready: bool = True  # shown only: kube-scheduler keeps pods away by the taints that come with it
    zone: str = ""
    rack: str = ""
    gpus_most: int = 0
    silent: bool = False
    driver: str = ""
    warnings: tuple[str, ...] = ()  # what could not be read, one sentence each
