"""nodes, gpus, top and why, as people and scripts use them."""

from __future__ import annotations

import re

import pytest

from scheduler.decision.reasons import REASONS
from scheduler.model.reservation import Event
from scheduler.model.subject import Subject
from tests.cli.stage import Stage, tessera
from tests.objects import raw_node

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def stage() -> Stage:
    return Stage()


async def test_nodes_as_table_and_json(stage: Stage, capsys: Capture) -> None:
    stage.bound("one", "exact-1", 3)
    stage.bound("two", "seen-1", 2)
    async with stage.serving():
        said = await tessera(capsys, "nodes", "--api", stage.url)
        assert said.code == 0
        lines = {line.split()[0]: line.split() for line in said.out.splitlines()}
        assert lines["exact-1"][1:4] == ["exact", "NVIDIA-H100-80GB-HBM3", "5/8"]
        assert lines["seen-1"][3] == "6/8"
        assert lines["cpu-1"][2:4] == ["-", "0/0"]
        said = await tessera(capsys, "nodes", "--api", stage.url, "--json")
    assert said.code == 0
    assert (said.json["ok"], said.json["seed"]) == (True, None)
    assert [node["name"] for node in said.json["nodes"]] == ["cpu-1", "exact-1", "seen-1"]
    assert said.out.count("\n") == 1


async def test_gpus_says_who_holds_what(stage: Stage, capsys: Capture) -> None:
    stage.bound("one", "exact-1", 2)
    stage.sick("exact-1", 7)
    async with stage.serving():
        said = await tessera(capsys, "gpus", "--api", stage.url)
        rows = [line.split() for line in said.out.splitlines()[1:]]
        assert [row[5] for row in rows if row[0] == "exact-1"] == ["whole"] * 2 + ["free"] * 6
        assert [row[7] for row in rows if row[5] == "whole"] == ["uid-one"] * 2
        assert [row[6] for row in rows if row[1] == "7"] == ["bad", "healthy"]
        found = (await tessera(capsys, "gpus", "--api", stage.url, "--json")).json
    assert len(found["gpus"]) == 16


async def test_divided_gpus_show_their_parts(capsys: Capture) -> None:
    stage = Stage()
    stage.node(raw_node("mig-1", **{"tessera.dev/mig-devices": "0"}), {"nvidia.com/mig-3g.40gb": "2"})
    stage.node(raw_node("seen-2", mode="observed"), {"nvidia.com/mig-1g.10gb": "7"})
    stage.bound("slice", "mig-1", ask={"nvidia.com/mig-3g.40gb": "1"})
    stage.bound("static", "seen-2", ask={"nvidia.com/mig-1g.10gb": "3"})
    size = {"tessera.dev/gpu-memory": "10Gi", "tessera.dev/gpu-milli": "250"}
    stage.bound("share", "mig-1", ask={"tessera.dev/share": "1"}, annotations=size)
    async with stage.serving():
        table = (await tessera(capsys, "gpus", "--api", stage.url)).out
        nodes = (await tessera(capsys, "nodes", "--api", stage.url)).out
        found = (await tessera(capsys, "gpus", "--api", stage.url, "--json")).json["gpus"]
        top = (await tessera(capsys, "top", "--api", stage.url)).out
    by_use = {gpu["use"]: gpu for gpu in found if gpu["node"] == "mig-1"}
    (part,) = by_use["mig"]["parts"]
    assert (part["request"], part["profile"], part["size"], part["start"] in {0, 4}) == (
        "uid-slice",
        "3g.40gb",
        4,
        True,
    )
    assert by_use["shared"]["parts"] == [{"request": "uid-share", "milli": 250, "mib": 10240}]
    assert by_use["shared"]["milliFree"] == 750
    assert "mig 3g.40gb@" in table
    assert "shared, 750m 71319Mi free" in table
    assert "1g.10gb 4/7" in nodes
    assert "ms......" in top


async def test_every_page_of_a_long_list_is_read(stage: Stage, capsys: Capture) -> None:
    for number in range(1203):
        stage.pod(f"p{number}", 9)
    async with stage.serving():
        said = await tessera(capsys, "top", "--once", "--api", stage.url)
    assert "Requests 1203 waiting" in said.out


