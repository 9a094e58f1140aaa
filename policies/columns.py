"""The arrays every policy reads: Snapshot (the cluster), Ask (one request in numbers), Mix (what is asked lately).

Axes: N nodes, D device slots (the most devices of any node, padded), P MIG profiles, E other extended resources,
M GPU models, C classes of requests. Device columns are `[D, N]`, so reductions run along axis 0. Invariant: a Snapshot
is checked once, when it is made, and nobody writes to it afterwards; a policy therefore carries no checks of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

BoolArray: TypeAlias = npt.NDArray[np.bool_]
IntArray: TypeAlias = npt.NDArray[np.integer]
BitsArray: TypeAlias = npt.NDArray[np.uint16]
FloatArray: TypeAlias = npt.NDArray[np.float32]


class Mode(IntEnum):
    """Who chooses the device on a node: NVIDIA's plugin (OBSERVED) or Tessera (EXACT)."""

    OBSERVED = 0
    EXACT = 1


class Use(IntEnum):
    """What a device is used for now; a device is never two of these at once."""

    FREE = 0
    WHOLE = 1
    SHARED = 2
    MIG = 3


class Health(IntEnum):
    """What the agent says of a device; only HEALTHY devices are given away."""

    HEALTHY = 0
    SUSPECT = 1
    DRAINING = 2
    RESETTING = 3
    PROBATION = 4
    BAD = 5


