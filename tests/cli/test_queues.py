"""queue and quota, and the API behind them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.intake.queue import read_queue, told_queue
from scheduler.model.queue import Queue
from tests.cli.stage import Stage, tessera
from tests.contract.making import queue

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def stage() -> Stage:
    """A tree of three: `vision` uses 3 of its 2 GPUs, and two of its pods wait."""
    stage = Stage()
    told = [
        read_queue(queue("research")),
        read_queue(queue("vision", parent="research", nominal={"gpu": 2, "H100": 8}, lendLimit={"gpu": 1})),
        read_queue(queue("speech", parent="research", nominal={"gpu": 4}, namespaceSelector={})),
    ]
    stage.desk.queues.replace((one, "") for one in told)
    stage.desk.queues.put(*told_queue(queue("odd", weight=0)))
    stage.desk.queues.put_namespace("default", {})
    stage.bound("runs", "exact-1", 3)
    stage.pod("waits")
    stage.pod("hurries")
    for uid, row in list(stage.desk.book.rows.items()):
        stage.desk.book.rows[uid] = replace(row, queue="vision", priority=7 if row.name == "hurries" else 0)
    return stage


async def test_queues_as_table_and_json(stage: Stage, capsys: Capture) -> None:
    async with stage.serving():
        lines = (await tessera(capsys, "queue", "--api", stage.url)).out.splitlines()
        found = (await tessera(capsys, "queue", "--api", stage.url, "--json")).json
    assert [line.split()[0] for line in lines] == ["QUEUE", "default", "odd", "research", "speech", "vision"]
    assert lines[5].split() == ["vision", "research", "gpu", "3/2,", "H100", "3/8", "gpu", "1", "2", "ok"]
    assert lines[2].split()[-1] == "invalid"
    assert found["ok"] is True
    vision = found["queues"][4]
    assert (vision["used"]["gpu"], vision["borrowed"], vision["pending"]) == (3, {"gpu": 1}, 2)
    assert vision["available"]["gpu"] == 3
    assert found["queues"][0] | {"used": {}} == found["queues"][0] | {"used": {}, "name": "default", "available": {}}


async def test_one_queue_shows_its_line_the_next_one_first(stage: Stage, capsys: Capture) -> None:
    async with stage.serving():
        said = await tessera(capsys, "queue", "vision", "--api", stage.url)
        found = (await tessera(capsys, "queue", "vision", "--api", stage.url, "--json")).json
        speech = (await tessera(capsys, "queue", "speech", "--api", stage.url, "--json")).json
    assert [line.split()[:3] for line in said.out.splitlines()[-2:]] == [
        ["1", "default/hurries", "7"],
        ["2", "default/waits", "0"],
    ]
    assert [(one["position"], one["name"]) for one in found["waiting"]] == [(1, "hurries"), (2, "waits")]
    assert (found["path"], found["namespaces"]) == (["vision", "research"], [])
    assert (speech["namespaces"], speech["waiting"]) == (["default"], [])


async def test_a_queue_that_is_wrong_says_why_and_one_that_is_not_there_too(stage: Stage, capsys: Capture) -> None:
    async with stage.serving():
        odd = await tessera(capsys, "queue", "odd", "--api", stage.url)
        absent = await tessera(capsys, "queue", "no such/queue?", "--api", stage.url, "--json")
    assert "spec.weight must be a whole number" in odd.out
    assert (absent.code, absent.json["ok"], absent.json["code"]) == (1, False, "queue.not_found")
    assert absent.json["text"] == "there is no queue 'no such/queue?'; `tessera queue` lists them"


async def test_quota_shows_the_tree_key_by_key(stage: Stage, capsys: Capture) -> None:
    async with stage.serving():
        lines = (await tessera(capsys, "quota", "--api", stage.url)).out.splitlines()
        found = (await tessera(capsys, "quota", "--api", stage.url, "--json")).json
    rows = [line.split() for line in lines[1:]]
    assert rows[0] == ["default", "no", "limit", *"-------"]
    assert ["odd", "no", "limit", *"------0"] in rows
    assert ["research", "no", "limit", *"-------"] in rows
    assert ["speech", "gpu", "0", "4", "-", "1", "-", "-", "3"] in rows
    at = next(index for index, line in enumerate(lines) if line.startswith("  vision"))
    assert lines[at + 1].startswith("   "), "a queue is named once"
    assert any(row[-8:] == ["gpu", "3", "2", "1", "-", "-", "1", "3"] for row in rows)
    assert [one["name"] for one in found["queues"]] == ["default", "odd", "research", "speech", "vision"]


async def test_an_empty_tree_has_the_built_in_queue(capsys: Capture) -> None:
    stage = Stage()
    async with stage.serving():
        found = (await tessera(capsys, "queue", "--api", stage.url, "--json")).json
    assert [(one["name"], one["nominal"], one["ready"]) for one in found["queues"]] == [("default", {}, True)]
    assert Queue("default").parent == ""
