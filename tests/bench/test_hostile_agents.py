"""The hostile agents: the same seed sends the same, of every kind, and a Tessera that takes too much is caught."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from bench.hostile import Findings, cluster_files
from bench.hostile_agents import AgentAttacker, Frame, Judge, good_report
from nodeagent.messages import ACK, DELTA, FULL, PAST, REFUSED, WANTED
from nodeagent.report import BadReport, decode

BINARY, CLOSE = aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.CLOSE


def frames(folder: Path, seed: int = 1, count: int = 400) -> list[Frame]:
    attacker = AgentAttacker(seed, *cluster_files(folder))
    return [attacker.frame("gpu-00001", "b", 7) for _ in range(count)]


def test_the_same_seed_sends_the_same(tmp_path: Path) -> None:
    assert frames(tmp_path) == frames(tmp_path)
    assert frames(tmp_path) != frames(tmp_path, 2)


def test_frames_are_of_every_kind_and_mostly_bad(tmp_path: Path) -> None:
    made = frames(tmp_path, count=1500)
    kinds = Counter(one.wire[:1] for one in made)
    assert min(kinds[kind] for kind in (FULL, DELTA, PAST)) > 100
    assert 0.4 < sum(one.bad for one in made) / len(made) < 0.95
    readable = 0
    for one in made:
        try:
            decode(one.wire[1:])
        except BadReport:
            continue
        readable += 1
    assert readable > 50, "some get as far as what decides"


def test_a_good_report_is_good() -> None:
    assert decode(json.dumps(good_report("a", "b", 1)).encode()).node == "a"


@pytest.mark.parametrize(
    ("message", "code", "bad", "kind"),
    [
        (aiohttp.WSMessage(BINARY, ACK + b"{}", None), None, True, "wrong"),
        (aiohttp.WSMessage(BINARY, ACK + b"{}", None), None, False, ""),
        (aiohttp.WSMessage(BINARY, WANTED, None), None, True, ""),
        (aiohttp.WSMessage(BINARY, REFUSED + b'{"why":"x"}', None), None, True, ""),
        (aiohttp.WSMessage(BINARY, REFUSED + b"{}", None), None, True, "wrong"),
        (aiohttp.WSMessage(BINARY, b"Z", None), None, True, "wrong"),
        (aiohttp.WSMessage(CLOSE, 1008, None), 1008, True, ""),
        (aiohttp.WSMessage(CLOSE, 1011, None), 1011, True, "bad_5xx"),
        (aiohttp.WSMessage(aiohttp.WSMsgType.CLOSED, None, None), None, True, "bad_5xx"),
    ],
)
def test_what_is_wrong_is_counted(message: aiohttp.WSMessage, code: int | None, bad: bool, kind: str) -> None:
    found = Findings()
    goes_on = Judge(found.note).answer(Frame(b"F{}", 1, bad), message, code)
    assert goes_on is (message.type is BINARY)
    assert [one.split(":")[0] for one in found.texts] == ([kind] if kind else [])
