"""A desk answers the same whether the offered names come as strings or as the bytes of a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from scheduler.clock import LoopClock, VirtualLoop
from scheduler.decision.pipeline import Policies
from scheduler.desk import Desk
from scheduler.intake.extender import read_filter
from scheduler.intake.node import read_node
from scheduler.intake.offered import Offered
from scheduler.metrics import Metrics
from scheduler.web.extender import Extender
from tests.objects import raw_node, raw_pod

NAMES = [f"gpu-{number:03}.example.internal" for number in range(500)]
ONE = raw_pod("one", 4)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


def desk(loop: VirtualLoop) -> Desk:
    made = Desk(LoopClock(loop), Policies(), fence=3)
    for name in NAMES[::2]:
        node = read_node(raw_node(name, gpus=4), {})
        assert node is not None
        made.registry.put_node(node)
    return made


def sent(raw: dict[str, Any]) -> bytes:
    return b'{"Pod":%b,"Nodes":null,"NodeNames":%b}' % (orjson.dumps(raw), orjson.dumps(NAMES))


def test_rows_are_the_same_and_the_lapsed_node_is_left_out(loop: VirtualLoop) -> None:
    made, args = desk(loop), read_filter(sent(ONE))
    assert isinstance(args.names, Offered)
    every = made.rows(args.pod.uid, NAMES).tolist()
    assert every == made.rows(args.pod.uid, args.names).tolist() == list(range(250))
    (named,) = made.filter(args.pod, args.names).names
    loop.run_until_complete(made.clock.sleep(16))
    made.lapse()
    every.remove(made.registry.columns.rows[named])
    assert made.rows(args.pod.uid, NAMES).tolist() == made.rows(args.pod.uid, args.names).tolist() == every
    gone = made.registry.nodes[NAMES[8]]
    made.registry.remove_node(gone.name, gone.uid)
    assert made.rows("another", args.names).tolist() == made.rows("another", NAMES).tolist()
    made.registry.put_node(replace(gone, name=NAMES[1]))
    assert made.rows("another", args.names).tolist() == made.rows("another", NAMES).tolist()


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_both_verbs_answer_the_same(loop: VirtualLoop, gpus: int) -> None:
    answers = []
    for body in (sent(raw_pod("two", gpus)), sent(raw_pod("two", gpus)).replace(b'","', b'", "')):
        made = desk(loop)
        extender = Extender(made, made.clock, Metrics(made.clock, "test"), str, refused)
        verbs = (extender.filter, extender.prioritize)
        answers.append([loop.run_until_complete(verb(body)) for verb in verbs])
    assert isinstance(read_filter(sent(ONE)).names, Offered)
    assert answers[0] == answers[1]
    (_, filtered), (_, scored) = answers[0]
    assert [each["Host"] for each in orjson.loads(scored)] == NAMES
    assert list(orjson.loads(filtered)["FailedAndUnresolvableNodes"]) == (NAMES if gpus > 4 else [])


async def refused(_: object) -> str:
    return "no"
