"""Folders of objects in, the same out; sentences for people where a folder cannot be used."""

from __future__ import annotations

from pathlib import Path
from random import Random

import orjson
import pytest

from scheduler import ALLOCATION
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.embedded.world import World
from scheduler.errors import ConfigError
from scheduler.ids import seeded_ids
from tests.simulation.town import Town, job, machine, town


def world() -> World:
    loop = VirtualLoop()
    try:
        return World(LoopClock(loop), seeded_ids(Random(1)), Random(1))
    finally:
        loop.close()


def write(folder: Path, nodes: object, pods: object) -> None:
    (folder / "nodes.json").write_bytes(orjson.dumps(nodes))
    (folder / "pods.json").write_bytes(orjson.dumps(pods))


async def test_what_was_dumped_can_be_loaded_again(tmp_path: Path) -> None:
    async with town("a", "b") as place:
        await place.pod("one", gpus=2)
        await place.until(lambda: "one" in place.bound(), 5)
        await place.wait(3)
        place.world.dump(tmp_path / "dump")
        nodes, pods = place.world.cluster.snapshot("nodes"), place.world.cluster.snapshot("pods")
    again = world()
    again.load(tmp_path / "dump")
    for kind, before in (("nodes", nodes), ("pods", pods)):
        for old, new in zip(before, again.cluster.snapshot(kind), strict=True):  # type: ignore[arg-type]
            old["metadata"].pop("resourceVersion"), new["metadata"].pop("resourceVersion")
            assert new == old


@pytest.mark.parametrize(
    ("nodes", "pods", "words"),
    [
        ({"items": [machine("a")]}, [], "pods.json: must be a Kubernetes list"),
        ({"items": [{"kind": "Pod", "metadata": {}}]}, {"items": []}, "nodes.json: item 0 is no Node object"),
        ({"items": []}, {"items": [{"metadata": {"name": "x"}, "spec": {}}]}, "spec.containers: Required value"),
        ({"items": [machine("a"), machine("a")]}, {"items": []}, "already exists"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_a_sentence(
    tmp_path: Path, nodes: object, pods: object, words: str
) -> None:
    write(tmp_path, nodes, pods)
    with pytest.raises(ConfigError, match=words):
        world().load(tmp_path)


def test_a_missing_file_and_one_that_is_no_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nodes\.json: cannot be read"):
        world().load(tmp_path)
    write(tmp_path, {"items": []}, {"items": [job("one")]})
    (tmp_path / "nodes.json").write_text("{")
    with pytest.raises(ConfigError, match=r"nodes\.json: not JSON"):
        world().load(tmp_path)


async def test_a_part_that_breaks_ends_the_run() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    async def run(place: Town) -> None:
        async with place.world.running():
            await place.wait(60)

    async with town("a") as place:
        place.world.kubelet.run = broken  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            await run(place)


async def test_while_nobody_answers_pods_wait_and_nothing_is_written() -> None:
    async with town("a", started=False) as place:
        await place.pod("one")
        await place.wait(30)
        assert place.bound() == {}
        condition = (await place.get("one"))["status"]["conditions"][0]
        assert (condition["reason"], "nobody listens" in condition["message"]) == ("SchedulerError", True)


async def test_the_witness_sees_a_device_that_two_pods_hold() -> None:
    async with town("a", started=False) as place:
        for name in ("one", "two"):
            pod = await place.pod(name)
            allocation = {"v": 1, "id": pod["metadata"]["uid"], "epoch": 1, "fence": 1, "node": "a", "mode": "exact"}
            allocation["containers"] = {"main": [{"dev": 3, "kind": "whole"}]}
            notes = {ALLOCATION: orjson.dumps(allocation).decode()}
            body = {"metadata": {"name": name, "annotations": notes}, "target": {"name": "a"}}
            await place.world.cluster.bind("default", name, body)
            await place.wait(0.1)
            assert bool(place.witness.over_allocations) == (name == "two")
