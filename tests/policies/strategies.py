"""Random clusters and asks: holes, padded slots, other people's devices, less than nothing free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from policies.columns import Ask, Kind, Mix, Snapshot, empty_mix
from tests.drawing import blank

MODEL_COUNT = 12  # above the number from which models are looked up rather than compared
RESOURCES = 2


def columns(rng: np.random.Generator, nodes: int, slots: int) -> dict[str, Any]:
    """Random columns; every fact is drawn by itself, so also contradictions occur."""
    made = blank(nodes, slots, profiles=2, resources=RESOURCES)
    made["schedulable"] = rng.random(nodes) < 0.9
    made["mode"] = rng.integers(0, 2, nodes, np.uint8)
    made["rank"] = rng.permutation(nodes).astype(np.int32)
    made["whole_gpus"] = rng.random(nodes) < 0.8
    made["foreign"] = rng.random(nodes) < 0.1
    for amount in ("cpu_milli", "memory_bytes", "storage_bytes"):
        made[f"{amount}_total"] = rng.integers(0, 9, nodes)
        made[f"{amount}_free"] = made[f"{amount}_total"] - rng.integers(0, 11, nodes)
    made["pods_free"] = rng.integers(-1, 3, nodes)
    made["gpus_total"] = rng.integers(0, slots + 1, nodes)
    made["gpus_free"] = made["gpus_total"] - rng.integers(0, 3, nodes)
    made["extended_free"] = rng.integers(-1, 3, (RESOURCES, nodes))
    made["exists"] = rng.random((slots, nodes)) < 0.85
    made["model"] = rng.integers(0, MODEL_COUNT, (slots, nodes), np.int32)
    made["mig_mode"] = rng.random((slots, nodes)) < 0.1
    made["use"] = (rng.integers(1, 4, (slots, nodes)) * (rng.random((slots, nodes)) < 0.3)).astype(np.uint8)
    made["health"] = (rng.integers(1, 6, (slots, nodes)) * (rng.random((slots, nodes)) < 0.15)).astype(np.uint8)
    return made


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Snapshot, Ask, Mix]:
    """A cluster of 0..12 nodes with 0..9 slots, and an ask."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, slots = draw(st.integers(0, 12)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from([Kind.NONE, Kind.WHOLE, Kind.WHOLE, Kind.WHOLE, Kind.MIG, Kind.SHARE]))
    wish = draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
    ask = Ask(
        kind=kind,
        count=0 if kind == Kind.NONE else draw(st.sampled_from([1, 1, 2, 3, 300, 1 << 40])),
        cpu_milli=int(rng.integers(0, 5)),
        memory_bytes=int(rng.integers(0, 5)),
        storage_bytes=int(rng.integers(0, 3)),
        extended=rng.integers(0, 2, RESOURCES),
        models=rng.random(MODEL_COUNT) < wish,
        allowed=rng.random(nodes) < 0.8,
        init_only=draw(st.booleans()),
    )
    return Snapshot(**columns(rng, nodes, slots)), ask, empty_mix(MODEL_COUNT)


def permuted(snapshot: Snapshot, ask: Ask, order: np.ndarray) -> tuple[Snapshot, Ask]:
    """The same nodes in another order of rows."""
    return snapshot.take(order), replace(ask, allowed=ask.allowed[order])
