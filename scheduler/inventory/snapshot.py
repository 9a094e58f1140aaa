"""Objects to columns: the only place where the arrays of a Snapshot are made and written.

Rows are stable: a node keeps its row for life, a removed node leaves a hole that the next one fills. The Snapshot
that `view` returns shares memory with these live arrays and is closed for writing; a turn takes a `copy` of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from policies.columns import COLUMN_DTYPES, DEVICE_COLUMNS, STACKED_COLUMNS, Snapshot, Use
from policies.placements import NO_PLACEMENTS, Placements
from scheduler.model.node import Device, Node

BLOCKED = 0xFFFF
MEMORY_MIN = -(1 << 30)  # what strangers claim beside each other may exceed any device, and must not wrap around
TAKEN_COLUMNS = ("use", "memory_mib_free", "milli_free", "occupancy", "mig_row")
UNKNOWN = {"zone": -1, "rack": -1, "family": -1, "numa": -1, "link_group": -1}


@dataclass(frozen=True, slots=True)
class Taken:
    """What is taken of one device.

    Attributes:
        use: what for; a device that is used for two things at once counts as taken whole.
        occupancy: memory slices of its MIG instances, as bits.
        engines: media engines of its MIG instances, in the order of the geometry; empty = none.
        mib, milli: of its shares together.
    """

    use: Use = Use.FREE
    occupancy: int = 0
    engines: tuple[int, ...] = ()
    mib: int = 0
    milli: int = 0


NOTHING = Taken()


class Names:
    """Codes for names: 0 is the unknown name, the others count up and never change."""

    def __init__(self) -> None:
        """Start with the unknown name alone."""
        self.names: list[str] = [""]
        self._codes: dict[str, int] = {"": 0}

    def code(self, name: str) -> int:
        """Return the code of a name, giving it one when it is new."""
        known = self._codes.get(name)
        if known is None:
            known = self._codes[name] = len(self.names)
            self.names.append(name)
        return known

    def find(self, name: str) -> int:
        """Return the code of a name, 0 when no node ever had it."""
        return self._codes.get(name, 0)

    def __len__(self) -> int:
        return len(self.names)


def model_name(model: str, product: str) -> str:
    """Return the name under which a model on a product has its code: gpu-model may tell products of one model apart."""
    return f"{model}|{product}" if model else ""


class Columns:
    """The live arrays, their growth and the filling of one row from one Node."""

    def __init__(self, placements: Placements = NO_PLACEMENTS) -> None:
        """Start without nodes; `placements` knows the models that can be cut into MIG instances."""
        self.placements = placements
        self.rows: dict[str, int] = {}
        self.names: list[str] = []  # per row; empty for a hole
        self.models, self.profiles, self.resources, self.places = Names(), Names(), Names(), Names()
        self._holes: list[int] = []
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}
        self._capacity, self._slots = 0, 1
        self._view: Snapshot | None = None
        self._ranked = True
        self.layout = 0  # grows when what Node objects say has changed
        self._grow(64, 8)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in DEVICE_COLUMNS:
            return self._slots, self._capacity
        if name in {"slices_free", "slices_total"}:
            return len(self.profiles), self._capacity
        if name in {"extended_free", "extended_total"}:
            return len(self.resources), self._capacity
        return (self._capacity,)

    def _grow(self, capacity: int, slots: int) -> None:
        """Make every array at least this large, keeping what is in it."""
        self._capacity, self._slots = max(capacity, self._capacity), max(slots, self._slots)
        for name, dtype in COLUMN_DTYPES.items():
            old = self._arrays.get(name)
            shape = self._shape(name)
            if old is not None and old.shape == shape:
                continue
            new = np.full(shape, UNKNOWN.get(name, 0), dtype)
            if old is not None:
                new[tuple(slice(0, extent) for extent in old.shape)] = old
            self._arrays[name] = new
        self._view = None

    def column(self, name: str) -> npt.NDArray[np.generic]:
        """Return a live array for writing; only the registry may ask."""
        return self._arrays[name]

    def view(self) -> Snapshot:
        """Return the columns as they are now; later changes show through it."""
        if not self._ranked:
            order = sorted(range(len(self.names)), key=lambda row: self.names[row])
            self._arrays["rank"][np.asarray(order, np.intp)] = np.arange(len(order), dtype=np.int32)
            # Fresh copies lie side by side: looking up hundreds of names waits for memory, not for the processor.
            self.rows = {name.encode().decode(): row + 0 for name, row in self.rows.items()}
            self._ranked = True
        if self._view is None:
            used = len(self.names)
            self._view = Snapshot(**{name: array[..., :used] for name, array in self._arrays.items()})  # type: ignore[arg-type]
        return self._view

    def find(self, names: Sequence[str]) -> npt.NDArray[np.intp]:
        """Return the rows of these nodes, in their order; names of no node are left out."""
        rows = self.rows
        try:
            return np.fromiter(map(rows.__getitem__, names), np.intp, len(names))
        except KeyError:  # seldom: kube-scheduler knows a node that the watch has not told of yet
            found = np.fromiter(map(rows.get, names, repeat(-1)), np.intp, len(names))
            return found[found >= 0]

    def row(self, node: Node) -> int:
        """Return the node's row, making one when it is new, with room for all it brings."""
        for profile, _ in node.slices:
            self.profiles.code(profile)
        for resource, _ in node.amounts.extended:
            self.resources.code(resource)
        row = self.rows.get(node.name)
        if row is None:
            row = self._holes.pop() if self._holes else len(self.names)
            if row == len(self.names):
                self.names.append(node.name)
            self.names[row] = node.name
            self.rows[node.name] = row
            self._ranked, self._view = False, None
        wanted = max(self._capacity, 1 << row.bit_length())
        self._grow(wanted, len(node.devices))
        return row

    def clear(self, name: str) -> int:
        """Turn a node's row into a hole and return it."""
        row = self.rows.pop(name)
        for column, array in self._arrays.items():
            array[..., row] = UNKNOWN.get(column, 0)
        self.names[row] = ""
        self._holes.append(row)
        self._holes.sort(reverse=True)
        self._ranked = False
        self.layout += 1
        return row

    def fill(self, row: int, node: Node) -> None:
        """Write what the Node object says into its row, with nothing taken yet."""
        put = self._arrays
        self.layout += 1
        put["schedulable"][row] = True
        put["mode"][row] = node.mode
        put["zone"][row] = self.places.code(node.zone) if node.zone else -1
        put["rack"][row] = self.places.code(node.rack) if node.rack else -1
        for column, amount in (
            ("cpu_milli", node.amounts.cpu_milli),
            ("memory_bytes", node.amounts.memory_bytes),
            ("storage_bytes", node.amounts.storage_bytes),
            ("gpus", node.gpus),
        ):
            put[f"{column}_free"][row] = put[f"{column}_total"][row] = amount
        put["pods_free"][row] = node.pods
        put["shares_free"][row] = node.shares
        put["whole_gpus"][row] = node.whole_gpus
        put["foreign"][row] = False
        for stacked in STACKED_COLUMNS:
            put[stacked][:, row] = 0
        for profile, count in node.slices:
            code = self.profiles.code(profile)
            put["slices_free"][code, row] = put["slices_total"][code, row] = count
        for resource, count in node.amounts.extended:
            code = self.resources.code(resource)
            put["extended_free"][code, row] = put["extended_total"][code, row] = count
        self._fill_devices(row, node)

    def _fill_devices(self, row: int, node: Node) -> None:
        put = self._arrays
        for column in DEVICE_COLUMNS:
            put[column][:, row] = UNKNOWN.get(column, 0)
        put["occupancy"][:, row] = BLOCKED
        put["trust"][:, row] = 1.0
        for slot, device in enumerate(node.devices):
            put["exists"][slot, row] = True
            put["model"][slot, row] = self.models.code(model_name(device.model, node.product))
            put["memory_mib_total"][slot, row] = device.memory_mib
            put["mig_mode"][slot, row] = device.mig_mode
            put["family"][slot, row] = self.placements.family(device.model)
            put["health"][slot, row] = device.health
            put["numa"][slot, row] = device.numa
            put["link_group"][slot, row] = device.link_group
        self.take_devices(row, node, {}, range(len(node.devices)))

    def take_devices(self, row: int, node: Node, taken: Mapping[int, Taken], slots: Iterable[int]) -> None:
        """Write what is in use of these devices of a node, and how much; those that are not named in `taken` are free.

        Slots beyond the node's devices are left out.
        """
        columns = [self._arrays[name] for name in TAKEN_COLUMNS]
        for slot in slots:
            if slot < len(node.devices):
                told = self._told(node.devices[slot], taken.get(slot, NOTHING))
                for column, value in zip(columns, told, strict=True):
                    column[slot, row] = value

    def _told(self, device: Device, held: Taken) -> tuple[int, ...]:
        """Return what TAKEN_COLUMNS say of one device."""
        if held.use is Use.WHOLE:
            return int(Use.WHOLE), 0, 0, BLOCKED, 0
        memory_mib = max(device.memory_mib - held.mib, MEMORY_MIN)
        slices = 0 if held.use is Use.SHARED else self.placements.slices(device.model)
        occupancy = BLOCKED & ~((1 << slices) - 1 & ~held.occupancy)
        row = 0
        if device.mig_mode and held.use is not Use.SHARED:
            used = held.engines or (0,) * len(self.placements.engines(device.model))
            row = self.placements.row(device.model, held.occupancy, used)
        return int(held.use), memory_mib, 0 if held.use is Use.MIG else 1000 - held.milli, occupancy, row
