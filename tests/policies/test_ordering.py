from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.ordering import MICRO, decayed, queue_rank, request_rank, share_milli

DAY = 86_400_000_000
amounts = st.integers(0, 100_000)
times = st.integers(0, 40 * DAY)


@settings(max_examples=300)
@given(before=amounts, rate=amounts, elapsed=times, half_life=st.integers(1, 30 * DAY))
def test_decay_is_what_floating_point_says(before: int, rate: int, elapsed: int, half_life: int) -> None:
    kept = 0.5 ** (elapsed / half_life)
    plain = before * MICRO * kept + rate * MICRO * (1 - kept)
    found = decayed(before * MICRO, rate, elapsed, half_life)
    assert found == pytest.approx(plain, rel=1e-6, abs=max(before, rate) * MICRO * 1e-6 + 1)


@given(before=st.integers(0, 10**12), rate=amounts, elapsed=times)
def test_decay_goes_from_what_was_to_what_is_held_and_never_past(before: int, rate: int, elapsed: int) -> None:
    found, later = decayed(before, rate, elapsed, DAY), decayed(before, rate, elapsed + DAY, DAY)
    low, high = sorted((before, rate * MICRO))
    assert low <= found <= high
    assert abs(rate * MICRO - later) <= abs(rate * MICRO - found)


@settings(max_examples=200)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5 * DAY), st.integers(0, 64)), min_size=1, max_size=12),
    splits=st.integers(2, 5),
)
def test_looking_more_often_changes_next_to_nothing(steps: list[tuple[int, int]], splits: int) -> None:
    once = often = 0
    for elapsed, rate in steps:
        once = decayed(once, rate, elapsed, DAY)
        for part in range(splits):
            piece = elapsed * (part + 1) // splits - elapsed * part // splits
            often = decayed(often, rate, piece, DAY)
    assert abs(once - often) <= 64 * MICRO // 100_000 * splits * len(steps) + splits * len(steps)


def test_half_is_left_after_a_half_life() -> None:
    assert decayed(8 * MICRO, 0, DAY, DAY) == 4 * MICRO
    assert decayed(0, 8, 2 * DAY, DAY) == 6 * MICRO
    assert decayed(8 * MICRO, 0, 100 * DAY, DAY) == 0
    assert decayed(8 * MICRO, 3, -DAY, DAY) == 8 * MICRO, "a clock that went back"


def test_a_number_that_every_machine_must_find() -> None:
    assert decayed(123_456_789, 7, 34_567_890_123, DAY) == 95_252_157


used = st.dictionaries(st.sampled_from("xyz"), st.integers(0, 10**9), max_size=3)


@given(
    used=used,
    entitled=st.dictionaries(st.sampled_from("xyz"), st.integers(0, 50), max_size=3),
    weight=st.integers(1, 9),
)
def test_a_share_is_the_largest_part_of_any_key(used: dict[str, int], entitled: dict[str, int], weight: int) -> None:
    best = 0
    for key, amount in used.items():
        if key in entitled:
            whole = entitled[key] or 1
            best = max(best, amount * 1000 // (whole * MICRO) // weight)
    assert share_milli(used, entitled, weight) == best


def test_who_stays_within_his_own_goes_before_who_borrows_then_the_smaller_share_then_the_name() -> None:
    ranks = [
        queue_rank(borrows=borrows, share=share, name=name)
        for borrows, share, name in [(True, 0, "a"), (False, 9, "c"), (False, 9, "b"), (False, 1, "z")]
    ]
    assert [name for _, _, name in sorted(ranks)] == ["z", "b", "c", "a"]


requests = st.tuples(st.integers(-5, 5), st.integers(0, 3), st.sampled_from("nm"), st.sampled_from("xyz"))


@given(waiting=st.lists(requests, unique=True))
def test_requests_stand_in_line_as_a_plain_search_finds_them(waiting: list[tuple[int, int, str, str]]) -> None:
    def before(one: tuple[int, int, str, str], other: tuple[int, int, str, str]) -> bool:
        if one[0] != other[0]:
            return one[0] > other[0]
        if one[1] != other[1]:
            return one[1] < other[1]
        return one[3] < other[3] if one[2] == other[2] else one[2] < other[2]

    def rank(one: tuple[int, int, str, str]) -> tuple[int, int, str, str]:
        return request_rank(priority=one[0], arrival_us=one[1], namespace=one[2], name=one[3])

    line = sorted(waiting, key=rank)
    for place, one in enumerate(line):
        assert all(not before(other, one) for other in line[place + 1 :])
