"""Events about waiting pods: one per change of reason, few a second, bounded, and polite to a busy API server."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from scheduler.clock import RealClock
from scheduler.decision.reasons import REASONS
from scheduler.kube.port import ApiError, Object, UnknownOutcome
from scheduler.notices import AGAIN_S, PER_S, QUEUED_MAX, STANDS_S, Notices, event
from tests.cli.stage import Stage

QUOTA, BEHIND = "WaitingForQuota", "WaitingBehindPriority"


class Wall(RealClock):
    """A clock that stands until it is moved."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def wall_us(self) -> int:
        return 1_767_225_600_000_000 + round(self.now_s * 1_000_000)


class Server:
    """Takes Events, or answers with the next of `errors`."""

    def __init__(self) -> None:
        self.events: list[Object] = []
        self.errors: list[Exception] = []
        self.calls = 0

    async def create(self, kind: str, namespace: str, body: Object) -> Object:
        self.calls += 1
        assert (kind, namespace) == ("events", body["metadata"]["namespace"])
        if self.errors:
            raise self.errors.pop(0)
        self.events.append(body)
        return body


class Scene:
    def __init__(self, pods: int = 1) -> None:
        self.stage, self.clock, self.server = Stage(), Wall(), Server()
        self.stage.desk.clock = self.clock
        self.count: Counter[str] = Counter()

        def counted(outcome: str) -> None:
            self.count[outcome] += 1

        self.notices = Notices(self.stage.desk, self.server, self.clock, counted)  # type: ignore[arg-type]
        for number in range(pods):
            self.stage.pod(f"p{number}", 1)
        self.say(QUOTA)

    def say(self, word: str) -> None:
        rows = self.stage.desk.book.rows
        self.stage.desk.order.words.update(dict.fromkeys(rows, word))

    async def run(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.notices.step()
            self.clock.now_s += 1.0

    def told(self) -> list[str]:
        return [one["reason"] for one in self.server.events]


async def test_a_reason_is_told_once_and_again_when_it_changes() -> None:
    scene = Scene()
    await scene.run(int(STANDS_S))
    assert scene.told() == []
    await scene.run(100)
    assert scene.told() == [QUOTA]
    scene.say(BEHIND)
    await scene.run(10)
    assert scene.told() == [QUOTA, BEHIND]
    (first, _) = scene.server.events
    assert first["regarding"]["uid"] == "uid-p0"
    assert first["note"] == REASONS[QUOTA].text
    assert scene.count == {"sent": 2}


async def test_a_reason_that_comes_and_goes_is_told_once_a_minute() -> None:
    scene = Scene()
    for number in range(30):
        scene.say((QUOTA, BEHIND)[number % 2])
        await scene.run(6)
    assert Counter(scene.told()) == {QUOTA: 3, BEHIND: 3}


async def test_what_does_not_wait_any_more_is_not_told() -> None:
    scene = Scene()
    await scene.run(1)
    scene.stage.desk.order.words.clear()
    await scene.run(10)
    assert scene.told() == []
    assert not scene.notices._due


async def test_nothing_is_remembered_of_pods_that_wait_no_longer() -> None:
    scene = Scene(20)
    await scene.run(10)
    assert len(scene.notices._told) == 20
    scene.stage.desk.order.words.clear()
    await scene.run(61)
    assert not scene.notices._told
    assert not scene.notices._sent


async def test_capacity_is_told_in_the_words_of_the_masks() -> None:
    scene = Scene(0)
    scene.stage.pod("wish", 1, annotations={"tessera.dev/gpu-model": "A100"})
    scene.stage.pod("large", 9)
    scene.stage.pod("fits", 1)
    scene.say("WaitingForCapacity")
    await scene.run(10)
    assert {one["regarding"]["name"]: one["reason"] for one in scene.server.events} == {
        "wish": "NoSuchGpuModel",
        "large": "ExceedsNodeSize",
    }


async def test_ten_thousand_waiting_pods_make_no_storm() -> None:
    scene = Scene(10_000)
    for _ in range(60):
        before = scene.server.calls
        await scene.run(1)
        assert scene.server.calls - before <= PER_S
        assert len(scene.notices._due) <= QUEUED_MAX
    assert len(scene.told()) == PER_S * (60 - int(STANDS_S))
    assert 8_000 < scene.count["dropped"] < 10_000  # each once, until it is tried again
    assert len({one["regarding"]["uid"] for one in scene.server.events}) == len(scene.server.events)


async def test_what_was_dropped_is_told_later() -> None:
    scene = Scene(QUEUED_MAX + 1)
    await scene.run(int(AGAIN_S) + 60)
    assert scene.count == {"sent": QUEUED_MAX + 1, "dropped": 1}


async def test_a_busy_server_gets_the_time_it_asks_for() -> None:
    scene = Scene(20)
    scene.server.errors = [ApiError(429, "TooManyRequests", "busy", retry_after_s=30.0)]
    await scene.run(int(STANDS_S) + 30)
    assert scene.server.calls == 1
    await scene.run(10)
    assert scene.count == {"sent": 20}


@pytest.mark.parametrize(
    ("error", "pause"), [(ApiError(403, "Forbidden", "no"), 60), (UnknownOutcome("gone"), 1), (TimeoutError(), 1)]
)
async def test_an_event_that_fails_is_counted_and_ends_nothing(error: Exception, pause: int) -> None:
    scene = Scene(2)
    scene.server.errors = [error]
    await scene.run(int(STANDS_S) + pause)
    assert (scene.server.calls, scene.count) == (1, {"failed": 1})
    await scene.run(5)
    assert scene.count == {"failed": 1, "sent": 1}


def test_the_name_of_an_event_is_legal_however_long_the_pods_is() -> None:
    scene = Scene(0)
    pod = scene.stage.pod("a" * 199 + "-" + "b" * 53, 1)
    body: dict[str, Any] = event(scene.stage.desk.book.rows[pod.uid], QUOTA, 1_767_225_600_000_042)
    assert len(body["metadata"]["name"]) <= 253
    assert body["metadata"]["name"].startswith("a" * 199 + ".")
    assert body["eventTime"] == "2026-01-01T00:00:00.000042Z"
    assert len(body["note"]) <= 1024
    assert all(len(reason.text) <= 1024 for reason in REASONS.values())
