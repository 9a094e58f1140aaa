"""The annotation `tessera.dev/allocation`: one line of JSON, strictly read, exactly written."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from scheduler.model.allocation import Allocation, Grant
from scheduler.model.pod import AMOUNT_MAX

from .demand import DEVICE_MAX
from .devices import MEMORY_MAX_MIB
from .reading import Unreadable, integer, mapping, name, sequence
from .resources import DEVICES_MAX

BYTES_MAX = 8192
VERSION = 1
_KINDS = ("whole", "mig", "share")
_MODES = ("exact", "observed")
_SLICES_MAX = 16  # bits of an occupancy mask
_MILLI_MAX = 1000


def write_allocation(allocation: Allocation) -> str:
    """Return the annotation's text.

    Raises:
        ValueError: the text would be longer than 8 KiB, so nobody would read it back.
    """
    document = {
        "v": VERSION,
        "id": allocation.id,
        "epoch": allocation.epoch,
        "fence": allocation.fence,
        "node": allocation.node,
        "mode": allocation.mode,
        "containers": {called: [_written(grant) for grant in grants] for called, grants in allocation.containers},
    }
    written = orjson.dumps(document)
    if len(written) > BYTES_MAX:
        raise ValueError(f"the allocation of {allocation.id} takes {len(written)} bytes of {BYTES_MAX}")
    return written.decode()


def read_allocation(text: str) -> Allocation | None:
    """Return what an annotation says, or None where it is not one that `write_allocation` could have written.

    Keys that this version does not know are passed over, so that a later version may add some.
    """
    if len(text) > BYTES_MAX or len(text.encode(errors="replace")) > BYTES_MAX:
        return None
    try:
        return _allocation(mapping(orjson.loads(text), "allocation"))
    except (Unreadable, orjson.JSONDecodeError):
        return None


def _written(grant: Grant) -> dict[str, object]:
    counted = grant.dev < 0
    document: dict[str, object] = {} if counted else {"dev": grant.dev}
    if grant.uuid:
        document["uuid"] = grant.uuid
    document["kind"] = grant.kind
    if grant.kind == "mig":
        document["profile"] = grant.profile
        if not counted:
            document |= {"start": grant.start, "size": grant.size}
    if grant.kind == "share":
        document |= {"milli": grant.milli, "mib": grant.mib}
    if counted:
        document["count"] = grant.count
    return document


def _allocation(raw: Mapping[str, object]) -> Allocation:
    if type(raw.get("v")) is not int or raw["v"] != VERSION:
        raise Unreadable("another version")
    mode = _one_of(raw, "mode", _MODES)
    listed = mapping(_present(raw, "containers"), "containers")
    if len(listed) > BYTES_MAX or not all(listed):
        raise Unreadable("a container has no name")
    return Allocation(
        id=_name(raw, "id"),
        epoch=_count(raw, "epoch", 0, AMOUNT_MAX),
        fence=_count(raw, "fence", 0, AMOUNT_MAX),
        node=_name(raw, "node"),
        mode=mode,
        containers=tuple(
            (name(called, "container"), tuple(_grant(mapping(g, "grant"), mode) for g in sequence(grants, "grants")))
            for called, grants in listed.items()
        ),
    )


def _grant(raw: Mapping[str, object], mode: str) -> Grant:
    kind = _one_of(raw, "kind", _KINDS)
    exact = mode == "exact"
    mig, share = kind == "mig", kind == "share"
    return Grant(
        kind=kind,
        dev=_count(raw, "dev", 0, DEVICES_MAX - 1) if exact else -1,
        count=1 if exact else _count(raw, "count", 1, DEVICE_MAX),
        uuid=_name(raw, "uuid") if "uuid" in raw else "",
        profile=_name(raw, "profile") if mig else "",
        start=_count(raw, "start", 0, _SLICES_MAX - 1) if mig and exact else -1,
        size=_count(raw, "size", 1, _SLICES_MAX) if mig and exact else 0,
        milli=_count(raw, "milli", 1, _MILLI_MAX) if share else 0,
        mib=_count(raw, "mib", 1, MEMORY_MAX_MIB) if share else 0,
    )


def _present(raw: Mapping[str, object], key: str) -> object:
    if raw.get(key) is None:
        raise Unreadable(f"{key} is missing")
    return raw[key]


def _count(raw: Mapping[str, object], key: str, low: int, high: int) -> int:
    return integer(_present(raw, key), key, low, high)


def _name(raw: Mapping[str, object], key: str) -> str:
    found = name(_present(raw, key), key)
    if not found:
        raise Unreadable(f"{key} is empty")
    return found


def _one_of(raw: Mapping[str, object], key: str, known: tuple[str, ...]) -> str:
    found = _name(raw, key)
    if found not in known:
        raise Unreadable(f"{key} is none of {known}")
    return found
