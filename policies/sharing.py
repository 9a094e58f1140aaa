"""Shares: parts of a GPU's memory and time, next to other shares and never next to a whole-GPU or MIG use.

A share has memory (MiB) and time (thousandths of the device). Where an ask names only one of them, the other is the
same part of the device, rounded down and at least 1. Containers that ask N shares get them on N different devices;
two containers may meet on one. Invariant: a device of unknown memory takes only shares that ask for time alone.
"""
# ruff: noqa: ARG001 - every policy has one signature

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .columns import I64, Ask, BoolArray, FloatArray, Kind, Mix, Snapshot, Use
from .fit import usable

DEVICE_MILLI = 1000
FREE, SHARED = int(Use.FREE), int(Use.SHARED)


def share_size(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose devices would do if they were empty, in memory and in time; `[N]`."""
    if ask.kind != Kind.SHARE:
        return np.ones(snapshot.nodes, np.bool_)
    mib, milli = sizes(snapshot, ask)
    room = np.minimum(_times(snapshot, snapshot.memory_mib_total, mib), DEVICE_MILLI // milli)
    return holds(room * _never_cut(snapshot, ask), ask)


def memory_free(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes with enough memory free on healthy devices that are empty or shared; `[N]`."""
    if ask.kind != Kind.SHARE:
        return np.ones(snapshot.nodes, np.bool_)
    room = _times(snapshot, snapshot.memory_mib_free, sizes(snapshot, ask)[0])
    return holds(room * sharers(snapshot, ask), ask)


def share_fit(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose devices have memory and time free for every share, those of one container apart; `[N]`."""
    if ask.kind != Kind.SHARE:
        return np.ones(snapshot.nodes, np.bool_)
    return holds(rooms(snapshot, ask), ask)


def fill_tightest(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the node whose tightest device that fits keeps least, memory and time alike.

    Returns:
        ``[N]`` 1 = filled exactly, 0 = no device fits; asks for anything else: 1.
    """
    if ask.kind != Kind.SHARE:
        return np.ones(snapshot.nodes, np.float32)
    return np.asarray(np.maximum.reduce(tightness(snapshot, ask), axis=0, initial=0.0), np.float32)


def tightness(snapshot: Snapshot, ask: Ask) -> FloatArray:
    """Return `[D, N]` 0..1: how full one more share makes each device; 0 where none fits."""
    mib, milli = sizes(snapshot, ask)
    total = snapshot.memory_mib_total
    memory = np.where(total > 0, (snapshot.memory_mib_free - mib) / np.maximum(total, 1), 0)
    left = (memory + (snapshot.milli_free - milli) / DEVICE_MILLI) / 2
    return np.where(rooms(snapshot, ask) > 0, np.clip(1 - left, 0, 1), 0).astype(np.float32)


def rooms(snapshot: Snapshot, ask: Ask) -> I64:
    """Return `[D, N]`: how many shares of this size each device takes now; 0 where nothing may be shared."""
    mib, milli = sizes(snapshot, ask)
    room = np.minimum(_times(snapshot, snapshot.memory_mib_free, mib), snapshot.milli_free // milli)
    return np.asarray(room * sharers(snapshot, ask), np.int64)


def sizes(snapshot: Snapshot, ask: Ask) -> tuple[I64, I64]:
    """Return what one share is on each device, in MiB and thousandths; `[D, N]`, each at least 1."""
    total = snapshot.memory_mib_total.astype(np.int64)
    mib = np.full_like(total, ask.device_mib) if ask.device_mib else ask.device_milli * total // DEVICE_MILLI
    milli = np.full_like(total, ask.device_milli)
    if not ask.device_milli:
        milli = DEVICE_MILLI * mib // np.maximum(total, 1)
    return np.maximum(mib, 1), np.maximum(milli, 1)


def sharers(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: healthy devices of an allowed model that are out of MIG mode and empty or shared."""
    use = snapshot.use
    free = (use == FREE) | (use == SHARED)
    return np.asarray(_never_cut(snapshot, ask) & (snapshot.health == 0) & free, np.bool_)


def holds(room: npt.NDArray[np.int64], ask: Ask) -> BoolArray:
    """Say where containers that ask `ask.parts` shares, each on different devices, can all be served.

    They can exactly when, for every k, the k largest ask no more than the devices take with at most k each.

    Args:
        room: ``[D, N]`` shares that each device takes; less than nothing is nothing.
        ask: the ask.

    Returns:
        ``[N]``.
    """
    parts = sorted(ask.parts or (ask.count,), reverse=True)
    fits = np.ones(room.shape[1], np.bool_)
    for most in range(1, len(parts) + 1):
        fits &= np.add.reduce(np.clip(room, 0, most), axis=0) >= sum(parts[:most])
    return fits


def _times(snapshot: Snapshot, memory_mib: npt.NDArray[np.int32], mib: I64) -> I64:
    """Return `[D, N]`: how often a share goes into this memory; more than ever asked where the memory is unknown."""
    return np.where(snapshot.memory_mib_total > 0, memory_mib // mib, DEVICE_MILLI)


def _never_cut(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: devices of an allowed model out of MIG mode, and of known memory where memory is asked."""
    devices = usable(snapshot, ask, snapshot.mig_mode.view(np.uint8))
    return devices & (snapshot.memory_mib_total > 0) if ask.device_mib else devices
