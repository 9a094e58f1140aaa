"""Draw a cluster: one string a node, one character a device.

    cluster("....", "x.!m", "observed T4 ..x", "-")

Devices: `.` free, `x` taken as a whole, `s` shared (half of it), `m` MIG mode on, `M` cut into MIG instances all over,
`!` broken, `?` not there (a gap); `-` alone = a node without devices. Words before them: `observed` (else exact),
`foreign` (somebody holds an unnamed device), `replicas` (nvidia.com/gpu is no whole GPU), `hole` (no live node), a
model of MODELS (else H100), `cpu=`, `memory=` (free, of 100 each), `pods=`, `shares=` (tokens left) and `1g.10gb=3/7`
(tokens left of all; plenty on exact nodes with devices, none on others, unless told). A device has 100 MiB.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from policies.columns import (
    COLUMN_DTYPES,
    DEVICE_COLUMNS,
    STACKED_COLUMNS,
    Ask,
    Health,
    Kind,
    Mode,
    Snapshot,
    Use,
)
from scheduler import geometry
from scheduler.model.node import Device, Node
from scheduler.model.pod import Amounts

MODELS = ["", "H100", "A100", "T4", "A30", "RTX"]
KEYS = {"H100": "H100-80", "A100": "A100-40", "A30": "A30-24", "RTX": "RTXPRO6000"}
PROFILES = ["", *dict.fromkeys(name for model in geometry.models().values() for name in model.profiles)]
PLENTY, DEVICE_MIB = 64, 100
UNKNOWN = {"zone": -1, "rack": -1, "family": -1, "numa": -1, "link_group": -1}
USES = {"x": Use.WHOLE, "s": Use.SHARED, "M": Use.MIG}


def blank(nodes: int, slots: int, *, profiles: int = 1, resources: int = 1) -> dict[str, Any]:
    """Columns of a table of holes, open for writing."""
    stacked = dict.fromkeys(("slices_free", "slices_total"), profiles)
    stacked |= dict.fromkeys(("extended_free", "extended_total"), resources)
    columns = {}
    for field in fields(Snapshot):
        lead = (slots,) if field.name in DEVICE_COLUMNS else ()
        lead = (stacked[field.name],) if field.name in STACKED_COLUMNS else lead
        columns[field.name] = np.full((*lead, nodes), UNKNOWN.get(field.name, 0), COLUMN_DTYPES[field.name])
    columns["rank"][:] = np.arange(nodes)
    columns["trust"][:] = 1.0
    return columns


def cluster(
    *nodes: str,
    links: dict[int, str] | None = None,
    numa: dict[int, str] | None = None,
    cut: dict[tuple[int, int], str] | None = None,
) -> Snapshot:
    """Columns of the drawn nodes.

    `links` and `numa` give a node's groups, one digit a device; `cut` the instances of a device in MIG mode by row and
    slot, such as `1g.10gb@0 3g.40gb@4`.
    """
    drawn = [node.split() for node in nodes]
    devices = ["" if words[-1] == "-" else words[-1] for words in drawn]
    columns = blank(len(nodes), max([1, *map(len, devices)]), profiles=len(PROFILES))
    for row, (words, row_devices) in enumerate(zip(drawn, devices, strict=True)):
        _node(columns, row, words)
        model = next((word for word in words[:-1] if word in MODELS), "H100")
        for slot, char in enumerate(row_devices):
            _device(columns, slot, row, char)
            if char == "m":
                _cut(columns, slot, row, KEYS.get(model, ""), (cut or {}).get((row, slot), "").split())
        columns["model"][: len(row_devices), row] = MODELS.index(model)
        columns["gpus_total"][row] = len(row_devices.replace("?", ""))
        columns["gpus_free"][row] = columns["gpus_total"][row] - sum(row_devices.count(char) for char in "xs")
    for column, groups in (("link_group", links), ("numa", numa)):
        for row, digits in (groups or {}).items():
            columns[column][: len(digits), row] = [int(digit) for digit in digits]
    return Snapshot(**columns)


def _node(columns: dict[str, Any], row: int, words: list[str]) -> None:
    columns["schedulable"][row] = "hole" not in words
    columns["mode"][row] = Mode.OBSERVED if "observed" in words else Mode.EXACT
    columns["foreign"][row] = "foreign" in words
    columns["whole_gpus"][row] = "replicas" not in words
    amounts = {"cpu": 100, "memory": 100, "pods": 10}
    told = {key: value for key, _, value in (word.partition("=") for word in words) if value}
    amounts |= {key: int(value) for key, value in told.items() if key not in PROFILES}
    for code, profile in enumerate(PROFILES):
        left, _, total = told.get(profile, "0" if {"observed", "-"} & {*words} else str(PLENTY)).partition("/")
        columns["slices_free"][code, row] = int(left)
        columns["slices_total"][code, row] = int(total or left)
    columns["shares_free"][row] = amounts.get("shares", PLENTY)
    for column, word in (("cpu_milli", "cpu"), ("memory_bytes", "memory")):
        columns[f"{column}_free"][row] = amounts[word]
        columns[f"{column}_total"][row] = 100
    columns["storage_bytes_free"][row] = columns["storage_bytes_total"][row] = 100
    columns["pods_free"][row] = amounts["pods"]


def _device(columns: dict[str, Any], slot: int, row: int, char: str) -> None:
    columns["exists"][slot, row] = char != "?"
    columns["mig_mode"][slot, row] = char in "mM"
    columns["use"][slot, row] = USES.get(char, Use.FREE)
    columns["health"][slot, row] = Health.BAD if char == "!" else Health.HEALTHY
    part = {".": 1.0, "!": 1.0, "s": 0.5}.get(char, 0.0)
    columns["milli_free"][slot, row] = 1000 * part
    columns["memory_mib_total"][slot, row] = DEVICE_MIB
    columns["memory_mib_free"][slot, row] = DEVICE_MIB * part


def _cut(columns: dict[str, Any], slot: int, row: int, model: str, instances: list[str]) -> None:
    """A device in MIG mode with these instances."""
    placements, occupancy, engines = geometry.placements(), 0, np.zeros(len(geometry.placements().engines(model)), int)
    for profile, _, start in (word.partition("@") for word in instances):
        shape = placements.shape(model, profile)
        assert shape is not None
        occupancy |= (1 << shape.size) - 1 << int(start)
        engines += shape.engines
    columns["use"][slot, row] = Use.MIG if instances else Use.FREE
    columns["occupancy"][slot, row] = occupancy | 0xFFFF << placements.slices(model) & 0xFFFF
    columns["mig_row"][slot, row] = placements.row(model, occupancy, engines.tolist())


def ask(count: int = 0, *, nodes: int, models: tuple[str, ...] = (), **more: Any) -> Ask:
    """An ask for whole GPUs (0 = CPU-only) of the named models, allowed on every node.

    With `profile` it is one for MIG instances, with `kind=Kind.SHARE` one for shares.
    """
    if "profile" in more:
        profile = more["profile"]
        offer = geometry.placements().offer(profile, [KEYS.get(name, "") for name in MODELS])
        more |= {"kind": Kind.MIG, "profile": PROFILES.index(profile) if profile in PROFILES else 0, "offer": offer}
    known: dict[str, Any] = {
        "kind": Kind.WHOLE if count else Kind.NONE,
        "count": count,
        "cpu_milli": 1,
        "memory_bytes": 1,
        "storage_bytes": 0,
        "extended": np.zeros(1, np.int64),
        "models": np.asarray([not models or (name in models and bool(name)) for name in MODELS]),
        "allowed": np.ones(nodes, np.bool_),
    }
    return Ask(**(known | more))


def node(snapshot: Snapshot, row: int, *, uuids: bool = False) -> Node:
    """The Node that a row of a drawn cluster stands for."""
    slots = int(snapshot.exists[:, row].sum())
    return Node(
        uid=f"uid-{row}",
        name=f"node-{row}",
        resource_version="1",
        mode=Mode(int(snapshot.mode[row])),
        amounts=Amounts(cpu_milli=100, memory_bytes=100),
        pods=10,
        gpus=slots,
        devices=tuple(
            Device(MODELS[snapshot.model[slot, row]], uuid=f"GPU-{row}-{slot}" if uuids else "")
            for slot in range(snapshot.slots)
            if snapshot.exists[slot, row]
        ),
    )
