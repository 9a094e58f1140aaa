"""Scores: which of the nodes that fit to prefer. Every score is `(Snapshot, Ask, Mix) -> [N]` float32, 0..1, 1 = best.

The pictures: `fill_*` closes gaps (best fit), `keep_scarce` saves rare models, `spread` levels the load.
A node that does not fit is masked out before; what a score says of it is stated, and nobody reads it.
"""
# ruff: noqa: ARG001 - every policy has one signature

from __future__ import annotations

import numpy as np

from .columns import Ask, FloatArray, Kind, Mix, Snapshot


def fill_gpus(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the node that keeps the fewest GPUs free; a CPU-only pod first nodes without any, to spoil no GPU node.

    Returns:
        ``[N]`` 1 / (1 + GPUs left): 1 = filled exactly (or no GPUs, for a CPU-only pod), 0 = too few free.
    """
    left = snapshot.gpus_free.astype(np.float32)
    left -= ask.count
    fits = (left >= 0) | (ask.kind == Kind.NONE)
    np.maximum(left, 0, out=left)
    if ask.kind == Kind.NONE:
        left += 1
        left *= snapshot.gpus_total > 0
    left += 1
    np.divide(fits, left, out=left)
    return left


def fill_host(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the node that keeps the least cpu and memory; 128 cores count as much as 1 TiB.

    Returns:
        ``[N]`` 1 / (1 + what is left, in such parts): 1 = nothing left (or too little free).
    """
    left = (snapshot.cpu_milli_free - ask.cpu_milli) / 128_000
    left += (snapshot.memory_bytes_free - ask.memory_bytes) / (1 << 40)
    np.maximum(left, 0, out=left)
    left += 1
    return np.asarray(np.reciprocal(left, out=left), np.float32)


def keep_scarce(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the model of which the cluster has most GPUs; a node's model is that of its first slot.

    Returns:
        ``[N]`` GPUs of the node's model in parts of the commonest one; 1 everywhere for a pod that has no choice.
    """
    if ask.kind == Kind.NONE or np.count_nonzero(ask.models) <= 1 or not snapshot.slots:
        return np.ones(snapshot.nodes, np.float32)
    model = snapshot.model[0].astype(np.intp)
    stock = np.bincount(model, weights=snapshot.gpus_total, minlength=1)
    return np.asarray((stock / max(stock.max(), 1)).astype(np.float32).take(model), np.float32)


def spread(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the emptier node: by GPUs for a device ask, by cpu and memory for a CPU-only pod.

    Returns:
        ``[N]`` share of the node that stays free; 0 = full, or too little free.
    """
    if ask.kind != Kind.NONE:
        return np.clip((snapshot.gpus_free - ask.count) / np.maximum(snapshot.gpus_total, 1), 0, 1).astype(np.float32)
    cpu = np.clip((snapshot.cpu_milli_free - ask.cpu_milli) / np.maximum(snapshot.cpu_milli_total, 1), 0, 1)
    memory = np.clip((snapshot.memory_bytes_free - ask.memory_bytes) / np.maximum(snapshot.memory_bytes_total, 1), 0, 1)
    return np.asarray((cpu + memory) / 2, np.float32)
