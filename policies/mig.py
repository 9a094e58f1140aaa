"""MIG: which nodes take the instances of a profile, and where one more costs least of what may be asked next.

On exact nodes an instance may go wherever the geometry leaves room, so everything is one look-up per device in the
Offer that the ask brings; on observed nodes the slices are cut already and only counted. Invariant: instances of one
profile never stand in each other's way, so the sum over the devices is exactly how many a node takes.
"""
# ruff: noqa: ARG001 - every policy has one signature

from __future__ import annotations

import numpy as np

from .columns import Ask, BoolArray, FloatArray, Kind, Mix, Mode, Snapshot
from .fit import EXACT, usable

OBSERVED = int(Mode.OBSERVED)


def profile_there(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes that have the profile: cut (observed), or legal on the model of some device (exact); `[N]`."""
    if ask.kind != Kind.MIG:
        return np.ones(snapshot.nodes, np.bool_)
    legal = snapshot.exists & (ask.offer.slots.take(snapshot.model) > 0)
    return np.where(snapshot.mode == EXACT, np.bitwise_or.reduce(legal, axis=0), _cut(snapshot, ask))


def mode_on(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes that may cut instances: exact ones need MIG mode on a device that has the profile.

    Returns:
        ``[N]``; asks for anything else pass everywhere.
    """
    if ask.kind != Kind.MIG:
        return np.ones(snapshot.nodes, np.bool_)
    ready = usable(snapshot, ask, (~snapshot.mig_mode).view(np.uint8))
    ready &= ask.offer.slots.take(snapshot.model) > 0
    return np.asarray(np.bitwise_or.reduce(ready, axis=0) | (snapshot.mode != EXACT), np.bool_)


def slice_fit(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes where all instances asked fit now, without moving anything.

    Returns:
        ``[N]``; every node needs the tokens, exact nodes also that many free placements on healthy devices of an
        allowed model.
    """
    if ask.kind != Kind.MIG:
        return np.ones(snapshot.nodes, np.bool_)
    room = np.add.reduce(ask.offer.fits.take(snapshot.mig_row) * takers(snapshot, ask), axis=0, dtype=np.int64)
    fits = (room >= ask.count) | (snapshot.mode != EXACT)
    return np.asarray(fits & (snapshot.slices_free[ask.profile] >= ask.count), np.bool_)


def least_loss(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the device on which one more instance costs least of what is likely to be asked next.

    Returns:
        ``[N]`` 0..1; a slice that is cut already costs nothing (0.5 to 1, fewest left best); 0 = no room; asks for
        anything else: 1.
    """
    if ask.kind != Kind.MIG:
        return np.ones(snapshot.nodes, np.float32)
    worth = ask.offer.worth.take(snapshot.mig_row)
    worth *= takers(snapshot, ask)
    left = snapshot.slices_free[ask.profile] - ask.count
    cut = np.where(left >= 0, 0.5 + 0.5 / (1.0 + np.maximum(left, 0)), 0.0)
    best = np.maximum.reduce(worth, axis=0, initial=0.0)
    return np.where(snapshot.mode == OBSERVED, cut, best).astype(np.float32)


def takers(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: healthy devices of an allowed model; whether MIG is on and room left, their rows tell."""
    return usable(snapshot, ask, snapshot.health)


def _cut(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[N]`: nodes that were given slices of the profile."""
    return np.asarray(snapshot.slices_total[ask.profile] > 0, np.bool_)
