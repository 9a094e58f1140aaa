"""What a pod that can never run says, and that it is in nobody's way."""

from __future__ import annotations

import pytest

from scheduler.kube.port import Object
from scheduler.waiting import waiting_word
from scheduler.web.explanation import explanation
from tests.simulation.test_queue_way import HELD, held
from tests.simulation.town import job, town


def dongled(pod: Object, count: str = "1") -> Object:
    for amounts in pod["spec"]["containers"][0]["resources"].values():
        amounts["example.com/dongle"] = count
    return pod


@pytest.mark.parametrize("gates", [HELD, []])
async def test_a_resource_that_no_node_has_blocks_nobody_and_is_named(gates: list[Object]) -> None:
    """One slip of the pen at the head of a queue: an extended resource that no node offers."""
    async with town("a") as place:
        slip = dongled(job("slip", gpus=1, schedulingGates=gates))
        pod = await place.world.cluster.create("pods", "default", slip)
        await place.wait(2)
        await held(place, "held", gpus=2)
        await place.pod("direct", gpus=1)
        await place.until(lambda: place.bound().keys() == {"held", "direct"}, 5)
        await place.wait(3)
        row, desk = place.row(pod), place.tessera.desk
        assert waiting_word(desk, row) == "ExceedsNodeSize"
        told = explanation(desk, row)["reasons"][0]
        assert (told["code"], told["class"], "1 example.com/dongle" in told["text"]) == (
            "ExceedsNodeSize",
            "change",
            True,
        )
        assert "example.com/dongle" in told["text_ko"]


async def test_who_could_never_run_says_so_behind_a_head_that_blocks() -> None:
    async with town("a") as place:
        await place.pod("big", gpus=6)
        await place.until(lambda: "big" in place.bound(), 5)
        head, never, next_ = (
            await held(place, "head", gpus=8),
            await held(place, "never", gpus=9),
            await held(place, "next", gpus=8),
        )
        await place.wait(3)
        desk = place.tessera.desk
        words = [waiting_word(desk, place.row(pod)) for pod in (head, never, next_)]
        assert words == ["WaitingForCapacity", "ExceedsNodeSize", "WaitingBehindPriority"]
