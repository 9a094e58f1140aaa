"""Durations and instants."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.intake.times import RUNTIME_MAX_S, micros, seconds


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("90s", 90),
        ("8h", 28_800),
        ("1h30m", 5400),
        ("2d", 172_800),
        ("1.5h", 5400),
        ("1d12h", 129_600),
        ("1ms", 1),
        ("1500ms", 2),
        ("1ns", 1),
        ("0.1s", 1),
        ("36500d", RUNTIME_MAX_S),
    ],
)
def test_durations_round_up_to_seconds(written: str, expected: int) -> None:
    assert seconds(written) == expected


@pytest.mark.parametrize(
    "written",
    ["", "0s", "90", "h", "-1h", "+1h", "1 h", "1h ", "1w", "1H", "1h-30m", ".5h", "1.h", "36501d", "٣h", "1s" * 8],
)
def test_what_is_no_duration(written: str) -> None:
    assert seconds(written) is None


@given(st.integers(0, 999), st.integers(0, 59), st.integers(1, 59))
def test_pieces_add_up(hours: int, minutes: int, rest: int) -> None:
    assert seconds(f"{hours}h{minutes}m{rest}s") == hours * 3600 + minutes * 60 + rest


@given(st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1)), st.integers(-14 * 60, 14 * 60))  # noqa: DTZ001 - zones are added here
def test_instants_of_any_zone(naive: datetime, offset: int) -> None:
    zoned = naive.replace(tzinfo=timezone(timedelta(minutes=offset)))
    expected = (zoned - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert micros(zoned.isoformat(timespec="microseconds")) == expected
    utc = zoned.astimezone(UTC).replace(tzinfo=None)
    assert micros(utc.isoformat(timespec="microseconds") + "Z") == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        "2026-11-21",
        "2026-11-21T01:13:33",
        "2026-13-21T01:13:33Z",
        "2026-W01-1T00:00:00Z",
        "20261121T011333Z",
        "now",
    ],
)
def test_what_is_no_instant(written: str) -> None:
    assert micros(written) is None
