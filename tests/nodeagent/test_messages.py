"""Frames, and deltas that lead exactly where they should or are refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.messages import HELLO, Hello, Place, apply, delta, take, write
from nodeagent.report import Activity, BadReport, Device, Health, Report, Sensors, Use, decode, encode

STATES = st.sampled_from(["HEALTHY", "BAD"])
RATIOS = st.none() | st.floats(0, 1)


@st.composite
def reports(draw: st.DrawFn, seq: int) -> Report:
    devices = tuple(
        Device(
            index=at, uuid=f"GPU-{at}", name="H100", bus=f"b{at}", pci_id=1, memory_mib=81559,
            health=Health(draw(STATES), tuple(draw(st.lists(st.sampled_from("abc"), max_size=2)))),
            activity=Activity(busy_ratio=draw(RATIOS), memory_used_mib=draw(st.none() | st.integers(0, 9))),
            sensors=Sensors(power_mw=draw(st.integers(0, 9)), ecc_on=draw(st.none() | st.booleans())),
        )
        for at in range(draw(st.integers(0, 3)))
    )  # fmt: skip
    uses = tuple(Use("GPU-0", None, "external", mib) for mib in draw(st.lists(st.integers(0, 9), max_size=3)))
    return Report("a", "b", seq, seq, "1", devices=devices, uses=uses if devices else ())


@given(reports(1), reports(2))
def test_a_delta_leads_from_one_report_to_the_other(old: Report, new: Report) -> None:
    before, after = encode(old), encode(new)
    body, read = apply(before, delta(before, after))
    assert read == new
    assert decode(body) == new


def test_numbers_and_flags_are_told_apart() -> None:
    old = Report("a", "b", 1, 1, "1", devices=(Device(0, "GPU-0", "H", "b0", 1, 1, mig_pending=False),))
    for value in (True, 0, 0.0):
        tree = orjson.loads(encode(old))
        tree["devices"][0]["mig_pending"] = value
        assert len(orjson.loads(delta(encode(old), orjson.dumps(tree)))["set"]) == 1, value


def old_body() -> bytes:
    return encode(Report("a", "b", 7, 1, "1", devices=(Device(0, "GPU-0", "H", "b0", 1, 1),)))


DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "change",
    [
        [],
        {},
        {"base": 7},
        {"base": 7, "set": {}},
        {"base": 6, "set": []},
        {"base": None, "set": []},
        {"base": 7, "set": [1]},
        {"base": 7, "set": [[[], 1]]},
        {"base": 7, "set": [[["seq"]]]},
        {"base": 7, "set": [["seq", 1]]},
        {"base": 7, "set": [[["nothing"], 1]]},
        {"base": 7, "set": [[["devices", 1, "index"], 1]]},
        {"base": 7, "set": [[["devices", -1, "index"], 1]]},
        {"base": 7, "set": [[["devices", True, "index"], 1]]},
        {"base": 7, "set": [[["devices", "0", "index"], 1]]},
        {"base": 7, "set": [[["seq", "x"], 1]]},
        {"base": 7, "set": [[["devices", [], "index"], 1]]},
        {"base": 7, "set": [[["devices", {}, "index"], 1]]},
        {"base": 7, "set": [[["devices"] * 9, 1]]},
        {"base": 7, "set": [[["seq"], -1]]},
        {"base": 7, "set": [[["devices"], [1]]]},
        {"base": 7, "set": [[["v"], 2]]},
        {"base": 7, "set": [[["seq"], 8]] * 20_001},
        {"base": 7, "set": [[["notes"], DEEP]]},
    ],
)  # fmt: skip
def test_what_is_no_delta_is_refused(change: object) -> None:
    body = b"[" * 5000 if change is None else str(change).replace("'", '"').replace("True", "true").encode()
    with pytest.raises(BadReport):
        apply(old_body(), body.replace(b"None", b"null"))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_delta_or_refused(body: bytes) -> None:
    with pytest.raises(BadReport):
        apply(old_body(), body)


def test_messages_go_through_their_bounds() -> None:
    said = Hello("a", "b", "1")
    frame = write(HELLO, said)
    assert frame[:1] == HELLO
    assert take(Hello, frame[1:]) == said
    for bad in (b"", b"[]", b'{"boot":"b","seq":-1}', b'{"boot":"","seq":1}', b'{"seq":1}', b"x" * 2_000_000):
        with pytest.raises(BadReport):
            take(Place, bad)
