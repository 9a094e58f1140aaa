"""Metrics: their names, their label sets, and that they agree with the state they speak of."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from policies.columns import Health
from scheduler import gauges, geometry
from scheduler.clock import RealClock
from scheduler.decision.pipeline import Policies
from scheduler.decision.reasons import REASONS
from scheduler.desk import Desk
from scheduler.errors import StoreError
from scheduler.gauges import CAUSES, QUEUES_MAX, STATES, kept
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.ledger.ledger import advance
from scheduler.ledger.taking import newborn
from scheduler.metrics import OUTCOMES, Metrics
from scheduler.model.queue import Queue, Selector
from scheduler.model.reservation import Change, Event
from tests.objects import raw_node, raw_pod

H100 = "NVIDIA-H100-80GB-HBM3"
SERIES_MAX = 2000
PROMTOOL = shutil.which("promtool")
RULES = Path("deploy/prometheus")
BOOK = Path("docs/operations.md").read_text()

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None and os.environ.get("CI") != "true",
    reason="promtool is not on the PATH (on Debian: apt-get install prometheus)",
)


class Scene:
    """A desk and its metrics, read as Prometheus reads them."""

    def __init__(self) -> None:
        self.desk = Desk(RealClock(), Policies())
        self.metrics = Metrics(self.desk.clock, "1.2.3")
        self.metrics.watch(self.desk, lambda: 1.5, lambda: ["one finding"])

    def node(self, name: str, *, slices: dict[str, str] | None = None, cordoned: bool = False, **how: object) -> None:
        raw = raw_node(name, **how)  # type: ignore[arg-type]
        raw["status"]["allocatable"].update(slices or {})
        raw["spec"]["unschedulable"] = cordoned
        node = read_node(raw, {})
        assert node is not None
        self.desk.registry.put_node(node)

    def health(self, node: str, slot: int, health: Health) -> None:
        self.desk.registry.columns.column("health")[slot, self.desk.registry.columns.rows[node]] = health

    def waits(self, name: str, queue: str = "default", created: str = "2026-01-01T00:00:00Z", gpus: int = 1) -> None:
        raw = raw_pod(name, gpus, created=created)
        raw["metadata"]["labels"] = {"tessera.dev/queue": queue}
        pod = read_pod(raw)
        self.desk.registry.put_pod(pod)
        born = newborn(pod.request, fence=self.desk.fence, now_us=self.desk.clock.wall_us())
        now_us = self.desk.clock.wall_us()
        self.desk.book.apply((advance(None, Event.SUBMIT, now_us=now_us, fence=0, born=born),))

    def bound(self, name: str, node: str, gpus: int = 1) -> None:
        written = self.desk.claim(read_pod(raw_pod(name, gpus)), node)[-1].after.allocation
        annotations = {"tessera.dev/allocation": written}
        self.desk.registry.put_pod(read_pod(raw_pod(name, gpus, node=node, annotations=annotations)))

    async def text(self) -> str:
        await self.metrics.refresh()
        return self.metrics.render().decode()

    async def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """Return the values of one metric by its label values, in the order of the label names."""
        return {
            tuple(value for _, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(await self.text())
            for sample in family.samples
            if sample.name == name
        }


class Disk:
    """A writer that may be out of room."""

    full = False

    async def commit(self, changes: tuple[Change, ...]) -> None:
        if self.full:
            raise StoreError("disk full")

    async def close(self) -> None:
        self.full = True


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_every_gpu_is_in_exactly_one_state(scene: Scene) -> None:
    scene.node("exact")
    scene.node("seen", mode="observed")
    scene.bound("one", "exact", 2)
    scene.bound("two", "seen", 3)
    scene.desk.claim(read_pod(raw_pod("soon", 1)), "exact")
    scene.desk.claim(read_pod(raw_pod("later", 2)), "seen")
    scene.desk.filter(read_pod(raw_pod("promised", 1)), ["exact"])
    scene.health("exact", 7, Health.BAD)
    scene.health("exact", 6, Health.DRAINING)
    found = await scene.samples("tessera_gpus")
    assert found == {
        (H100, "allocated"): 5,
        (H100, "free"): 5,
        (H100, "reserved"): 4,
        (H100, "unhealthy"): 1,
        (H100, "draining"): 1,
    }
    assert {state for _, state in found} == set(STATES)


async def test_free_gpus_that_nothing_can_use_are_stranded_for_one_cause(scene: Scene) -> None:
    scene.node("full")
    scene.desk.registry.put_pod(read_pod(raw_pod("eater", 0, "95.5", node="full", scheduler="other")))
    scene.node("away", cordoned=True)
    scene.node("held")
    scene.desk.registry.put_pod(read_pod(raw_pod("foreign", 1, node="held", scheduler="other")))
    scene.node("good")
    found = await scene.samples("tessera_gpu_stranded")
    assert {cause: found[cause, H100] for cause in CAUSES} == {
        "cordoned": 8,
        "unnamed": 8,
        "cpu": 8,
        "memory": 0,
        "pods": 0,
    }


async def test_free_gpus_of_no_use_for_what_is_asked_lately_are_fragments(scene: Scene) -> None:
    for name in ("one", "two"):
        scene.node(name)
    scene.node("other", product="Tesla-T4", gpus=4)
    scene.node("full", product="NVIDIA-A100-SXM4-80GB", gpus=1)
    scene.bound("a", "one", 6)
    scene.bound("b", "two", 3)
    scene.bound("c", "full", 1)
    ratio = "tessera_gpu_fragmentation_ratio"
    assert set((await scene.samples(ratio)).values()) == {0.0}
    for gpus in (1, 4, 4, 4):
        scene.desk.arrivals.learn(read_pod(raw_pod("came", gpus)).request, scene.desk.clock.wall_us())
    scene.desk.arrivals.learn(read_pod(raw_pod("came", 0)).request, scene.desk.clock.wall_us())
    scene.desk.arrivals._since = 32
    assert await scene.samples(ratio) == {
        (H100,): pytest.approx(0.75 * 2 / 7),
        ("Tesla-T4",): 0.0,
        ("NVIDIA-A100-SXM4-80GB",): 0.0,
    }


async def test_a_scrape_of_a_large_cluster_lets_others_run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "NODES_AT_ONCE", 2)
    for number in range(7):
        scene.node(f"n{number}")
    read = list(gauges.fragmentation(scene.desk.registry, scene.desk.mix))
    assert [metric is None for metric in read] == [True] * 4 + [False]


async def test_a_model_that_comes_during_a_scrape_is_no_trouble(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "NODES_AT_ONCE", 1)
    scene.node("first")
    scene.node("second")
    scene.desk.arrivals.learn(read_pod(raw_pod("came", 1)).request, scene.desk.clock.wall_us())
    reading = gauges.fragmentation(scene.desk.registry, scene.desk.mix)
    assert next(reading) is None
    scene.desk.registry.remove_node("second", scene.desk.registry.nodes["second"].uid)
    scene.node("third", product="Tesla-T4")
    *_, metric = reading
    assert metric is not None
    assert {sample.labels["model"] for sample in metric.samples} == {H100, "Tesla-T4"}


async def test_static_mig_slices_are_counted_where_the_plugin_offers_them(scene: Scene) -> None:
    scene.node("seen", mode="observed", slices={"nvidia.com/mig-1g.10gb": "7"})
    raw = raw_pod("one", 0, node="seen")
    raw["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/mig-1g.10gb"] = "3"
    raw["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] = "3"
    scene.desk.registry.put_pod(read_pod(raw))
    assert await scene.samples("tessera_mig_instances") == {("1g.10gb", "free"): 4, ("1g.10gb", "allocated"): 3}


async def test_mig_instances_of_exact_nodes_are_those_that_are_held(scene: Scene) -> None:
    raw = raw_node("mig", **{"tessera.dev/mig-devices": "all"})
    raw["status"]["allocatable"]["nvidia.com/mig-3g.40gb"] = "16"
    node = read_node(raw, geometry.products())
    assert node is not None
    scene.desk.registry.put_node(node)
    pod = raw_pod("one", 0)
    for amounts in pod["spec"]["containers"][0]["resources"].values():
        amounts["nvidia.com/mig-3g.40gb"] = "3"
    scene.desk.claim(read_pod(pod), "mig")
    assert await scene.samples("tessera_mig_instances") == {("3g.40gb", "allocated"): 3, ("3g.40gb", "free"): 0}
    assert (await scene.samples("tessera_gpus"))["H100-80", "reserved"] == 2


async def test_the_queue_tells_depth_by_who_must_act_and_the_oldest(scene: Scene) -> None:
    scene.node("exact")
    scene.node("other")
    scene.desk.queues.replace((Queue(name, namespaces=Selector()), "") for name in ("vision", "speech"))
    scene.waits("one", "vision")
    scene.waits("two", "vision", "2026-01-02T00:00:00Z")
    scene.waits("big", "speech", gpus=99)
    scene.desk.filter(scene.desk.registry.pods["uid-big"], ["exact", "other"])
    assert await scene.samples("tessera_queue_depth") == {("wait", "vision"): 2, ("change", "speech"): 1}
    scene.desk.registry.freed += 1  # room elsewhere does not make a wrong ask right
    assert (await scene.samples("tessera_queue_depth"))["change", "speech"] == 1
    ages = await scene.samples("tessera_queue_oldest_seconds")
    now_s = scene.desk.clock.wall_us() / 1_000_000
    assert ages["vision",] == pytest.approx(now_s - 1_767_225_600, abs=60)
    assert set(ages) == {("vision",), ("speech",)}


async def test_pods_that_wait_without_a_gate_are_counted(scene: Scene) -> None:
    scene.waits("one")
    scene.waits("two")
    assert await scene.samples("tessera_direct_pods_waiting") == {(): 2}
    held = raw_pod("two", 1)
    held["spec"]["schedulingGates"] = [{"name": "tessera.dev/hold"}]
    scene.desk.registry.put_pod(read_pod(held))
    assert await scene.samples("tessera_direct_pods_waiting") == {(): 1}


async def test_only_what_became_durable_counts_as_an_allocation(scene: Scene) -> None:
    scene.node("exact")
    disk = Disk()
    writer = scene.metrics.counting(disk)
    changes = scene.desk.claim(read_pod(raw_pod("one", 1)), "exact")
    await writer.commit(changes)
    post = advance(changes[-1].after, Event.POST, now_us=1, fence=0)
    await writer.commit((post,))
    disk.full = True
    with pytest.raises(StoreError):
        await writer.commit((post,))
    found = await scene.samples("tessera_allocations_total")
    assert {outcome for (outcome,) in found} == set(OUTCOMES.values())
    assert {outcome for (outcome,), count in found.items() if count} == {"bound"}
    assert found["bound",] == 1
    disk.full = False
    await writer.close()
    assert disk.full


async def test_names_and_labels_are_those_promised(scene: Scene) -> None:
    fill(scene)
    families = {family.name: family for family in text_string_to_metric_families(await scene.text())}
    labels = {
        name: {key for sample in family.samples for key in sample.labels} - {"le"} for name, family in families.items()
    }
    assert labels == {
        "tessera_breaker_state": {"dependency", "state"},
        "tessera_breaker_transitions": {"dependency", "to"},
        "tessera_build_info": {"version"},
        "tessera_extender_request_duration_seconds": {"verb"},
        "tessera_extender_requests": {"verb", "code"},
        "tessera_filter_rejections": {"reason"},
        "tessera_inventory_age_seconds": set(),
        "tessera_gpus": {"model", "state"},
        "tessera_gpu_stranded": {"model", "cause"},
        "tessera_gpu_fragmentation_ratio": {"model"},
        "tessera_mig_instances": {"profile", "state"},
        "tessera_queue_depth": {"queue", "class"},
        "tessera_direct_pods_waiting": set(),
        "tessera_queue_oldest_seconds": {"queue"},
        "tessera_allocations": {"outcome"},
        "tessera_pod_events": {"outcome"},
        "tessera_drift_devices": set(),
        "tessera_poison_objects": {"kind"},
        "tessera_requests": {"state"},
    }


async def test_series_stay_bounded_whatever_things_are_called(scene: Scene) -> None:
    for number in range(200):
        node = {"product": f"GPU-{number}", "gpus": 1, "mode": "observed"}
        scene.node(f"n{number}", slices={f"nvidia.com/mig-1g.{number}gb": "1"}, **node)
    for number in range(700):
        scene.waits(f"p{number}", f"queue-{number}")
    for verb in ("filter", "prioritize", "bind"):
        for code in ("ok", "refused", "error", "malformed"):
            scene.metrics.answered(verb, code)
    for word in REASONS:
        scene.metrics.rejected(word)
    lines = [line for line in (await scene.text()).splitlines() if not line.startswith("#")]
    assert len(lines) <= SERIES_MAX
    depth = await scene.samples("tessera_queue_depth")
    assert len(depth) == QUEUES_MAX + 1
    assert sum(depth.values()) == 700
    assert sum((await scene.samples("tessera_gpus")).values()) == 200
    assert not [line for line in lines if "uid-" in line or "p699" in line]


def test_the_largest_keep_their_names() -> None:
    assert kept({"a": 1, "b": 5, "c": 5}, 2) == {"b": "b", "c": "c", "a": "other"}
    assert kept({}, 2) == {}


def fill(scene: Scene) -> None:
    """Give every metric a sample."""
    scene.node("exact")
    scene.node("seen", mode="observed", slices={"nvidia.com/mig-1g.10gb": "7"})
    scene.waits("one")
    scene.metrics.answered("filter", "ok")
    scene.metrics.rejected("GpusBusy")
    scene.metrics.counting(Disk())


@needs_promtool
async def test_promtool_finds_nothing_to_complain_about(scene: Scene, tmp_path: Path) -> None:
    fill(scene)
    assert PROMTOOL, "promtool"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    tool = await asyncio.create_subprocess_exec(PROMTOOL, "check", "metrics", cwd=tmp_path, **pipes)
    said = await tool.communicate((await scene.text()).encode())
    assert (tool.returncode, said) == (0, (b"", b""))


@needs_promtool
def test_promtool_tests_every_alert() -> None:
    assert PROMTOOL, "promtool"
    tests = RULES / "rules-test.yaml"
    told = subprocess.run([PROMTOOL, "test", "rules", tests], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    alerts = {rule["alert"] for group in rules() for rule in group["rules"]}
    assert set(re.findall(r"alertname=\"(\w+)\"", tests.read_text())) == alerts


def rules() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((RULES / "rules.yaml").read_text())["groups"]
    return groups


async def test_alerts_ask_for_what_is_exposed_and_name_a_paragraph(scene: Scene) -> None:
    fill(scene)
    exposed = {
        sample.name for family in text_string_to_metric_families(await scene.text()) for sample in family.samples
    }
    for rule in rules()[0]["rules"]:
        assert set(re.findall(r"tessera_\w+", rule["expr"])) <= exposed, rule["alert"]
        assert f"| {rule['alert']} |" in BOOK
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
