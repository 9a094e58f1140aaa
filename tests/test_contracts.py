"""The import contracts hold, and each of them catches the breach it is there for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bench", "nodeagent", "policies", "scheduler")
LINT = [
    sys.executable,
    "-c",
    "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())",
    "--no-logo",
    "--no-cache",
]


def lint(folder: Path, contract: str | None = None) -> subprocess.CompletedProcess[str]:
    chosen = ["--contract", contract] if contract else []
    return subprocess.run([*LINT, *chosen], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the house in which breaches may be planted; each test takes its own out again."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / ".importlinter", folder)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_tree_keeps_every_contract(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("contract", "module", "line"),
    [
        pytest.param("policies", "policies/fit.py", "import time", id="a policy reads the clock"),
        pytest.param("policies", "policies/packing.py", "from random import random", id="a policy draws"),
        pytest.param("packages", "policies/fit.py", "import scheduler.model.node", id="a policy knows the house"),
        pytest.param("packages", "scheduler/desk.py", "import bench.child", id="the product leans on its bench"),
        pytest.param("house", "scheduler/model/node.py", "import scheduler.intake", id="a noun reads its source"),
        pytest.param("house", "scheduler/inventory/asks.py", "import scheduler.decision", id="inventory decides"),
        pytest.param("house", "scheduler/ledger/lifecycle.py", "import scheduler.decision", id="the ledger decides"),
        pytest.param("house", "scheduler/desk.py", "import scheduler.cli", id="the desk knows the command line"),
        pytest.param("house", "scheduler/kube/port.py", "import scheduler.desk", id="an adapter calls back"),
        pytest.param("house", "scheduler/gadget.py", "", id="a module without a place"),
        pytest.param("ledger", "scheduler/ledger/lifecycle.py", "import scheduler.inventory", id="the ledger looks"),
        pytest.param("pure", "scheduler/ledger/lifecycle.py", "import uuid", id="the ledger names things itself"),
        pytest.param("pure", "scheduler/inventory/asks.py", "import asyncio", id="the inventory waits"),
        pytest.param("pure", "scheduler/model/node.py", "import scheduler.clock", id="a clock by a detour"),
        pytest.param("dates", "scheduler/model/pod.py", "from datetime import datetime", id="a noun with a date"),
        pytest.param("kubernetes", "scheduler/web/__init__.py", "import kubernetes", id="a second API client"),
        pytest.param("sql", "scheduler/web/__init__.py", "import sqlalchemy", id="SQL in a handler"),
        pytest.param("web", "scheduler/web/__init__.py", "import scheduler.kube.port", id="a handler calls the API"),
        pytest.param("packages", "nodeagent/collect.py", "import scheduler.model.node", id="the agent knows the house"),
        pytest.param("agent", "nodeagent/collect.py", "import numpy", id="the agent grows heavy"),
        pytest.param("nvml", "nodeagent/collect.py", "import pynvml", id="a second way to the driver"),
        pytest.param(
            "wire", "scheduler/intake/node.py", "import nodeagent.collect", id="Tessera reaches into the agent"
        ),
        pytest.param("thought", "nodeagent/report.py", "import time", id="the wire format reads the clock"),
    ],
)
def test_a_planted_breach_is_caught(tree: Path, contract: str, module: str, line: str) -> None:
    path = tree / module
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        result = lint(tree, contract)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = result.stdout.partition("Broken contracts")[2]
    assert module.removesuffix(".py").removesuffix("/__init__").replace("/", ".") in broken, result.stdout
