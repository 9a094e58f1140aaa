"""Which placement wastes least GPU, whatever is asked: one measure for whole GPUs, shares, MIG and CPU-only pods.

What a node is likely to waste is counted in GPUs, from four things that its state alone tells:
- *gaps*: what is left on a card after shares, as far as the shares asked lately are not likely to fill it;
- *stranded GPUs*: free GPU for which the node has too little CPU, at the CPU per GPU that is asked lately;
- *broken nodes*: free cards too few for the pods that ask several at once;
- *looseness*: free GPU and CPU as such, so that of equals the fuller node is taken.
The cost of a placement is what this grows by, and the price of the model: who may use a model that others are bound to
pays for it. Invariant: a node's score depends on that node, the ask and the mix alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from . import sharing
from .columns import I32, Ask, BoolArray, FloatArray, Kind, Mix, Snapshot
from .fit import EXACT

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

MILLI = 1000
MICRO = 1_000_000
NO_ROOM = 1 << 40
GRAIN = 10  # milli: gaps are told apart so finely
COMING = 30  # shares that will come by while a gap is still open
SOFTNESS = 0.25  # how early CPU begins to be short: 0 = when there is too little for an average pod, not before
STRANDED = 0.4  # a stranded GPU may be used after all, by pods that ask little CPU
BROKEN = 0.025
FREE_GPU, FREE_CORE = 0.05 / 8, 0.03 / 128  # looseness, in GPUs per free GPU and per free core
BESIDE_GPU, BESIDE_CORE = 0.3 / 8, 0.3 / 128  # the same for pods without devices, which can go anywhere
ON_GPU_NODE = 1.0  # what a pod without devices costs on a node with GPUs, were it full
PRICE, PRICE_MAX = 0.5, 8.0
SLOTS_MAX = 256
SLICE_MILLI = 125  # of a MIG device, per memory slice that is free


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """What a mix says of pods to come.

    Attributes:
        cores: cores per GPU asked; 0 = nobody has asked.
        broken: ``[SLOTS_MAX + 1]`` GPUs that so many free cards waste, being too few for pods that ask several; None
            while nobody asks several.
        shares: milli of one share (0 = what mib is of the device), mib, and how often.
        by_memory: some shares are what their memory is of the card, so that gaps differ from model to model.
        price: ``[M]`` of one GPU, in GPUs; None while nobody is bound to a model.
    """

    cores: float
    broken: Floats | None
    price: Floats | None
    shares: tuple[tuple[int, int, float], ...]
    by_memory: bool


@lru_cache(maxsize=4)
def outlook(mix: Mix) -> Outlook:
    """Return what a mix says of pods to come; MIG asks say nothing of CPU, cards and gaps."""
    whole, share = mix.kind == Kind.WHOLE, mix.kind == Kind.SHARE
    gpus = np.where(whole | share, mix.count * np.where(share & (mix.device_milli > 0), mix.device_milli / MILLI, 1), 0)
    asked = gpus * mix.weight
    total = float(asked.sum())
    cores = float((mix.cpu_milli * mix.weight)[whole | share].sum()) / MILLI / total if total else 0.0
    free = np.arange(SLOTS_MAX + 1)
    several = np.flatnonzero(whole & (mix.count > 1) & (mix.count <= SLOTS_MAX))
    broken = np.zeros(SLOTS_MAX + 1)
    for each in several.tolist():
        broken += asked[each] / total * np.where(free < mix.count[each], free, 0)
    sizes: dict[tuple[int, int], float] = {}
    for each in np.flatnonzero(share & (mix.weight > 0)).tolist():
        size = int(mix.device_milli[each]), int(mix.device_mib[each]) if not mix.device_milli[each] else 0
        sizes[size] = sizes.get(size, 0.0) + float(mix.weight[each] * mix.count[each])
    return Outlook(
        cores=cores,
        broken=BROKEN * broken if broken.any() else None,
        price=PRICE * np.minimum(mix.price, PRICE_MAX).astype(np.float64) if mix.price.any() else None,
        shares=tuple((*size, often) for size, often in sizes.items()),
        by_memory=any(mib for _, mib in sizes),
    )


@lru_cache(maxsize=64)
def gaps(mix: Mix, memory_mib: int) -> Counts:
    """Return ``[1001]`` what of so many free milli of a card is likely to be wasted, in millionths of a GPU.

    A gap that no share fits is wasted. Else one of those that fit comes in time with a chance that grows with how
    common they are, and leaves a smaller gap.

    Args:
        mix: what is asked lately.
        memory_mib: of the card; 0 = unknown, then shares by memory are left out.
    """
    items = [
        (-(-milli // GRAIN) if milli else -(-MILLI * mib // (memory_mib * GRAIN)), often)
        for milli, mib, often in outlook(mix).shares
        if milli or (memory_mib and mib <= memory_mib)
    ]
    size = np.asarray([item[0] for item in items], np.int64)
    often = np.asarray([item[1] for item in items])
    waste = np.arange(MILLI // GRAIN + 1) * (GRAIN / MILLI)
    for gap in range(1, len(waste)):
        fits = size <= gap
        likely = float(often[fits].sum())
        if likely > 0:
            comes = 1 - (1 - min(likely / float(often.sum()), 1.0)) ** COMING
            rest = float((often[fits] * waste[gap - size[fits]]).sum()) / likely
            waste[gap] += comes * (rest - waste[gap])
    return np.asarray(np.rint(MICRO * waste.take(np.arange(MILLI + 1) // GRAIN)), np.int64)


def least_waste(snapshot: Snapshot, ask: Ask, mix: Mix) -> FloatArray:
    """Prefer the node on which this ask makes the least waste likely, its model's price included.

    Returns:
        ``[N]`` 0..1, 0.5 = no cost; a GPU of cost counts 1 / (8 + 8 GPUs asked). Meaningful where the ask fits.
    """
    if not snapshot.slots:
        return np.full(snapshot.nodes, 0.5, np.float32)
    seen, free = outlook(mix), open_milli(snapshot)
    taken, fresh, cost = _taken(snapshot, ask, mix, free)
    gpu = (np.add.reduce(free, axis=0, dtype=np.int64) + _mig_milli(snapshot)) / MILLI
    cpu = snapshot.cpu_milli_free / MILLI
    gpu_left, cpu_left = np.maximum(gpu - taken, 0), cpu - ask.cpu_milli / MILLI
    if seen.cores:
        cost += STRANDED * (_stranded(gpu_left, cpu_left / seen.cores) - _stranded(gpu, cpu / seen.cores))
    if ask.kind == Kind.NONE:
        cost += BESIDE_GPU * gpu + BESIDE_CORE * cpu_left + ON_GPU_NODE * _with_gpus(snapshot)
    else:
        cost += FREE_GPU * gpu_left + FREE_CORE * cpu_left
        if seen.broken is not None:
            idle = np.add.reduce(free >= MILLI, axis=0, dtype=np.int64)
            cost += seen.broken.take(idle - fresh, mode="clip") - seen.broken.take(idle, mode="clip")
        if seen.price is not None:
            cost += taken * seen.price.take(snapshot.model[0])
    cost *= -1 / (8 * (1 + min(ask.count, SLOTS_MAX)))
    cost += 0.5
    return np.asarray(np.minimum(np.maximum(cost, 0.0), 1.0), np.float32)


def open_milli(snapshot: Snapshot) -> I32:
    """Return ``[D, N]`` milli free for whole and shared use; on observed nodes as many cards as they have tokens."""
    blocked = snapshot.health | snapshot.mig_mode.view(np.uint8)
    free = np.maximum(snapshot.milli_free, 0)
    free *= snapshot.exists.view(np.uint8) > blocked
    exact = snapshot.mode == EXACT
    if not exact.all():
        free *= exact | ((free > 0).cumsum(axis=0) <= snapshot.gpus_free)
    return free


def card_costs(snapshot: Snapshot, ask: Ask, mix: Mix, free: I32) -> Counts:
    """Return what one share of an ask wastes more on each card, in millionths of a GPU.

    Args:
        snapshot: the columns.
        ask: for shares.
        mix: what is asked lately.
        free: ``[D, N]`` milli free for shares.

    Returns:
        ``[D, N]``; `NO_ROOM` where the share has none.
    """
    left = free - _share_milli(snapshot, ask)
    fits = left >= 0
    if ask.device_mib:
        fits &= snapshot.memory_mib_free >= ask.device_mib
    if not ask.models.all():
        fits &= ask.models.take(snapshot.model)
    np.maximum(left, 0, out=left)
    if outlook(mix).by_memory:
        cost = np.zeros(free.shape, np.int64)
        for memory in np.unique(snapshot.memory_mib_total).tolist():
            table, here = gaps(mix, memory), snapshot.memory_mib_total == memory
            cost += (table.take(left) - table.take(free, mode="clip")) * here
    else:
        table = gaps(mix, 0)
        cost = table.take(left)
        cost -= table.take(free, mode="clip")
    cost[~fits] = NO_ROOM
    return cost


def _taken(snapshot: Snapshot, ask: Ask, mix: Mix, free: I32) -> tuple[Floats | float, Counts | int, Floats]:
    """Return ``[N]`` GPUs that an ask takes, cards that are idle no more, and what its gaps cost in GPUs."""
    cost, count = np.zeros(snapshot.nodes), min(ask.count, SLOTS_MAX)
    if ask.kind == Kind.WHOLE:
        return float(count), count, cost
    if ask.kind == Kind.MIG:
        sizes = np.maximum.reduce(ask.offer.sizes.take(snapshot.mig_row), axis=0, initial=0)
        return count * SLICE_MILLI / MILLI * sizes.astype(np.float64), 0, cost
    if ask.kind == Kind.NONE:
        return 0.0, 0, cost
    costs, milli = card_costs(snapshot, ask, mix, free), _share_milli(snapshot, ask)
    if count == 1 and isinstance(milli, int):
        card = costs.argmin(axis=0)
        here = card * snapshot.nodes + np.arange(snapshot.nodes)
        chosen = costs.ravel().take(here)
        room = chosen < NO_ROOM
        return milli / MILLI * room, (free.ravel().take(here) >= MILLI) & room, chosen * room / MICRO
    cards = np.argsort(costs, axis=0, kind="stable")[:count]
    chosen = np.take_along_axis(costs, cards, axis=0)
    room = chosen < NO_ROOM
    fresh = ((np.take_along_axis(free, cards, axis=0) >= MILLI) & room).sum(axis=0)
    each = milli if isinstance(milli, int) else np.take_along_axis(milli, cards, axis=0)
    return np.asarray((each * room).sum(axis=0) / MILLI, np.float64), fresh, (chosen * room).sum(axis=0) / MICRO


def _share_milli(snapshot: Snapshot, ask: Ask) -> Counts | int:
    """Return what one share takes of each card, ``[D, N]``, or one number where it is the same of all."""
    return ask.device_milli or sharing.sizes(snapshot, ask)[1]


def _with_gpus(snapshot: Snapshot) -> BoolArray:
    """Return ``[N]`` which nodes have GPUs in any form: tokens, MIG slices, all taken or not, or known devices."""
    return (snapshot.gpus_total > 0) | (snapshot.slices_total > 0).any(axis=0) | snapshot.exists.any(axis=0)


def _mig_milli(snapshot: Snapshot) -> Counts | int:
    """Return ``[N]`` milli free of healthy devices in MIG mode: an eighth of a GPU for each slice."""
    if not snapshot.mig_mode.any():
        return 0
    there = snapshot.mig_mode & snapshot.exists & (snapshot.health == 0)
    slices = np.bitwise_count(~snapshot.occupancy).astype(np.int64) * there
    return np.asarray(np.minimum(SLICE_MILLI * slices, MILLI).sum(axis=0), np.int64)


def _stranded(gpu: Floats, served: Floats) -> Floats:
    """Return free GPUs beyond those for which there is CPU (`served`), with a soft edge; ``[N]``, 0..gpu."""
    served = np.maximum(served, 0)
    beyond = gpu - served
    soft = gpu * served
    soft *= SOFTNESS
    soft += beyond * beyond
    beyond += np.sqrt(soft, out=soft)
    beyond *= 0.5
    return np.asarray(beyond)
