"""The hostile bench: what it sends is repeatable and broken in every way, and what it counts is really wrong."""

from __future__ import annotations

import functools
import json
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path

import orjson
import pytest

from bench.hostile import NODES, RUNNING, WAITING, Findings, cluster_files, judge
from bench.hostile_bodies import Attacker, Sent
from bench.hostile_strategies import BODY_MAX, MANY, binds, broken, crowds, drawn, filters
from scheduler.intake.extender import BadBody, read_filter


def attacker(folder: Path, seed: int = 1) -> Attacker:
    return Attacker(seed, *cluster_files(folder))


def sent(verb: str = "filter", names: tuple[str, ...] = ("a", "b")) -> Sent:
    body = json.dumps({"Pod": {}, "NodeNames": names}).encode()
    return Sent(body, verb, body)


def test_the_same_seed_sends_the_same_requests(tmp_path: Path) -> None:
    one, same, other = attacker(tmp_path), attacker(tmp_path), attacker(tmp_path, 2)
    first = [(one.extender().wire, one.api().wire) for _ in range(200)]
    assert first == [(same.extender().wire, same.api().wire) for _ in range(200)]
    assert first != [(other.extender().wire, other.api().wire) for _ in range(200)]


def test_bodies_are_broken_in_every_way(tmp_path: Path) -> None:
    source = attacker(tmp_path)
    made = [source.extender() for _ in range(2000)]
    bodies = [one.body for one in made if one.framed]
    assert {one.verb for one in made} == {"filter", "prioritize", "bind", ""}
    for mark in (b"NaN", b"\\ud800", b"[" * 1000, b"9" * 5000, b"Infinity", b"\xff", b"1" + b"0" * 400):
        assert any(mark in body for body in bodies), mark
    good = 0
    for body in bodies:
        try:
            good += isinstance(orjson.loads(body), dict)
        except orjson.JSONDecodeError:
            continue
    assert len(bodies) * 0.3 < good < len(bodies) * 0.9


def test_names_come_by_the_million(tmp_path: Path) -> None:
    source = attacker(tmp_path)
    assert len(orjson.loads(source.largest().body)["NodeNames"]) == 1_000_000
    assert max(MANY) == 1_000_000


UIDS, NAMES = ["89eba25d-fdba-4624-9bb1-000000000001"], ["gpu-00001", "gpu-00002"]


@functools.cache
def made_up() -> list[bytes]:
    return list(islice(drawn(broken(filters(UIDS, NAMES)), 1), 500))


def test_what_hypothesis_makes_up_is_the_same_for_a_seed_and_never_large() -> None:
    def first(seed: int) -> list[bytes]:
        return list(islice(drawn(broken(filters(UIDS, NAMES)), seed, batch=8), 12))

    assert first(1) == first(1) != first(2)
    assert first(1)[:4] != first(1)[8:]
    assert len(set(made_up())) > 250
    assert max(map(len, made_up())) <= BODY_MAX


def test_what_hypothesis_makes_up_is_often_what_tessera_reads_and_often_not() -> None:
    read, refused = 0, set()
    for body in made_up():
        try:
            read += read_filter(body).pod.uid == UIDS[0]
        except BadBody as error:
            refused.add(str(error)[:20])
    assert read > 30
    assert len(refused) >= 4
    bound = [orjson.loads(body) for body in islice(drawn(binds(UIDS, NAMES), 1), 200)]
    assert any(body.get("PodUID") == UIDS[0] and body.get("Node") in NAMES for body in bound)


def test_what_hypothesis_makes_up_holds_what_json_does_not_allow() -> None:
    for mark in (b"NaN", b"Infinity", b"[" * 400, b"0" * 400):
        assert any(mark in body for body in made_up()), mark
    halves = twice = 0

    def seen(found: list[tuple[str, object]]) -> None:
        nonlocal twice
        twice += len({key for key, _ in found}) < len(found)

    for body in made_up():
        with suppress(ValueError, RecursionError):
            json.loads(body, object_pairs_hook=seen)
            halves += bool(re.search(r"[\ud800-\udfff]", json.dumps(json.loads(body), ensure_ascii=False)))
    assert halves
    assert twice


def test_crowds_have_a_million_names() -> None:
    bodies = list(islice(drawn(crowds(UIDS), 1, batch=2), 12))
    assert {body.count(b",", body.index(b"NodeNames")) + 1 for body in bodies} >= {50_001, 1_000_000}


def test_content_lengths_are_right_where_http_is_in_order(tmp_path: Path) -> None:
    source = attacker(tmp_path)
    for one in [source.extender() for _ in range(300)] + [source.api() for _ in range(300)]:
        if one.framed:
            head, _, rest = one.wire.partition(b"\r\n\r\n")
            assert int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]) == len(rest) == len(one.body)


def test_the_cluster_is_one_that_embedded_mode_reads(tmp_path: Path) -> None:
    pods, names = cluster_files(tmp_path)
    assert len(names) == NODES
    assert len(pods) == RUNNING + WAITING
    assert len(json.loads((tmp_path / "pods.json").read_text())["items"]) == len(pods)


@pytest.mark.parametrize(
    ("asked", "status", "body", "kind"),
    [
        (sent(), 200, b'{"NodeNames":["a"],"Error":""}', ""),
        (sent(), 200, b'{"Error":"not ready"}', ""),
        (sent(), 400, b'{"Error":"extender.malformed: no"}', ""),
        (sent("prioritize"), 200, b'[{"Host":"a","Score":10}]', ""),
        (sent(), 503, b'{"code":"not_ready"}', ""),
        (sent(), 200, b'{"NodeNames":["c"],"Error":""}', "wrong"),
        (sent(), 200, b'{"NodeNames":[],"FailedAndUnresolvableNodes":{"c":"GpusBusy"}}', "wrong"),
        (sent("prioritize"), 200, b'[{"Host":"c","Score":10}]', "wrong"),
        (sent(), 200, b"fine", "wrong"),
        (sent(), 200, b"1", "wrong"),
        (sent(), 500, b'{"code":"internal"}', "bad_5xx"),
        (sent("bind"), 503, b"<html>", "bad_5xx"),
        (sent("bind"), 0, b"", "crashes"),
    ],
)
def test_an_answer_is_judged(asked: Sent, status: int, body: bytes, kind: str) -> None:
    found = Findings()
    judge(asked, status, body, found)
    assert {name: getattr(found, name) for name in ("crashes", "bad_5xx", "wrong")} == {
        name: int(name == kind) for name in ("crashes", "bad_5xx", "wrong")
    }
    assert found.statuses == {status: 1}
    assert len(found.texts) == bool(kind)


def test_garbage_may_be_left_unanswered() -> None:
    found = Findings()
    judge(Sent(b"GET\r\n\r\n", "", b"", framed=False), 0, b"", found)
    assert found.crashes == 0
