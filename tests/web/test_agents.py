"""Node agents as Tessera meets them: who may speak for a node, what counts, and what silence does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import orjson
import pytest
import trustme
from aiohttp import web
from joserfc import jwt
from joserfc.jwk import OctKey

from nodeagent.messages import ACK, DELTA, FULL, MESSAGE_MAX, PAST, PATH, REFUSED, WANTED, WELCOME, Place, delta, take
from nodeagent.report import encode
from nodeagent.stream import LineError, Stream, Tessera
from policies.columns import Health
from scheduler.clock import LoopClock, RealClock
from scheduler.errors import UnavailableError
from scheduler.intake.node import read_node
from scheduler.web.agents import SILENT_S, Agents, Caller, HungUp, Outcome, Talk, agents_app
from scheduler.web.patience import GuardedRunner
from scheduler.web.tls import Files, RotatingContext, TlsSite
from scheduler.web.vouching import by_kubernetes, by_token
from tests.objects import raw_node
from tests.virtual import virtual
from tests.web.agent_parts import (
    BOOT,
    CALLER,
    GPUS,
    answer,
    counted,
    device,
    full,
    greeted,
    hello,
    report,
    tessera,
    well,
)


def health(agents: Agents, node: str = "a") -> list[int]:
    registry = agents.desk.registry
    return list(registry.snapshot().health[:GPUS, registry.columns.rows[node]].tolist())


def closed(agents: Agents, node: str = "a") -> bool:
    registry = agents.desk.registry
    return bool(registry.snapshot().foreign[registry.columns.rows[node]])


def test_reports_full_and_as_deltas() -> None:
    agents = tessera(RealClock())
    talk = Talk(agents, CALLER)
    frame = talk.hear(hello())
    assert (frame[:1], take(Place, frame[1:])) == (WELCOME, Place(BOOT, 0))
    first, second = well(5), report(6, device(0), device(1, "BAD"), device(2), device(3))
    assert answer(talk.hear(full(first))) == (ACK, 5, "")
    assert answer(talk.hear(DELTA + delta(encode(first), encode(second)))) == (ACK, 6, "")
    assert health(agents) == [Health.HEALTHY, Health.BAD, Health.HEALTHY, Health.HEALTHY]
    assert take(Place, Talk(agents, CALLER).hear(hello())[1:]) == Place(BOOT, 6)
    assert [counted(agents, one) for one in (Outcome.FULL, Outcome.DELTA, Outcome.REPLACED)] == [1, 1, 1]


def test_a_gap_asks_for_the_whole_report() -> None:
    agents = tessera(RealClock())
    talk = greeted(agents)
    bodies = [encode(well(seq)) for seq in (5, 6, 7)]
    assert talk.hear(DELTA + delta(bodies[0], bodies[1])) == WANTED, "nothing to make it against"
    talk.hear(FULL + bodies[0])
    assert talk.hear(DELTA + delta(bodies[1], bodies[2])) == WANTED
    assert talk.hear(DELTA + delta(bodies[0], bodies[1])) == WANTED, "until a whole one comes"
    assert answer(talk.hear(FULL + bodies[2])) == (ACK, 7, "")
    assert counted(agents, Outcome.GAP) == 3


def test_what_is_older_does_not_count() -> None:
    agents = tessera(RealClock())
    talk = greeted(agents)
    talk.hear(full(report(9, device(0), device(1), device(2, "BAD"), device(3))))
    before = health(agents)
    assert answer(talk.hear(full(well(8))))[:2] == (REFUSED, 8)
    assert answer(talk.hear(full(well(9)))) == (ACK, 9, ""), "the same again is answered again"
    assert health(agents) == before
    assert [counted(agents, one) for one in (Outcome.OLDER, Outcome.DUPLICATE)] == [1, 1]


def test_a_new_start_of_the_machine_begins_anew_and_the_old_one_is_over() -> None:
    agents = tessera(RealClock())
    greeted(agents).hear(full(well(9)))
    assert take(Place, Talk(agents, CALLER).hear(hello(boot="boot-2"))[1:]) == Place("boot-2", 0)
    talk = greeted(agents, boot="boot-2")
    assert answer(talk.hear(full(well(1, boot="boot-2")))) == (ACK, 1, "")
    with pytest.raises(HungUp, match="started anew") as caught:
        greeted(agents, boot=BOOT)
    assert caught.value.outcome is Outcome.OLDER


def test_the_past_counts_once_and_changes_nothing() -> None:
    agents = tessera(RealClock())
    taken: list[int] = []
    agents.remember = lambda one: taken.append(one.seq)
    talk = greeted(agents)
    talk.hear(full(well(9)))
    for seq in (3, 4, 3, 9, 8):
        assert answer(talk.hear(PAST + encode(report(seq, device(0, "BAD"))))) == (ACK, seq, "")
    assert answer(talk.hear(PAST + encode(report(4, boot="boot-0")))) == (ACK, 4, "")
    assert taken == [3, 4, 8, 4]
    assert health(agents) == [Health.HEALTHY] * GPUS
    assert counted(agents, Outcome.DUPLICATE) == 2
    with pytest.raises(HungUp):
        greeted(agents, boot="boot-0")
    assert answer(greeted(agents).hear(full(well(10)))) == (ACK, 10, "")


def another_machine(agents: Agents) -> None:
    node = read_node(raw_node("a", gpus=GPUS, uid="uid-new"), {})
    assert node is not None
    agents.desk.registry.put_node(node)


def pod_gone(agents: Agents) -> None:
    agents.desk.registry.remove_pod("uid-agent")


SPOOFS: dict[str, tuple[Caller, Callable[[Agents], None] | None, bytes, bytes | None, Outcome]] = {
    # whose token, what happens before, HELLO, the report after it, and what becomes of it
    "HELLO for another node": (CALLER, None, hello("b"), None, Outcome.OTHER_NODE),
    "report about another node": (CALLER, None, hello(), full(well(1, node="b")), Outcome.OTHER_NODE),
    "past of another node": (CALLER, None, hello(), PAST + encode(well(1, node="b")), Outcome.OTHER_NODE),
    "unknown node": (Caller("c", "uid-c", "uid-agent"), None, hello("c"), None, Outcome.UNKNOWN_NODE),
    "token of the machine before": (CALLER, another_machine, hello(), None, Outcome.OTHER_NODE),
    "HELLO names another Node object": (CALLER, None, hello(uid="uid-b"), None, Outcome.OTHER_NODE),
    "pod on another node": (replace(CALLER, pod_uid="uid-agent-b"), None, hello(), None, Outcome.NO_POD),
    "pod that has ended": (replace(CALLER, pod_uid="uid-over"), None, hello(), None, Outcome.NO_POD),
    "pod that is gone": (CALLER, pod_gone, hello(), None, Outcome.NO_POD),
    "token that is over": (replace(CALLER, until_us=1), None, hello(), None, Outcome.EXPIRED),
    "start before the present one": (CALLER, lambda agents: started_anew(agents), hello(), None, Outcome.OLDER),  # noqa: PLW0108 - named below
    "another start than HELLO's": (CALLER, None, hello(), full(well(1, boot="x")), Outcome.OLDER),
    "report without HELLO": (CALLER, None, full(well(1)), None, Outcome.MALFORMED),
}


def started_anew(agents: Agents) -> None:
    greeted(agents).hear(full(well(1)))
    greeted(agents, boot="boot-2").hear(full(well(1, boot="boot-2")))


@pytest.mark.parametrize("case", SPOOFS)
def test_the_spoof_is_refused_and_changes_nothing(case: str) -> None:
    caller, first, greeting, frame, outcome = SPOOFS[case]
    agents = tessera(RealClock())
    if first is not None:
        first(agents)
    registry = agents.desk.registry
    before, reports = registry.generation, counted(agents, Outcome.FULL)
    talk = Talk(agents, caller)
    if frame is not None:
        talk.hear(greeting)
    with pytest.raises(HungUp) as caught:
        talk.hear(greeting if frame is None else frame)
    assert caught.value.outcome is outcome
    assert str(caught.value)
    assert (registry.generation, counted(agents, Outcome.FULL)) == (before, reports)


@pytest.mark.parametrize(("happens", "outcome"), [(another_machine, Outcome.OTHER_NODE), (pod_gone, Outcome.NO_POD)])
def test_who_loses_the_right_loses_it_at_once(happens: Callable[[Agents], None], outcome: Outcome) -> None:
    agents = tessera(RealClock())
    talk = greeted(agents)
    talk.hear(full(well(1)))
    happens(agents)
    with pytest.raises(HungUp) as caught:
        talk.hear(full(well(2)))
    assert caught.value.outcome is outcome


def test_more_gpus_than_the_node_can_have_are_refused() -> None:
    agents = tessera(RealClock())
    talk = greeted(agents)
    talk.hear(full(well(1)))
    generation = agents.desk.registry.generation
    for seq, one in enumerate([well(2, lost=1), report(3, *map(device, range(GPUS + 1)))], start=2):
        kind, number, why = answer(talk.hear(full(one)))
        assert (kind, number) == (REFUSED, seq)
        assert f"names {GPUS + 1} GPUs and the node can have {GPUS}" in why
    assert agents.desk.registry.generation == generation
    assert counted(agents, Outcome.TOO_MANY_GPUS) == 2
    assert answer(talk.hear(full(well(4)))) == (ACK, 4, "")


def test_the_newer_connection_has_the_node() -> None:
    agents = tessera(RealClock())
    old = greeted(agents)
    new = greeted(agents)
    assert old.ended.is_set()
    with pytest.raises(HungUp, match="another agent"):
        old.hear(full(well(1)))
    assert answer(new.hear(full(well(1)))) == (ACK, 1, "")
    old.leave()
    with pytest.raises(HungUp):
        Talk(agents, Caller("b", "uid-b", "uid-agent-b")).hear(hello())
    assert not new.ended.is_set(), "a stranger does not replace it"


@asynccontextmanager
async def silence() -> AsyncGenerator[Agents, None]:
    yield tessera(LoopClock(asyncio.get_running_loop()))


@virtual(silence)
async def test_silence_closes_an_exact_node_and_a_report_opens_it(agents: Agents) -> None:
    talk = greeted(agents)
    talk.hear(full(well(1)))
    await agents.desk.clock.sleep(SILENT_S)
    await agents.step()
    assert not closed(agents)
    talk.hear(PAST + encode(report(0, device(0))))
    await agents.desk.clock.sleep(0.5)
    await agents.step()
    assert closed(agents), "the past is no sign of life"
    assert not closed(agents, "b"), "it never had an agent"
    assert talk.hear(full(well(2)))[:1] == ACK
    assert not closed(agents)
    await agents.step()
    assert agents._nodes["silent"]._value.get() == 0
    assert agents._nodes["reporting"]._value.get() == 1


@virtual(silence)
async def test_a_node_that_is_gone_is_forgotten(agents: Agents) -> None:
    talk = greeted(agents)
    talk.hear(full(well(1)))
    agents.desk.registry.remove_node("a", "uid-a")
    await agents.step()
    assert talk.ended.is_set()
    assert agents._known == {}


# tokens


def token(*, life_s: int = 3600, **claims: object) -> str:
    return jwt.encode({"alg": "HS256"}, {"iat": 1000, "exp": 1000 + life_s, **claims}, OctKey.import_key("x" * 32))


EXTRA = {"node-name": ("a",), "node-uid": ("uid-a",), "pod-uid": ("uid-agent",)}
ACCOUNT = "system:serviceaccount:tessera-system:tessera-agent"


@pytest.mark.parametrize(
    ("told", "shown", "good"),
    [
        ((ACCOUNT, EXTRA), token(), True),
        (None, token(), False),
        (("system:serviceaccount:tessera-system:other", EXTRA), token(), False),
        (("system:serviceaccount:mine:tessera-agent", EXTRA), token(), False),
        (("system:node:a", EXTRA), token(), False),
        ((ACCOUNT, {**EXTRA, "node-name": ()}), token(), False),
        ((ACCOUNT, {**EXTRA, "node-name": ("a", "b")}), token(), False),
        ((ACCOUNT, {**EXTRA, "pod-uid": ()}), token(), False),
        ((ACCOUNT, EXTRA), token(life_s=86_400), False),
        ((ACCOUNT, EXTRA), token(life_s=-1), False),
        ((ACCOUNT, EXTRA), token(exp="never"), False),
        ((ACCOUNT, EXTRA), "opaque", False),
    ],
)
async def test_only_the_agents_own_short_token_counts(
    told: tuple[str, Mapping[str, tuple[str, ...]]] | None, shown: str, good: bool
) -> None:
    async def review(_: str, audiences: Sequence[str]) -> tuple[str, Mapping[str, tuple[str, ...]]] | None:
        assert audiences == ("tessera-agent",)
        return told and (told[0], {f"authentication.kubernetes.io/{key}": value for key, value in told[1].items()})

    caller = await by_kubernetes(review, "tessera-system")(shown)
    assert caller == (Caller("a", "uid-a", "uid-agent", 4600 * 1_000_000) if good else None)


# sockets


@asynccontextmanager
async def serving(agents: Agents, files: Files | None = None) -> AsyncGenerator[int, None]:
    runner = GuardedRunner(agents_app(agents), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    context = RotatingContext.of(files) if files else None
    await (TlsSite(runner, "localhost", 0, context=context) if context else web.TCPSite(runner, "127.0.0.1", 0)).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def asking(port: int, headers: Mapping[str, str]) -> AsyncGenerator[aiohttp.ClientResponse, None]:
    url = f"http://127.0.0.1:{port}{PATH}"
    async with aiohttp.ClientSession() as client, client.get(url, headers=headers) as http:
        yield http


def known_by(agents: Agents, text: str) -> None:
    agents.vouch = by_token(text)


async def turn() -> None:
    await asyncio.sleep(0)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await turn()


async def test_an_agent_over_tls_with_a_token_that_rotates(tmp_path: Path) -> None:
    authority, agents = trustme.CA(), tessera(RealClock())
    made = authority.issue_cert("localhost")
    made.private_key_pem.write_to_path(tmp_path / "key")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    authority.cert_pem.write_to_path(tmp_path / "ca")
    (tmp_path / "token").write_text("one\n")
    known_by(agents, "one")
    said: list[str] = []
    async with serving(agents, Files(tmp_path / "cert", tmp_path / "key")) as port:
        place = Tessera(f"wss://localhost:{port}", tmp_path / "token", tmp_path / "ca")
        stream = Stream(place.connect, spool=None, rng=Random(1), say=said.append)
        task = asyncio.ensure_future(stream.run())
        stream.publish(well(1))
        await until(lambda: counted(agents, Outcome.FULL) == 1)
        stream.publish(report(2, device(0), device(1), device(2)))
        await until(lambda: counted(agents, Outcome.DELTA) == 1)
        assert health(agents) == [Health.HEALTHY] * 3 + [Health.BAD]
        known_by(agents, "two")
        (tmp_path / "token").write_text("two\n")
        await agents.hang_up(web.Application())
        await until(lambda: counted(agents, Outcome.DUPLICATE) == 1)
        assert said == ["the connection to Tessera ended"] or "hung up" in said[0]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stream.close()
        with pytest.raises(LineError, match="certificate"):
            await replace(place, authority=None).connect()
        (tmp_path / "token").write_text("three\n")
        with pytest.raises(LineError, match="401"):
            await place.connect()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "wss://", "ws://tessera:8444", "8444"])
def test_a_token_is_shown_to_tessera_alone(url: str) -> None:
    with pytest.raises(ValueError, match=r"wss://"):
        Tessera(url, Path("token")).check()


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Basic x"}, 401), ({"Authorization": "Bearer no"}, 401),
     ({"Authorization": "Bearer x"}, 400), ({"Authorization": "Bearer \xff"}, 401)],
)  # fmt: skip
async def test_strangers_get_no_socket(headers: dict[str, str], status: int) -> None:
    agents = tessera(RealClock())
    known_by(agents, "x")
    async with serving(agents) as port, asking(port, headers) as http:
        body: dict[str, Any] = orjson.loads(await http.read())
    assert (http.status, body["status"]) == (status, status)
    assert body["detail"]


async def test_an_api_server_that_is_away_is_no_proof() -> None:
    agents = tessera(RealClock())

    async def vouch(_: str) -> Caller | None:
        raise UnavailableError("away")

    agents.vouch = vouch
    async with serving(agents) as port, asking(port, {"Authorization": "Bearer x"}) as http:
        assert http.status == 503


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [(b"H{}", Outcome.MALFORMED), ("text", Outcome.MALFORMED), (b"F" + b" " * MESSAGE_MAX, Outcome.TOO_LARGE),
     (b"", Outcome.MALFORMED), (hello("nowhere"), Outcome.UNKNOWN_NODE)],
)  # fmt: skip
async def test_what_is_no_message_ends_the_connection_and_is_counted(sent: bytes | str, outcome: Outcome) -> None:
    agents = tessera(RealClock())
    known_by(agents, "x")
    async with serving(agents) as port, aiohttp.ClientSession() as client:
        async with client.ws_connect(f"http://127.0.0.1:{port}{PATH}", headers={"Authorization": "Bearer x"}) as socket:
            await (socket.send_str(sent) if isinstance(sent, str) else socket.send_bytes(sent))
            message = await socket.receive(timeout=10)
            assert message.type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
        await until(lambda: agents.open == 0)
    assert counted(agents, outcome) == 1
