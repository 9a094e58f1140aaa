"""Shares: parts of a GPU's memory and time, next to other shares and never next to a whole-GPU or MIG use.

A share has memory (MiB) and time (thousandths of the device). Where an ask names only one of them, the other is the
same part of the device, rounded down and at least 1. Containers that ask N shares get them on N different devices;
two containers may meet on one. Invariant: a device of unknown memory takes only shares that ask for time alone.
"""
# ruff: noqa: ARG001 - every policy has one signature

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .columns import I32, I64, Ask, BoolArray, FloatArray, Kind, Mix, Snapshot, Use
from .fit import usable

Counts: TypeAlias = npt.NDArray[np.uint16]
DEVICE_MILLI = 1000
CONTAINERS_MAX = 64  # of one pod on one device; an allocation of more shares could hardly be written down
FREE, SHARED = int(Use.FREE), int(Use.SHARED)


def share_size(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose devices would do if they were empty, in memory and in time; `[N]`."""
    if ask.kind != Kind.SHARE:
        return np.ones(snapshot.nodes, np.bool_)
    return holds(_rooms(snapshot, ask, snapshot.memory_mib_total, DEVICE_MILLI) * _uncut(snapshot, ask), ask)


def memory_free(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes with enough memory free on healthy devices that are empty or shared; `[N]`."""
    if ask.kind != Kind.SHARE:
        return np.ones(snapshot.nodes, np.bool_)
    return holds(_rooms(snapshot, ask, snapshot.memory_mib_free, None) * sharers(snapshot, ask), ask)


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
    left = np.subtract(snapshot.memory_mib_free, mib, dtype=np.float32)
    left /= np.maximum(snapshot.memory_mib_total, 1)
    left *= snapshot.memory_mib_total > 0
    left += np.subtract(snapshot.milli_free, milli, dtype=np.float32) / np.float32(DEVICE_MILLI)
    full = 1 - left / 2
    full *= rooms(snapshot, ask) > 0
    return np.asarray(np.clip(full, 0, 1, out=full), np.float32)


def rooms(snapshot: Snapshot, ask: Ask) -> Counts:
    """Return `[D, N]`: how many containers may have a share of this size on each device now; 0 = nothing is shared."""
    return np.asarray(
        _rooms(snapshot, ask, snapshot.memory_mib_free, snapshot.milli_free) * sharers(snapshot, ask), np.uint16
    )


def sizes(snapshot: Snapshot, ask: Ask) -> tuple[I64 | int, I64 | int]:
    """Return what one share is on each device, in MiB and thousandths: `[D, N]`, or one number where it is the same."""
    total = snapshot.memory_mib_total
    mib: I64 | int = ask.device_mib
    milli: I64 | int = ask.device_milli
    if not ask.device_mib:
        mib = np.maximum(np.multiply(total, ask.device_milli, dtype=np.int64) // DEVICE_MILLI, 1)
    if not ask.device_milli:
        milli = np.maximum(DEVICE_MILLI * ask.device_mib // np.maximum(total, 1).astype(np.int64), 1)
    return mib, milli


def sharers(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: healthy devices of an allowed model that are out of MIG mode and empty or shared."""
    open_to = (snapshot.use == FREE) | (snapshot.use == SHARED)
    open_to &= _uncut(snapshot, ask)
    open_to &= snapshot.health == 0
    return np.asarray(open_to, np.bool_)


def holds(room: Counts, ask: Ask) -> BoolArray:
    """Say where containers that ask `ask.parts` shares, each on different devices, can all be served.

    They can exactly when, for every k, the k largest ask no more than the devices take with at most k each.

    Args:
        room: ``[D, N]`` shares that each device takes.
        ask: the ask.

    Returns:
        ``[N]``.
    """
    parts = _parts(ask)
    fits = np.ones(room.shape[1], np.bool_)
    for most in range(1, min(len(parts), CONTAINERS_MAX) + 1):
        fits &= np.add.reduce(np.minimum(room, most), axis=0, dtype=np.int64) >= sum(parts[:most])
    fits &= np.add.reduce(room, axis=0, dtype=np.int64) >= sum(parts)
    return fits


def _parts(ask: Ask) -> list[int]:
    return sorted(ask.parts or (ask.count,), reverse=True)


def _rooms(snapshot: Snapshot, ask: Ask, memory_mib: I32, milli_free: I32 | int | None) -> Counts:
    """Count, up to the number of containers, how often a share goes into these amounts; None = whatever the time.

    Unknown memory has room for any share that asks for time alone.
    """
    mib, milli = sizes(snapshot, ask)
    room = np.zeros(snapshot.exists.shape, np.uint16)
    for times in range(1, min(len(_parts(ask)), CONTAINERS_MAX) + 1):
        fits = memory_mib >= times * mib
        fits |= snapshot.memory_mib_total == 0
        if milli_free is not None:
            fits &= milli_free >= times * milli
        room += fits
    return room


def _uncut(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: devices of an allowed model out of MIG mode, and of known memory where memory is asked."""
    devices = usable(snapshot, ask, snapshot.mig_mode.view(np.uint8))
    if ask.device_mib:
        devices &= snapshot.memory_mib_total > 0
    return devices
