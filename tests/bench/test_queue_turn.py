"""The bench of the turn, on a small cluster: the same seed decides the same, and every grant is looked at."""

from __future__ import annotations

import pytest

from bench import queue_turn


def test_the_same_seed_decides_the_same() -> None:
    told: list[str] = []
    first, second = (queue_turn.run_queue_turn(40, 120, "none", 3, told.append) for _ in range(2))
    assert first["wrong"] == []
    assert 0 < first["reserved"] <= first["decided"]
    assert first["journal_digest"] == second["journal_digest"]
    assert queue_turn.run_queue_turn(40, 120, "none", 4, told.append)["journal_digest"] != first["journal_digest"]


def test_a_queue_beyond_its_quota_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    small = (*queue_turn.QUEUES[:3], queue_turn.Queue("free", nominal={"gpu": 0}, namespaces=queue_turn.ALL))
    given = queue_turn.Queue("free", namespaces=queue_turn.ALL)
    replace = queue_turn.Desk.__post_init__

    def without_limit(desk: queue_turn.Desk) -> None:
        replace(desk)
        told = desk.queues.replace
        desk.queues.replace = lambda _: told([*((one, "") for one in small[:3]), (given, "")])  # type: ignore[method-assign]

    monkeypatch.setattr(queue_turn, "QUEUES", small)
    monkeypatch.setattr(queue_turn.Desk, "__post_init__", without_limit)
    report = queue_turn.run_queue_turn(40, 120, "none", 3, str)
    assert not report["ok"]
    assert report["wrong"][0].startswith("queue free holds")
