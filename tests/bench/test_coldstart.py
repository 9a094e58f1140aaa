"""The restart bench: its load is what it says, and it reads the phases from Tessera's own log."""

from __future__ import annotations

import pytest

from bench.coldstart import ColdstartError, allocation, gpus_of, load, started


def test_every_node_keeps_two_gpus_free() -> None:
    wanted = load(10, 100)
    assert set(wanted.free().values()) == {2}
    assert sum(gpus_of(pod) for pod in wanted.pods) == 60
    assert len(load(10, 25).pods) == 25


def test_no_device_is_given_twice() -> None:
    wanted = load(4, 40)
    taken = set()
    for number, (pod, place) in enumerate(zip(wanted.pods, wanted.places, strict=True)):
        pod["metadata"]["uid"] = str(number)
        made = allocation(pod, wanted.nodes[place], number // 4)
        grants = made["containers"].get("main", [])
        assert len(grants) == gpus_of(pod)
        if made["mode"] == "exact" and grants:
            assert (place, grants[0]["dev"]) not in taken
            taken.add((place, grants[0]["dev"]))
    assert len(taken) == 12


def test_the_phases_of_a_start_are_in_the_log() -> None:
    line = '{"verify_s":0.2,"list_s":1.5,"rebuild_s":0.1,"event":"recovered","level":"info"}'
    assert started(f"noise\n{line}\n") == {"verify_s": 0.2, "list_s": 1.5, "rebuild_s": 0.1}
    with pytest.raises(ColdstartError, match="does not say"):
        started("noise\n")