class Kind(IntEnum):
    """What a request asks of a device."""

    NONE = 0
    WHOLE = 1
    MIG = 2
    SHARE = 3


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The cluster at one instant, in columns. Unused rows and slots have `schedulable` / `exists` False."""

    # per node, [N]
    schedulable: BoolArray  # a live node in service (not a hole in the table)
    mode: npt.NDArray[np.uint8]  # Mode
    rank: npt.NDArray[np.int32]  # place in the order of node names: the last tie-break
    zone: npt.NDArray[np.int32]  # code, -1 unknown
    rack: npt.NDArray[np.int32]  # code, -1 unknown
    generation: npt.NDArray[np.int64]  # grows with every change of the node
    cpu_milli_free: npt.NDArray[np.int64]  # may be negative on an overcommitted node
    cpu_milli_total: npt.NDArray[np.int64]
    memory_bytes_free: npt.NDArray[np.int64]
    memory_bytes_total: npt.NDArray[np.int64]
    storage_bytes_free: npt.NDArray[np.int64]  # ephemeral-storage
    storage_bytes_total: npt.NDArray[np.int64]
    pods_free: npt.NDArray[np.int64]
    whole_gpus: BoolArray  # nvidia.com/gpu is a whole GPU here (no replicas, no -SHARED, MIG strategy not single)
    gpus_free: npt.NDArray[np.int64]  # tokens of nvidia.com/gpu left
    gpus_total: npt.NDArray[np.int64]
    foreign: BoolArray  # exact node on which somebody holds a device nobody has named: no device asks
    # per profile or resource and node
    slices_free: npt.NDArray[np.int64]  # [P, N] static MIG slices (observed nodes)
    extended_free: npt.NDArray[np.int64]  # [E, N] other extended resources
    # per device, [D, N]
    exists: BoolArray
    model: npt.NDArray[np.int32]  # code; 0 = unknown model
    memory_mib_free: npt.NDArray[np.int32]
    memory_mib_total: npt.NDArray[np.int32]
    milli_free: npt.NDArray[np.int32]  # 0..1000
    mig_mode: BoolArray  # a fact: MIG mode is on
    use: npt.NDArray[np.uint8]  # Use
    occupancy: BitsArray  # taken memory slices; missing slices and padding set
    family: npt.NDArray[np.int16]  # row of the placement tables, -1 = no MIG
    health: npt.NDArray[np.uint8]  # Health
    numa: npt.NDArray[np.int8]  # -1 unknown
    link_group: npt.NDArray[np.int16]  # devices of one group share NVLink; -1 unknown
    utilisation: FloatArray  # 0..1, live
    trust: FloatArray  # 0..1, how far the agent's last report is to be believed

    def __post_init__(self) -> None:
        """Check shapes and dtypes once, and close the arrays for writing.

        Raises:
            ValueError: an array has another shape or dtype than this class says; the sentence names it.
        """
        n, d = self.schedulable.shape[0], self.exists.shape[0]
        for field in fields(self):
            array: npt.NDArray[np.generic] = getattr(self, field.name)
            wanted: tuple[int, ...] = (n,)
            if field.name in DEVICE_COLUMNS:
                wanted = (d, n)
            elif field.name in STACKED_COLUMNS:
                wanted = (array.shape[0], n)
            if array.shape != wanted:
                raise ValueError(f"column {field.name}: shape {array.shape}, expected {wanted}")
            if array.dtype != COLUMN_DTYPES[field.name]:
                raise ValueError(f"column {field.name}: {array.dtype}, expected {COLUMN_DTYPES[field.name]}")
            if array.flags.writeable:
                closed = array.view()
                closed.flags.writeable = False
                object.__setattr__(self, field.name, closed)

    @property
    def nodes(self) -> int:
        """N, holes included."""
        return int(self.schedulable.shape[0])

    @property
    def slots(self) -> int:
        """D."""
        return int(self.exists.shape[0])

    def copy(self) -> Snapshot:
        """Return a private copy that later changes of the live columns do not reach."""
        return replace(self, **{f.name: getattr(self, f.name).copy() for f in fields(self)})

    def take(self, rows: npt.NDArray[np.intp] | slice) -> Snapshot:
        """Return the columns of these nodes alone, in this order; of a slice without copying."""
        taken = object.__new__(Snapshot)  # nothing to check again: rows of checked columns
        for name in COLUMN_DTYPES:
            column = getattr(self, name)[..., rows]
            if column.flags.writeable:
                column.flags.writeable = False
            object.__setattr__(taken, name, column)
        return taken


DEVICE_COLUMNS = frozenset(
    "exists model memory_mib_free memory_mib_total milli_free mig_mode use occupancy family health numa"
    " link_group utilisation trust".split()
)
STACKED_COLUMNS = frozenset({"slices_free", "extended_free"})
COLUMN_DTYPES: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(kind)
    for kind, names in {
        "bool": "schedulable whole_gpus foreign exists mig_mode",
        "uint8": "mode use health",
        "int8": "numa",
        "int16": "family link_group",
        "uint16": "occupancy",
        "int32": "rank zone rack model memory_mib_free memory_mib_total milli_free",
        "int64": "generation cpu_milli_free cpu_milli_total memory_bytes_free memory_bytes_total storage_bytes_free"
        " storage_bytes_total pods_free gpus_free gpus_total slices_free extended_free",
        "float32": "utilisation trust",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request in numbers.

    `models` is indexed by model code and says which are allowed (code 0, the unknown model, is allowed only by an
    ask without a wish). `allowed` is what nodeSelector, affinity, taints and lessons from kube-scheduler leave.
    """

    kind: Kind
    count: int  # devices (or slices) of the whole pod; 0 for Kind.NONE
    cpu_milli: int
    memory_bytes: int
    storage_bytes: int
    extended: npt.NDArray[np.int64]  # [E]
    models: BoolArray  # [M]
    allowed: BoolArray  # [N]
    init_only: bool = False  # only an ordinary init container asks for devices
    device_milli: int = 1000  # per device, 1..1000
    device_mib: int = 0  # per device, 0 = all of it
    profile: int = -1  # row of slices_free and of the placement tables; -1 = no MIG
    linked: bool = False  # wants devices of one link group
    priority: int = 0
    queue: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The classes of requests seen lately, with decayed weights that sum to 1 (or to 0 when nothing was seen)."""

    kind: npt.NDArray[np.uint8]  # [C] Kind
    count: npt.NDArray[np.int32]  # [C]
    cpu_milli: npt.NDArray[np.int64]  # [C]
    device_milli: npt.NDArray[np.int32]  # [C]
    device_mib: npt.NDArray[np.int32]  # [C]
    profile: npt.NDArray[np.int32]  # [C]
    models: BoolArray  # [C, M]
    weight: FloatArray  # [C]


def empty_mix(models: int) -> Mix:
    """Return the mix of a cluster that has seen no request; `models` is M."""
    none32 = np.zeros(0, np.int32)
    return Mix(
        kind=np.zeros(0, np.uint8),
        count=none32,
        cpu_milli=np.zeros(0, np.int64),
        device_milli=none32,
        device_mib=none32,
        profile=none32,
        models=np.zeros((0, models), np.bool_),
        weight=np.zeros(0, np.float32),
    )
