"""Which nodes can give several GPUs that are close to each other, where a report has told what is close."""
# ruff: noqa: ARG001 - every policy has one signature

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .columns import Ask, BoolArray, FloatArray, Kind, Mix, Snapshot
from .fit import free_devices


def one_group(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer nodes where all GPUs asked can share NVLink, then those where they can share a NUMA node.

    Returns:
        ``[N]`` 1 = one link group has enough free devices, 0.5 = one NUMA node has, 0 = neither or not known; asks
        for fewer than two whole GPUs: 0 everywhere.
    """
    near = np.zeros(snapshot.nodes, np.float32)
    if ask.kind != Kind.WHOLE or ask.count < 2:  # noqa: PLR2004 - one GPU is close to itself
        return near
    for groups, worth in ((snapshot.numa, 0.5), (snapshot.link_group, 1.0)):
        known = int(groups.max(initial=-1)) + 1
        if known:
            near[_enough(groups, known, free_devices(snapshot, ask), ask.count)] = worth
    return near


def _enough(groups: npt.NDArray[np.signedinteger], known: int, free: BoolArray, count: int) -> BoolArray:
    """Return `[N]`: some group of the node has at least `count` free devices; `groups` is `[D, N]`, -1 = unknown."""
    enough = np.zeros(groups.shape[1], np.bool_)
    for group in range(known):
        enough |= np.add.reduce((groups == group) & free, axis=0, dtype=np.uint8) >= count
    return enough
