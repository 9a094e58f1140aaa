"""The command line as scripts use it: one JSON object, 0, 1 or 64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bench.__main__ import _run
from tests.bench.dumps import EXACT, Fake, good_run, grants, pod

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv, env = [sys.executable, "-m", "bench", *arguments], {**os.environ, **environment}
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


def audited(fake: Fake, folder: Path) -> tuple[int, dict[str, object]]:
    fake.write(folder)
    ran = bench("audit", "--dump", str(folder), "--json")
    return ran.returncode, json.loads(ran.stdout.splitlines()[-1])


def test_a_good_dump_ends_with_0_and_a_bad_one_with_1(tmp_path: Path) -> None:
    fake, _ = good_run()
    status, report = audited(fake, tmp_path)
    assert (status, report["ok"]) == (0, True)
    fake.bind(pod("thief", 1), EXACT, grants(1))
    status, report = audited(fake, tmp_path)
    assert (status, report["ok"], report["over_allocations"]) == (1, False, 1)


def test_people_get_a_table(tmp_path: Path) -> None:
    fake, _ = good_run()
    fake.write(tmp_path)
    ran = bench("audit", "--dump", str(tmp_path))
    assert ran.returncode == 0
    assert "waiting_placeable" in ran.stdout


def test_an_empty_dump_fails_with_a_sentence(tmp_path: Path) -> None:
    ran = bench("audit", "--dump", str(tmp_path), "--json")
    assert ran.returncode == 1
    assert "cannot be read" in json.loads(ran.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("cluster --nodes none", "--nodes"),
        ("cluster --nodes 0", "--nodes"),
        ("cluster --way sideways", "direct or queue"),
        ("cluster --way queue --queues nowhere.yaml", "there is no file"),
        ("cluster --trace openb:default", "go together"),
        ("cluster --trace philly:default --drop-refused", "--trace is openb:NAME"),
        ("throughput --way sideways", "direct"),
        ("crash --points C1", "C3, C4, C5, C6, C7, C8"),
        ("crash --each 0", "--each"),
        ("wake --held 5 --freed 6", "--held is at least --freed"),
        ("cluster --kinds whole,half", "--kinds is a list of none,whole,mig,share"),
        ("soak --kinds mig", "with none or whole among them"),
        ("soak --seeds 0", "--seeds"),
        ("cluster --pods 10 --kills 9", "9 kills need at least 45 pods"),
        ("cluster --nodes 200 --pods 10", "use --pods"),
        ("cluster --colour", "--colour"),
        ("audit --dump /nowhere/at/all", "/nowhere/at/all"),
        ("latency --nodes some", "--nodes"),
        ("latency --nodes 5", "--nodes must be at least 32"),
        ("latency --k 0", "--k must be at least 1"),
        ("latency --rounds 0", "--rounds"),
        ("coldstart --pods 0", "--pods"),
        ("hostile --port side", "--port is extender, webhook, agents or api"),
        ("hostile --bodies 0", "--bodies"),
        ("check --only painting", "--only is one of latency"),
        ("paint", "paint"),
    ],
)
def test_usage_errors_end_with_64_and_a_sentence(arguments: str, sentence: str) -> None:
    ran = bench(*arguments.split())
    assert (ran.returncode, ran.stdout) == (64, "")
    assert sentence in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [("cluster --seed 3", 3), ("coldstart", None), ("crash --seed 4", 4), ("throughput", None), ("wake", 1)],
)
def test_without_a_control_plane_a_bench_fails_with_one_sentence(arguments: str, seed: int | None) -> None:
    ran = bench(*arguments.split(), "--json", TESSERA_KUBE_BIN="/nowhere")
    report = json.loads(ran.stdout.splitlines()[-1])
    assert (ran.returncode, report["seed"], report["ok"]) == (1, seed, False)
    assert "/nowhere" in report["error"]


@pytest.mark.parametrize(("ok", "status", "words"), [(True, 0, []), (False, 1, ["why", '"a pod is lost"'])])
def test_who_has_seen_a_table_gets_the_whole_report_only_when_it_is_not_ok(
    capsys: pytest.CaptureFixture[str], ok: bool, status: int, words: list[str]
) -> None:
    report: dict[str, object] = {"seed": 1, "ok": ok, "why": "a pod is lost"}

    async def work(_: object) -> dict[str, object]:
        return report

    for as_json in (False, True):
        shown: list[object] = []
        with pytest.raises(typer.Exit) as ended:
            _run(work, seed=1, as_json=as_json, show=shown.append)
        out = capsys.readouterr().out
        assert (ended.value.exit_code, shown) == (status, [report])
        assert json.loads(out) == report if as_json else all(word in out for word in words) and bool(out) == (not ok)
