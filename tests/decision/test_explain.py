"""Decision records and explanations."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.columns import empty_mix
from scheduler.decision import reasons
from scheduler.decision.board import Board
from scheduler.decision.catalog import DEFAULT_MASKS, FILTER_MASKS, REASONS, SCORES, TURN_MASKS, read_policies
from scheduler.decision.explain import NAME_BYTES_MAX, RECORD_BYTES_MAX, record, why, why_refused
from scheduler.decision.pipeline import Policies, Verdict, judge
from scheduler.model.pod import Refusal
from tests.drawing import ask, cluster

MIX = empty_mix(4)
ALL_SCORES = read_policies(tiers=[[name] for name in SCORES])


def verdict(*nodes: str, count: int = 1, models: tuple[str, ...] = (), policies: Policies | None = None) -> Verdict:
    wanted = ask(count, nodes=len(nodes), models=models)
    return judge(cluster(*nodes), wanted, MIX, policies or Policies())


def board(*nodes: str, policies: Policies | None = None) -> Board:
    every = policies or Policies()
    return Board(every, TURN_MASKS).turn(cluster(*nodes), ask(1, nodes=len(nodes)), MIX, 1)


def test_a_record_names_the_chosen_node_and_the_runner_up() -> None:
    decided = board("....", "xx..", "xxx.", "xxxx", "T4 ....")
    written = json.loads(record(decided, 2, ["a", "b", "c", "d", "e"], 17))
    assert written["v"] == 1
    assert written["generation"] == 17
    assert written["funnel"] == [
        [mask, 5 if mask not in {"devices-free", "cpu-memory"} else 4] for mask in DEFAULT_MASKS
    ]
    assert written["chosen"] == {
        "node": "c",
        "scores": [{"least-loss": 1000000}, {"least-waste+one-group": 495048}],
    }
    assert written["runner_up"]["node"] == "b"
    assert written["runner_up"]["scores"][1]["least-waste+one-group"] < 495048


def test_the_runner_up_is_one_of_those_that_were_offered() -> None:
    decided = board("....", "xx..", "xxx.")
    rows = decided.best(count=3)
    assert json.loads(record(decided, 2, ["a", "b", "c"], 1, rows=rows[[0, 2]]))["runner_up"]["node"] == "a"
    assert json.loads(record(decided, 2, ["a", "b", "c"], 1, rows=rows[[0, 2]]))["funnel"][-1] == ["cpu-memory", 2]
    assert json.loads(record(decided, 2, ["a", "b", "c"], 1, rows=rows[:1]))["runner_up"] is None


def test_a_record_is_the_same_text_for_the_same_decision() -> None:
    texts = {record(board("....", "xx.."), 1, ["a", "b"], 3) for _ in range(2)}
    assert len(texts) == 1


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(
        st.one_of(
            st.text(max_size=400),
            st.text('\x00"\\\x1f', max_size=400),
            st.text("가힣😀", max_size=400),
            st.text(st.characters(categories=["Cs"]), max_size=20),
        ),
        min_size=2,
        max_size=2,
    ),
    generation=st.integers(0, 2**63 - 1),
)
def test_a_record_is_bounded_whatever_nodes_are_called(names: list[str], generation: int) -> None:
    text = record(board("....", "xx..", policies=ALL_SCORES), 1, names, generation)
    assert len(text.encode()) <= RECORD_BYTES_MAX
    written = json.loads(text)
    shown = written["chosen"]["node"]
    readable = names[1].encode("utf-8", "replace").decode()
    assert readable.startswith(shown)
    assert shown == readable or len(json.dumps(readable, ensure_ascii=False).encode()) > NAME_BYTES_MAX


def test_why_starts_with_the_reason_that_speaks_for_the_request() -> None:
    answer = why(verdict("xx", "T4 ..", "!!", models=("H100",)))
    assert [reason["code"] for reason in answer["reasons"]] == [
        "WaitingForCapacity",
        "GpusBusy",
        "GpuUnhealthy",
        "GpuModelMismatch",
    ]
    assert [reason["class"] for reason in answer["reasons"]] == ["wait", "wait", "admin", "change"]
    assert answer["funnel"][0] == {"mask": "in-service", "nodes": 3}
    assert answer["funnel"][-1] == {"mask": "cpu-memory", "nodes": 0}


@pytest.mark.parametrize(
    ("nodes", "count", "models", "first"),
    [
        pytest.param(["T4 ..", "-"], 1, ("A100",), "NoSuchGpuModel", id="model"),
        pytest.param(["..", "xx"], 3, (), "ExceedsNodeSize", id="size"),
        pytest.param(["!!"], 1, (), "AllGpusUnhealthy", id="health"),
        pytest.param(["xx", "cpu=0 .."], 1, (), "WaitingForCapacity", id="cpu"),
        pytest.param([], 1, (), "InventoryStale", id="nothing there"),
        pytest.param(["..", "xx"], 1, (), "PendingEvaluation", id="it fits"),
    ],
)
def test_why(nodes: list[str], count: int, models: tuple[str, ...], first: str) -> None:
    codes = [reason["code"] for reason in why(verdict(*nodes, count=count, models=models))["reasons"]]
    assert codes[0] == first
    assert len(codes) == len(set(codes))


def test_the_nearest_profiles_are_named_where_no_node_has_the_one_asked() -> None:
    def reasons_of(drawn: str) -> list[Any]:
        wanted = ask(1, nodes=1, profile="1g.20gb")
        return why(judge(cluster(drawn), wanted, MIX, Policies()), ("1g.10gb", "2g.10gb"))["reasons"]

    (foreign,) = reasons_of("A100 mm")
    assert foreign["code"] == "NoSuchMigProfile"
    assert foreign["text"].endswith("Nearest names: 1g.10gb, 2g.10gb.")
    assert foreign["text_ko"].endswith("1g.10gb, 2g.10gb.")
    assert "Nearest" not in reasons_of("MM")[0]["text"]
    assert "Nearest" not in reasons.REASONS["NoSuchMigProfile"].text


def test_a_refused_pod_is_told_its_own_sentence() -> None:
    answer = why_refused(Refusal("InvalidRequest", "request.negative", "container main asks -1 GPUs: ask 0 or more"))
    assert answer["reasons"][0]["text"] == "container main asks -1 GPUs: ask 0 or more"
    assert answer["reasons"][0]["class"] == "change"


def test_the_vocabulary_is_closed_and_constant() -> None:
    words = reasons.REASONS
    assert {REASONS[mask] for mask in FILTER_MASKS} | {REASONS[mask] for mask in DEFAULT_MASKS} <= set(words)
    assert set(reasons.OF_REQUEST) | set(reasons.OF_REQUEST.values()) <= set(words)
    for word in words.values():
        assert word.who in get_args(reasons.Class)
        for text in (word.text, word.text_ko):
            assert text.endswith(".")
            assert not any(char.isdigit() for char in text)
        assert any("가" <= char <= "힣" for char in word.text_ko)
        assert word.text.isascii()
