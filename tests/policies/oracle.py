"""Every policy once more, node by node and device by device, written from what it promises, not from its code."""
# ruff: noqa: ARG005 - every oracle has one signature

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations

import numpy as np

from policies.columns import Ask, Health, Kind, Mix, Mode, Snapshot, Use


def _usable(s: Snapshot, a: Ask, n: int) -> Iterator[int]:
    """Slots of an allowed model that are there."""
    for d in range(s.slots):
        if s.exists[d, n] and a.models[s.model[d, n]]:
            yield d


def _whole(s: Snapshot, a: Ask, n: int) -> list[int]:
    return [d for d in _usable(s, a, n) if not s.mig_mode[d, n]]


def _room(s: Snapshot, a: Ask, n: int, devices: list[int]) -> bool:
    """These devices are enough for the ask, were they empty."""
    if a.kind == Kind.MIG:
        return sum(int(a.offer.slots[s.model[d, n]]) for d in devices if s.mig_mode[d, n]) >= a.count
    most = max(a.parts) if a.kind == Kind.SHARE and a.parts else a.count
    return sum(1 for d in devices if not s.mig_mode[d, n]) >= most


def _gpu_count(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind == Kind.NONE:
        return True
    if a.kind == Kind.WHOLE and s.gpus_total[n] < a.count:
        return False
    if a.kind == Kind.MIG and s.slices_total[a.profile, n] < a.count:
        return False
    return s.mode[n] == Mode.OBSERVED or _room(s, a, n, list(_usable(s, a, n)))


def _sound(s: Snapshot, a: Ask, n: int) -> list[int]:
    return [d for d in _usable(s, a, n) if s.health[d, n] == Health.HEALTHY]


def _healthy(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind == Kind.NONE or _room(s, a, n, _sound(s, a, n)):
        return True
    return s.mode[n] == Mode.OBSERVED and any(a.kind == Kind.MIG or not s.mig_mode[d, n] for d in _sound(s, a, n))


def _mig_profile(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind != Kind.MIG:
        return True
    if s.mode[n] == Mode.OBSERVED:
        return bool(s.slices_total[a.profile, n] > 0)
    return any(s.exists[d, n] and a.offer.slots[s.model[d, n]] for d in range(s.slots))


def _mig_mode(s: Snapshot, a: Ask, n: int) -> bool:
    ready = (d for d in _usable(s, a, n) if s.mig_mode[d, n] and a.offer.slots[s.model[d, n]])
    return a.kind != Kind.MIG or s.mode[n] == Mode.OBSERVED or any(True for _ in ready)


def _slice_fit(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind != Kind.MIG:
        return True
    if s.slices_free[a.profile, n] < a.count:
        return False
    room = sum(int(a.offer.fits[s.mig_row[d, n]]) for d in _sound(s, a, n))
    return s.mode[n] == Mode.OBSERVED or room >= a.count


def _size(s: Snapshot, a: Ask, d: int, n: int) -> tuple[int, int]:
    """MiB and thousandths of one share on a device of known memory."""
    total = int(s.memory_mib_total[d, n])
    mib = a.device_mib or max(1, a.device_milli * total // 1000)
    return mib, a.device_milli or max(1, 1000 * a.device_mib // total)


def _sharers(s: Snapshot, a: Ask, n: int) -> list[int]:
    return [d for d in _whole(s, a, n) if s.memory_mib_total[d, n] > 0 or not a.device_mib]


def _open(s: Snapshot, a: Ask, n: int) -> list[int]:
    return [d for d in _sharers(s, a, n) if d in _sound(s, a, n) and s.use[d, n] in {Use.FREE, Use.SHARED}]


def serves(rooms: list[int], parts: tuple[int, ...]) -> bool:
    """Try every way to give each container its shares on different devices."""

    @cache
    def rest(left: tuple[int, ...], todo: tuple[int, ...]) -> bool:
        if not todo:
            return True
        free = [d for d, room in enumerate(left) if room > 0]
        if todo[0] > len(free):
            return False
        ways = {
            tuple(sorted(room - (d in chosen) for d, room in enumerate(left))) for chosen in combinations(free, todo[0])
        }
        return any(rest(way, todo[1:]) for way in ways)

    return rest(tuple(sorted(min(max(room, 0), len(parts)) for room in rooms)), parts)


def _shares(s: Snapshot, a: Ask, n: int, *, devices: list[int], memory: np.ndarray, milli: np.ndarray | None) -> bool:
    rooms = []
    for d in devices:
        need_mib, need_milli = _size(s, a, d, n)
        room = int(memory[d, n]) // need_mib if s.memory_mib_total[d, n] else 1000
        rooms.append(room if milli is None else min(room, int(milli[d, n]) // need_milli))
    return serves(rooms, a.parts or (a.count,))


def _share_size(s: Snapshot, a: Ask, n: int) -> bool:
    whole = np.full(s.exists.shape, 1000)
    return a.kind != Kind.SHARE or _shares(s, a, n, devices=_sharers(s, a, n), memory=s.memory_mib_total, milli=whole)


def _share_memory(s: Snapshot, a: Ask, n: int) -> bool:
    return a.kind != Kind.SHARE or _shares(s, a, n, devices=_open(s, a, n), memory=s.memory_mib_free, milli=None)


def _share_fit(s: Snapshot, a: Ask, n: int) -> bool:
    return a.kind != Kind.SHARE or _shares(
        s, a, n, devices=_open(s, a, n), memory=s.memory_mib_free, milli=s.milli_free
    )


def _devices_free(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind == Kind.SHARE:
        return bool(s.shares_free[n] >= a.count)
    if a.kind != Kind.WHOLE:
        return True
    if s.gpus_free[n] < a.count:
        return False
    free = [d for d in _whole(s, a, n) if s.health[d, n] == Health.HEALTHY and s.use[d, n] == Use.FREE]
    return s.mode[n] == Mode.OBSERVED or len(free) >= a.count


def _whole_gpu_kind(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind == Kind.SHARE:
        return bool(s.mode[n] == Mode.EXACT)
    return a.kind != Kind.WHOLE or s.mode[n] == Mode.EXACT or bool(s.whole_gpus[n])


def _cpu_memory(s: Snapshot, a: Ask, n: int) -> bool:
    free = [int(s.cpu_milli_free[n]), int(s.memory_bytes_free[n]), int(s.storage_bytes_free[n])]
    need = [a.cpu_milli, a.memory_bytes, a.storage_bytes]
    for e, count in enumerate(a.extended.tolist()):
        free.append(int(s.extended_free[e, n]))
        need.append(count)
    return s.pods_free[n] >= 1 and all(n_ == 0 or f >= n_ for f, n_ in zip(free, need, strict=True))


def _host_size(s: Snapshot, a: Ask, n: int) -> bool:
    return (
        a.cpu_milli <= s.cpu_milli_total[n]
        and a.memory_bytes <= s.memory_bytes_total[n]
        and a.storage_bytes <= s.storage_bytes_total[n]
        and all(need <= s.extended_total[e, n] for e, need in enumerate(a.extended.tolist()) if need)
    )


MASKS: dict[str, Callable[[Snapshot, Ask, int], bool]] = {
    "in-service": lambda s, a, n: s.schedulable[n],
    "allowed": lambda s, a, n: a.allowed[n],
    "mig-profile": _mig_profile,
    "whole-gpu-kind": _whole_gpu_kind,
    "init-only": lambda s, a, n: not a.init_only or s.mode[n] == Mode.OBSERVED,
    "model": lambda s, a, n: a.kind == Kind.NONE or any(True for _ in _usable(s, a, n)),
    "mig-mode": _mig_mode,
    "gpu-count": _gpu_count,
    "share-size": _share_size,
    "host-size": _host_size,
    "named-devices": lambda s, a, n: a.kind == Kind.NONE or not s.foreign[n],
    "healthy": _healthy,
    "slice-fit": _slice_fit,
    "share-memory": _share_memory,
    "share-fit": _share_fit,
    "devices-free": _devices_free,
    "cpu-memory": _cpu_memory,
}


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _least_loss(s: Snapshot, a: Ask, n: int) -> float:
    if a.kind != Kind.MIG:
        return 1.0
    if s.mode[n] == Mode.OBSERVED:
        left = int(s.slices_free[a.profile, n]) - a.count
        return 0.0 if left < 0 else 0.5 + 0.5 / (1 + left)
    return max([0.0, *(float(a.offer.worth[s.mig_row[d, n]]) for d in _sound(s, a, n))])


def _fill_tightest(s: Snapshot, a: Ask, n: int) -> float:
    if a.kind != Kind.SHARE:
        return 1.0
    found = [0.0]
    for d in _open(s, a, n):
        mib, milli = _size(s, a, d, n)
        total = int(s.memory_mib_total[d, n])
        memory, time = int(s.memory_mib_free[d, n]) - mib, int(s.milli_free[d, n]) - milli
        if (memory >= 0 or not total) and time >= 0:
            found.append(_clip(1 - ((memory / total if total else 0) + time / 1000) / 2))
    return max(found)


def _fill_gpus(s: Snapshot, a: Ask, n: int) -> float:
    free = int(s.gpus_free[n])
    if a.kind == Kind.NONE:
        return 1.0 if s.gpus_total[n] <= 0 else 1 / (2 + max(free, 0))
    return 0.0 if free < a.count else 1 / (1 + free - a.count)


def _fill_host(s: Snapshot, a: Ask, n: int) -> float:
    cpu = (int(s.cpu_milli_free[n]) - a.cpu_milli) / 128_000
    memory = (int(s.memory_bytes_free[n]) - a.memory_bytes) / 2**40
    return 1 / (1 + max(cpu + memory, 0))


def _keep_scarce(s: Snapshot, a: Ask, n: int) -> float:
    if a.kind == Kind.NONE or sum(a.models.tolist()) <= 1 or s.slots == 0:
        return 1.0
    stock: dict[int, int] = {}
    for m in range(s.nodes):
        model = int(s.model[0, m])
        stock[model] = stock.get(model, 0) + int(s.gpus_total[m])
    return stock[int(s.model[0, n])] / max([1, *stock.values()])


def _spread(s: Snapshot, a: Ask, n: int) -> float:
    if a.kind != Kind.NONE:
        return _clip((int(s.gpus_free[n]) - a.count) / max(int(s.gpus_total[n]), 1))
    cpu = _clip((int(s.cpu_milli_free[n]) - a.cpu_milli) / max(int(s.cpu_milli_total[n]), 1))
    memory = _clip((int(s.memory_bytes_free[n]) - a.memory_bytes) / max(int(s.memory_bytes_total[n]), 1))
    return (cpu + memory) / 2


def _one_group(s: Snapshot, a: Ask, n: int) -> float:
    if a.kind != Kind.WHOLE or a.count < 2:
        return 0.0
    free = [d for d in _sound(s, a, n) if not s.mig_mode[d, n] and s.use[d, n] == Use.FREE]
    for groups, worth in ((s.link_group, 1.0), (s.numa, 0.5)):
        known = [int(groups[d, n]) for d in free if groups[d, n] >= 0]
        if any(known.count(group) >= a.count for group in known):
            return worth
    return 0.0


def fragment(s: Snapshot, mix: Mix, n: int, free: list[int], cpu: int) -> float:
    """Expected milli of no use on one node, class by class and device by device."""
    classes = [c for c in range(len(mix.weight)) if mix.kind[c] in {Kind.WHOLE, Kind.SHARE}]
    total = sum(float(mix.weight[c]) for c in classes)
    lost = 0.0
    for c in classes:
        useful = []
        for d, left in enumerate(free):
            memory = int(s.memory_mib_total[d, n])
            need = int(mix.device_milli[c]) or 1000 * int(mix.device_mib[c]) // max(memory, 1)
            if left >= max(need, 1) and memory >= mix.device_mib[c] and mix.models[c][s.model[d, n]]:
                useful.append(left)
        fits = len(useful) >= mix.count[c] and cpu >= mix.cpu_milli[c]
        lost += float(mix.weight[c]) / total * (sum(free) - (sum(useful) if fits else 0))
    return lost


def _one_more(s: Snapshot, a: Ask, d: int, n: int) -> bool:
    mib, milli = _size(s, a, d, n)
    return (not s.memory_mib_total[d, n] or s.memory_mib_free[d, n] >= mib) and s.milli_free[d, n] >= milli


def _least_fragment(s: Snapshot, a: Ask, n: int, mix: Mix) -> float:
    if a.kind == Kind.MIG or not any(kind in {Kind.WHOLE, Kind.SHARE} for kind in mix.kind.tolist()):
        return 0.5
    before = [0] * s.slots
    for d in range(s.slots):
        if s.exists[d, n] and not s.mig_mode[d, n] and s.health[d, n] == Health.HEALTHY:
            before[d] = max(int(s.milli_free[d, n]), 0)
    after = list(before)
    if a.kind == Kind.WHOLE:
        for d in [d for d in _sound(s, a, n) if not s.mig_mode[d, n] and s.use[d, n] == Use.FREE][: a.count]:
            after[d] = 0
    if a.kind == Kind.SHARE:
        open_to = [d for d in _open(s, a, n) if _one_more(s, a, d, n)]
        for d in sorted(open_to, key=lambda d: before[d])[: a.count]:
            after[d] -= min(_size(s, a, d, n)[1], before[d])
    cpu = int(s.cpu_milli_free[n])
    grown = fragment(s, mix, n, after, cpu - a.cpu_milli) - fragment(s, mix, n, before, cpu)
    return min(1.0, max(0.0, 0.5 - grown / (2000 * s.slots))) if s.slots else 0.5


def _gap(mix: Mix, free: int, memory: int) -> float:
    """Expected waste of a gap, in GPUs: by hundredths of a card, share after share."""
    often: dict[int, float] = {}
    for c in np.flatnonzero((mix.kind == Kind.SHARE) & (mix.weight > 0)).tolist():
        milli, mib = int(mix.device_milli[c]), int(mix.device_mib[c])
        if milli or (memory and mib <= memory):
            size = math.ceil((milli or Fraction(1000 * mib, memory)) / 10)
            often[size] = often.get(size, 0.0) + float(mix.weight[c]) * int(mix.count[c])

    @cache
    def waste(gap: int) -> float:
        fits = {size: weight for size, weight in often.items() if size <= gap}
        if not fits:
            return gap / 100
        rest = sum(weight * waste(gap - size) for size, weight in fits.items()) / sum(fits.values())
        none_comes = (1 - min(sum(fits.values()) / sum(often.values()), 1)) ** 30
        return none_comes * gap / 100 + (1 - none_comes) * rest

    return waste(min(free, 1000) // 10)


def _stranded(gpu: float, served: float) -> float:
    served = max(served, 0.0)
    return (gpu - served + math.sqrt((gpu - served) ** 2 + 0.25 * gpu * served)) / 2


def _open_milli(s: Snapshot, n: int) -> list[int]:
    free = [0] * s.slots
    left = s.slots if s.mode[n] == Mode.EXACT else int(s.gpus_free[n])
    for d in range(s.slots):
        sound = s.exists[d, n] and not s.mig_mode[d, n] and s.health[d, n] == Health.HEALTHY
        if sound and s.milli_free[d, n] > 0 and left > 0:
            free[d], left = int(s.milli_free[d, n]), left - 1
    return free


def _shares_on(s: Snapshot, a: Ask, n: int, mix: Mix, free: list[int]) -> tuple[float, int, float]:
    """GPUs taken, cards that were idle, and what the gaps waste more, when the cheapest cards are taken."""
    found = []
    for d in range(s.slots):
        total = int(s.memory_mib_total[d, n])
        milli = a.device_milli or max(1, 1000 * a.device_mib // max(total, 1))
        enough = free[d] >= milli and (not a.device_mib or s.memory_mib_free[d, n] >= a.device_mib)
        if enough and a.models[s.model[d, n]]:
            grown = round(1e6 * _gap(mix, free[d] - milli, total)) - round(1e6 * _gap(mix, free[d], total))
            found.append((grown, d, milli))
    found = sorted(found)[: a.count]
    fresh = sum(free[d] >= 1000 for _, d, _ in found)
    return sum(milli for _, _, milli in found) / 1000, fresh, sum(grown for grown, _, _ in found) / 1e6


def _broken(mix: Mix, idle: int) -> float:
    gpus = {
        c: float(mix.weight[c])
        * int(mix.count[c])
        * (int(mix.device_milli[c]) / 1000 if mix.kind[c] == Kind.SHARE and mix.device_milli[c] else 1)
        for c in range(len(mix.weight))
        if mix.kind[c] in {Kind.WHOLE, Kind.SHARE}
    }
    several = [c for c in gpus if mix.kind[c] == Kind.WHOLE and mix.count[c] > 1]
    return 0.025 * sum(gpus[c] * idle for c in several if 0 <= idle < mix.count[c]) / max(sum(gpus.values()), 1e-9)


def _cores(mix: Mix) -> float:
    whole = [c for c in range(len(mix.weight)) if mix.kind[c] in {Kind.WHOLE, Kind.SHARE}]
    size = [int(mix.device_milli[c]) / 1000 if mix.kind[c] == Kind.SHARE and mix.device_milli[c] else 1 for c in whole]
    gpus = sum(float(mix.weight[c]) * int(mix.count[c]) * each for c, each in zip(whole, size, strict=True))
    cores = sum(float(mix.weight[c]) * int(mix.cpu_milli[c]) / 1000 for c in whole)
    return cores / gpus if gpus else 0.0


def _with_gpus(s: Snapshot, n: int) -> bool:
    tokens, slices = s.gpus_total[n], sum(int(row[n]) for row in s.slices_total)
    return tokens > 0 or slices > 0 or any(s.exists[d, n] for d in range(s.slots))


def _least_waste(s: Snapshot, a: Ask, n: int, mix: Mix) -> float:
    if not s.slots:
        return 0.5
    free, count = _open_milli(s, n), min(a.count, 256)
    gpu = sum(free) / 1000
    for d in range(s.slots):
        if s.exists[d, n] and s.mig_mode[d, n] and s.health[d, n] == Health.HEALTHY:
            gpu += min(125 * (16 - int(s.occupancy[d, n]).bit_count()), 1000) / 1000
    taken, fresh, cost = 0.0, 0, 0.0
    if a.kind == Kind.WHOLE:
        taken, fresh = float(count), count
    elif a.kind == Kind.MIG:
        taken = 0.125 * count * max(int(a.offer.sizes[s.mig_row[d, n]]) for d in range(s.slots))
    elif a.kind == Kind.SHARE:
        taken, fresh, cost = _shares_on(s, replace(a, count=count), n, mix, free)
    cores, left = _cores(mix), max(gpu - taken, 0.0)
    cpu = int(s.cpu_milli_free[n]) / 1000
    after = cpu - a.cpu_milli / 1000
    if cores:
        cost += 0.4 * (_stranded(left, after / cores) - _stranded(gpu, cpu / cores))
    if a.kind == Kind.NONE:
        cost += 0.3 * gpu / 8 + 0.3 * after / 128 + _with_gpus(s, n)
    else:
        idle = sum(milli >= 1000 for milli in free)
        cost += 0.05 * left / 8 + 0.03 * after / 128
        cost += _broken(mix, idle - fresh) - _broken(mix, idle)
        cost += 0.5 * taken * min(float(mix.price[s.model[0, n]]), 8.0)
    return _clip(0.5 - cost / (8 * (1 + count)))


def score(name: str, s: Snapshot, a: Ask, n: int, mix: Mix) -> float:
    """One node's score; two of them alone look at the mix."""
    by_mix = {"least-fragment": _least_fragment, "least-waste": _least_waste}
    return by_mix[name](s, a, n, mix) if name in by_mix else SCORES[name](s, a, n)


SCORES: dict[str, Callable[[Snapshot, Ask, int], float]] = {
    "fill-gpus": _fill_gpus,
    "fill-host": _fill_host,
    "keep-scarce": _keep_scarce,
    "spread": _spread,
    "least-loss": _least_loss,
    "fill-tightest": _fill_tightest,
    "least-fragment": lambda s, a, n: 0.5,  # while nothing was seen; see `score`
    "least-waste": lambda s, a, n: 0.5,  # as above
    "one-group": _one_group,
}
