"""Budgets: the shipped ones can be read, and a figure out of budget, or none at all, is a failure."""

from __future__ import annotations

from typing import Any

import pytest

from bench.check import BUDGETS, BudgetError, check, read_budgets

SMALL = """
[speed]
command = "latency --json"
quick = true
figures.ok = { exactly = true }
figures.wrong = { exactly = 0 }
figures.us = { low = true, mean = 10, spread = 1, margin = 2 }
figures.rate = { high = true, mean = 10, spread = 1, margin = 2 }
"""
GOOD: dict[str, Any] = {"ok": True, "wrong": 0, "us": 13, "rate": 7}


def missed(**changes: object) -> list[str]:
    report = check(read_budgets(SMALL), lambda _: {**GOOD, **changes})
    assert report["ok"] is (not report["missed"])
    assert report["checked"] == 4
    return list(report["missed"])


def test_figures_at_their_bounds_are_in_budget() -> None:
    assert missed() == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("us", 13.1), ("us", None), ("us", "9"), ("us", True), ("rate", 6.9), ("wrong", 1), ("wrong", False), ("ok", 1)],
)
def test_one_figure_out_of_budget_is_named(key: str, value: object) -> None:
    assert missed(**{key: value}) == [f"speed.{key}"]


def test_a_promise_bounds_a_figure_whatever_is_measured() -> None:
    low = SMALL.replace("low = true, mean = 10", "low = true, most = 11, mean = 10")
    high = SMALL.replace("high = true, mean = 10", "high = true, least = 9, mean = 10")
    assert check(read_budgets(low), lambda _: {**GOOD, "us": 11.5})["missed"] == ["speed.us"]
    assert check(read_budgets(high), lambda _: {**GOOD, "rate": 8})["missed"] == ["speed.rate"]
    loose = SMALL.replace("low = true, mean = 10", "low = true, most = 99, mean = 10")
    assert check(read_budgets(loose), lambda _: {**GOOD, "us": 14})["missed"] == ["speed.us"]


def test_a_bench_that_says_nothing_misses_everything() -> None:
    assert len(check(read_budgets(SMALL), lambda _: {})["missed"]) == 4
    assert check([])["ok"] is False


def test_the_shipped_budgets_are_complete() -> None:
    budgets = {budget.name: budget for budget in read_budgets(BUDGETS.read_text())}
    assert {"latency", "coldstart", "throughput", "throughput-queue", "wake", "crash", "hostile-extender"} <= (
        budgets.keys()
    )
    assert all(budget.command.endswith("--json") for budget in budgets.values())
    bounds = {(budget.name, figure.key): figure.bound for budget in budgets.values() for figure in budget.figures}
    most = {
        ("latency", "ratio_k1"): 6.5,
        ("latency", "ratio_k16"): 6.0,
        ("latency", "rss_mib_10k"): 250,
        ("latency-growth", "exponent"): 0.6,
        ("coldstart", "ready_s"): 5,
        ("wake", "freed_to_bound_ms_p99"): 1000,
    }
    least = {
        ("throughput", "ratio"): 0.75,
        ("throughput", "ratio_100"): 0.8,
        ("throughput-queue", "ratio"): 0.6,
        ("throughput-queue", "ratio_100"): 3.0,
    }
    numbers = {place: bounds[place] for place in [*most, *least]}
    assert all(isinstance(bound, int | float) for bound in numbers.values())
    assert {place: bound for place, bound in numbers.items() if place in most and bound > most[place]} == {}  # type: ignore[operator]
    assert {place: bound for place, bound in numbers.items() if place in least and bound < least[place]} == {}  # type: ignore[operator]


@pytest.mark.parametrize(
    "text",
    [
        "speed",
        "[speed]\nquick = true",
        '[speed]\ncommand = "x"\nquick = true\nfigures.us = 3',
        '[speed]\ncommand = "x"\nquick = true\nfigures.us = { low = true, mean = 3 }',
        '[speed]\ncommand = "x"\nquick = true\nfigures.us = { mean = 3, spread = 1, margin = 1 }',
        '[speed]\ncommand = "x"\nquick = true\nfigures.us = { low = true, mean = 3, spread = -1, margin = 1 }',
    ],
)
def test_budgets_that_say_too_little_are_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        read_budgets(text)
