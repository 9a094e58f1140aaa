"""What a waiting request could change to start now: each idea is judged on the whole cluster, none is a promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypedDict

import numpy as np

from policies.columns import Ask, Kind, Mix, Snapshot

from .pipeline import Policies, judge


class Idea(TypedDict):
    """One change and on how many nodes the request would fit with it."""

    change: str
    nodes: int


_DEVICES = {Kind.WHOLE: "GPUs", Kind.MIG: "MIG slices"}


def ideas(snapshot: Snapshot, ask: Ask, mix: Mix, policies: Policies) -> list[Idea]:
    """Return the single changes that would let the ask fit somewhere now; none when it fits as it is."""

    def fitting(changed: Ask) -> int:
        return int(judge(snapshot, changed, mix, policies).passes.sum())

    if fitting(ask):
        return []
    found: list[Idea] = []
    for text, changed in _candidates(ask):
        if nodes := fitting(changed):
            found.append({"change": text, "nodes": nodes})
    if ask.kind in _DEVICES:
        low, high = 0, ask.count  # low fits, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fitting(replace(ask, count=middle)) else (low, middle)
        if low:
            text = f"ask for {low} instead of {ask.count} {_DEVICES[ask.kind]}"
            found.append({"change": text, "nodes": fitting(replace(ask, count=low))})
    return found


def _candidates(ask: Ask) -> Iterator[tuple[str, Ask]]:
    if not ask.models.all():
        yield "take any GPU model", replace(ask, models=np.ones_like(ask.models))
    if not ask.allowed.all():
        yield "loosen the node selector, affinity or tolerations", replace(ask, allowed=np.ones_like(ask.allowed))
    if ask.cpu_milli or ask.memory_bytes:
        yield "ask for less CPU and memory", replace(ask, cpu_milli=0, memory_bytes=0)
