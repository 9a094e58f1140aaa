"""The wire format: what is made can be read; what breaks a bound is refused with a sentence."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeagent.report import (
    BYTES_MAX,
    DEVICES_MAX,
    LINKS_MAX,
    PROFILES_MAX,
    REASONS_MAX,
    SLICES_MAX,
    USES_MAX,
    Activity,
    BadReport,
    Device,
    Health,
    Link,
    Lost,
    Most,
    OneOf,
    Profile,
    Real,
    Report,
    Sensors,
    Slice,
    Text,
    Use,
    Whole,
    decode,
    encode,
    plain,
    within,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def device(index: int = 0, **how: Any) -> Device:
    rows = (
        Slice(1, 0, f"MIG-{index}-a", "3g.40gb", 4, 4, 40192),
        Slice(7, None, None, "1g.10gb", 0, 1, 9728),
    )
    made = Device(
        index, f"GPU-{index}", "NVIDIA H100", "00000000:18:00.0", 0x233010DE, 81559, mig_mode="on", slices=rows,
        profiles=(Profile(9, "3g.40gb", 3, 4, 2, 40192, (0, 4)),), links=(Link("switch", 18, 18),),
    )  # fmt: skip
    return replace(made, **how)


def report(**how: Any) -> Report:
    return replace(Report("gpu-1", "boot-1", 7, 1, "0.1.0", devices=(device(0), device(1))), **how)


def largest() -> Report:
    """Every list full, every number and text as long as it may be."""
    word, sentence, big = "w" * 95, "s" * 300, 2**31 - 1
    health = Health("PROBATION", (sentence,) * REASONS_MAX)
    ratios = dict.fromkeys([one.name for one in fields(Activity)], 0.1234)
    activity = Activity(**{**ratios, **dict.fromkeys([n for n in ratios if n.startswith("memory")], 2**24)})  # type: ignore[arg-type]
    sensors = Sensors(**{
        one.name: False if one.type == "bool | None" else big for one in fields(Sensors)
    })  # fmt: skip
    profile = Profile(big, word, 7, 16, 16, 2**24, tuple(range(16)))

    def part(d: int, s: int) -> Slice:
        return Slice(big - s, big, f"{d:03}{s:03}".rjust(63, "s"), word, s, 1, 2**24, health, activity)

    devices = tuple(
        Device(
            d, str(d).rjust(63, "u"), word, word, 2**32 - 1, 2**24, word, big, big, big,
            tuple(Link(f"{at}".rjust(63, "l"), 255, 255) for at in range(LINKS_MAX)), "on", mig_pending=False,
            profiles=(profile,) * PROFILES_MAX, slices=tuple(part(d, s) for s in range(SLICES_MAX)), health=health,
            activity=activity, sensors=sensors, missing=(word,) * REASONS_MAX,
        )
        for d in range(DEVICES_MAX)
    )  # fmt: skip
    use = Use("0".rjust(63, "u"), "s" * 63, "squatter", 2**24, 0.1234, "n" * 63, "p" * 253, "c" * 63, "u" * 36, big)
    return report(devices=devices, uses=(use,) * USES_MAX)


def test_what_is_made_can_be_read() -> None:
    made = report(lost=(Lost(5, None, "GPU is lost"),), uses=(Use("GPU-0", None, "pod", 5, 0.5, "ml", "train"),))
    assert decode(encode(made)) == made


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that an annotation of the format allows, its ends included."""
    if get_origin(hint) in {Union, types.UnionType}:
        return st.none() | values(next(one for one in get_args(hint) if one is not types.NoneType))
    if get_origin(hint) is not Annotated:
        return st.booleans() if hint is bool else st.builds(hint, **parts(hint))
    kind, bound = get_args(hint)
    if isinstance(bound, Most):
        return st.lists(values(get_args(kind)[0]), max_size=min(bound.count, 2)).map(tuple)
    return within_bound(bound)


