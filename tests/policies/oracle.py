"""Every policy once more, node by node and device by device, written from what it promises, not from its code."""
# ruff: noqa: ARG005 - every oracle has one signature

from __future__ import annotations

from collections.abc import Callable, Iterator

from policies.columns import Ask, Health, Kind, Mode, Snapshot, Use


def _usable(s: Snapshot, a: Ask, n: int) -> Iterator[int]:
    """Slots of an allowed model that are there."""
    for d in range(s.slots):
        if s.exists[d, n] and a.models[s.model[d, n]]:
            yield d


def _whole(s: Snapshot, a: Ask, n: int) -> list[int]:
    return [d for d in _usable(s, a, n) if not s.mig_mode[d, n]]


def _gpu_count(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind != Kind.WHOLE:
        return True
    if s.gpus_total[n] < a.count:
        return False
    return s.mode[n] == Mode.OBSERVED or len(_whole(s, a, n)) >= a.count


def _healthy(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind != Kind.WHOLE:
        return True
    sound = [d for d in _whole(s, a, n) if s.health[d, n] == Health.HEALTHY]
    return len(sound) >= (a.count if s.mode[n] == Mode.EXACT else 1)


def _devices_free(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind != Kind.WHOLE:
        return True
    if s.gpus_free[n] < a.count:
        return False
    free = [d for d in _whole(s, a, n) if s.health[d, n] == Health.HEALTHY and s.use[d, n] == Use.FREE]
    return s.mode[n] == Mode.OBSERVED or len(free) >= a.count


def _whole_gpu_kind(s: Snapshot, a: Ask, n: int) -> bool:
    if a.kind == Kind.SHARE:
        return False
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
    )


MASKS: dict[str, Callable[[Snapshot, Ask, int], bool]] = {
    "in-service": lambda s, a, n: s.schedulable[n],
    "allowed": lambda s, a, n: a.allowed[n],
    "mig-profile": lambda s, a, n: a.kind != Kind.MIG,
    "whole-gpu-kind": _whole_gpu_kind,
    "init-only": lambda s, a, n: not a.init_only or s.mode[n] == Mode.OBSERVED,
    "model": lambda s, a, n: a.kind == Kind.NONE or any(True for _ in _usable(s, a, n)),
    "gpu-count": _gpu_count,
    "host-size": _host_size,
    "named-devices": lambda s, a, n: a.kind == Kind.NONE or not s.foreign[n],
    "healthy": _healthy,
    "devices-free": _devices_free,
    "cpu-memory": _cpu_memory,
}


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _fill_gpus(s: Snapshot, a: Ask, n: int) -> float:
    free = int(s.gpus_free[n])
    if a.kind == Kind.NONE:
        return 1.0 if s.gpus_total[n] <= 0 else 1 / (2 + max(free, 0))
    return 0.0 if free < a.count else 1 / (1 + free - a.count)


def _fill_host(s: Snapshot, a: Ask, n: int) -> float:
    cpu_max = max([1, *s.cpu_milli_total.tolist()])
    memory_max = max([1, *s.memory_bytes_total.tolist()])
    cpu = (int(s.cpu_milli_free[n]) - a.cpu_milli) / cpu_max
    memory = (int(s.memory_bytes_free[n]) - a.memory_bytes) / memory_max
    return _clip(1 - (cpu + memory) / 2)


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


SCORES: dict[str, Callable[[Snapshot, Ask, int], float]] = {
    "fill-gpus": _fill_gpus,
    "fill-host": _fill_host,
    "keep-scarce": _keep_scarce,
    "spread": _spread,
}
