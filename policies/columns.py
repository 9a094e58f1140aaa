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

from .placements import NO_OFFER, Offer

BoolArray: TypeAlias = npt.NDArray[np.bool_]
I64: TypeAlias = npt.NDArray[np.int64]
I32: TypeAlias = npt.NDArray[np.int32]
I16: TypeAlias = npt.NDArray[np.int16]
I8: TypeAlias = npt.NDArray[np.int8]
U8: TypeAlias = npt.NDArray[np.uint8]
BitsArray: TypeAlias = npt.NDArray[np.uint16]
FloatArray: TypeAlias = npt.NDArray[np.float32]


class Mode(IntEnum):
    """Who chooses the device on a node: NVIDIA's plugin (OBSERVED) or Tessera (EXACT)."""

    OBSERVED, EXACT = range(2)


class Use(IntEnum):
    """What a device is used for now; a device is never two of these at once."""

    FREE, WHOLE, SHARED, MIG = range(4)


class Health(IntEnum):
    """What the agent says of a device; only HEALTHY devices are given away."""

    HEALTHY, SUSPECT, DRAINING, RESETTING, PROBATION, BAD = range(6)


class Kind(IntEnum):
    """What a request asks of a device."""

    NONE, WHOLE, MIG, SHARE = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The cluster at one instant, in columns. Unused rows and slots have `schedulable` / `exists` False."""

    # per node, [N]
    schedulable: BoolArray  # a live node in service (not a hole in the table)
    mode: U8  # Mode
    rank: I32  # place in the order of node names: the last tie-break
    zone: I32  # code, -1 unknown
    rack: I32  # code, -1 unknown
    generation: I64  # grows with every change of the node
    cpu_milli_free: I64  # may be negative on an overcommitted node
    cpu_milli_total: I64
    memory_bytes_free: I64
    memory_bytes_total: I64
    storage_bytes_free: I64  # ephemeral-storage
    storage_bytes_total: I64
    pods_free: I64
    whole_gpus: BoolArray  # nvidia.com/gpu is a whole GPU here (no replicas, no -SHARED, MIG strategy not single)
    gpus_free: I64  # tokens of nvidia.com/gpu left
    gpus_total: I64
    shares_free: I64  # tokens of tessera.dev/share left
    foreign: BoolArray  # exact node on which somebody holds a device nobody has named: no device asks
    # per profile or resource and node
    slices_free: I64  # [P, N] tokens of nvidia.com/mig-* left: the slices themselves on observed nodes
    slices_total: I64
    extended_free: I64  # [E, N] other extended resources
    extended_total: I64  # [E, N]
    # per device, [D, N]
    exists: BoolArray
    model: I32  # code; 0 = unknown model
    memory_mib_free: I32
    memory_mib_total: I32
    milli_free: I32  # 0..1000; 0 on a device that is taken whole or cut into MIG instances
    mig_mode: BoolArray  # a fact: MIG mode is on
    use: U8  # Use
    occupancy: BitsArray  # taken memory slices; missing slices and padding set
    family: I16  # code of the MIG geometry, -1 = none
    mig_row: BitsArray  # row of an Offer: model, occupancy and media engines in one; 0 = takes no instance
    health: U8  # Health
    numa: I8  # -1 unknown
    link_group: I16  # devices of one group share NVLink; -1 unknown
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
            lead = array.shape[:1] if field.name in STACKED_COLUMNS else (d,) * (field.name in DEVICE_COLUMNS)
            if array.shape != (wanted := (*lead, n)):
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
            column.flags.writeable = False
            object.__setattr__(taken, name, column)
        return taken


_CODES = "BoolArray=? BitsArray=u2 FloatArray=f4 I64=i8 I32=i4 I16=i2 I8=i1 U8=u1"
_DTYPES = dict(code.split("=") for code in _CODES.split())
COLUMN_DTYPES: dict[str, np.dtype[np.generic]] = {f.name: np.dtype(_DTYPES[str(f.type)]) for f in fields(Snapshot)}
STACKED_COLUMNS = frozenset({"slices_free", "slices_total", "extended_free", "extended_total"})
DEVICE_COLUMNS = frozenset(list(COLUMN_DTYPES)[list(COLUMN_DTYPES).index("exists") :])  # [D, N]: from `exists` on


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
    extended: I64  # [E]
    models: BoolArray  # [M]
    allowed: BoolArray  # [N]
    init_only: bool = False  # only an ordinary init container asks for devices
    device_milli: int = 1000  # per share, 1..1000; 0 = what device_mib is of the device
    device_mib: int = 0  # per share; 0 = what device_milli is of the device
    parts: tuple[int, ...] = ()  # shares per container, each on different devices; empty = one of `count`
    profile: int = -1  # row of slices_free; -1 = no MIG
    offer: Offer = NO_OFFER  # where its MIG instances fit, by mig_row
    priority: int = 0
    queue: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """The classes of requests seen lately, with decayed weights that sum to 1 (or to 0 when nothing was seen)."""

    kind: U8  # [C] Kind
    count: I32  # [C]
    cpu_milli: I64  # [C]
    device_milli: I32  # [C]
    device_mib: I32  # [C]
    profile: I32  # [C]
    models: BoolArray  # [C, M]
    weight: FloatArray  # [C]
    price: FloatArray  # [M] GPUs asked by requests that are bound to some models, in parts of what there is of each


def empty_mix(models: int) -> Mix:
    """Return the mix of a cluster that has seen no request; `models` is M."""
    none = {f.name: np.zeros(0, _DTYPES[str(f.type)]) for f in fields(Mix)}
    return Mix(**{**none, "models": np.zeros((0, models), np.bool_), "price": np.zeros(models, np.float32)})
