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
    cpu = snapshot.cpu_milli_free
    grown = _fragment(snapshot, mix, heavy, after, cpu - ask.cpu_milli) - _fragment(snapshot, mix, heavy, before, cpu)
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


def _fragment(
    snapshot: Snapshot, mix: Mix, heavy: npt.NDArray[np.intp], free: I32, cpu: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return `[N]` the expected milli of no use, given free milli per device and free cpu per node."""
    total = np.add.reduce(free, axis=0, dtype=np.int64)
    fragment = np.zeros(snapshot.nodes, np.float64)
    weights = mix.weight[heavy] / mix.weight[heavy].sum()
    memory = snapshot.memory_mib_total.astype(np.int64)
    for weight, row in zip(weights.tolist(), heavy.tolist(), strict=True):
        need = int(mix.device_milli[row]) or WHOLE_MILLI * int(mix.device_mib[row]) // np.maximum(memory, 1)
        enough: BoolArray = (free >= np.maximum(need, 1)) & (memory >= mix.device_mib[row])
        if not mix.models[row].all():
            enough &= mix.models[row].take(snapshot.model)
        useful = np.add.reduce(np.where(enough, free, 0), axis=0, dtype=np.int64)
        fits = (np.add.reduce(enough, axis=0, dtype=np.uint8) >= mix.count[row]) & (cpu >= mix.cpu_milli[row])
        fragment += weight * (total - np.where(fits, useful, 0))
    return fragment
