"""The admission bench: its table is whole, and a wrong answer of any kind is a mismatch."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from bench.admission import LEAST, Case, Tally, called_at, judge, read_table
from bench.apiclient import Reply

Json = dict[str, Any]
TABLE = {case.name: case for case in read_table()}
HOLD = "tessera.dev/hold"


def held(case: Case) -> Json:
    """Return the pod as the API server would store it when it is held."""
    made = copy.deepcopy(case.pod)
    made["spec"] |= {"schedulerName": "tessera", "schedulingGates": [{"name": HOLD}]}
    made["metadata"]["labels"] = {"tessera.dev/queue": "default", **made["metadata"].get("labels", {})}
    if case.becomes:
        amounts = case.becomes["limits"]
        made["spec"]["containers"][0]["resources"] = {"limits": amounts, "requests": dict(amounts)}
        made["metadata"]["annotations"] = case.becomes["notes"]
    return made


def test_the_table_is_large_enough_and_each_name_is_one_case() -> None:
    cases = read_table()
    assert len(TABLE) == len(cases)
    outcomes = Counter(outcome in {"held", "as is"} for case in cases for outcome in (case.up, case.down))
    assert min(outcomes[True], outcomes[False]) >= LEAST
    assert {case.namespace for case in cases} == {"managed", "plain"}
    assert all(case.up and case.down for case in cases)


def test_only_the_place_of_the_webhook_is_replaced() -> None:
    (hook,) = called_at("https://127.0.0.1:1/mutate")["webhooks"]
    assert hook["clientConfig"] == {"url": "https://127.0.0.1:1/mutate"}
    assert (hook["failurePolicy"], hook["timeoutSeconds"]) == ("Ignore", 2)


def test_right_answers_are_counted() -> None:
    tally = Tally()
    tally.count(TABLE["one GPU"], "up", Reply(201, held(TABLE["one GPU"])))
    tally.count(TABLE["HAMi memory"], "up", Reply(201, held(TABLE["HAMi memory"])))
    tally.count(TABLE["one GPU"], "down", Reply(422, {"message": "... create the pod again in a moment"}))
    tally.count(TABLE["nothing asked"], "up", Reply(201, TABLE["nothing asked"].pod))
    bad = Reply(422, {"message": 'admission webhook "x" denied the request: request.profile: no such'})
    tally.count(TABLE["no such profile"], "up", bad)
    assert (tally.accepted, tally.denied, tally.texts) == (3, 2, [])
    assert (tally.non_gpu_blocked, tally.unmanaged_admitted) == (0, 0)
    assert not tally.report(1)["ok"]  # too few
    tally.accepted = tally.denied = LEAST
    assert tally.report(1)["ok"]


def changed(case: str, part: str, **keys: object) -> Json:
    made = held(TABLE[case])
    made[part] |= keys
    return made


@pytest.mark.parametrize(
    ("case", "phase", "status", "body", "counted"),
    [
        ("one GPU", "up", 201, changed("one GPU", "spec", schedulingGates=[]), "unmanaged_admitted"),
        ("one GPU", "up", 201, changed("one GPU", "spec", schedulerName="default-scheduler"), "unmanaged_admitted"),
        ("one GPU", "up", 201, changed("one GPU", "metadata", labels={}), ""),
        ("one GPU", "up", 201, changed("one GPU", "metadata", annotations={"x": "y"}), ""),
        ("HAMi memory", "up", 201, changed("HAMi memory", "metadata", annotations={}), ""),
        (
            "HAMi memory",
            "up",
            201,
            changed("HAMi memory", "spec", containers=TABLE["HAMi memory"].pod["spec"]["containers"]),
            "",
        ),
        ("one GPU", "up", 422, {"message": "create the pod again in a moment"}, ""),
        ("one GPU", "down", 201, held(TABLE["one GPU"]), ""),
        ("one GPU", "down", 201, TABLE["one GPU"].pod, "unmanaged_admitted"),
        ("one GPU", "down", 500, {"message": "create the pod again in a moment"}, ""),
        ("nothing asked", "up", 422, {"message": "no"}, "non_gpu_blocked"),
        ("nothing asked", "up", 201, held(TABLE["nothing asked"]), ""),
        ("no such profile", "up", 201, held(TABLE["no such profile"]), ""),
        ("no such profile", "up", 422, {"message": "denied the request: request.queue: x"}, ""),
        ("a GPU on a named node", "up", 201, held(TABLE["a GPU on a named node"]), ""),
    ],
)
def test_a_wrong_answer_is_a_mismatch(case: str, phase: str, status: int, body: Json, counted: str) -> None:
    tally = Tally()
    tally.count(TABLE[case], phase, Reply(status, body))
    assert len(tally.texts) == 1
    assert tally.accepted + tally.denied == 0
    assert tally.non_gpu_blocked == (counted == "non_gpu_blocked")
    assert tally.unmanaged_admitted == (counted == "unmanaged_admitted")
    assert not tally.report(1)["ok"]


def test_requests_must_follow_limits() -> None:
    case = TABLE["HAMi cores"]
    made = held(case)
    del made["spec"]["containers"][0]["resources"]["requests"]
    assert "limits and requests" in judge(case, "held", Reply(201, made))
