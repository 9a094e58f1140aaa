"""Random clusters and asks: holes, padded slots, other people's devices, less than nothing free."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from policies.columns import Ask, Kind, Mix, Snapshot, empty_mix
from scheduler.geometry import placements
from tests.drawing import blank

MODEL_COUNT = 12  # above the number from which models are looked up rather than compared
RESOURCES = 2
TABLES = placements()
MODEL_KEYS = ["", "T4", *list(TABLES.models)[: MODEL_COUNT - 2]]
PROFILES = ["1g.10gb", "2g.20gb", "1g.6gb+me", "4g.96gb", "9g.1gb"]


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
    made["extended_total"] = rng.integers(0, 4, (RESOURCES, nodes))
    made["extended_free"] = made["extended_total"] - rng.integers(0, 3, (RESOURCES, nodes))
    made["exists"] = rng.random((slots, nodes)) < 0.85
    made["model"] = rng.integers(0, MODEL_COUNT, (slots, nodes), np.int32)
    made["mig_mode"] = rng.random((slots, nodes)) < 0.1
    made["use"] = (rng.integers(1, 4, (slots, nodes)) * (rng.random((slots, nodes)) < 0.3)).astype(np.uint8)
    made["health"] = (rng.integers(1, 6, (slots, nodes)) * (rng.random((slots, nodes)) < 0.15)).astype(np.uint8)
    made["slices_total"] = rng.integers(0, 6, (2, nodes))
    made["slices_free"] = made["slices_total"] - rng.integers(0, 4, (2, nodes))
    made["shares_free"] = rng.integers(-1, 6, nodes)
    made["mig_row"] = (rng.integers(1, TABLES.rows, (slots, nodes)) * (rng.random((slots, nodes)) < 0.5)).astype(
        np.uint16
    )
    made["memory_mib_total"] = rng.integers(0, 9, (slots, nodes), np.int32) * 10
    made["memory_mib_free"] = made["memory_mib_total"] - rng.integers(0, 50, (slots, nodes), np.int32)
    made["milli_free"] = rng.integers(-100, 1001, (slots, nodes), np.int32)
    return made


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Snapshot, Ask, Mix]:
    """A cluster of 0..12 nodes with 0..9 slots, and an ask."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, slots = draw(st.integers(0, 12)), draw(st.integers(0, 9))
    kind = draw(st.sampled_from([Kind.NONE, Kind.WHOLE, Kind.WHOLE, Kind.WHOLE, Kind.MIG, Kind.SHARE]))
    sizes = share_sizes(draw) if kind == Kind.SHARE else {}
    wish = draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
    ask = Ask(
        kind=kind,
        cpu_milli=int(rng.integers(0, 5)),
        memory_bytes=int(rng.integers(0, 5)),
        storage_bytes=int(rng.integers(0, 3)),
        extended=rng.integers(0, 2, RESOURCES),
        models=rng.random(MODEL_COUNT) < wish,
        allowed=rng.random(nodes) < 0.8,
        init_only=draw(st.booleans()),
        **({"count": 0 if kind == Kind.NONE else draw(st.sampled_from([1, 1, 2, 3, 300, 1 << 40]))} | sizes),
        profile=draw(st.integers(0, 1)) if kind == Kind.MIG else -1,
    )
    if kind == Kind.MIG:
        ask = replace(ask, offer=TABLES.offer(draw(st.sampled_from(PROFILES)), MODEL_KEYS))
    mix = mixes(rng) if draw(st.booleans()) else empty_mix(MODEL_COUNT)
    return Snapshot(**columns(rng, nodes, slots)), ask, mix


def mixes(rng: np.random.Generator) -> Mix:
    """A few classes of requests, some of a kind that expected fragmentation leaves out."""
    classes = int(rng.integers(1, 5))
    weight = rng.random(classes) + 0.01
    kind = rng.integers(0, 4, classes).astype(np.uint8)
    milli = np.where(kind == Kind.WHOLE, 1000, rng.choice([0, 250, 400], classes)).astype(np.int32)
    return Mix(
        kind=kind,
        count=rng.integers(1, 4, classes, np.int32),
        cpu_milli=rng.integers(0, 6, classes),
        device_milli=milli,
        device_mib=np.where(milli == 0, rng.integers(1, 60, classes), 0).astype(np.int32),
        profile=np.zeros(classes, np.int32),
        models=rng.random((classes, MODEL_COUNT)) < 0.8,
        weight=(weight / weight.sum()).astype(np.float32),
        price=(rng.random(MODEL_COUNT) * (rng.random() < 0.7)).astype(np.float32),
    )


def share_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a share, by memory, by time or by both, and how the containers ask them."""
    milli, mib = draw(st.sampled_from([(0, 7), (0, 30), (250, 0), (1000, 0), (1, 0), (300, 20), (1, 1)]))
    parts = draw(st.sampled_from([(), (1,), (2,), (1, 1), (2, 1), (1, 2, 2), (3, 3)]))
    return {"device_milli": milli, "device_mib": mib, "parts": parts} | ({"count": sum(parts)} if parts else {})


def permuted(snapshot: Snapshot, ask: Ask, order: np.ndarray) -> tuple[Snapshot, Ask]:
    """The same nodes in another order of rows."""
    return snapshot.take(order), replace(ask, allowed=ask.allowed[order])
