"""The roll answers what the dict of rows answers, whatever nodes came and went."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.intake import offered
from scheduler.intake.offered import Offered, part
from scheduler.inventory.roll import NONE, Roll

LONGEST = 253


def names_of(names: list[str]) -> Offered:
    with patch.object(offered, "BYTES_MIN", 0):
        parted = part(b'{"Pod":{},"NodeNames":%b}' % orjson.dumps(names))
    assert parted is not None
    return parted[1]


class Cluster:
    """Rows as the columns give them: a hole is filled before a row is added."""

    def __init__(self, *names: str) -> None:
        self.rows: dict[str, int] = {}
        self.holes: list[int] = []
        self.roll = Roll(self.rows)
        for name in names:
            self.put(name)

    def put(self, name: str) -> None:
        row = self.holes.pop() if self.holes else len(self.rows)
        self.rows[name] = row
        self.roll.put(name, row)

    def drop(self, name: str) -> None:
        row = self.rows.pop(name)
        self.holes.append(row)
        self.roll.drop(row)

    def find(self, *names: str) -> list[int]:
        return [int(row) for row in self.roll.find(names_of(list(names)))]

    def in_table(self) -> int:
        """Return how many names the table answers without the dict."""
        kept, names = dict(self.rows), list(self.rows)
        assert self.find(*names) == list(kept.values())
        self.rows.clear()
        found = self.find(*names)
        self.rows.update(kept)
        assert all(row in {NONE, kept[name]} for row, name in zip(found, names, strict=True))
        return sum(row >= 0 for row in found)


def test_prefixes_and_lengths() -> None:
    names = ["a" * length for length in range(1, LONGEST + 1)]
    cluster = Cluster(*names)
    assert cluster.find(*names, "", "b", "a" * 257, "a" * 600) == [*range(LONGEST), -1, -1, -1, -1]
    assert cluster.find(*reversed(names)) == [*reversed(range(LONGEST))]


@pytest.mark.parametrize("longest", [1, 7, 8, 9, 45, 253, 256, 257, 600])
def test_names_longer_than_any_known(longest: int) -> None:
    known = "n" * longest
    cluster = Cluster("m", known)
    assert cluster.find(known, known + "x", known[:-1], "m", "m" * longest) == [
        1,
        -1,
        -1,
        0,
        0 if longest == 1 else -1,
    ]


def test_names_the_table_cannot_hold() -> None:
    cluster = Cluster("", "é", "a\0", "a\0b", "\ud800", "a" * 300, "b")
    assert cluster.find("", "a", "b", "a" * 300, "a" * 299) == [0, -1, 6, 5, -1]
    cluster.put("a")
    assert cluster.find("a", "a") == [7, 7]


def test_nobody_is_known() -> None:
    assert Cluster().find("a", "", "b" * 300) == [-1, -1, -1]


def test_most_names_are_answered_by_the_table_also_after_all_nodes_were_replaced() -> None:
    cluster = Cluster(*(f"gpu-{number:05}.example.internal" for number in range(3000)))
    assert cluster.in_table() > 0.95 * 3000
    for number in range(3000):
        cluster.drop(f"gpu-{number:05}.example.internal")
        cluster.put(f"ip-10-{number // 250}-{number % 250}-7.compute.internal")
        if number % 100 == 0:
            cluster.find("x")
    assert cluster.in_table() > 0.95 * 3000
    assert cluster.find("gpu-00000.example.internal") == [-1]


NAMES = st.text("ab\0é-", max_size=9) | st.sampled_from([f"{'x' * 40}{number}" for number in range(30)])


class ComingAndGoing(RuleBasedStateMachine):
    """Nodes come and go, and whoever asks is told what the dict says."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()

    @rule(name=NAMES)
    def come_or_go(self, name: str) -> None:
        if name in self.cluster.rows:
            self.cluster.drop(name)
        else:
            self.cluster.put(name)

    @rule(many=st.integers(0, 200))
    def many_come(self, many: int) -> None:
        for number in range(many):
            if f"pool-{number}" not in self.cluster.rows:
                self.cluster.put(f"pool-{number}")

    @rule(names=st.lists(NAMES, min_size=1))
    def ask(self, names: list[str]) -> None:
        self.check([name for name in names if name.isascii() and "\0" not in name] or ["a"])

    @rule()
    def ask_all(self) -> None:
        self.check([name for name in self.cluster.rows if name.isascii() and "\0" not in name] or ["a"])

    def check(self, names: list[str]) -> None:
        assert self.cluster.find(*names) == [self.cluster.rows.get(name, -1) for name in names]

    @invariant()
    def rows_are_rows(self) -> None:
        assert sorted(self.cluster.rows.values()) == sorted(set(self.cluster.rows.values()))


TestComingAndGoing = ComingAndGoing.TestCase


@given(st.integers(1, 31), st.data())
def test_two_names_of_one_slot(words: int, data: st.DataObject) -> None:
    cluster = Cluster("a" * 8 * words, "b" * 8 * words, "c")
    cluster.find("c")
    with patch.object(Roll, "_wanted", lambda _, given: np.zeros(len(given), np.uint64)):
        cluster = Cluster("a" * 8 * words, "b" * 8 * words, "c")
        asked = data.draw(st.lists(st.sampled_from([*cluster.rows, "d", ""]), min_size=1))
        assert cluster.find(*asked) == [cluster.rows.get(name, -1) for name in asked]
        assert cluster.in_table() == 1
        gone = data.draw(st.sampled_from(list(cluster.rows)))
        cluster.drop(gone)
        assert cluster.find(*asked) == [cluster.rows.get(name, -1) for name in asked]
