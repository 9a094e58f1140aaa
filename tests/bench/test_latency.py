"""The latency bench's arithmetic, its world and its oracle: a wrong answer must be found."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy as np
import orjson
import pytest

from bench.latency import LatencyError, Samples, Wire, _row, arguments, exponent, figures, limit_us, request
from bench.latency_world import (
    GPUS,
    Ask,
    Spot,
    ask,
    give_back,
    node_name,
    sampled,
    take,
    world,
    wrong_filter,
    wrong_scores,
)


def spot(free: int = 8, model: str = "h100", *, divided: bool = False, stranger: bool = False) -> Spot:
    return Spot(exact=True, model=model, divided=divided, stranger=stranger, free=free)


def reply(*names: str, error: str = "", told: dict[str, str] | None = None) -> dict[str, Any]:
    return {"NodeNames": list(names), "FailedNodes": {}, "FailedAndUnresolvableNodes": told or {}, "Error": error}


SPOTS = {
    "a": spot(8),
    "b": spot(1),
    "c": spot(8, "a100"),
    "d": spot(8, divided=True),
    "e": spot(8, stranger=True),
}
TWO = Ask("u", 2, frozenset({"h100"}), b"{}")
ANY = Ask("u", 2, frozenset(), b"{}")
NONE = Ask("u", 0, frozenset(), b"{}")


@pytest.mark.parametrize(("nodes", "names"), [(50, 50), (500, 230), (1000, 420), (5000, 500), (50_000, 2500)])
def test_as_many_names_as_kube_schedulers_default_sampling_sends(nodes: int, names: int) -> None:
    assert sampled(nodes) == names


def test_names_are_of_realistic_length_and_all_different() -> None:
    assert {len(node_name(number)) for number in (0, 49_999)} == {45}
    assert len({node_name(number) for number in range(5000)}) == 5000


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (TWO, reply("a")),
        (ANY, reply("c")),
        (NONE, reply("e")),
    ],
)
def test_a_right_answer_passes(asked: Ask, answer: dict[str, Any]) -> None:
    assert wrong_filter(asked, list(SPOTS), 1, answer, SPOTS) == ""


@pytest.mark.parametrize(
    ("asked", "count", "answer", "sentence"),
    [
        (TWO, 1, reply("b"), "does not fit"),
        (TWO, 1, reply("c"), "does not fit"),
        (TWO, 1, reply("d"), "does not fit"),
        (TWO, 1, reply("e"), "does not fit"),
        (TWO, 1, reply("elsewhere"), "does not fit"),
        (TWO, 1, reply(), "0 nodes were named, 1 of those offered fit"),
        (ANY, 16, reply("a"), "1 nodes were named, 2 of those offered fit"),
        (ANY, 1, reply("a", "c"), "2 nodes were named"),
        (ANY, 16, reply("a", "a"), "1 nodes were named"),
        (TWO, 1, reply("a", error="not ready"), "an error"),
    ],
)
def test_a_wrong_answer_is_found(asked: Ask, count: int, answer: dict[str, Any], sentence: str) -> None:
    assert sentence in wrong_filter(asked, list(SPOTS), count, answer, SPOTS)


def test_a_refusal_gives_every_node_the_same_word() -> None:
    full = {"a": spot(0), "b": spot(0)}
    assert wrong_filter(TWO, ["a", "b"], 1, reply(told={"a": "GpusBusy", "b": "GpusBusy"}), full) == ""
    for told in ({}, {"a": "GpusBusy"}, {"a": "GpusBusy", "b": "GpuModelMismatch"}):
        assert "same word" in wrong_filter(TWO, ["a", "b"], 1, reply(told=told), full)


def test_what_an_answer_intends_is_taken_until_it_is_given_back() -> None:
    spots = {"a": spot(2)}
    take(TWO, reply("a"), spots)
    assert "does not fit" in wrong_filter(TWO, ["a"], 1, reply("a"), spots)
    give_back(TWO, reply("a"), spots)
    assert wrong_filter(TWO, ["a"], 1, reply("a"), spots) == ""


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([("a", 10), ("b", 9)], ""),
        ([("a", 10)], "not the hosts offered"),
        ([("a", 10), ("b", 10)], "the only one with 10"),
        ([("a", 9), ("b", 10)], "the only one with 10"),
        ([("a", 10), ("b", 11)], "from 0 to 10"),
        ([("a", 10), ("b", 0.5)], "from 0 to 10"),
    ],
)
def test_scores_follow_the_order_of_filter(scores: list[tuple[str, float]], sentence: str) -> None:
    said = wrong_scores(["a", "b"], [{"Host": host, "Score": score} for host, score in scores])
    assert (sentence in said) if sentence else not said


def test_the_oracle_knows_the_cluster_that_the_server_is_filled_with() -> None:
    for raw, pods, knows in world(300, 7):
        assert len(raw["metadata"]["name"]) == 45
        held = [int(pod["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/gpu"]) for pod in pods]
        assert knows.free == GPUS - sum(held)
        assert knows.exact == (raw["metadata"]["labels"].get("tessera.dev/mode") == "exact")
        assert knows.divided == (raw["metadata"]["labels"]["nvidia.com/gpu.replicas"] != "1")
        assert knows.stranger == (knows.exact and any(not pod["metadata"]["annotations"] for pod in pods))


def test_pods_are_of_realistic_size_and_all_different() -> None:
    rng = np.random.default_rng(3)
    asks = [ask(rng, number) for number in range(50)]
    assert len({each.uid for each in asks}) == 50
    assert all(3400 <= len(each.pod) <= 4000 for each in asks)
    assert {each.gpus for each in asks} == {0, 1, 2, 4, 8}


def row(nodes: int, k: int, filter_us: float, prioritize_us: float | None, canned_us: float) -> dict[str, Any]:
    figures_ = {"filter_us_p50": filter_us, "prioritize_us_p50": prioritize_us, "canned_us_p50": canned_us}
    return {"nodes": nodes, "names": sampled(nodes), "k": k, **figures_}


def test_ratios_are_those_of_5000_nodes_and_the_sum_of_the_calls() -> None:
    rows = [row(500, 1, 100, None, 100), row(5000, 1, 250, None, 100), row(5000, 16, 260, 140, 200)]
    assert figures(rows) == {"ratio_k1": 2.5, "ratio_k16": 2.0, "exponent": None}
    assert figures(rows[:1]) == {"ratio_k1": None, "ratio_k16": None, "exponent": None}


def test_the_exponent_is_a_slope_of_logarithms() -> None:
    assert exponent([(10, 3.0), (100, 30.0), (1000, 300.0)]) == 1.0
    assert exponent([(500, 100.0), (50_000, 1000.0)]) == 0.5
    assert exponent([(500, 100.0), (500, 120.0)]) is None


def test_a_row_takes_the_median_of_the_rounds_medians() -> None:
    ours = [Samples([[1.0, 2.0, 90.0]], [[5.0]], 0.001, 3), Samples([[4.0, 4.0, 4.0]], [[7.0]], 0.002, 3)]
    floor = [Samples([[1.0]], [[2.0]]), Samples([[1.0]], [[2.0]])]
    made = _row(5000, 16, ours, floor)
    assert made["filter_us_p50"] == 3.0
    assert made["prioritize_us_p50"] == 6.0
    assert made["canned_us_p50"] == 3.0
    assert made["cpu_us"] == 500.0
    assert made["filter_us_p99"] > 80
    alone = _row(5000, 1, [Samples([[1.0]], [[]], 0.001, 1)], [Samples([[1.0]], [[]])])
    assert alone["prioritize_us_p50"] is None
    assert limit_us(alone) < limit_us(made)


def test_a_body_is_one_that_kube_scheduler_sends() -> None:
    body = orjson.loads(arguments(b'{"metadata":{}}', ["a", "b"]))
    assert body == {"Pod": {"metadata": {}}, "Nodes": None, "NodeNames": ["a", "b"]}


@pytest.mark.parametrize("answer", [b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b""])
def test_what_is_no_answer_ends_the_run(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with Wire(listener.getsockname()[1]) as wire, pytest.raises(LatencyError):
            wire.post(request("/scheduler/filter", b"{}"))
        thread.join()
