"""The simulation itself: kept seeds are replayed for ever, a seed repeats exactly, and what is wrong is seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scheduler.inventory.registry import Booking, Registry, Source
from scheduler.queueing.charging import Charging
from tests.simulation.episode import play

KEPT = sorted((Path(__file__).resolve().parent.parent / "seeds").glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_seed_that_once_found_something_finds_nothing(path: Path) -> None:
    assert play(json.loads(path.read_text())["seed"]).violation == ""


def test_a_seed_repeats_exactly() -> None:
    first, second = play(3), play(3)
    assert first.violation == ""
    assert first == second
    assert first.pods > 10
    assert first.bound > 0
    assert first.looks > 50


def _found(seeds: range) -> str:
    return "; ".join(filter(None, (play(seed).violation for seed in seeds)))


def test_quota_that_is_not_charged_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Charging, "give_back", lambda self, uid: self._charged.pop(uid, None))
    assert "I3" in _found(range(4))


def test_devices_that_are_claimed_and_not_booked_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    say = Registry.say

    def lossy(self: Registry, uid: str, source: Source, held: Booking) -> None:
        if source is not Source.CLAIMED:
            say(self, uid, source, held)

    monkeypatch.setattr(Registry, "say", lossy)
    assert "I1" in _found(range(8))
