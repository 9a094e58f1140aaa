from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.auditor import ZERO, audit, max_calls
from bench.replay import line_hash
from tests.bench.dumps import (
    ALLOCATION,
    EXACT,
    OBSERVED,
    SHARES,
    Fake,
    Json,
    allocation,
    good_run,
    gpu_node,
    grants,
    mig_node,
    piece,
    pod,
    share,
    slices,
)

H100 = "NVIDIA-H100-80GB-HBM3"


def faults(report: Json) -> set[str]:
    kinds = {kind for kind in ZERO if report[kind]}
    return kinds | (set() if report["journal_ok"] else {"journal"})


def test_a_run_without_a_fault_passes() -> None:
    fake, _ = good_run()
    report = fake.audit()
    assert faults(report) == set()
    assert report["ok"], report["findings"]
    figures = [report[key] for key in ("pods", "bound", "waiting", "max_filter_calls_5s", "seed", "on_nominated")]
    assert figures == [5, 4, 1, 2, 7, None]
    assert report["released"] == ["ended", "train", "notebook", "web"]
    assert report["checked"] > 20


def test_a_dump_reads_back_from_its_files(tmp_path: Path) -> None:
    fake, _ = good_run()
    fake.write(tmp_path)
    assert audit(tmp_path) == fake.audit()


def test_one_device_for_two_pods_at_the_end_is_found() -> None:
    fake, _ = good_run()
    fake.bind(pod("thief", 1), EXACT, grants(1))
    report = fake.audit()
    assert faults(report) == {"over_allocations"}
    assert report["over_allocations"] == 1
    assert not report["ok"]


def test_one_device_for_two_pods_at_one_instant_is_found_though_both_are_gone() -> None:
    fake = Fake(nodes=[gpu_node(EXACT, 4, "exact")])
    first, second = (fake.bind(pod(name, 1), EXACT, grants(3)) for name in ("first", "second"))
    fake.finish(first)
    fake.finish(second)
    assert faults(fake.audit()) == {"over_allocations"}


def test_a_reservation_takes_the_device_until_it_is_voided() -> None:
    fake, pods = good_run()
    large = pods["large"]
    fake.tell("reserve", large, "QUEUED", "RESERVED", node=EXACT, said=allocation(large, EXACT, grants(1, 2)))
    fake.tell("void", large, "RESERVED", "QUEUED", node=EXACT)
    assert faults(fake.audit()) == {"over_allocations"}


def test_an_observed_node_counts() -> None:
    fake, _ = good_run()
    fake.bind(pod("more", 2), OBSERVED, [{"kind": "whole", "count": 2}])
    report = fake.audit()
    assert faults(report) == {"over_allocations"}
    assert "nvidia.com/gpu" in report["findings"]["over_allocations"][0]


def test_too_much_cpu_on_a_node_is_found() -> None:
    fake, _ = good_run()
    fake.bind(pod("hog", cpu="15"), EXACT, [])
    assert faults(fake.audit()) == {"over_allocations"}


def test_a_device_that_the_node_does_not_have_is_found() -> None:
    fake, _ = good_run()
    fake.bind(pod("ghost", 1), EXACT, grants(4))
    assert faults(fake.audit()) == {"over_allocations"}


def divided() -> Fake:
    """An exact node with device 0 whole and devices 1 to 3 in MIG mode, an observed one with static slices."""
    observed = mig_node(OBSERVED, 2, "observed", H100)
    observed["status"]["allocatable"] |= {"nvidia.com/mig-3g.40gb": "2", "nvidia.com/mig-1g.10gb.me": "1"}
    return Fake(nodes=[mig_node(EXACT, 4, "exact", H100), observed])


