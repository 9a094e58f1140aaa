"""The desk answers kube-scheduler without waiting: one node, one constant reason, nothing durable."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from policies.columns import Use
from scheduler.clock import LoopClock, VirtualLoop
from scheduler.decision.board import Board
from scheduler.decision.catalog import MASKS, read_policies
from scheduler.decision.pipeline import Policies
from scheduler.decision.placing import DoesNotFit
from scheduler.desk import Desk
from scheduler.intake.allocation import read_allocation
from scheduler.intake.node import read_node
from scheduler.intake.pod import read_pod
from scheduler.ledger.ledger import advance
from scheduler.model.pod import Pod
from scheduler.model.reservation import Event, State
from tests.objects import raw_node, raw_pod


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    made = VirtualLoop()
    yield made
    made.close()


def desk(loop: VirtualLoop, *names: str, mode: str = "exact", gpus: int = 4) -> Desk:
    made = Desk(LoopClock(loop), Policies(), fence=3)
    for name in names:
        node = read_node(raw_node(name, gpus=gpus, mode=mode), {})
        assert node is not None
        made.registry.put_node(node)
    return made


def pod(name: str, gpus: int = 1, **how: object) -> Pod:
    return read_pod(raw_pod(name, gpus, **how))  # type: ignore[arg-type]


def test_an_allocation_too_long_to_write_is_refused(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    raw = raw_pod("one", 0)
    (app,) = raw["spec"]["containers"]
    limits = {"limits": {"cpu": "1", "tessera.dev/share": "1"}}
    raw["spec"]["containers"] = [app | {"name": f"{'x' * 200}{i}", "resources": limits} for i in range(56)]
    raw["metadata"]["annotations"] = {"tessera.dev/gpu-milli": "1"}
    node = raw_node("a")
    node["status"]["allocatable"]["tessera.dev/share"] = "512"
    made.registry.put_node(read_node(node, {}))  # type: ignore[arg-type]
    one = read_pod(raw)
    assert one.request.refusal is None
    assert made.filter(one, ["a"]).names == ["a"]
    with pytest.raises(DoesNotFit, match="InvalidRequest"):
        made.claim(one, "a")
    assert made.registry.held(one.uid) is None


def broken(*_: object) -> None:
    raise AssertionError("judged")


def test_two_pods_never_get_the_same_device(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    assert made.filter(pod("one", 3), ["a"]).names == ["a"]
    assert made.filter(pod("two", 2), ["a"]).reason == "GpusBusy"
    assert made.filter(pod("three", 1), ["a"]).names == ["a"]
    first = read_allocation(made.claim(pod("one", 3), "a")[-1].after.allocation)
    third = read_allocation(made.claim(pod("three", 1), "a")[-1].after.allocation)
    assert first is not None
    assert third is not None
    assert len(first.devices()) == 3
    assert not first.devices() & third.devices()


def test_only_offered_nodes_are_named(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b", "c")
    assert made.filter(pod("one"), ["c", "nowhere"]).names == ["c"]
    assert made.filter(pod("two"), ["nowhere"]).names == []


def test_a_pods_own_intent_is_not_in_its_way(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    for _ in range(3):
        assert made.filter(pod("one", 4), ["a"]).names == ["a"]
    assert made.claim(pod("one", 4), "a")


def test_a_claim_on_another_node_moves_the_intent(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b")
    named = made.filter(pod("one", 4), ["a", "b"]).names[0]
    other = {"a": "b", "b": "a"}[named]
    made.claim(pod("one", 4), other)
    assert made.filter(pod("two", 4), [named]).names == [named]


def test_a_claim_carries_submit_reserve_and_bind_in_one_transaction(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    made.filter(pod("one", 2), ["a"])
    changes = made.claim(pod("one", 2), "a")
    assert [change.entry.event for change in changes] == [Event.SUBMIT, Event.RESERVE, Event.BIND]
    assert changes[-1].after.state is State.BINDING
    assert changes[-1].after.fence == 3
    assert changes[1].entry.decision
    made.unclaim(changes)
    assert not made.book.rows
    assert made.filter(pod("two", 4), ["a"]).names == ["a"]


def test_a_claim_that_no_longer_fits_changes_nothing(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    made.claim(pod("one", 4), "a")
    before = made.registry.generation
    with pytest.raises(DoesNotFit) as refused:
        made.claim(pod("two", 1), "a")
    assert refused.value.reason == "GpusBusy"
    assert made.registry.generation == before
    with pytest.raises(DoesNotFit):
        made.claim(pod("two", 1), "nowhere")


def test_an_intent_lapses_and_keeps_the_pod_off_that_node_for_a_while(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b")
    first = made.filter(pod("one", 4), ["a", "b"]).names
    loop.run_until_complete(made.clock.sleep(16))
    second = made.filter(pod("one", 4), ["a", "b"]).names
    assert second != first
    loop.run_until_complete(made.clock.sleep(61))
    made.lapse()
    assert made.filter(pod("two", 4), first).names == first


def test_a_pod_kept_off_the_only_node_hears_that_it_backs_off_and_not_that_the_node_is_odd(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    assert made.filter(pod("one", 4), ["a"]).names == ["a"]
    loop.run_until_complete(made.clock.sleep(16))
    assert made.filter(pod("one", 4), ["a"]).reason == "BackingOff"
    assert made.filter(pod("two", 4), ["a"]).names == ["a"]


def test_a_pod_known_to_wait_is_refused_without_a_new_decision_until_something_is_freed(
    loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = desk(loop, "a", "b")
    made.claim(pod("one", 4), "a")
    made.claim(pod("other", 4), "b")
    assert made.filter(pod("two", 1), ["a", "b"]).reason == "GpusBusy"
    monkeypatch.setattr(Board, "best", broken)
    assert made.filter(pod("two", 1), ["a", "b"]).reason == "GpusBusy"
    made.registry.freed += 1
    with pytest.raises(AssertionError, match="judged"):
        made.filter(pod("two", 1), ["a", "b"])


def test_a_pod_known_to_wait_is_judged_anew_when_it_asks_for_something_else(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b")
    wrong = pod("one", 1, annotations={"tessera.dev/gpu-model": "T4"})
    assert made.filter(wrong, ["a", "b"]).reason == "GpuModelMismatch"
    assert made.filter(pod("one", 1, annotations={"tessera.dev/gpu-model": "H100"}), ["a", "b"]).names


def test_filter_and_prioritize_leave_nothing_durable(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b", "c")
    for number in range(200):
        made.filter(pod(f"p{number}", number % 5), ["a", "b", "c"])
        made.prioritize(pod(f"p{number}", number % 5), ["a", "b", "c"])
    assert not made.book.rows
    loop.run_until_complete(made.clock.sleep(20))
    made.lapse()
    assert (made.registry.snapshot().gpus_free[:3] == 4).all()
    assert (made.registry.snapshot().use[:4, :3] == Use.FREE).all()


def test_prioritize_gives_ten_to_one_node_alone(loop: VirtualLoop) -> None:
    made = desk(loop, *"abcdef")
    made.claim(pod("one", 1), "d")
    scores = dict(made.prioritize(pod("two", 1), list("fedcba")))
    assert [name for name, score in scores.items() if score == 10] == ["d"]
    assert all(0 <= score <= 10 for score in scores.values())


def test_bad_input_is_refused_by_its_own_word(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    bad = pod("one", 1, annotations={"tessera.dev/gpu-model": ","})
    assert made.filter(bad, ["a"]).reason == "InvalidRequest"


def test_an_observed_node_gets_a_count_and_an_exact_one_devices(loop: VirtualLoop) -> None:
    made = desk(loop, "seen", mode="observed")
    text = made.claim(pod("one", 2), "seen")[-1].after.allocation
    assert '"mode":"observed"' in text
    assert '"count":2' in text
    made = desk(loop, "exact")
    text = made.claim(pod("one", 2), "exact")[-1].after.allocation
    assert '"dev":0' in text
    assert '"dev":1' in text


def test_a_pod_in_back_off_waits(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    row = made.claim(pod("one", 1), "a")[-1].after
    void = advance(row, Event.VOID, now_us=made.clock.wall_us(), fence=3)
    made.book.apply((void,))
    assert made.filter(pod("one", 1), ["a"]).reason == "BackingOff"


def test_cpu_only_pods_keep_away_from_gpus(loop: VirtualLoop) -> None:
    made = desk(loop, "gpu")
    plain = read_node(raw_node("plain", gpus=0), {})
    assert plain is not None
    made.registry.put_node(plain)
    assert made.filter(pod("one", 0), ["gpu", "plain"]).names == ["plain"]
    assert '"containers":{}' in made.claim(pod("one", 0), "plain")[-1].after.allocation


def test_a_pod_that_is_placed_frees_nothing_for_those_who_wait(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b")
    before = made.registry.freed
    named = made.filter(pod("one", 2), ["a", "b"]).names
    made.prioritize(pod("one", 2), ["a", "b"])
    assert made.filter(pod("one", 2), ["a", "b"]).names == named
    made.claim(pod("one", 2), named[0])
    assert made.registry.freed == before
    made.filter(pod("two", 2), ["a"])
    made.filter(pod("two", 2), ["b"])  # what was intended on a is free again
    assert made.registry.freed == before + 1


def test_the_decision_record_is_of_the_node_that_is_bound(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b")
    named = made.filter(pod("one", 2), ["a", "b"]).names[0]
    other = {"a": "b", "b": "a"}[named]
    record = made.claim(pod("one", 2), other)[1].entry.decision
    assert f'"node":"{other}"' in record.split('"runner_up"')[0]


def test_the_runner_up_is_one_of_the_nodes_that_were_offered(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b", "c", "d")
    one = pod("one", 1)
    (best,) = made.filter(one, ["c", "d"]).names
    record = json.loads(made.claim(one, best)[1].entry.decision)
    assert {record["chosen"]["node"], record["runner_up"]["node"]} == {"c", "d"}


@pytest.mark.parametrize("mode", ["exact", "observed"])
@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_an_intent_books_what_the_claim_will_hold(loop: VirtualLoop, mode: str, gpus: int) -> None:
    made = desk(loop, "a", mode=mode)
    made.claim(pod("first", 1), "a")
    one = pod("one", gpus)
    made.filter(one, ["a"])
    intended = made.registry.held("uid-one")
    made.claim(one, "a")
    assert intended == made.registry.held("uid-one")
    assert intended is not None


def test_a_node_that_is_gone_is_named_by_no_order_of_masks(loop: VirtualLoop) -> None:
    made = desk(loop, "a", "b")
    made = Desk(made.clock, read_policies(masks=list(reversed(MASKS))), registry=made.registry)
    waits = pod("one", 1)
    made.registry.put_pod(waits)
    assert made.reserve(waits) is not None
    made.unclaim(made.reserve(pod("two", 1))[0])  # type: ignore[index]
    for name in ("a", "b"):
        made.registry.remove_node(name, f"uid-{name}")
    assert made.reserve(pod("three", 1)) is None


def test_failed_commits_leave_nothing_behind_in_whatever_order_they_fail(loop: VirtualLoop) -> None:
    for order in (1, -1):
        made, one = desk(loop, "a", "b"), pod("one", 4)
        made.registry.put_pod(one)
        reserved = made.reserve(one)
        assert reserved is not None
        other = {"a": "b", "b": "a"}[reserved[0][-1].after.node]
        moved = made.claim(one, other)
        for changes in (reserved[0], moved)[::order]:
            made.unclaim(changes)
        assert made.registry.held("uid-one") is None
        assert made.book.rows.get("uid-one") is None


def test_a_pod_whose_gate_is_gone_does_not_wait_for_it(loop: VirtualLoop) -> None:
    made = desk(loop, "a")
    made.order.words["uid-one"] = "WaitingForGate"
    assert made.filter(pod("one", 1), ["a"]).names == ["a"]
