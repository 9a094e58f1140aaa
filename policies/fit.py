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
FEW_DEVICES = 512  # up to here looking each one up is cheaper than asking first whether that is needed
FEW_MODELS = 8  # up to here comparing with each model is cheaper than one look-up per device


def in_service(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass live nodes; `[N]`, False for holes in the table."""
    return snapshot.schedulable


def allowed(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes that selectors, affinity, taints and lessons from kube-scheduler leave; `[N]`."""
    return ask.allowed


def whole_gpu_kind(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose `nvidia.com/gpu` is a whole GPU to whole asks, and exact nodes alone to asks for shares.

    Returns:
        ``[N]``; on exact nodes a device is always whole, and asks without devices or for MIG slices all pass.
    """
    if ask.kind == Kind.SHARE:
        return np.asarray(snapshot.mode == EXACT, np.bool_)
    if ask.kind != Kind.WHOLE:
        return np.ones(snapshot.nodes, np.bool_)
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
    """Pass nodes big enough for the devices asked, taken or not.

    Returns:
        ``[N]``; exact nodes count devices of an allowed model, in MIG mode for MIG instances (as many as fit on the
        empty device) and out of it for all else; nodes also count their tokens, where they have tokens of the kind.
    """
    if ask.kind == Kind.NONE:
        return np.ones(snapshot.nodes, np.bool_)
    fits = _room(snapshot, ask, _other_mode(snapshot, ask)) >= _least(ask)
    fits |= snapshot.mode != EXACT
    if ask.kind != Kind.SHARE:
        fits &= (snapshot.gpus_total if ask.kind == Kind.WHOLE else snapshot.slices_total[ask.profile]) >= ask.count
    return fits


def host_size(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes whose cpu, memory, ephemeral storage and extended resources would do if they were empty; `[N]`."""
    fits = np.ones(snapshot.nodes, np.bool_)
    fits &= snapshot.cpu_milli_total >= ask.cpu_milli
    fits &= snapshot.memory_bytes_total >= ask.memory_bytes
    fits &= snapshot.storage_bytes_total >= ask.storage_bytes
    for total, need in zip(snapshot.extended_total, ask.extended, strict=True):
        if need > 0:
            fits &= total >= need
    return fits


def named_devices(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes where every held device is known by name; `[N]`, a stranger's unnamed device closes the node."""
    return np.ones(snapshot.nodes, np.bool_) if ask.kind == Kind.NONE else ~snapshot.foreign


def healthy(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes with enough healthy devices for the ask, taken or not.

    Returns:
        ``[N]``; exact nodes need as many as asked, observed nodes one, since there their tokens count the rest.
    """
    if ask.kind == Kind.NONE:
        return np.ones(snapshot.nodes, np.bool_)
    sound = _room(snapshot, ask, snapshot.health | _other_mode(snapshot, ask))
    fits = sound >= _least(ask)
    if ask.kind == Kind.MIG:  # whether the device of a slice that is cut already is in MIG mode, nobody says
        sound = _per_node(usable(snapshot, ask, snapshot.health))
    fits |= (snapshot.mode != EXACT) & (sound > 0)
    return fits


def devices_free(snapshot: Snapshot, ask: Ask, mix: Mix) -> BoolArray:
    """Pass nodes where a whole ask finds its GPUs free, and an ask for shares its tokens.

    Returns:
        ``[N]``; every node needs the tokens, exact nodes also devices that are free, healthy, of an allowed model
        and out of MIG mode.
    """
    if ask.kind == Kind.SHARE:
        return np.asarray(snapshot.shares_free >= ask.count, np.bool_)
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
    made: dict[str, BoolArray] | None = getattr(snapshot, "made", None)  # a view of some rows, used for one ask alone
    if made is not None and "free" in made:
        return made["free"]
    taken = snapshot.health | snapshot.use
    taken |= snapshot.mig_mode.view(np.uint8)
    free = usable(snapshot, ask, taken)
    if made is not None:
        made["free"] = free
    return free


def free_slots(snapshot: Snapshot, row: int, ask: Ask) -> list[int]:
    """Return the indices of one node's free devices, as `free_devices` has them: of so few a loop is quicker."""
    columns = (snapshot.exists, snapshot.health, snapshot.use, snapshot.mig_mode, snapshot.model)
    told = zip(*(column[:, row].tolist() for column in columns), strict=True)
    return [
        slot
        for slot, (there, health, use, mig, model) in enumerate(told)
        if there and not (health or use or mig) and ask.models[model]
    ]


def usable(snapshot: Snapshot, ask: Ask, blocked: npt.NDArray[np.uint8]) -> BoolArray:
    """Return `[D, N]`: devices of an allowed model that exist and whose `blocked` is 0."""
    usable = snapshot.exists.view(np.uint8) > blocked
    if snapshot.model.size < FEW_DEVICES:
        usable &= ask.models.take(snapshot.model)
    elif not ask.models.all():
        usable &= _of_model(snapshot, ask)
    return usable


def _least(ask: Ask) -> int:
    """Return how many devices (or MIG instances) an ask needs at least: containers may meet on a shared device."""
    return max(ask.parts, default=ask.count) if ask.kind == Kind.SHARE else ask.count


def _other_mode(snapshot: Snapshot, ask: Ask) -> npt.NDArray[np.uint8]:
    """Return `[D, N]`: 1 where the device's MIG mode is not the one that the ask needs."""
    mode = snapshot.mig_mode.view(np.uint8)
    return mode ^ np.uint8(1) if ask.kind == Kind.MIG else mode


def _room(snapshot: Snapshot, ask: Ask, blocked: npt.NDArray[np.uint8]) -> npt.NDArray[np.unsignedinteger]:
    """Count per node the devices (or MIG instances they take when empty) that are not `blocked`; `[N]`."""
    devices = usable(snapshot, ask, blocked)
    if ask.kind != Kind.MIG:
        return _per_node(devices)
    return np.asarray(np.add.reduce(ask.offer.slots.take(snapshot.model) * devices, axis=0, dtype=np.uint32))


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
