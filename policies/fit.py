"""Masks: which nodes can take an ask at all, by service, place, kind, model, size, health and what is free.

Every mask is `(Snapshot, Ask, Mix) -> [N]` bool, True = passes, and stands alone: a node is a candidate when all
masks pass. Device masks pass every node for an ask without devices. Invariant: what is unknown does not pass.
"""
# ruff: noqa: ARG001 - every policy has one signature

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .columns import Ask, BoolArray, Kind, Mix, Mode, Snapshot

EXACT = int(Mode.EXACT)  # comparing an array with the enum itself costs five times as much
FEW_MODELS = 8  # up to here comparing with each model is cheaper than one look-up per device


def in_service(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass live nodes; `[N]`, False for holes in the table."""
    return snapshot.schedulable


def allowed(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes that selectors, affinity, taints and lessons from kube-scheduler leave; `[N]`."""
    return ask.allowed


def mig_profile(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass every ask but one for MIG slices, which no policy places: refused everywhere rather than guessed; `[N]`."""
    return np.full(snapshot.nodes, ask.kind != Kind.MIG)


def whole_gpu_kind(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose `nvidia.com/gpu` is a whole GPU to whole asks, and no node to asks for shares.

    Returns:
        ``[N]``; on exact nodes a device is always whole, and asks without devices or for MIG slices all pass.
    """
    if ask.kind != Kind.WHOLE:
        return np.full(snapshot.nodes, ask.kind != Kind.SHARE)
    return np.asarray(snapshot.whole_gpus | (snapshot.mode == EXACT), np.bool_)


def init_only(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Keep pods in which only an ordinary init container asks for devices off exact nodes; `[N]`.

    The kubelet does not say who owns such a device, so an exact node could never hand it out.
    """
    return snapshot.mode != EXACT if ask.init_only else np.ones(snapshot.nodes, np.bool_)


def model_fit(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes with some device of an allowed model; `[N]`, padded slots never count."""
    if ask.kind == Kind.NONE:
        return np.ones(snapshot.nodes, np.bool_)
    fits = snapshot.exists if ask.models.all() else snapshot.exists & _of_model(snapshot, ask)
    return np.asarray(np.bitwise_or.reduce(fits, axis=0), np.bool_)


def gpu_count(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes big enough for the whole GPUs asked, taken or not.

    Returns:
        ``[N]``; exact nodes count devices of an allowed model out of MIG mode, and every node counts its tokens.
    """
    if ask.kind != Kind.WHOLE:
        return np.ones(snapshot.nodes, np.bool_)
    fits = _per_node(_usable(snapshot, ask, snapshot.mig_mode.view(np.uint8))) >= ask.count
    fits |= snapshot.mode != EXACT
    fits &= snapshot.gpus_total >= ask.count
    return fits


def host_size(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose cpu, memory and ephemeral storage would do if they were empty; `[N]`."""
    fits = np.ones(snapshot.nodes, np.bool_)
    fits &= snapshot.cpu_milli_total >= ask.cpu_milli
    fits &= snapshot.memory_bytes_total >= ask.memory_bytes
    fits &= snapshot.storage_bytes_total >= ask.storage_bytes
    return fits


def named_devices(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes where every held device is known by name; `[N]`, a stranger's unnamed device closes the node."""
    return np.ones(snapshot.nodes, np.bool_) if ask.kind == Kind.NONE else ~snapshot.foreign


def healthy(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes with enough healthy devices for a whole ask, taken or not.

    Returns:
        ``[N]``; exact nodes need as many as asked, observed nodes one, since there their tokens count the rest.
    """
    if ask.kind != Kind.WHOLE:
        return np.ones(snapshot.nodes, np.bool_)
    sound = _per_node(_usable(snapshot, ask, snapshot.health | snapshot.mig_mode.view(np.uint8)))
    fits = sound >= ask.count
    fits |= (snapshot.mode != EXACT) & (sound > 0)
    return fits


def devices_free(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes where a whole ask finds its GPUs free.

    Returns:
        ``[N]``; every node needs the tokens, exact nodes also devices that are free, healthy, of an allowed model
        and out of MIG mode.
    """
    if ask.kind != Kind.WHOLE:
        return np.ones(snapshot.nodes, np.bool_)
    fits = _per_node(free_devices(snapshot, ask)) >= ask.count
    fits |= snapshot.mode != EXACT
    fits &= snapshot.gpus_free >= ask.count
    return fits


def cpu_memory(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes with room for the pod beside its devices: one pod, cpu, memory, storage, extended resources.

    Returns:
        ``[N]``; an amount of 0 fits anywhere, also where less than nothing is free.
    """
    fits = snapshot.pods_free >= 1
    for free, need in (
        (snapshot.cpu_milli_free, ask.cpu_milli),
        (snapshot.memory_bytes_free, ask.memory_bytes),
        (snapshot.storage_bytes_free, ask.storage_bytes),
        *zip(snapshot.extended_free, ask.extended, strict=True),
    ):
        if need > 0:
            fits &= free >= need
    return fits


def free_devices(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: devices a whole ask may be given on exact nodes (there, free, healthy, allowed, no MIG mode)."""
    taken = snapshot.health | snapshot.use
    taken |= snapshot.mig_mode.view(np.uint8)
    return _usable(snapshot, ask, taken)


def _usable(snapshot: Snapshot, ask: Ask, blocked: npt.NDArray[np.uint8]) -> BoolArray:
    """Return `[D, N]`: devices of an allowed model that exist and whose `blocked` is 0."""
    usable = snapshot.exists.view(np.uint8) > blocked
    if not ask.models.all():
        usable &= _of_model(snapshot, ask)
    return usable


def _per_node(devices: BoolArray) -> npt.NDArray[np.uint8]:
    """Count per node; `[D, N]` -> `[N]`, a node has fewer than 256 slots."""
    return np.asarray(np.add.reduce(devices.view(np.uint8), axis=0, dtype=np.uint8), np.uint8)


def _of_model(snapshot: Snapshot, ask: Ask) -> BoolArray:
    """Return `[D, N]`: devices (or padding) whose model the ask allows."""
    codes = np.flatnonzero(ask.models).tolist()
    if len(codes) > FEW_MODELS:
        return np.asarray(ask.models.take(snapshot.model), np.bool_)
    match = np.zeros(snapshot.model.shape, np.bool_)
    for code in codes:
        match |= snapshot.model == code
    return match
