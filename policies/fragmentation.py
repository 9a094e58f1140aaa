"""How much GPU a placement leaves that the requests seen lately could not use.

The fragment of a node, after Weng et al., "Beware of Fragmentation" (USENIX ATC 2023): over the classes of requests,
weighted by how often they come, the free GPU milli that a class cannot use there: all of it where the class does not
fit at all, else the devices with less free than it needs. Devices in MIG mode are judged by their own tables.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import sharing
from .columns import I32, Ask, BoolArray, FloatArray, Health, Kind, Mix, Snapshot, Use
from .fit import free_devices

WHOLE_MILLI = 1000
CLASSES_MAX = 16
NODES_AT_ONCE = 256  # [C, D, n] of so many stays in the processor's cache


def least_fragment(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer nodes where this ask adds least to the expected fragment.

    Returns:
        ``[N]`` 0..1; 0.5 = the fragment stays as it is, above = it shrinks; measured against all GPU of the largest
        node. Meaningful where the ask fits; 0.5 everywhere while nothing was seen or for MIG asks.
    """
    heavy = np.argsort(-mix.weight, kind="stable")[:CLASSES_MAX]
    heavy = heavy[(mix.kind[heavy] == Kind.WHOLE) | (mix.kind[heavy] == Kind.SHARE)]
    if not heavy.size or ask.kind == Kind.MIG:
        return np.full(snapshot.nodes, 0.5, np.float32)
    shared = (snapshot.use == Use.FREE) | (snapshot.use == Use.SHARED)
    open_to_all = snapshot.exists & ~snapshot.mig_mode & (snapshot.health == Health.HEALTHY) & shared
    before = np.where(open_to_all, np.maximum(snapshot.milli_free, 0), 0).astype(np.int32)
    after = before - _taken(snapshot, ask, before)
    grown = np.zeros(snapshot.nodes, np.float64)
    for start in range(0, snapshot.nodes, NODES_AT_ONCE):
        some = slice(start, start + NODES_AT_ONCE)
        free = before[:, some], after[:, some]
        grown[some] = _grown(snapshot, mix, heavy, free, cpu_milli=ask.cpu_milli, some=some)
    return np.asarray(np.clip(0.5 - grown / (2 * WHOLE_MILLI * max(snapshot.slots, 1)), 0.0, 1.0), np.float32)


def _taken(snapshot: Snapshot, ask: Ask, free: I32) -> I32:
    """Return `[D, N]` milli the ask would take: its first free devices, or shares of the fullest ones."""
    if ask.kind == Kind.NONE:
        return np.zeros_like(free)
    if ask.kind == Kind.WHOLE:
        whole = free_devices(snapshot, ask)
        return np.where(whole & (whole.cumsum(axis=0) <= ask.count), free, 0).astype(np.int32)
    fits = sharing.rooms(snapshot, ask) > 0
    order = np.argsort(np.where(fits, free, np.iinfo(np.int32).max), axis=0, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(free.shape[0])[:, None], axis=0)
    return np.where(fits & (place < ask.count), np.minimum(sharing.sizes(snapshot, ask)[1], free), 0).astype(np.int32)


def _grown(
    snapshot: Snapshot, mix: Mix, heavy: npt.NDArray[np.intp], free: tuple[I32, I32], *, cpu_milli: int, some: slice
) -> npt.NDArray[np.float64]:
    """Return by how much the expected milli of no use grow on some nodes, all classes at once.

    Args:
        snapshot: the cluster.
        mix: what is asked lately.
        heavy: rows of the classes that count.
        free: ``[D, n]`` free milli per device, before and after.
        cpu_milli: what the ask takes of every node.
        some: which nodes.
    """
    memory = snapshot.memory_mib_total[:, some].astype(np.int64)
    mib, milli = mix.device_mib[heavy, None, None], mix.device_milli[heavy, None, None]  # [C, 1, 1]
    need = np.maximum(np.where(milli > 0, milli, WHOLE_MILLI * mib // np.maximum(memory, 1)), 1)
    takes = memory >= mib
    takes &= mix.models[heavy].take(snapshot.model[:, some], axis=1)
    weights = (mix.weight[heavy] / mix.weight[heavy].sum()).astype(np.float64)[:, None]
    cpu = snapshot.cpu_milli_free[some]
    fragments = [
        np.add.reduce(weights * _useless(milli_free, takes & (milli_free >= need), cpu_free, mix, heavy), axis=0)
        for milli_free, cpu_free in zip(free, (cpu, cpu - cpu_milli), strict=True)
    ]
    return np.asarray(fragments[1] - fragments[0], np.float64)


def _useless(
    free: I32, enough: BoolArray, cpu_free: npt.NDArray[np.int64], mix: Mix, heavy: npt.NDArray[np.intp]
) -> npt.NDArray[np.int64]:
    """Return `[C, n]` the free milli that each class cannot use; `enough` `[C, D, n]`: devices with enough for it."""
    fits = np.add.reduce(enough, axis=1, dtype=np.uint8) >= mix.count[heavy, None]
    fits &= cpu_free >= mix.cpu_milli[heavy, None]
    useful = np.add.reduce(enough * free, axis=1, dtype=np.int64)
    useful *= fits
    return np.asarray(np.add.reduce(free, axis=0, dtype=np.int64) - useful, np.int64)