def test_slices_and_shares_as_they_should_be_pass() -> None:
    fake = divided()
    fake.bind(pod("two", asked=slices("3g.40gb", 2)), EXACT, [piece(1, "3g.40gb", 0, 4), piece(1, "3g.40gb", 4, 4)])
    fake.bind(pod("media", asked=slices("1g.10gb+me")), EXACT, [piece(2, "1g.10gb+me", 6, 1)])
    for name in ("one", "other"):
        half = pod(name, asked=SHARES, **{"tessera.dev/gpu-milli": "500"})
        fake.bind(half, EXACT, [share(0, 500, 40960)])
    static = [{"kind": "mig", "profile": "3g.40gb", "count": 2}]
    fake.bind(pod("static", asked=slices("3g.40gb", 2)), OBSERVED, static)
    report = fake.audit()
    assert faults(report) == set(), report["findings"]
    assert report["ok"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(piece(1, "3g.40gb", 0, 4), piece(1, "2g.20gb", 2, 2), id="overlap"),
        pytest.param(piece(1, "3g.40gb", 0, 4), piece(1, "3g.40gb", 0, 4), id="same"),
        pytest.param(piece(1, "3g.40gb", 0, 4), piece(2, "2g.20gb", 6, 2), id="start"),
        pytest.param(piece(1, "3g.40gb", 0, 4), piece(2, "2g.20gb", 2, 1), id="size"),
    ],
)
def test_slices_that_overlap_or_are_legal_nowhere_are_found(first: Json, second: Json) -> None:
    fake = divided()
    for name, one in (("first", first), ("second", second)):
        fake.bind(pod(name, asked=slices(one["profile"])), EXACT, [one])
    assert faults(fake.audit()) == {"slice_overlaps"}


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        pytest.param({}, [[piece(1, "1g.10gb+me", 0, 1)], [piece(1, "1g.10gb+me", 1, 1)]], id="media engines"),
        pytest.param({}, [[piece(0, "1g.10gb", 0, 1)]], id="slice of a whole device"),
        pytest.param({"nvidia.com/gpu": 1}, [[*grants(1)]], id="whole device in MIG mode"),
        pytest.param(SHARES, [[share(1, 500, 40960)]], id="share in MIG mode"),
        pytest.param(SHARES, [[share(0, 500, 40960)]] * 3, id="shares"),
    ],
)
def test_a_device_in_the_wrong_use_or_over_its_size_is_found(asked: dict[str, int], held: list[list[Json]]) -> None:
    fake = divided()
    for number, one in enumerate(held):
        wants = asked or slices(one[0]["profile"])
        sizes = {"tessera.dev/gpu-milli": "500"} if wants is SHARES else {}
        fake.bind(pod(f"pod-{number}", asked=wants, **sizes), EXACT, one)
    assert faults(fake.audit()) == {"over_allocations"}


def test_a_share_beside_a_whole_gpu_is_found() -> None:
    fake = divided()
    fake.bind(pod("whole", 1), EXACT, grants(0))
    fake.bind(pod("part", asked=SHARES, **{"tessera.dev/gpu-milli": "10"}), EXACT, [share(0, 10, 819)])
    assert faults(fake.audit()) == {"over_allocations"}


def test_more_memory_than_a_device_has_is_found() -> None:
    fake = divided()
    for name in ("one", "two"):
        sizes = {"tessera.dev/gpu-milli": "100", "tessera.dev/gpu-memory": "50Gi"}
        fake.bind(pod(name, asked=SHARES, **sizes), EXACT, [share(0, 100, 51200)])
    assert faults(fake.audit()) == {"over_allocations"}


def test_static_slices_are_counted() -> None:
    fake = divided()
    for name in ("one", "two"):
        static = [{"kind": "mig", "profile": "1g.10gb+me", "count": 1}]
        fake.bind(pod(name, asked=slices("1g.10gb+me")), OBSERVED, static)
    assert faults(fake.audit()) == {"over_allocations"}


