"""The replay, its book, the reference policies and the comparison of two reports, on traces of a few machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bench.compare import CompareError, compare, read_report
from bench.quality import POLICIES, Settings, made, run_quality
from bench.quality_plot import plot
from bench.quality_reference import Fgd, Greedy, Typical, best_fit, class_of, gpu_packing
from bench.quality_replay import Place, Room, WrongPlacementError, replay
from bench.trace import Machine, Task, Trace, TraceError, arrivals, load_all

ROOT = Path(__file__).parents[2]
MACHINES = [
    Machine("a", 64_000, 262_144, 2, "P100"),
    Machine("b", 96_000, 393_216, 8, "G2"),
    Machine("c", 96_000, 393_216, 8, "G2"),
    Machine("d", 32_000, 131_072, 1, "T4"),
]
TASKS = [
    *(Task(f"one-{n}", 6_000, 8_192, 1, 1000) for n in range(6)),
    *(Task(f"part-{n}", 4_000, 4_096, 1, milli) for n, milli in enumerate((810, 470, 470, 230, 650, 320))),
    *(Task(f"cpu-{n}", 8_000, 16_384, 0, 0) for n in range(3)),
    Task("eight", 64_000, 131_072, 8, 1000),
    Task("two", 12_000, 16_384, 2, 1000, ("G2", "T4")),
    Task("old", 4_000, 4_096, 1, 470, ("P100",)),
]
TRACE = Trace(MACHINES, TASKS, "drawn")


class Fixed:
    """Places everything at one place."""

    def __init__(self, place: Place) -> None:
        self.answer = place

    def place(self, task: Task) -> Place | None:
        return self.answer


@pytest.mark.parametrize(
    ("task", "place", "sentence"),
    [
        pytest.param(TASKS[0], (0, ()), "asks 1 GPUs", id="no GPU"),
        pytest.param(Task("two", 1, 1, 2, 1000), (0, (0, 0)), "asks 2 GPUs", id="one GPU twice"),
        pytest.param(Task("odd", 1, 1, 1, 1000, ("T4",)), (0, (0,)), "wants", id="another model"),
        pytest.param(Task("big", 65_000, 1, 0, 0), (0, ()), "CPU or memory", id="cpu"),
        pytest.param(Task("big", 1, 262_145, 0, 0), (0, ()), "CPU or memory", id="memory"),
        pytest.param(TASKS[0], (0, (2,)), "too much", id="no such card"),
    ],
)
def test_the_book_refuses_what_does_not_fit(task: Task, place: Place, sentence: str) -> None:
    with pytest.raises(WrongPlacementError, match=sentence):
        replay(MACHINES, [task], Fixed(place))


def test_the_book_refuses_a_card_that_is_full() -> None:
    part = Task("part", 1, 1, 1, 600)
    with pytest.raises(WrongPlacementError, match="too much"):
        replay(MACHINES, [part, part], Fixed((0, (0,))))


@pytest.mark.parametrize(("policy", "mix"), list(product(POLICIES, ("oracle", "online"))))
def test_every_policy_places_what_fits_and_the_same_again(policy: str, mix: str) -> None:
    tasks = arrivals(TRACE, 7)
    curves = [replay(MACHINES, tasks, made(policy, TRACE, mix, 7)) for _ in range(2)]
    assert curves[0].allocated.tolist() == curves[1].allocated.tolist()
    assert curves[0].asked[-1] >= 1.3 * curves[0].gpu_milli
    early = np.flatnonzero(np.diff(curves[0].allocated, prepend=0) < np.diff(curves[0].asked, prepend=0))
    assert not len(early) or early[0] > 3, "on an empty cluster nothing is refused"
    assert curves[0].placed > 10


def test_bestfit_and_packing_by_hand() -> None:
    room, part = Room(MACHINES), Task("part", 4_000, 4_096, 1, 500)
    room.take(part, 1, (3,))
    assert best_fit(room, part).tolist() == [67, 21, 17, 85]
    assert gpu_packing(room, part).tolist() == [31, 95, 25, 32]
    assert room.best_cards(part, 1) == (3,)
    greedy = Greedy(MACHINES, best_fit)
    assert greedy.place(part) == (3, (0,))
    assert greedy.place(Task("whole", 4_000, 4_096, 1, 1000)) == (0, (0,))


def fragment(task: Task, cpu: int, cards: list[int], model: str) -> int:
    """By the definition: all free GPU where the class does not fit, else the cards that are too small for it."""
    enough = [free for free in cards if free >= task.milli]
    fits = task.gpus and cpu >= task.cpu_milli and len(enough) >= task.gpus
    return sum(cards) - sum(enough) if fits and (not task.models or model in task.models) else sum(cards)


def test_the_expected_fragment_is_that_of_the_definition() -> None:
    room = Room(MACHINES)
    for task, at, cards in ((TASKS[6], 1, (0,)), (TASKS[7], 3, (0,)), (TASKS[0], 1, (2,)), (TASKS[12], 0, ())):
        room.take(task, at, cards)
    typical = Typical(Counter(class_of(task) for task in TASKS), MACHINES)
    ranked = sorted(Counter(class_of(task) for task in TASKS).items(), key=lambda each: (-each[1], each[0]))
    while sum(often for _, often in ranked[:-1]) >= 0.95 * len(TASKS):
        ranked.pop()
    total = sum(often for _, often in ranked)

    def expected(at: int, cpu: int, cards: list[int]) -> float:
        classes = [(Task("", known[0], 0, known[2], known[1], known[3]), often) for known, often in ranked]
        return sum(often * fragment(task, cpu, cards, MACHINES[at].model) for task, often in classes) / total

    cards = [[int(free) for free in room.cards[: machine.gpus, at]] for at, machine in enumerate(MACHINES)]
    cpu = room.cpu.tolist()
    assert typical.fragment(room) == pytest.approx(sum(expected(at, cpu[at], cards[at]) for at in range(4)))
    share, rows = Task("", 4_000, 0, 1, 320), np.arange(4)
    before, after = typical.before_and_after(room, share, rows)
    assert before.tolist() == pytest.approx([expected(at, cpu[at], cards[at]) for at in range(4)])
    for at, each in enumerate(cards):
        for card, free in enumerate(each):
            if free >= 320:
                left = [free - 320 * (other == card) for other, free in enumerate(each)]
                assert after[card, at] == pytest.approx(expected(at, cpu[at] - 4_000, left))
    two = Task("", 12_000, 0, 2, 1000)
    _, after = typical.before_and_after(room, two, rows)
    left = [0 if place in {1, 3} else free for place, free in enumerate(cards[1])]
    assert after[1] == pytest.approx(expected(1, cpu[1] - 12_000, left))


def test_fgd_scores_machines_that_changed_anew() -> None:
    kept, placed = Fgd(MACHINES, TASKS), list[tuple[Task, Place]]()
    for task in arrivals(TRACE, 3)[:20]:
        fresh = Fgd(MACHINES, TASKS)
        for earlier, (at, cards) in placed:
            fresh.room.take(earlier, at, cards)
        place = kept.place(task)
        assert fresh.place(task) == place
        placed += [(task, place)] if place else []
    assert len(placed) > 10


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    row = {"trace": "drawn", "policy": "tessera", "arrived": 100, "mean": 95.0}
    plot({"rows": [row, {**row, "arrived": 110, "mean": 96.0}]}, tmp_path / "curves.svg")
    assert "tessera" in (tmp_path / "curves.svg").read_text()


def test_the_report_has_a_row_per_point_and_can_be_compared(tmp_path: Path) -> None:
    settings = Settings({"drawn": TRACE}, ("tessera", "bestfit"), "online", (9, 10), many=False)
    report = run_quality(settings, lambda _: None)
    assert report["ok"]
    assert report["checked"] > 0
    assert report["ratio_bestfit"] > 0
    at_100 = {row["policy"]: row["mean"] for row in report["rows"] if row["arrived"] == 100}
    assert at_100 == pytest.approx({name: report[f"{name}_at_100"] for name in ("tessera", "bestfit")}, abs=0.002)
    keys = {(row["policy"], row["arrived"]) for row in report["rows"]}
    assert keys <= set(product(("tessera", "bestfit"), (50, 80, 90, 95, 100, 110, 120, 130)))
    for row in report["rows"]:
        assert row["mean"] == pytest.approx(np.mean(row["values"]), abs=0.001)
        assert row["mean"] <= min(row["arrived"] + 0.5, 100)
    worse = json.loads(json.dumps(report))
    for row in worse["rows"]:
        row |= {"mean": row["mean"] - 1, "values": [value - 1 for value in row["values"]]}
    assert {row["regret"] for row in compare(worse, report)["rows"]} == {1.0}
    with pytest.raises(CompareError, match="run the same ones"):
        compare(report, {**report, "seeds": [3]})
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(CompareError, match="is no report"):
        read_report(tmp_path / "empty.json")


def test_a_wrong_placement_fails_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.quality.made", lambda *_: Fixed((0, (0,))))
    report = run_quality(Settings({"drawn": TRACE}, ("bestfit",), "online", (1,), many=False), lambda _: None)
    assert not report["ok"]
    assert "asks" in report["error"] or "takes" in report["error"]


NODES = "sn,cpu_milli,memory_mib,gpu,model\nn-0,64000,262144,2,P100\nn-1,96000,393216,8,G2\n"


@pytest.mark.parametrize(
    ("pods", "sentence"),
    [
        pytest.param("p-0,1000,1024,1,1500", "1500 milli", id="more than a GPU of one"),
        pytest.param("p-0,1000,1024,2,500", "2 GPUs of 500", id="parts of two"),
        pytest.param("p-0,-1,1024,1,500", "-1 milli-CPU", id="less than no CPU"),
        pytest.param("p-0,many,1024,1,500", "cannot be read", id="no number"),
        pytest.param("p-0,1000,1024,0,0", "nobody asks", id="no GPU asked"),
        pytest.param("p-0,1,1,1,500\np-0,1,1,1,500", "twice", id="a name twice"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_a_sentence(tmp_path: Path, pods: str, sentence: str) -> None:
    (tmp_path / "pods.csv").write_text(f"name,cpu_milli,memory_mib,num_gpu,gpu_milli\n{pods}\n")
    (tmp_path / "nodes.csv").write_text(NODES)
    with pytest.raises(TraceError, match=sentence):
        load_all(str(tmp_path / "pods.csv"), None, tmp_path / "nodes.csv")


def test_days_of_ones_own_are_replayed_from_two_files(tmp_path: Path) -> None:
    pods = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np-0,4000,1024,1,1000\np-1,4000,1024,1,500\n"
    (tmp_path / "day.csv").write_text(pods)
    (tmp_path / "nodes.csv").write_text(NODES)
    files = ["--trace", str(tmp_path / "day.csv"), "--nodes", str(tmp_path / "nodes.csv"), "--seeds", "1"]
    argv = [sys.executable, "-m", "bench", "quality", *files, "--policies", "bestfit", "--json"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["sources"] == {"day": "day.csv on nodes.csv"}
    assert {row["policy"] for row in report["rows"]} == {"bestfit"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--trace openb:default --policies best", "--policies is a list of tessera,fgd"),
        ("--trace openb:default --mix known", "--mix is oracle or online"),
        ("--trace openb:default --seeds 5-1", "--seeds names none"),
        ("--trace openb:default --seeds a", "--seeds is a list"),
        ("--trace openb:default --plot curves.pdf", "--plot writes"),
        ("--trace day.csv", "--nodes FILE"),
        ("--trace philly:day", "openb:NAME"),
    ],
)
def test_usage_errors_end_with_64_and_a_sentence(arguments: str, sentence: str) -> None:
    argv = [sys.executable, "-m", "bench", "quality", *arguments.split()]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (64, "")
    assert sentence in ran.stderr
