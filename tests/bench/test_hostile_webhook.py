"""Hostile AdmissionReviews: repeatable, broken in every way, and a wrong answer of each kind is found."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import orjson
import pytest
from prometheus_client import CollectorRegistry

from bench.hostile import Findings, cluster_files, judge
from bench.hostile_bodies import Sent
from bench.hostile_webhook import ReviewAttacker, ReviewOracle
from scheduler.intake.admission import BadReview
from scheduler.web.webhook import BODY_MAX, Webhook

Json = dict[str, Any]


def attacker(folder: Path, seed: int = 1) -> ReviewAttacker:
    return ReviewAttacker(seed, *cluster_files(folder))


def test_the_same_seed_sends_the_same_reviews(tmp_path: Path) -> None:
    one, same, other = attacker(tmp_path), attacker(tmp_path), attacker(tmp_path, 2)
    first = [one.webhook().wire for _ in range(300)]
    assert first == [same.webhook().wire for _ in range(300)]
    assert first != [other.webhook().wire for _ in range(300)]


def test_every_outcome_is_drawn_and_none_is_a_fault(tmp_path: Path) -> None:
    source, webhook, oracle = attacker(tmp_path), Webhook(CollectorRegistry()), ReviewOracle()
    outcomes = dict.fromkeys(("malformed", "too large", "held", "untouched", "refused", "again"), 0)
    seen: set[bytes] = set()
    for sent in (source.webhook() for _ in range(3000)):
        if not sent.framed:
            continue
        outcomes["again"] += sent.body in seen
        seen.add(sent.body)
        if len(sent.body) > BODY_MAX:
            outcomes["too large"] += 1
            continue
        try:
            body = webhook.mutate(sent.body)
        except BadReview:
            outcomes["malformed"] += 1
            continue
        assert oracle.mistake(sent, 200, body) == ""
        response = orjson.loads(body)["response"]
        outcomes["refused" if not response["allowed"] else "held" if "patch" in response else "untouched"] += 1
    assert min(outcomes.values()) > 5, outcomes


def sent(uid: object = "u") -> Sent:
    body = orjson.dumps({"request": {"uid": uid}})
    return Sent(b"POST " + body, "webhook", body)


def answered(kind: str = "AdmissionReview", **response: object) -> bytes:
    return orjson.dumps({"kind": kind, "response": {"uid": "u", "allowed": True, **response}})


def patch(**operation: object) -> str:
    return base64.b64encode(orjson.dumps([{"op": "add", "path": "/metadata/labels", **operation}])).decode()


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        (200, answered(), True),
        (200, answered(patch=patch()), True),
        (200, answered(patch=patch(path="/spec/containers/0/resources")), True),
        (200, answered(allowed=False, status={"message": "no"}), True),
        (400, b'{"code":"review.malformed","detail":"no"}', True),
        (200, answered(uid="v"), False),
        (200, answered(kind="Status"), False),
        (200, answered(allowed=None), False),
        (200, answered(allowed=False), False),
        (200, answered(patch="*"), False),
        (200, answered(patch=patch(op="remove")), False),
        (200, answered(patch=patch(path="/spec/nodeName")), False),
        (400, b'{"code":"review.malformed"}', False),
        (200, b"", False),
    ],
)
def test_an_answer_is_judged(status: int, body: bytes, right: bool) -> None:
    assert (ReviewOracle().mistake(sent(), status, body) == "") is right
    found = Findings()
    judge(sent(), status, body, found)
    assert (found.wrong == 0) is right


def test_an_answer_to_what_is_no_review_is_wrong() -> None:
    assert ReviewOracle().mistake(Sent(b"", "webhook", b"{"), 200, answered()) != ""


def test_the_same_body_must_get_the_same_bytes() -> None:
    oracle = ReviewOracle()
    assert oracle.mistake(sent(), 200, answered()) == ""
    assert oracle.mistake(sent(), 200, answered()) == ""
    assert "another answer" in oracle.mistake(sent(), 200, answered(patch=patch()))