@pytest.mark.parametrize(
    "held",
    [
        pytest.param([share(0, 499, 40960)], id="milli"),
        pytest.param([share(0, 500, 40961)], id="memory"),
        pytest.param([share(0, 500, 40960), share(0, 500, 40960)], id="two"),
        pytest.param(grants(0), id="kind"),
    ],
)
def test_a_share_of_another_size_is_found(held: list[Json]) -> None:
    fake = divided()
    fake.bind(pod("half", asked=SHARES, **{"tessera.dev/gpu-milli": "500"}), EXACT, held)
    assert "unannotated" in faults(fake.audit())


def test_a_slice_of_another_profile_is_found() -> None:
    fake = divided()
    fake.bind(pod("asks", asked=slices("1g.20gb")), EXACT, [piece(1, "2g.20gb", 0, 2)])
    assert faults(fake.audit()) == {"unannotated"}


def test_one_slice_for_two_containers_is_found() -> None:
    fake = divided()
    both = pod("both", asked=slices("1g.10gb"))
    both["spec"]["containers"].append({**both["spec"]["containers"][0], "name": "second"})
    fake.bind(both, EXACT, [piece(1, "1g.10gb", 3, 1)])
    said = json.loads(both["metadata"]["annotations"][ALLOCATION])
    fake.rewrite(both, containers={**said["containers"], "second": said["containers"]["main"]})
    assert "doubled" in faults(fake.audit())


@pytest.mark.parametrize(
    ("asked", "sizes", "fits"),
    [
        pytest.param(slices("2g.20gb"), {}, True, id="a slice fits beside another"),
        pytest.param(slices("3g.40gb"), {}, False, id="no start is free"),
        pytest.param(slices("2g.20gb", 3), {}, False, id="not all of them"),
        pytest.param(slices("1g.10gb+me"), {}, False, id="media engine taken"),
        pytest.param(slices("1g.12gb"), {}, False, id="profile of another model"),
        pytest.param(SHARES, {"tessera.dev/gpu-milli": "400"}, True, id="a share fits"),
        pytest.param(SHARES, {"tessera.dev/gpu-milli": "401"}, False, id="share too large"),
        pytest.param(
            {"tessera.dev/share": 2}, {"tessera.dev/gpu-milli": "100"}, False, id="two devices for two shares"
        ),
        pytest.param(SHARES, {}, False, id="share without a size"),
        pytest.param({"nvidia.com/gpu": 1}, {}, False, id="no whole one left"),
        pytest.param({**SHARES, "nvidia.com/gpu": 1}, {"tessera.dev/gpu-milli": "1"}, False, id="two kinds"),
    ],
)
def test_waiting_pods_are_tried_on_what_is_free(asked: dict[str, int], sizes: dict[str, str], fits: bool) -> None:
    fake = Fake(nodes=[mig_node(EXACT, 2, "exact", H100)])
    fake.bind(pod("media", asked=slices("1g.10gb+me")), EXACT, [piece(1, "1g.10gb+me", 1, 1)])
    fake.bind(pod("third", asked=slices("1g.10gb")), EXACT, [piece(1, "1g.10gb", 4, 1)])
    fake.bind(pod("part", asked=SHARES, **{"tessera.dev/gpu-milli": "600"}), EXACT, [share(0, 600, 49152)])
    fake.arrive(pod("waits", asked=asked, **sizes))
    assert faults(fake.audit()) == ({"waiting_placeable"} if fits else set())


def test_one_device_in_two_containers_of_one_pod_is_found() -> None:
    fake, _ = good_run()
    both = pod("both", 1)
    both["spec"]["containers"].append({**both["spec"]["containers"][0], "name": "second"})
    fake.bind(both, EXACT, grants(2))
    said = allocation(both, EXACT, [])
    said["containers"] = {"main": grants(2), "second": grants(2)}
    both["metadata"]["annotations"][ALLOCATION] = json.dumps(said)
    assert "doubled" in faults(fake.audit())