async def test_top_draws_each_gpu(stage: Stage, capsys: Capture) -> None:
    stage.bound("one", "exact-1", 2)
    stage.bound("two", "seen-1", 3)
    stage.sick("exact-1", 7)
    stage.pod("big", 9)
    async with stage.serving():
        said = await tessera(capsys, "top", "--api", stage.url)  # not a terminal: once
    assert said.code == 0
    assert "##.....x" in said.out
    assert "###....." in said.out
    assert "16: 5 used, 10 free, 1 unhealthy" in said.out
    assert "Requests 1 waiting, 0 reserved, 2 bound, 0 running" in said.out
    assert "default/big" in said.out
    assert "ready" in said.out


async def test_what_nobody_can_take_whole_is_not_free(stage: Stage, capsys: Capture) -> None:
    for name, change in (("exact-1", {"unschedulable": True}), ("seen-1", {})):
        raw = raw_node(name, mode="exact" if name == "exact-1" else "observed")
        raw["spec"] = change
        raw["status"]["conditions"] = [{"type": "Ready", "status": "True" if change else "Unknown"}]
        stage.node(raw)
    stage.node(raw_node("mig-1", **{"tessera.dev/mig-devices": "0-1"}))
    replicas = raw_node("replicas-1", mode="observed", gpus=2)
    replicas["metadata"]["labels"]["nvidia.com/gpu.replicas"] = "2"
    stage.node(replicas)
    stage.bound("one", "seen-1", 3)
    async with stage.serving():
        top = (await tessera(capsys, "top", "--api", stage.url)).out
        table = (await tessera(capsys, "nodes", "--api", stage.url)).out
        found = (await tessera(capsys, "nodes", "--api", stage.url, "--json")).json["nodes"]
    drawn = {line.split()[0]: line.split()[3] for line in top.splitlines() if "-1 " in line}
    assert drawn["exact-1"] == "////////"
    assert drawn["seen-1"] == "###/////"
    assert drawn["mig-1"] == "//......"
    assert drawn["replicas-1"] == "//"
    assert "26: 3 used, 6 free, 0 unhealthy, 17 closed" in top
    states = {line.split()[0]: line.strip() for line in table.splitlines()}
    assert states["exact-1"].endswith("  cordoned")
    assert states["seen-1"].endswith("  not ready")
    assert states["mig-1"].endswith("  ok")
    assert {node["name"] for node in found if not node["ready"]} == {"seen-1"}


async def test_top_tells_when_tessera_is_not_ready(stage: Stage, capsys: Capture) -> None:
    stage.unready = "the API server was last heard 61 s ago"
    async with stage.serving():
        assert stage.unready in (await tessera(capsys, "top", "--once", "--api", stage.url)).out