def within_bound(bound: object) -> st.SearchStrategy[Any]:
    match bound:
        case Text(most, least):
            return st.text(st.characters(categories=("L", "N", "P")), min_size=least, max_size=min(most, 8))
        case Whole(low, high):
            return st.integers(low, high) | st.sampled_from([low, high])
        case Real(low, high):
            return st.floats(low, high)
    assert isinstance(bound, OneOf)
    return st.sampled_from(bound.words)


def parts(cls: type) -> dict[str, st.SearchStrategy[Any]]:
    return {name: values(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(values(Report))
def test_all_that_the_bounds_allow_comes_through_unless_it_contradicts_itself(made: Report) -> None:
    try:
        body = encode(made)
    except BadReport as refused:
        assert re.search("are called|overlaps|mig_mode|one of the report's devices", str(refused))  # noqa: PT017
    else:
        assert decode(body) == made


def test_the_body_is_plain_json_that_names_its_version() -> None:
    raw = orjson.loads(encode(report()))
    assert (raw["v"], raw["node"], raw["seq"], raw["devices"][0]["slices"][0]["start"]) == (1, "gpu-1", 7, 4)


def test_a_field_of_a_later_release_is_passed_over() -> None:
    raw = orjson.loads(encode(report()))
    raw["devices"][0]["later"] = {"any": ["thing"]}
    assert decode(orjson.dumps(raw)) == report()


def test_a_field_with_a_default_may_be_left_out() -> None:
    raw = orjson.loads(encode(report()))
    del raw["lost"], raw["devices"][1]["health"]
    assert decode(orjson.dumps(raw)) == report()


def change(raw: dict[str, Any], path: str, value: object) -> None:
    *way, last = path.split(".")
    at: Any = raw
    for step in way:
        at = at[int(step)] if step.isdigit() else at[step]
    if value is ...:
        del at[last]
    else:
        at[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("v", 2, "version 2 and this side reads version 1"),
        ("v", True, "version true"),
        ("node", "", "node must be a printable string of 1 to 253 characters; it is ''"),
        ("node", "a\nb", "node must be a printable string"),
        ("boot", None, "boot must be a printable string of 1 to 63 characters; it is null"),
        ("seq", -1, "seq must be a whole number between 0 and"),
        ("seq", 1.0, "seq must be a whole number"),
        ("seq", True, "seq must be a whole number between 0 and 9223372036854775743; it is true"),
        ("at_us", ..., "at_us is missing"),
        ("devices", {}, "devices must be a list of at most 32 entries; it is a dict"),
        ("devices", [{}] * 33, "devices must be a list of at most 32 entries; it is 33 entries"),
        ("devices.0", [], "devices[0] must be an object; it is a list"),
        ("devices.1.uuid", "GPU-0", "two devices are called 'GPU-0'"),
        ("devices.1.index", 0, "two device indices are called 0"),
        ("devices.1.slices.0.uuid", "MIG-0-a", "two slices are called 'MIG-0-a'"),
        ("devices.0.slices.0.start", 16, "devices[0].slices[0].start must be a whole number between 0 and 15"),
        ("devices.0.slices.1.start", 5, "devices[0]: instance"),
        ("devices.0.slices.0.start", 14, "overlaps another or ends behind the device"),
        ("devices.0.mig_mode", "off", "has slices and its mig_mode is 'off'"),
        ("devices.0.mig_mode", "yes", "devices[0].mig_mode must be one of none, off, on; it is 'yes'"),
        ("devices.0.mig_pending", 1, "devices[0].mig_pending must be true or false; it is 1"),
        ("devices.0.health.state", "FINE", "devices[0].health.state must be one of HEALTHY, SUSPECT"),
        ("devices.0.activity.busy_ratio", 1.5, "busy_ratio must be a number between 0 and 1; it is 1.5"),
        ("devices.0.activity.busy_ratio", False, "busy_ratio must be a number between 0 and 1; it is false"),
        ("uses", [{"device": "GPU-9", "slice": None, "kind": "pod", "memory_mib": 1}], "uses[0].device must be one of"),
        ("devices.0.uuid", "x" * 64, "devices[0].uuid must be a printable string of 1 to 63 characters"),
    ],
)
def test_a_broken_bound_is_named(path: str, value: object, sentence: str) -> None:
    raw = orjson.loads(encode(report()))
    change(raw, path, value)
    with pytest.raises(BadReport) as refused:
        decode(orjson.dumps(raw))
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"1", b'"v"', b"[" * 5000, b"\xff", b'{"v":1}'])
def test_no_report_is_refused(body: bytes) -> None:
    with pytest.raises(BadReport):
        decode(body)


