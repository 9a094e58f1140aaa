"""The hostile bench: what it sends is repeatable and broken in every way, and what it counts is really wrong."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from bench.hostile import NODES, RUNNING, WAITING, Findings, cluster_files, judge
from bench.hostile_bodies import MANY, Attacker, Sent


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
    made = [source.extender() for _ in range(3000)]
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