def test_a_second_life_during_the_first_is_found() -> None:
    fake, pods = good_run()
    fake.tell("adopt", pods["train"], None, "RUNNING", node=EXACT)
    assert faults(fake.audit()) == {"doubled"}


def test_a_changed_line_breaks_the_journal() -> None:
    fake, _ = good_run()
    fake.journal[3]["node"] = OBSERVED
    report = fake.audit()
    assert "journal" in faults(report)
    assert "line 4 was changed" in report["findings"]["journal"][0]


def test_a_changed_and_rehashed_line_breaks_the_journal_at_the_next() -> None:
    fake, _ = good_run()
    fake.journal[3]["reason"] = "other"
    fake.journal[3]["hash"] = line_hash(fake.journal[3])
    report = fake.audit()
    assert faults(report) == {"journal"}
    assert "line 5 does not follow" in report["findings"]["journal"][0]


def test_a_missing_line_breaks_the_journal() -> None:
    fake, _ = good_run()
    del fake.journal[2]
    assert "journal" in faults(fake.audit())


def test_a_step_from_a_state_that_the_request_is_not_in_breaks_the_journal() -> None:
    fake, pods = good_run()
    fake.tell("cancel", pods["large"], "RESERVED", "CANCELLED")
    assert faults(fake.audit()) == {"journal"}


def test_an_empty_journal_is_not_ok() -> None:
    fake, _ = good_run()
    fake.journal.clear()
    assert {"journal", "lost", "drift"} <= faults(fake.audit())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"v": 2}, id="version"),
        pytest.param({"id": "uid-other"}, id="id"),
        pytest.param({"node": OBSERVED}, id="node"),
        pytest.param({"mode": "observed"}, id="mode"),
        pytest.param({"epoch": 0}, id="epoch"),
        pytest.param({"containers": {"main": grants(0)}}, id="too few"),
        pytest.param({"containers": {"main": grants(0, 1), "x": grants(2)}}, id="unknown container"),
        pytest.param({"containers": {"main": grants(0, 0)}}, id="one device twice"),
        pytest.param({"containers": {"main": [{"kind": "whole", "count": 2}]}}, id="observed form"),
        pytest.param({"containers": {"main": [{**one, "milli": 0} for one in grants(0, 1)]}}, id="idle keys"),
        pytest.param({"containers": {"main": [{**one, "kind": "half"} for one in grants(0, 1)]}}, id="kind"),
        pytest.param({"containers": []}, id="no containers"),
    ],
)
def test_an_allocation_that_says_something_else_is_found(changes: Json) -> None:
    fake, pods = good_run()
    fake.rewrite(pods["train"], **changes)
    assert "unannotated" in faults(fake.audit())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"v":1}', "two\nlines"])
def test_a_missing_or_unreadable_allocation_is_found(text: str) -> None:
    fake, pods = good_run()
    pods["notebook"]["metadata"]["annotations"][ALLOCATION] = text
    assert "unannotated" in faults(fake.audit())


def test_an_init_container_names_only_what_no_lasting_container_lends() -> None:
    fake, _ = good_run()
    asks = pod("asks", 1)
    init = {**asks["spec"]["containers"][0], "name": "prepare", "resources": {"requests": {"nvidia.com/gpu": "2"}}}
    asks["spec"]["initContainers"] = [init]
    fake.bind(asks, EXACT, grants(2))
    assert faults(fake.audit()) == {"unannotated"}
    containers = {"main": grants(2), "prepare": grants(3)}
    fake.rewrite(asks, containers=containers)
    assert faults(fake.audit()) == {"drift"}  # right form, but the ledger says otherwise


def test_a_waiting_pod_that_fits_is_found() -> None:
    fake, _ = good_run()
    small = pod("small", 2)
    fake.arrive(small)
    assert faults(fake.audit()) == set()  # somebody waits before it who could use that node
    small["spec"]["priority"] = 1
    report = fake.audit()
    assert faults(report) == {"waiting_placeable"}
    assert "small waits and fits on exact-1" in report["findings"]["waiting_placeable"][0]