def test_not_a_number_is_no_ratio() -> None:
    body = encode(report(uses=(Use("GPU-0", None, "pod", 5, 0.5),)))
    for bad in (b"1e999", b"NaN", b"-0.1"):
        with pytest.raises(BadReport):
            decode(body.replace(b":0.5", b":" + bad))


def test_the_largest_report_fits_and_a_larger_body_is_not_read() -> None:
    full = largest()
    size = len(orjson.dumps(full))
    assert size > BYTES_MAX  # the bound on bytes is the tighter one, and keeps memory small
    with pytest.raises(BadReport, match=f"{size} bytes"):
        encode(full)
    assert len(encode(replace(full, devices=full.devices[:8], uses=full.uses[:256]))) <= BYTES_MAX


def test_measured_values_that_break_a_bound_are_left_out() -> None:
    found = within(Sensors, {"power_mw": 5, "temperature_c": -1, "energy_mj": 2**63 - 60, "ecc_on": True})
    assert found == Sensors(power_mw=5, ecc_on=True)
    assert within(Activity, {"busy_ratio": float("nan"), "sm_ratio": None, "memory_mib": 7}) == Activity(memory_mib=7)
    assert plain("a\nb\x00" + "c" * 100) == "ab" + "c" * 93


def test_two_compute_instances_may_share_a_place() -> None:
    parts = tuple(Slice(1, ci, f"MIG-{ci}", "3g.40gb", 4, 4, 1) for ci in (0, 1))
    assert decode(encode(report(devices=(device(slices=parts),)))).devices[0].slices == parts


@given(JSON)
def test_any_json_is_a_report_or_refused(raw: object) -> None:
    body = orjson.dumps({"v": 1, "node": raw, "devices": raw} if not isinstance(raw, dict) else {"v": 1} | raw,
                        option=orjson.OPT_PASSTHROUGH_DATETIME) if small(raw) else b"0"  # fmt: skip
    with pytest.raises(BadReport):
        decode(body)


def small(raw: object) -> bool:
    """Whether orjson can write it: its integers have 64 bits."""
    if isinstance(raw, list):
        return all(small(one) for one in raw)
    if isinstance(raw, dict):
        return all(small(one) for one in raw.values())
    return not isinstance(raw, int) or abs(raw) < 2**63


@given(st.data())
def test_one_changed_value_is_kept_within_bounds_or_refused(data: st.DataObject) -> None:
    raw = orjson.loads(encode(report()))
    at: Any = raw
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    value = data.draw(JSON.filter(small))
    at[key] = value
    body = orjson.dumps(raw)
    try:
        found = decode(body)
    except BadReport as refused:
        assert str(refused).endswith((".", "...")), refused  # noqa: PT017
    else:
        assert decode(encode(found)) == found


def walk(value: object, visit: Callable[[object], None]) -> None:
    visit(value)
    if is_dataclass(value):
        for one in fields(value):
            walk(getattr(value, one.name), visit)
    elif isinstance(value, tuple):
        for part in value:
            walk(part, visit)


def test_what_is_read_is_immutable_all_the_way_down() -> None:
    seen: list[object] = []
    walk(decode(encode(report())), seen.append)
    assert not any(isinstance(one, list | dict) for one in seen)
