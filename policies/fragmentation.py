"""How much GPU a placement leaves that the requests seen lately could not use.

The fragment of a node, after Weng et al., "Beware of Fragmentation" (USENIX ATC 2023): over the classes of requests,
weighted by how often they come, the free GPU milli that a class cannot use there: all of it where the class does not
fit at all, else the devices with less free than it needs. Devices in MIG mode are judged by their own tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from . import sharing
from .columns import I32, I64, Ask, BoolArray, FloatArray, Kind, Mix, Mode, Snapshot
from .fit import free_devices

WHOLE_MILLI = 1000
CLASSES_MAX = 16
NODES_AT_ONCE = 256  # [C, 2, D, n] of so many stays in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """The heaviest classes of a mix that take whole GPUs or shares; C of them, ready to be compared with devices."""

    count: I32  # [C, 1, 1]
    cpu_milli: I64  # [C, 1, 1]
    milli: I32  # [C, 1, 1]; 0 = what mib is of the device
    mib: I64  # [C, 1, 1]
    models: BoolArray  # [C, M]
    weight: npt.NDArray[np.float64]  # [C, 1, 1], sums to 1


def least_fragment(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer nodes where this ask adds least to the expected fragment.

    Returns:
        ``[N]`` 0..1; 0.5 = the fragment stays as it is, above = it shrinks; measured against all GPU of the largest
        node. Meaningful where the ask fits; 0.5 everywhere while nothing was seen or for MIG asks.
    """
    classes = heaviest(mix)
    if not len(classes.weight) or ask.kind == Kind.MIG or not snapshot.slots:
        return np.full(snapshot.nodes, 0.5, np.float32)
    blocked = snapshot.health | snapshot.mig_mode.view(np.uint8)
    before = np.maximum(snapshot.milli_free, 0) * (snapshot.exists.view(np.uint8) > blocked)
    free = np.stack((before, before - _taken(snapshot, ask, before)))
    cpu = np.stack((snapshot.cpu_milli_free, snapshot.cpu_milli_free - ask.cpu_milli))
    grown = np.empty(snapshot.nodes, np.float64)
    for start in range(0, snapshot.nodes, NODES_AT_ONCE):
        some = slice(start, start + NODES_AT_ONCE)
        lost = useless(
            snapshot.model[:, some], snapshot.memory_mib_total[:, some], free[..., some], cpu[:, some], classes
        )
        np.subtract(lost[1], lost[0], out=grown[some])
    return np.asarray(np.clip(0.5 - grown / (2 * WHOLE_MILLI * snapshot.slots), 0.0, 1.0), np.float32)


@lru_cache(maxsize=4)
def heaviest(mix: Mix) -> Classes:
    """Return the classes of a mix that weigh most, MIG and CPU-only ones left out."""
    heavy = np.argsort(-mix.weight, kind="stable")[:CLASSES_MAX]
    heavy = heavy[(mix.kind[heavy] == Kind.WHOLE) | (mix.kind[heavy] == Kind.SHARE)]
    weight = mix.weight[heavy, None, None].astype(np.float64)
    return Classes(
        count=mix.count[heavy, None, None],
        cpu_milli=mix.cpu_milli[heavy, None, None],
        milli=mix.device_milli[heavy, None, None],
        mib=mix.device_mib[heavy, None, None].astype(np.int64),
        models=mix.models[heavy],
        weight=weight / max(weight.sum(), 1e-9),
    )


def useless(model: I32, memory_mib: I32, free: I32, cpu_free: I64, classes: Classes) -> npt.NDArray[np.float64]:
    """Return the expected free milli of no use, of several states of the same nodes at once.

    Args:
        model: ``[D, n]``.
        memory_mib: ``[D, n]`` of the devices, free or not.
        free: ``[S, D, n]`` milli that are free in each state; 0 where a device is not open to whole or shared use.
        cpu_free: ``[S, n]``.
        classes: what is asked lately.

    Returns:
        ``[S, n]``.
    """
    need: npt.NDArray[np.integer] = classes.milli
    takes = classes.models.take(model, axis=1)
    if classes.mib.any():
        need = np.maximum(np.where(need > 0, need, WHOLE_MILLI * classes.mib // np.maximum(memory_mib, 1)), 1)
        takes &= memory_mib >= classes.mib
    enough = free >= need[:, None]  # [C, S, D, n]
    enough &= takes[:, None]
    fits = np.add.reduce(enough, axis=2, dtype=np.uint8) >= classes.count
    fits &= cpu_free >= classes.cpu_milli
    useful = np.add.reduce(enough * free, axis=2, dtype=np.int64) * fits
    return np.asarray(np.add.reduce(free, axis=1) - np.add.reduce(classes.weight * useful, axis=0), np.float64)


def _taken(snapshot: Snapshot, ask: Ask, free: I32) -> I32 | int:
    """Return `[D, N]` milli the ask would take: its first free devices, or shares of the fullest ones."""
    if ask.kind == Kind.NONE:
        return 0
    if ask.kind == Kind.WHOLE:
        whole = free_devices(snapshot, ask)
        return free * (whole & (whole.cumsum(axis=0) <= ask.count))
    fits = sharing.rooms(snapshot, ask) > 0
    order = np.argsort(np.where(fits, free, np.iinfo(np.int32).max), axis=0, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(free.shape[0])[:, None], axis=0)
    return np.where(fits & (place < ask.count), np.minimum(sharing.sizes(snapshot, ask)[1], free), 0).astype(np.int32)


def expected_fragment(snapshot: Snapshot, mix: Mix) -> tuple[npt.NDArray[np.float64], I64]:
    """Return what of each node's free GPU is of no use for requests like those of late, and all that is free.

    Returns:
        Two ``[N]`` in milli, the first at most the second; zeros in the first while nothing was seen. Free is what is
        open to whole and shared use; on observed nodes as many devices as they have tokens left.
    """
    blocked = snapshot.health | snapshot.mig_mode.view(np.uint8)
    free = np.maximum(snapshot.milli_free, 0) * (snapshot.exists.view(np.uint8) > blocked)
    free *= (snapshot.mode == Mode.EXACT) | ((free > 0).cumsum(axis=0) <= snapshot.gpus_free)
    idle = np.add.reduce(free, axis=0, dtype=np.int64)
    classes = heaviest(mix)
    if not len(classes.weight):
        return np.zeros(snapshot.nodes, np.float64), idle
    lost = useless(snapshot.model, snapshot.memory_mib_total, free[None], snapshot.cpu_milli_free[None], classes)[0]
    return np.asarray(np.clip(lost, 0, idle), np.float64), idle
