"""The allocation annotation: written as pinned, read strictly, there and back."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.intake.allocation import BYTES_MAX, read_allocation, write_allocation
from scheduler.model.allocation import Allocation, Grant

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)
PROFILES = st.sampled_from(["1g.10gb", "3g.40gb", "1g.24gb+me.all"])
COUNTS = st.integers(0, 1 << 62)


def grants(*, exact: bool) -> st.SearchStrategy[Grant]:
    place: dict[str, Any] = (
        {"dev": st.integers(0, 63), "uuid": st.just("") | NAMES} if exact else {"count": st.integers(1, 1 << 40)}
    )
    slices: dict[str, Any] = {"start": st.integers(0, 15), "size": st.integers(1, 16)} if exact else {}
    whole = st.builds(Grant, kind=st.just("whole"), **place)
    mig = st.builds(Grant, kind=st.just("mig"), profile=PROFILES, **place, **slices)
    share = st.builds(Grant, kind=st.just("share"), milli=st.integers(1, 1000), mib=st.integers(1, 2**31 - 1), **place)
    return whole | mig | share


def allocations(mode: str) -> st.SearchStrategy[Allocation]:
    held = st.lists(grants(exact=mode == "exact"), min_size=1, max_size=8).map(tuple)
    containers = st.dictionaries(NAMES, held, max_size=4).map(lambda found: tuple(found.items()))
    return st.builds(
        Allocation, id=NAMES, epoch=COUNTS, fence=COUNTS, node=NAMES, mode=st.just(mode), containers=containers
    )


@given(allocations("exact") | allocations("observed"))
def test_there_and_back(allocation: Allocation) -> None:
    written = write_allocation(allocation)
    assert "\n" not in written
    assert read_allocation(written) == allocation


def test_exact_text() -> None:
    grant = Grant("mig", dev=0, uuid="GPU-1", profile="3g.40gb", start=4, size=4)
    share, whole = Grant("share", dev=2, milli=250, mib=20_480), Grant("whole", dev=3)
    allocation = Allocation("r-1", 1, 1, "gpu-00017", "exact", (("main", (grant,)), ("side", (share, whole))))
    assert write_allocation(allocation) == (
        '{"v":1,"id":"r-1","epoch":1,"fence":1,"node":"gpu-00017","mode":"exact","containers":{'
        '"main":[{"dev":0,"uuid":"GPU-1","kind":"mig","profile":"3g.40gb","start":4,"size":4}],'
        '"side":[{"dev":2,"kind":"share","milli":250,"mib":20480},{"dev":3,"kind":"whole"}]}}'
    )


def test_observed_and_cpu_only_text() -> None:
    held = (Grant("whole", count=2), Grant("mig", profile="1g.10gb", count=1))
    written = write_allocation(Allocation("r", 2, 3, "n", "observed", (("main", held),)))
    assert json.loads(written)["containers"] == {
        "main": [{"kind": "whole", "count": 2}, {"kind": "mig", "profile": "1g.10gb", "count": 1}]
    }
    assert write_allocation(Allocation("r", 2, 3, "n", "observed")).endswith('"containers":{}}')


def test_too_long_is_never_written() -> None:
    held = tuple(Grant("whole", dev=dev, uuid="GPU-" + "0" * 200) for dev in range(64))
    with pytest.raises(ValueError, match="8192"):
        write_allocation(Allocation("r", 1, 1, "n", "exact", (("main", held),)))
    assert read_allocation(" " * BYTES_MAX + "{}") is None


DOCUMENT: dict[str, Any] = {
    "v": 1,
    "id": "r",
    "epoch": 1,
    "fence": 1,
    "node": "n",
    "mode": "exact",
    "containers": {"main": [{"dev": 0, "kind": "mig", "profile": "1g.10gb", "start": 0, "size": 1}]},
}


def altered(path: tuple[Any, ...], value: object) -> str:
    document = json.loads(json.dumps(DOCUMENT))
    where = document
    for step in path[:-1]:
        where = where[step]
    if value is ...:
        del where[path[-1]]
    else:
        where[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            (path, value)
            for path in [("v",), ("epoch",), ("fence",)]
            for value in (..., None, "1", 1.0, True, -1, 1 << 63)
        ),
        *((path, value) for path in [("id",), ("node",)] for value in (..., None, "", 1, "x" * 254)),
        *((("mode",), value) for value in (..., None, "both", 1)),
        *((("containers",), value) for value in (..., None, [], "main", {"": []}, {"main": {}}, {"main": [1]})),
        *(
            (("containers", "main", 0, key), value)
            for key in ("dev", "start", "size")
            for value in (..., None, -1, 64, "0", 0.0, True)
        ),
        *((("containers", "main", 0, "kind"), value) for value in (..., None, "gpu", 1)),
        *((("containers", "main", 0, "profile"), value) for value in (..., None, "", 1)),
        (("containers", "main", 0, "uuid"), ""),
        (("v",), 2),
    ],
)
def test_what_is_not_quite_an_allocation_is_none(path: tuple[Any, ...], value: object) -> None:
    assert read_allocation(json.dumps(DOCUMENT)) is not None
    assert read_allocation(altered(path, value)) is None


def test_keys_of_a_later_version_are_passed_over() -> None:
    assert read_allocation(altered(("more",), {"x": 1})) == read_allocation(json.dumps(DOCUMENT))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*DOCUMENT, "main", "dev"]) | st.text(), inner, max_size=4)
    ),
)


@given(
    st.text()
    | JSON.map(
        lambda value: orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS, default=str).decode() if _fits(value) else "{"
    )
)
def test_any_text_is_read_or_none(written: str) -> None:
    allocation = read_allocation(written)
    assert allocation is None or read_allocation(write_allocation(allocation)) == allocation


def _fits(value: object) -> bool:
    """Integers of more than 64 bits are not orjson's to write."""
    if isinstance(value, int):
        return abs(value) < 1 << 63
    if isinstance(value, dict):
        return all(map(_fits, value.values()))
    return not isinstance(value, list) or all(map(_fits, value))
