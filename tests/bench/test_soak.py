"""Soaking: a seed repeats, finds what is planted, and says how to see it again."""

from __future__ import annotations

import re

import pytest

from bench.soak import Json, Size, soak, soak_one
from scheduler import binding
from scheduler.app import App
from scheduler.model.reservation import Row

SMALL = Size(nodes=5, pods=20, kinds=("none", "whole"))


def test_a_seed_repeats_to_the_last_journal_line_and_another_does_not() -> None:
    first, again, other = (soak_one(seed, SMALL) for seed in (3, 3, 4))
    assert first["violations"] == {}
    assert first["bound"] >= 10
    assert first["head"] == again["head"]
    assert first["head"] != other["head"]


def test_seeds_add_up_over_processes() -> None:
    said: list[str] = []
    report = soak(range(3, 7), SMALL, said.append, jobs=2)
    alone = [soak_one(seed, SMALL) for seed in range(3, 7)]
    assert report["ok"], said
    assert report["seeds"] == 4
    assert report["bound"] == sum(one["bound"] for one in alone)
    assert report["failed"] == []


def test_a_tessera_that_writes_another_device_than_it_booked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = binding._body

    def careless(row: Row, version: str) -> Json:
        body = honest(row, version)
        notes = body["metadata"]["annotations"]
        notes["tessera.dev/allocation"] = re.sub('"dev":[0-9]+', '"dev":0', notes["tessera.dev/allocation"])
        return body

    monkeypatch.setattr(binding, "_body", careless)
    said: list[str] = []
    report = soak(range(3, 5), SMALL, said.append, jobs=1)
    assert not report["ok"]
    assert {"over_allocations", "drift"} <= report["kinds"].keys()
    assert report["failed"] == [3, 4]
    assert "python -m bench soak --seeds 1 --first 3 --nodes 5 --pods 20" in said[0]


def test_a_seed_that_breaks_the_program_is_a_finding_of_that_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: App) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(App, "start", broken)
    said: list[str] = []
    report = soak(range(3, 4), SMALL, said.append, jobs=1)
    assert report["kinds"] == {"crashed": 1}
    assert "planted" in said[0]
