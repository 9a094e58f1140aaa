"""Documents that cannot drift: their YAML works, their words are the program's, their links lead somewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from scheduler import config
from scheduler.cli import serve
from scheduler.cli.main import app
from scheduler.cli.scheduler_config import check_configuration
from scheduler.clock import RealClock
from scheduler.config import Settings
from scheduler.decision.catalog import REASONS as MASK_WORDS
from scheduler.decision.reasons import REASONS
from scheduler.embedded.world import World
from scheduler.errors import StoreError
from scheduler.ids import seeded_ids
from scheduler.intake.pod import read_pod
from scheduler.intake.queue import read_queue
from scheduler.ledger.queues import Queues
from scheduler.store import database
from tests.objects import raw_pod
from tests.refusals import NO_ADVICE, PAGE, advice, written

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```yaml\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
ASKS = {"whole-gpu", "mig-slice", "share", "cpu-only", "gpu-model", "priority-and-queue"}


def documents() -> Iterator[Any]:
    """Every YAML document in a fenced block, with where it stands."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            inner = re.sub(rf"^{found[1]}", "", found[2], flags=re.MULTILINE)
            for number, document in enumerate(yaml.safe_load_all(inner)):
                yield pytest.param(document, id=f"{page.relative_to(ROOT)}:{line}#{number}")


def pod_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the pod that a document is, or makes."""
    if document["kind"] == "Pod":
        return document
    template = document.get("spec", {}).get("template")
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template} if template else None


@pytest.mark.parametrize("document", list(documents()))
def test_yaml_works(document: dict[str, Any], tmp_path: Path) -> None:
    if "kind" not in document:  # Tessera's own configuration
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(document))
        assert isinstance(config.load(path, {}), Settings)
        return
    if document["kind"] == "KubeSchedulerConfiguration":
        assert [one for one in check_configuration(yaml.safe_dump(document), "docs") if one.status != "ok"] == []
        return
    if document["kind"] == "Queue":
        assert read_queue(document).name == document["metadata"]["name"]
        return
    kubernetes_validate.validate(document, "1.36", strict=True)
    raw = pod_of(document)
    if raw is not None:
        pod = read_pod({**raw, "metadata": {**raw["metadata"], "uid": "u", "namespace": "default"}})
        assert pod.request.refusal is None
        assert pod.ours


def test_every_ask_has_a_page_with_a_pod_that_works() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "asks").glob("*.md")}
    assert set(pages) == ASKS
    assert [name for name, text in pages.items() if "kind: Pod" not in text] == []
    listed = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in pages if f"docs/asks/{name}.md" not in listed] == []


def test_the_table_of_refusals_is_the_vocabulary() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "write it anew: python -m tests.refusals"
    advised = advice(page)
    assert list(advised) == list(REASONS)
    assert [word for word, said in advised.items() if said in {"", NO_ADVICE}] == []


def test_words_in_code_type_are_words_of_the_vocabulary() -> None:
    """A CamelCase word that looks like a reason is one."""
    known = {*REASONS, "DefaultPreemption", "KubeSchedulerConfiguration"}
    pages = [page for page in PAGES if page.parent.name == "asks" or page.stem in {"refusals", "operations"}]
    found = {
        f"{page.name}: {word}"
        for page in pages
        for word in re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", page.read_text(encoding="utf-8"))
        if word not in known
    }
    assert found == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = [found[1] for found in LINK.finditer(page.read_text(encoding="utf-8")) if "://" not in found[1]]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_command_and_option_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    tree = get_command(app)
    commands = tree.commands  # type: ignore[attr-defined]
    missing = [f"tessera {name}" for name in commands if f"tessera {name}" not in reference]
    for name, command in commands.items():
        options = [word for parameter in command.params for word in parameter.opts if word.startswith("--")]
        missing += [f"{name} {option}" for option in options if option not in reference and option != "--help"]
    assert missing == []


def test_every_key_of_the_ready_line_is_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    serve._say_ready(["e", "a", "m"], None, None)
    line = json.loads(capsys.readouterr().out)
    reference = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"prints one JSON line on stdout:(.*?)\n\n", reference, re.DOTALL)
    assert set(re.findall(r"`([a-z]+)`", told)) == set(line)


def test_the_ledgers_that_are_documented_are_those_that_open() -> None:
    reference = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `--db URL` .*$", reference, re.MULTILINE)
    kinds = set(re.findall(r"`([a-z]+)://", row))
    assert {database.parse(f"{kind}://x/y").get_backend_name() for kind in kinds} == {"sqlite", "postgresql"}
    with pytest.raises(StoreError, match="postgresql://HOST/NAME"):
        database.parse("postgres://x/y")


def test_every_step_of_the_funnel_is_explained_with_its_word() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| step \|.*?\n\n", page, re.DOTALL)
    rows = [[re.findall(r"`([A-Za-z-]+)`", cell) for cell in row.split("|")] for row in table.strip().splitlines()[2:]]
    told = [pair for row in rows for pair in zip(row[1], row[3], strict=True)]
    assert told == list(MASK_WORDS.items())


def test_the_documented_queue_default_limits_pods_without_a_label_of_every_namespace() -> None:
    (document,) = [one for one in map(yaml.safe_load, _queue_documents()) if one["metadata"]["name"] == "default"]
    told = read_queue({**document, "spec": {**document["spec"], "parent": ""}})
    made = Queues()
    made.replace([(told, "")])
    assert made.refusal("default", "anywhere") == ""
    assert made.quota.keys("default") == ("gpu",)
    none = read_queue({**document, "spec": {"nominal": {"gpu": 0}}})
    made.replace([(none, "")])
    assert made.refusal("default", "anywhere") == "NotAuthorized", "the line namespaceSelector matters"


def _queue_documents() -> list[str]:
    text = (ROOT / "docs" / "queues.md").read_text(encoding="utf-8")
    blocks = [found[2] for found in BLOCK.finditer(text) if "kind: Queue" in found[2]]
    return [part for block in blocks for part in block.split("---\n")]


def test_namespaces_of_the_embedded_cluster_have_their_name_alone(tmp_path: Path) -> None:
    for kind, items in (("nodes", []), ("pods", [raw_pod("one")])):
        (tmp_path / f"{kind}.json").write_text(json.dumps({"kind": "List", "items": items}))
    (tmp_path / "namespaces.json").write_text("[]")  # not read
    world = World(RealClock(), seeded_ids(Random(1)), Random(1))
    world.load(tmp_path)
    (found,) = world.cluster.snapshot("namespaces")
    assert found["metadata"]["labels"] == {"kubernetes.io/metadata.name": found["metadata"]["name"]}