async def test_colour_only_where_it_is_wanted(stage: Stage, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage.serving():
        assert "\x1b[" not in (await tessera(capsys, "nodes", "--api", stage.url)).out
        monkeypatch.setenv("FORCE_COLOR", "1")
        coloured = (await tessera(capsys, "nodes", "--api", stage.url)).out
        assert "\x1b[" in coloured
        monkeypatch.setenv("NO_COLOR", "1")
        plain = (await tessera(capsys, "nodes", "--api", stage.url)).out
    assert "\x1b[3" not in plain  # bold is no colour


async def test_why_of_a_pod_that_runs(stage: Stage, capsys: Capture) -> None:
    stage.bound("one", "exact-1")
    async with stage.serving():
        said = await tessera(capsys, "why", "one", "--api", stage.url)
        assert (said.code, said.out.split()[:2]) == (0, ["default/one", "BOUND"])
        found = (await tessera(capsys, "why", "one", "--api", stage.url, "--json")).json
    assert found["ok"] is True
    assert (found["state"], found["class"], found["reasons"], found["position"]) == ("BOUND", None, [], None)


async def test_why_of_a_pod_that_waits_names_its_place_and_what_would_fit(stage: Stage, capsys: Capture) -> None:
    stage.bound("a", "exact-1", 5)
    stage.bound("b", "seen-1", 7)
    stage.pod("first", 8, created="2026-01-01T00:00:00Z")
    stage.pod("second", 8, created="2026-01-01T00:00:01Z")
    async with stage.serving():
        said = await tessera(capsys, "why", "second", "-n", "default", "--api", stage.url, "--json")
        people = await tessera(capsys, "why", "second", "--api", stage.url)
    assert said.code == people.code == 2
    found = said.json
    assert found["ok"] is False
    assert (found["state"], found["class"], found["position"], found["waiting"]) == ("QUEUED", "wait", 2, 2)
    assert found["reasons"][0]["code"] == "WaitingForCapacity"
    assert {"code", "class", "text", "text_ko"} == set(found["reasons"][0])
    assert found["funnel"][0]["nodes"] == 3
    assert found["funnel"][-1]["nodes"] == 0
    assert {"change": "ask for 3 instead of 8 GPUs", "nodes": 1} in found["changes"]
    assert "position 2 of 2" in people.out
    steps = people.out.partition("nodes left: ")[2].splitlines()[0].split(" -> ")
    counts = [int(step.rpartition(" ")[2]) for step in steps]
    assert counts == sorted(set(counts), reverse=True)
    assert "ask for 3 instead of 8 GPUs (1 node)" in people.out


async def test_why_speaks_korean_where_it_is_asked_to_or_the_locale_says_so(
    stage: Stage, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.bound("a", "exact-1", 8)
    stage.pod("second", gpus=8)
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    async with stage.serving():
        call = ["why", "second", "--api", stage.url]
        english = (await tessera(capsys, *call)).out
        asked = (await tessera(capsys, *call, "--lang", "ko")).out
        monkeypatch.setenv("LANG", "ko_KR.UTF-8")
        local = (await tessera(capsys, *call)).out
        monkeypatch.setenv("LC_ALL", "kok_IN")
        other = (await tessera(capsys, *call)).out
        wrong = await tessera(capsys, *call, "--lang", "fr")
    assert asked == local != english == other
    words = re.findall(r"\[([A-Za-z]+): ", english)
    assert words
    assert all(REASONS[word].text_ko in asked and REASONS[word].text in english for word in words)
    assert (wrong.code, "--lang fr: there are en and ko" in wrong.err) == (64, True)


async def test_why_of_a_wrong_wish_says_what_to_change(stage: Stage, capsys: Capture) -> None:
    stage.pod("wish", 1, annotations={"tessera.dev/gpu-model": "A100"})
    stage.pod("bad", 1, annotations={"tessera.dev/gpu-milli": "100"})
    async with stage.serving():
        wish = await tessera(capsys, "why", "wish", "--api", stage.url, "--json")
        bad = await tessera(capsys, "why", "bad", "--api", stage.url, "--json")
    assert (wish.code, wish.json["reasons"][0]["code"]) == (3, "NoSuchGpuModel")
    assert {"change": "take any GPU model", "nodes": 2} in wish.json["changes"]
    assert (bad.code, bad.json["state"], bad.json["class"]) == (3, "REJECTED", "change")
    assert "tessera.dev/share" in bad.json["reasons"][0]["text"]


async def test_why_warns_of_a_misspelt_annotation_and_refuses_nothing(stage: Stage, capsys: Capture) -> None:
    stage.pod("slip", 9, annotations={"tessera.dev/gpu-modle": "A100"})
    async with stage.serving():
        said = await tessera(capsys, "why", "slip", "--api", stage.url)
        found = (await tessera(capsys, "why", "slip", "--api", stage.url, "--json")).json
    assert "warning: The annotation 'tessera.dev/gpu-modle' has no effect: did you mean" in said.out
    (warning,) = found["warnings"]
    assert warning.endswith("did you mean tessera.dev/gpu-model?")
    assert found["state"] == "QUEUED"


@pytest.mark.parametrize(
    ("kind", "word"), [("Job", "activeDeadlineSeconds"), ("ReplicaSet", "progressDeadlineSeconds"), ("StatefulSet", "")]
)
async def test_why_warns_of_deadlines_that_a_pod_does_not_show_while_it_waits(
    stage: Stage, capsys: Capture, kind: str, word: str
) -> None:
    owners = [{"kind": "Node", "uid": "x"}, {"kind": kind, "uid": "y", "controller": True}]
    stage.pod("waits", 9, owners=owners)
    stage.bound("runs", "exact-1", owners=owners)
    async with stage.serving():
        waits = (await tessera(capsys, "why", "waits", "--api", stage.url, "--json")).json["warnings"]
        runs = (await tessera(capsys, "why", "runs", "--api", stage.url, "--json")).json["warnings"]
    assert (len(waits), runs) == (bool(word), [])
    assert all(word in sentence for sentence in waits)


async def test_why_sends_sick_hardware_to_the_administrator(stage: Stage, capsys: Capture) -> None:
    for slot in range(8):
        stage.sick("exact-1", slot)
        stage.sick("seen-1", slot)
    stage.pod("one", 1)
    async with stage.serving():
        said = await tessera(capsys, "why", "one", "--api", stage.url, "--json")
    assert (said.code, said.json["reasons"][0]["code"]) == (4, "AllGpusUnhealthy")


async def test_why_explains_the_life_that_goes_on(stage: Stage, capsys: Capture) -> None:
    """A name that was used before: the old pod is over, the new one counts."""
    old = stage.pod("again", 1, uid="uid-old", created="2026-01-01T00:00:05Z")
    stage.step(old, Event.CANCEL, "PodGone")
    async with stage.serving():
        over = await tessera(capsys, "why", "again", "--api", stage.url, "--json")
        stage.pod("again", 1, uid="uid-new", created="2026-01-01T00:00:00Z")
        alive = await tessera(capsys, "why", "again", "--api", stage.url, "--json")
    assert (over.code, over.json["state"], over.json["reasons"]) == (1, "CANCELLED", [])
    assert (alive.code, alive.json["state"]) == (2, "QUEUED")
    assert alive.json["reasons"][0]["code"] == "PendingEvaluation"


async def test_every_failure_is_one_object_one_sentence_and_status_1(stage: Stage, capsys: Capture) -> None:
    async with stage.serving():
        said = await tessera(capsys, "why", "nobody", "--api", stage.url, "--json")
        assert (said.code, said.json["ok"], said.json["code"]) == (1, False, "request.not_found")
        assert "schedulerName" in said.err
        strange = await tessera(capsys, "nodes", "--api", stage.url + "/elsewhere", "--json")
        assert (strange.code, strange.json["code"]) == (1, "http.404")
    for command in (["nodes"], ["gpus"], ["why", "x"]):
        away = await tessera(capsys, *command, "--api", stage.url, "--json")
        assert (away.code, away.json["ok"], away.json["code"]) == (1, False, "api.unreachable")
        assert "--api" in away.err


class Nobody:
    """Knows no token."""

    async def subject(self, token: str) -> Subject | None:
        assert token
        return None


@pytest.mark.parametrize(("token", "said"), [("", "TESSERA_TOKEN is not set"), ("x", "TESSERA_TOKEN holds no valid")])
async def test_a_stranger_is_told_to_set_a_token(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, token: str, said: str
) -> None:
    monkeypatch.setenv("TESSERA_TOKEN", token)
    stage = Stage(bearers=(Nobody(),))
    async with stage.serving():
        refused = await tessera(capsys, "nodes", "--api", stage.url, "--json")
    assert (refused.code, refused.json["code"]) == (1, "access.unauthenticated")
    assert said in refused.err
    assert "; set TESSERA_TOKEN to a token" in refused.err
    assert "Authorization" not in refused.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nodes", "--api", "127.0.0.1:8080"],
        ["gpus", "--api", "ftp://x"],
        ["why"],
        ["top", "--never"],
        ["serve", "--embedded", ".", "--extender", "0.0.0.0:0"],
        ["serve", "--embedded", ".", "--extender-tls-cert", "x"],
        ["serve", "--embedded", ".", "--extender", "0.0.0.0:0", "--extender-tls-cert", "x", "--extender-tls-key", "x"],
    ],
)
async def test_wrong_use_is_64(capsys: Capture, arguments: list[str]) -> None:
    said = await tessera(capsys, *arguments)
    assert said.code == 64
    assert said.out == ""


def test_exit_statuses_cover_every_class() -> None:
    from scheduler.cli.why import EXIT  # noqa: PLC0415 - beside its use

    assert {reason.who for reason in REASONS.values()} == set(EXIT)
