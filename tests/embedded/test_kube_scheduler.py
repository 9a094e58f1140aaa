"""The embedded kube-scheduler does what was measured on the real one."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from scheduler.kube.port import Object
from tests.embedded.stage import FULL, HOLD, Reply, answer, machine, refuse_all, staged


async def test_a_pod_goes_filter_prioritize_bind() -> None:
    async with staged() as stage:
        nodes = await stage.nodes(3)
        stage.scores = {"gpu-1": 10}
        await stage.pod("a")
        await stage.settle(1)
        assert [verb for _, verb, _, _ in stage.calls] == ["filter", "prioritize", "bind"]
        assert set(stage.asked("filter")[0]) == set(nodes)
        assert await stage.node_of("a") == "gpu-1"
        assert (await stage.get("a"))["metadata"]["annotations"] == {"bound": "yes"}


async def test_one_node_left_skips_prioritize() -> None:
    async with staged() as stage:
        await stage.nodes(3)
        stage.judge = lambda *_: {"NodeNames": ["gpu-2"]}
        await stage.pod("a")
        await stage.settle(1)
        assert [verb for _, verb, _, _ in stage.calls] == ["filter", "bind"]
        assert await stage.node_of("a") == "gpu-2"


async def test_the_filter_body_is_the_pod_and_names() -> None:
    bodies: list[Object] = []
    async with staged() as stage:
        await stage.nodes(1)

        async def keep(asked: Object) -> Reply:
            bodies.append(asked)
            return answer({"NodeNames": asked["NodeNames"]})

        stage.hooks["filter"] = keep
        made = await stage.pod("a")
        await stage.settle(1)
    assert list(bodies[0]) == ["Pod", "Nodes", "NodeNames"]
    assert bodies[0]["Nodes"] is None
    assert bodies[0]["Pod"]["metadata"] == made["metadata"]
    assert bodies[0]["Pod"]["spec"] == made["spec"]


async def test_constant_text_costs_two_calls() -> None:
    async with staged() as stage:
        await stage.nodes(20)
        stage.judge = refuse_all()
        await stage.pod("a")
        assert await stage.settle(5) == 2
        (condition,) = (await stage.get("a"))["status"]["conditions"]
        assert (condition["reason"], condition["message"]) == (
            "Unschedulable",
            f"0/20 nodes are available: 20 {FULL}. no new claims to deallocate",
        )
        assert await stage.settle(200) == 0


async def test_varying_text_is_a_hot_loop() -> None:
    async with staged() as stage:
        await stage.nodes(1)
        number = itertools.count()
        stage.judge = lambda _, names: {"FailedAndUnresolvableNodes": {names[0]: f"{next(number)} GPUs short"}}
        await stage.pod("a")
        assert await stage.settle(5) >= 300


async def test_a_forgotten_pod_is_tried_after_five_minutes() -> None:
    async with staged() as stage:
        await stage.nodes(1)
        stage.judge = refuse_all()
        await stage.pod("a")
        await stage.settle(10)
        assert await stage.settle(310) == 1


async def test_a_plugin_refusal_asks_no_extender() -> None:
    async with staged() as stage:
        await stage.nodes(2, gpus=1)
        await stage.pod("a", gpus=2)
        assert await stage.settle(5) == 0
        (condition,) = (await stage.get("a"))["status"]["conditions"]
        assert (
            condition["message"]
            == "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. no new claims to deallocate"
        )


@pytest.mark.parametrize(
    ("spec", "node"),
    [({"nodeSelector": {"kubernetes.io/hostname": "gpu-1"}}, "gpu-1"), ({"tolerations": []}, "gpu-0")],
)
async def test_selectors_and_taints_are_plugins(spec: Object, node: str) -> None:
    async with staged() as stage:
        await stage.cluster.create("nodes", "", machine("gpu-0"))
        await stage.cluster.create("nodes", "", machine("gpu-1"))
        await stage.cluster.create("nodes", "", machine("gpu-2", unschedulable=True))
        await stage.cluster.create("nodes", "", machine("gpu-3", taints=[{"key": "a", "effect": "NoSchedule"}]))
        stage.scores = {"gpu-0": 5}
        await stage.pod("a", **spec)
        await stage.settle(1)
        assert set(stage.asked("filter")[0]) <= {"gpu-0", "gpu-1"}
        assert await stage.node_of("a") == node


async def test_assumed_pods_count_at_once() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=4)
        held = asyncio.get_running_loop().create_future()

        async def slow(asked: Object) -> Reply:
            await asyncio.wait([held], timeout=1)
            return await stage.bind(asked)

        stage.hooks["bind"] = slow
        for name in ("a", "b"):
            await stage.pod(name, gpus=3)
        await stage.settle(0.5)
        assert stage.asked("filter", "a")
        assert not stage.asked("filter", "b")
        await stage.settle(30)
        assert (await stage.node_of("a"), await stage.node_of("b")) == ("gpu-0", "")


async def test_pods_of_other_schedulers_take_room_and_are_left_alone() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=4)
        await stage.pod("other", gpus=3, schedulerName="default-scheduler")
        await stage.cluster.bind("default", "other", {"metadata": {"name": "other"}, "target": {"name": "gpu-0"}})
        await stage.pod("waiting", schedulerName="default-scheduler")
        await stage.settle(1)
        await stage.pod("a", gpus=2)
        assert await stage.settle(5) == 0
        assert await stage.node_of("waiting") == ""


async def test_priority_goes_first_then_age() -> None:
    async with staged() as stage:
        for name, priority in (("late", 0), ("first", 5), ("last", 0)):
            await stage.pod(name, priority=priority, gates=(HOLD,))
        await stage.nodes(1)
        hold = asyncio.get_running_loop().create_future()

        async def block(asked: Object) -> Reply:
            await asyncio.wait([hold], timeout=1)
            del stage.hooks["filter"]
            return answer({"NodeNames": asked["NodeNames"]})

        stage.hooks["filter"] = block
        await stage.pod("blocker")
        await stage.settle(0.1)
        for name in ("late", "first", "last"):
            await stage.ungate(name)
        await stage.settle(5)
        assert [pod for _, verb, pod, _ in stage.calls if verb == "filter"] == ["blocker", "first", "late", "last"]


# errors


async def test_errors_back_off_and_say_so() -> None:
    async with staged() as stage:
        await stage.nodes(1)
        stage.judge = lambda *_: {"Error": "ledger down"}
        await stage.pod("a")
        await stage.settle(45)
        times = [at for at, verb, _, _ in stage.calls if verb == "filter"]
        waits = [later - sooner for sooner, later in itertools.pairwise(times)]
        assert len(waits) == 6
        for wait, backoff in zip(waits, (1, 2, 4, 8, 10, 10), strict=True):
            assert backoff <= wait <= backoff + 1.1
        (condition,) = (await stage.get("a"))["status"]["conditions"]
        assert (condition["reason"], condition["message"]) == ("SchedulerError", "ledger down")


@pytest.mark.parametrize("reply", [(500, b"{}"), (204, b""), (200, b"oops"), (200, b'{"NodeNames":["elsewhere"]}')])
async def test_what_is_no_answer_is_an_error(reply: Reply) -> None:
    async with staged() as stage:
        await stage.nodes(1)

        async def broken(asked: Object) -> Reply:
            return reply

        stage.hooks["filter"] = broken
        await stage.pod("a")
        await stage.settle(1)
        (condition,) = (await stage.get("a"))["status"]["conditions"]
        assert condition["reason"] == "SchedulerError"
        del stage.hooks["filter"]
        await stage.settle(10)
        assert await stage.node_of("a") == "gpu-0"


async def test_a_hanging_filter_stops_every_pod_for_two_seconds() -> None:
    async with staged() as stage:
        await stage.nodes(1)

        async def hang(asked: Object) -> Reply:
            del stage.hooks["filter"]
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=60)
            return answer({"NodeNames": asked["NodeNames"]})

        stage.hooks["filter"] = hang
        await stage.pod("a")
        await stage.pod("b")
        await stage.settle(1.9)
        assert not stage.asked("filter", "b")
        await stage.settle(5)
        assert (await stage.node_of("a"), await stage.node_of("b")) == ("gpu-0", "gpu-0")


async def test_nobody_listening_is_an_error() -> None:
    async with staged() as stage:
        await stage.nodes(1)

        async def refuse(asked: Object) -> Reply:
            raise ConnectionRefusedError("nobody listens")

        stage.hooks["filter"] = refuse
        await stage.pod("a")
        await stage.settle(3)
        del stage.hooks["filter"]
        await stage.settle(10)
        assert await stage.node_of("a") == "gpu-0"


async def test_a_failed_prioritize_costs_only_the_score() -> None:
    async with staged() as stage:
        await stage.nodes(2)

        async def broken(asked: Object) -> Reply:
            return 500, b""

        stage.hooks["prioritize"] = broken
        await stage.pod("a")
        await stage.settle(1)
        assert await stage.node_of("a")


async def test_a_bind_error_is_tried_again_from_the_start() -> None:
    async with staged() as stage:
        await stage.nodes(1)

        async def broken(asked: Object) -> Reply:
            return answer({"Error": "ledger down"})

        stage.hooks["bind"] = broken
        await stage.pod("a", gpus=8)
        await stage.settle(12)
        assert len(stage.asked("filter")) == len(stage.asked("bind")) == 4
        del stage.hooks["bind"]
        await stage.settle(12)
        assert await stage.node_of("a") == "gpu-0"


async def test_a_lost_bind_reply_is_not_repeated() -> None:
    async with staged() as stage:
        await stage.nodes(1)

        async def lost(asked: Object) -> Reply:
            await stage.bind(asked)
            await asyncio.wait([asyncio.get_running_loop().create_future()], timeout=60)
            raise AssertionError("nobody waits for this")

        stage.hooks["bind"] = lost
        await stage.pod("a")
        await stage.settle(60)
        assert len(stage.asked("bind")) == 1
        assert await stage.node_of("a") == "gpu-0"


# nominations


async def test_the_nominated_node_is_tried_alone() -> None:
    async with staged() as stage:
        await stage.nodes(5)
        await stage.pod("a", gates=(HOLD,))
        await stage.nominate("a", "gpu-3")
        await stage.ungate("a")
        await stage.settle(1)
        assert [(verb, names) for _, verb, _, names in stage.calls] == [
            ("filter", ("gpu-3",)),
            ("bind", ("gpu-3",)),
        ]
        assert "nominatedNodeName" not in (await stage.get("a"))["status"]


@pytest.mark.parametrize(("clears", "lists"), [(False, [1, 3, 1, 3]), (True, [1, 3, 3])])
async def test_a_refused_nomination_stays_unless_preemption_is_on(clears: bool, lists: list[int]) -> None:
    async with staged(clears_nominations=clears) as stage:
        await stage.nodes(3)
        stage.judge = refuse_all()
        await stage.pod("a", gates=(HOLD,))
        await stage.nominate("a", "gpu-1")
        await stage.ungate("a")
        await stage.settle(5)
        assert [len(names) for names in stage.asked("filter")] == lists
        assert (await stage.get("a"))["status"].get("nominatedNodeName") == (None if clears else "gpu-1")


async def test_a_refused_nomination_goes_on_holding_its_room() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=8)
        stage.judge = lambda pod, names: {"NodeNames": [] if pod["metadata"]["name"] == "a" else names}
        await stage.pod("a", gpus=8, gates=(HOLD,))
        await stage.nominate("a", "gpu-0")
        await stage.ungate("a")
        await stage.settle(5)
        await stage.pod("b")
        await stage.settle(5)
        assert not stage.asked("filter", "b")
        await stage.cluster.patch("pods", "default", "a", {"status": {"nominatedNodeName": None}}, subresource="status")
        await stage.settle(5)
        assert await stage.node_of("b") == "gpu-0"


async def test_an_error_on_the_nominated_node_brings_the_full_list_at_once() -> None:
    async with staged() as stage:
        await stage.nodes(3)
        stage.judge = lambda _, names: {"Error": "late"} if len(names) == 1 else {"NodeNames": ["gpu-2"]}
        await stage.pod("a", gates=(HOLD,))
        await stage.nominate("a", "gpu-1")
        await stage.ungate("a")
        await stage.settle(0.5)
        assert [len(names) for names in stage.asked("filter")] == [1, 3]
        assert await stage.node_of("a") == "gpu-2"


async def test_errors_twice_clear_the_nomination() -> None:
    async with staged() as stage:
        await stage.nodes(3)
        stage.judge = lambda *_: {"Error": "ledger down"}
        await stage.pod("a", gates=(HOLD,))
        await stage.nominate("a", "gpu-1")
        await stage.ungate("a")
        await stage.settle(0.5)
        assert "nominatedNodeName" not in (await stage.get("a"))["status"]


async def test_a_new_nomination_wakes_a_refused_pod() -> None:
    async with staged() as stage:
        await stage.nodes(3)
        stage.judge = refuse_all()
        await stage.pod("a")
        await stage.settle(5)
        stage.judge = lambda _, names: {"NodeNames": names}
        await stage.nominate("a", "gpu-2")
        await stage.settle(0.05)
        assert stage.asked("filter")[-1] == ("gpu-2",)
        assert await stage.node_of("a") == "gpu-2"


@pytest.mark.parametrize("node", ["gpu-0", "nowhere"])
async def test_a_cordoned_or_unknown_nominated_node_means_the_full_list(node: str) -> None:
    async with staged() as stage:
        await stage.nodes(3)
        await stage.cluster.patch("nodes", "", "gpu-0", {"spec": {"unschedulable": True}})
        await stage.pod("a", gates=(HOLD,))
        await stage.nominate("a", node)
        await stage.ungate("a")
        await stage.settle(1)
        assert all("gpu-0" not in names for names in stage.asked("filter"))
        assert len(stage.asked("filter")[0]) > 1
        assert await stage.node_of("a") in {"gpu-1", "gpu-2"}


async def test_a_nomination_holds_room_against_its_equals_and_not_its_betters() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=8)
        await stage.pod("reserved", gpus=8, priority=5, gates=(HOLD,))
        await stage.nominate("reserved", "gpu-0")
        await stage.settle(1)
        await stage.pod("equal", gpus=1, priority=5)
        await stage.settle(5)
        assert not stage.asked("filter")
        await stage.pod("better", gpus=1, priority=6)
        await stage.settle(1)
        assert await stage.node_of("better") == "gpu-0"


async def test_a_gated_nomination_is_lost_at_a_restart_until_the_pod_changes() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=8)
        await stage.pod("reserved", gpus=8, gates=(HOLD,))
        await stage.nominate("reserved", "gpu-0")
        await stage.settle(1)
        await stage.kube_scheduler.stop()
        stage.kube_scheduler.start()
        await stage.settle(1)
        stage.judge = refuse_all()
        await stage.pod("other")
        assert await stage.settle(5) == 2
        await stage.annotate("reserved", "1")
        await stage.annotate("other", "1")
        assert await stage.settle(20) == 0


# the whole


ROOT = Path(__file__).parents[2]


async def test_sampling_names_as_many_nodes_as_kubernetes_does() -> None:
    async with staged(percentage=0) as stage:
        stage.cluster.preload("nodes", [machine(f"gpu-{number:05}") for number in range(5000)])
        await stage.settle(1)
        for number in range(2):
            await stage.pod(f"pod-{number}")
        await stage.settle(2)
        first, second = stage.asked("filter")
        assert (len(first), len(second)) == (500, 500)
        assert not set(first) & set(second)


async def test_a_restarted_kube_scheduler_starts_from_the_cluster() -> None:
    async with staged() as stage:
        await stage.nodes(1, gpus=4)
        await stage.pod("a", gpus=4)
        await stage.settle(1)
        await stage.kube_scheduler.stop()
        await stage.pod("b", gpus=4)
        await stage.settle(1)
        stage.kube_scheduler.start()
        await stage.settle(20)
        assert len(stage.asked("bind")) == 1
        await stage.cluster.delete("pods", "default", "a", grace_s=0)
        await stage.settle(5)
        assert await stage.node_of("b") == "gpu-0"


async def calls_of(seed: int) -> bytes:
    async with staged(seed=seed) as stage:
        await stage.nodes(6)
        for number in range(40):
            await stage.pod(f"pod-{number}", gpus=number % 4 + 1)
        await stage.settle(20)
        return orjson.dumps(stage.calls)


SCRIPT = """
import hashlib
from scheduler.clock import VirtualLoop
from tests.embedded.test_kube_scheduler import calls_of
loop = VirtualLoop()
calls = [hashlib.sha256(loop.run_until_complete(calls_of(seed))).hexdigest() for seed in (3, 4)]
loop.close()
print(*calls)
"""


def digests(hash_seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


def test_the_same_seed_does_the_same_whatever_the_hashes() -> None:
    first = digests("1")
    assert first == digests("2")
    assert first[0] != first[1]