@pytest.mark.parametrize(("way", "found"), [("queue", {"misordered"}), ("direct", set())])
def test_who_passes_a_pod_that_was_nominated_is_found_where_pods_are_held(way: str, found: set[str]) -> None:
    fake, _ = good_run()
    fake.run["way"] = way
    first, second = fake.arrive(pod("first", 2)), fake.arrive(pod("second", 2))
    first["spec"]["priority"] = 1
    for one in (first, second):
        one["status"]["conditions"] = [{"type": "tessera.dev/Admitted", "status": "True"}]
    for one, at in ((second, 9_000_000), (first, 9_000_001)):
        held = grants(2, 3) if one is second else grants(0, 1)
        fake.tell("reserve", one, "QUEUED", "RESERVED", node=EXACT, said=allocation(one, EXACT, held), at=at)
    assert faults(fake.audit()) & {"misordered"} == found


def test_a_pod_in_no_line_and_on_no_node_is_lost() -> None:
    fake, _ = good_run()
    fake.pods.append(pod("forgotten", 4))
    assert faults(fake.audit()) == {"lost"}


def test_a_pod_that_left_no_trace_is_lost() -> None:
    fake, _ = good_run()
    fake.run["pods"] = 6
    assert fake.audit()["lost"] == 1


def test_a_row_that_outlives_its_pod_is_drift() -> None:
    fake, pods = good_run()
    fake.pods.remove(pods["notebook"])
    assert faults(fake.audit()) == {"drift"}


def test_a_bound_pod_that_the_ledger_does_not_know_is_drift() -> None:
    fake, _ = good_run()
    stray = pod("stray")
    stray["spec"]["nodeName"] = EXACT
    stray["metadata"]["annotations"][ALLOCATION] = json.dumps(allocation(stray, EXACT, []))
    fake.pods.append(stray)
    assert faults(fake.audit()) == {"drift"}


def test_a_pod_on_a_node_that_it_excludes_is_misplaced() -> None:
    fake, _ = good_run()
    fake.bind(pod("picky", 1, **{"tessera.dev/gpu-model": "H100"}), EXACT, grants(2))
    assert faults(fake.audit()) == {"misplaced"}


def test_a_bad_end_of_the_process_is_found() -> None:
    fake, _ = good_run()
    fake.run["exit_status"] = -9
    assert faults(fake.audit()) == {"crashed"}


def test_a_hot_loop_in_the_quiet_time_is_found() -> None:
    fake, pods = good_run()
    for step in range(3):
        fake.call(pods["large"], 1020.0 + step)
    report = fake.audit()
    assert report["max_filter_calls_5s"] == 3
    assert not report["ok"]


def test_calls_before_the_quiet_time_and_of_bound_pods_do_not_count() -> None:
    fake, pods = good_run()
    for step in range(9):
        fake.call(pods["large"], 900.0 + step)
        fake.call(pods["train"], 1020.0 + step / 10)
    assert fake.audit()["max_filter_calls_5s"] == 2


def test_less_than_half_bound_is_not_ok() -> None:
    fake, _ = good_run()
    for number in range(4):
        fake.arrive(pod(f"waits-{number}", 4))
    report = fake.audit()
    assert faults(report) == set()
    assert not report["ok"]


def test_most_calls_in_any_five_seconds() -> None:
    assert max_calls({}) == 0
    assert max_calls({"a": [0.0, 5.0, 10.1], "b": [9.0, 1.0, 2.0, 6.5]}) == 2
    assert max_calls({"a": [0.0, 4.9, 2.0, 5.1]}) == 3


def test_the_auditor_imports_nothing_of_tessera() -> None:
    probe = "import sys, bench.auditor; print([m for m in sys.modules if m.split('.')[0] in ('scheduler', 'policies')])"
    seen = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"
