"""What is remembered of pods: the same as reading them anew, for any JSON in any place, and never more than fits."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.intake import pod as reading
from scheduler.intake.memo import KEPT_MAX, Memo
from scheduler.intake.pod import read_pod
from scheduler.intake.reading import Reader, Unreadable
from scheduler.model.pod import Pod
from tests.intake.test_pod import ANY_JSON, RICH, places


@pytest.fixture
def memo() -> Memo[int]:
    """Return an empty memo."""
    return Memo()


def anew(raw: Any) -> Pod:
    """Read a pod as if nothing had been read before."""
    with patch.object(reading, "_ASKS", Memo()), patch.object(reading, "_SELECTIONS", Memo()):
        return read_pod(raw)


@settings(max_examples=600)
@given(st.lists(st.tuples(st.sampled_from(places(RICH)[1:]), ANY_JSON), min_size=1, max_size=3))
def test_a_pod_is_read_as_if_it_were_the_first(changes: list[tuple[tuple[Any, ...], object]]) -> None:
    raw = json.loads(json.dumps(RICH))
    read_pod(raw)
    for place, value in changes:
        where = raw
        try:
            for step in place[:-1]:
                where = where[step]
            where[place[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change took that place away
        assert read_pod(raw) == anew(raw)
        assert read_pod(raw) == anew(raw)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**30, -0.0, False, 0, 1, True, 1.0, "1", None, [], {}])
def test_values_that_json_or_python_call_equal_are_told_apart(value: object) -> None:
    raw = json.loads(json.dumps(RICH))
    for other in (None, 1, 0, "1"):
        raw["spec"]["containers"][0]["resources"]["requests"]["cpu"] = other
        read_pod(raw)
    raw["spec"]["containers"][0]["resources"]["requests"]["cpu"] = value
    assert read_pod(raw) == anew(raw)


def test_the_refusal_comes_with_it_and_the_first_one_stays(memo: Memo[int]) -> None:
    def refuse(reader: Reader) -> int:
        reader.refuse(Unreadable("this is odd; write it even."))
        return 3

    for _ in range(2):
        reader = Reader()
        assert memo.take(["x"], refuse, reader) == 3
        assert reader.refusal is not None
        assert reader.refusal.text.startswith("this is odd")
        other = Reader()
        other.refuse(Unreadable("the first."))
        memo.take(["x"], refuse, other)
        assert other.refusal is not None
        assert other.refusal.text == "the first."


def test_it_reads_once_and_keeps_a_bounded_number(memo: Memo[int]) -> None:
    calls: list[int] = []

    def anew(number: int) -> int:
        calls.append(number)
        return number

    def read(number: int) -> int:
        return memo.take(number, lambda _: anew(number), Reader())

    for number in range(KEPT_MAX + 1):
        assert read(number) == number
    assert read(KEPT_MAX) == KEPT_MAX
    assert len(calls) == KEPT_MAX + 1
    assert read(0) == 0
    assert len(calls) == KEPT_MAX + 2
    assert len(memo._kept) == KEPT_MAX


def test_what_is_not_plain_is_read_every_time(memo: Memo[int]) -> None:
    readers: list[Reader] = []

    def read(reader: Reader) -> int:
        readers.append(reader)
        return 1

    for _ in range(2):
        assert memo.take([object()], read, Reader()) == 1
    assert len(readers) == 2


def test_what_is_large_is_read_every_time() -> None:
    memo = Memo[int](100)

    def refuse(reader: Reader) -> int:
        reader.refuse(Unreadable("too long; write less."))
        return 0

    for size in (50, 100, 100):
        reader = Reader()
        assert memo.take("x" * size, refuse, reader) == 0
        assert reader.refusal is not None
    assert len(memo._kept) == 1


def test_long_selections_do_not_stay_after_their_pods() -> None:
    raw = json.loads(json.dumps(RICH))
    with patch.object(reading._SELECTIONS, "_kept", {}):
        read_pod(raw)
        assert len(reading._SELECTIONS._kept) == 1
        for number in range(3):
            raw["spec"]["nodeSelector"] = {f"key-{number}-{row}": "v" * 60 for row in range(100)}
            assert len(read_pod(raw).request.selection.labels) == 100
        assert len(reading._SELECTIONS._kept) == 1
