"""House rules that no other tool checks: sizes, the seams for determinism, names, and words that do not belong here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX, FUNCTION_LINES_MAX, IDEA_LINES_MAX = 500, 60, 600
FOLDERS = ("scheduler", "policies", "bench", "tests", "nodeagent", "deploy", ".ci")
PURE = (
    "policies/",
    *(f"scheduler/{room}/" for room in "model intake inventory decision queueing ledger allocation insight".split()),
)
IDEA = (
    "policies/columns.py",
    "policies/packing.py",
    "scheduler/decision/pipeline.py",
    "scheduler/ledger/lifecycle.py",
    "scheduler/web/routes.py",
    "scheduler/app.py",
)
BANNED_NAMES = frozenset(
    "manager util utils helper helpers info data base impl service services controller repository".split()
)
IMPURE = re.compile(
    r"(time|asyncio|random|secrets|logging|socket|threading|subprocess)\..+|os\.(environ|getenv|urandom)(\..+)?"
    r"|(datetime\.)*(datetime|date)\.(now|utcnow|today)|(uuid\.)?uuid[14]|open|input|print|id|hash"
    r"|(np|numpy)\.random\..+"
)
GIVEN = re.compile(
    r"time\..+|os\.(environ|getenv|urandom)(\..+)?|(datetime\.)*(datetime|date)\.(now|utcnow|today)|(uuid\.)?uuid[14]"
)
GIVERS = ("scheduler/clock.py", "scheduler/ids.py", "scheduler/cli/")
POINT = re.compile(r"[a-z_]+(\.[a-z_]+)+")
# Spelled so that this file does not match itself: folders of one person's machine, and files that name package hosts.
MACHINE_WORDS = re.compile(r"/(w[o]rk|hom[e]|roo[t]|User[s])/|p[i]p\.conf")


@lru_cache(maxsize=1)
def sources() -> dict[str, ast.Module]:
    """Every Python file of the repository, parsed, by its path from the root."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(), str(path)) for path in paths}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for a chain of names, an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def words(name: str) -> set[str]:
    """Split a CamelCase or snake_case name into lower-case words."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def reached(tree: ast.AST, forbidden: re.Pattern[str]) -> Iterator[str]:
    """Yield the forbidden chains of names, used or called, and bare calls such as `open(...)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.Attribute):
            name = dotted(node.func if isinstance(node, ast.Call) else node)
            if forbidden.fullmatch(name):
                yield f"{node.lineno}: {name}"


def impure(tree: ast.AST) -> Iterator[str]:
    """Yield what has no place in a pure room."""
    yield from reached(tree, IMPURE)
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await):
            yield f"{node.lineno}: async code"


def sleeps(tree: ast.AST) -> Iterator[str]:
    """Yield waits in real time; `asyncio.sleep(0)` only lets others run, and a Clock's sleep is the seam itself."""
    for call in calls(tree):
        yielding = len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0
        if dotted(call.func) in {"time.sleep", "asyncio.sleep", "sleep"} and not yielding:
            yield f"{call.lineno}: {dotted(call.func)}"


def fault_points() -> list[tuple[str, ast.Call]]:
    return [
        (f"{path}:{call.lineno}", call)
        for path, tree in sources().items()
        if path.startswith("scheduler/") and path != "scheduler/faults.py"
        for call in calls(tree)
        if dotted(call.func).rpartition(".")[2] == "fault"
    ]


def texts() -> Iterator[tuple[str, str]]:
    """Yield every text file that is, or is about to be, part of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the repository's files")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in {".png", ".gz", ".sum"} and path.is_file():
            yield name, path.read_text(encoding="utf-8")


def test_files_are_short() -> None:
    sizes = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert {path: lines for path, lines in sizes.items() if lines > FILE_LINES_MAX} == {}


def test_functions_are_short() -> None:
    long = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES_MAX
    }
    assert long == {}


def test_the_idea_fits_into_six_short_files() -> None:
    sizes = {path: len((ROOT / path).read_text().splitlines()) if (ROOT / path).exists() else None for path in IDEA}
    missing = [path for path, lines in sizes.items() if lines is None]
    assert missing == []
    assert sum(lines or 0 for lines in sizes.values()) <= IDEA_LINES_MAX, sizes


def test_pure_rooms_reach_for_nothing() -> None:
    found = [f"{path}:{what}" for path, tree in sources().items() if path.startswith(PURE) for what in impure(tree)]
    assert found == []


def test_the_shell_is_given_time_identity_and_settings() -> None:
    shell = {p: t for p, t in sources().items() if p.startswith("scheduler/") and not p.startswith(GIVERS)}
    assert [f"{path}:{what}" for path, tree in shell.items() for what in reached(tree, GIVEN)] == []


def test_nothing_waits_but_through_a_clock() -> None:
    found = [
        f"{path}:{what}" for path, tree in sources().items() if path != "scheduler/clock.py" for what in sleeps(tree)
    ]
    assert found == []


def test_tests_never_wait_in_real_time() -> None:
    found = [
        f"{path}:{call.lineno}"
        for path, tree in sources().items()
        if path.startswith("tests/")
        for call in calls(tree)
        if ast.unparse(call.func).endswith("RealClock().sleep")
    ]
    assert found == []


def test_asserts_are_never_switched_off() -> None:
    debug = [
        f"{path}:{node.lineno}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "__debug__" and path != "scheduler/__main__.py"
    ]
    switched = [
        name
        for name, text in texts()
        if name.startswith((".ci/", "deploy/", "Makefile")) and re.search(r"PYTHONOPTIMIZE|python\S* -O", text)
    ]
    assert debug + switched == []


def test_python_without_asserts_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-O", "-m", "scheduler", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "python -O" in result.stderr


def test_names_say_what_a_thing_is() -> None:
    modules = {path: words(Path(path).stem) | words(Path(path).parent.name) for path in sources()}
    classes = {
        f"{path}:{node.lineno} {node.name}": words(node.name)
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert [name for name, parts in (modules | classes).items() if parts & BANNED_NAMES] == []


def test_fault_points_are_literal_and_unique() -> None:
    names = {
        place: call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
        for place, call in fault_points()
    }
    assert {p: n for p, n in names.items() if not (isinstance(n, str) and POINT.fullmatch(n))} == {}
    assert [name for name, count in Counter(names.values()).items() if count > 1] == []


def test_the_repository_speaks_of_the_project_alone() -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_WORDS.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("check", "code"),
    [
        pytest.param(impure, "import time\ntime.monotonic()", id="reads the clock"),
        pytest.param(impure, "from datetime import datetime\ndatetime.now()", id="asks the date"),
        pytest.param(impure, "import datetime\nnow = datetime.datetime.now", id="keeps the clock for later"),
        pytest.param(impure, "import os\nos.environ['HOME']", id="reads the environment"),
        pytest.param(impure, "import uuid\nuuid.uuid4()", id="makes up an identity"),
        pytest.param(impure, "rng = np.random.default_rng()", id="draws"),
        pytest.param(impure, "open('x')", id="opens a file"),
        pytest.param(impure, "hash(name)", id="depends on the hash seed"),
        pytest.param(impure, "async def decide(): ...", id="waits"),
        pytest.param(sleeps, "import time\ntime.sleep(1)", id="sleeps"),
        pytest.param(sleeps, "await asyncio.sleep(delay)", id="sleeps on the loop"),
    ],
)
def test_the_seams_are_really_checked(check: Callable[[ast.AST], Iterator[str]], code: str) -> None:
    assert list(check(ast.parse(code)))
