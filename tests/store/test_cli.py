"""`tessera ledger`: one JSON object, the exit code, and an export that anybody can check."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scheduler.cli.ledger import app
from scheduler.ledger.journal import verify
from scheduler.model.reservation import State
from scheduler.store.store import Store
from tests.ledger.lives import history


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the file of a ledger with 1,200 journal lines."""
    path = tmp_path / "ledger.db"
    with Store.open(f"sqlite:///{path}") as store:
        group = [tuple(history(State.BOUND, f"{number}", queue="v\u00efsion-\ube44\uc804")) for number in range(300)]
        assert store.commit(group) == [None] * 300
    return path


def test_verify_says_ok_beside_a_running_process(file: Path) -> None:
    with Store.open(f"sqlite:///{file}") as store:
        result = CliRunner().invoke(app, ["verify", "--db", f"sqlite:///{file}", "--json"])
        said = json.loads(result.stdout.splitlines()[-1])
        assert said == {"rows": 1200, "ok": True, "first_bad": None, "head": store.head[1], "seed": None}
    assert result.exit_code == 0
    assert "good: 1200 lines" in CliRunner().invoke(app, ["verify", "--db", f"sqlite:///{file}"]).stdout


def test_verify_names_the_first_bad_line(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE journal SET node = 'gpu-2' WHERE seq = 77")
    connection.close()
    result = CliRunner().invoke(app, ["verify", "--db", f"sqlite:///{file}", "--json"])
    said = json.loads(result.stdout)
    assert (result.exit_code, said["ok"], said["first_bad"], said["rows"]) == (1, False, 77, 1200)
    assert "Line 77" in result.stderr


def test_verify_of_nothing_fails_with_a_sentence_and_still_one_object(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "--db", f"sqlite:///{tmp_path}/none.db", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (1, False)
    assert "no ledger at" in result.stderr
    assert CliRunner().invoke(app, ["export", "--db", f"sqlite:///{tmp_path}/none.db"]).exit_code == 1


def test_the_export_can_be_checked_by_anybody(file: Path) -> None:
    result = CliRunner().invoke(app, ["export", "--db", f"sqlite:///{file}"])
    assert result.exit_code == 0
    prev = "0" * 64
    lines = [json.loads(text) for text in result.stdout.splitlines()]
    for line in lines:
        body = {key: value for key, value in line.items() if key != "hash"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert line["prev"] == prev
        prev = line["hash"]
        assert hashlib.sha256(text.encode()).hexdigest() == prev
    assert (len(lines), verify(lines).head) == (1200, prev)
