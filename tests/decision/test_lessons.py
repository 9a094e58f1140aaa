"""What kube-scheduler teaches about single pods."""

from __future__ import annotations

import numpy as np

from scheduler.decision.lessons import KEPT_S, LESSONS_MAX, Lessons, sampled

EVERY = np.ones(6, np.bool_)


def test_only_what_was_named_is_left_for_a_while() -> None:
    lessons = Lessons()
    lessons.learn("one", np.asarray([1, 4]), 2, EVERY, ~EVERY, 0.0)
    found = lessons.of("one", 6, KEPT_S - 1)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [1, 4]
    assert lessons.of("one", 6, KEPT_S) is None
    assert not lessons.knows("one")


def test_a_node_that_comes_later_is_not_held_against_the_pod() -> None:
    lessons, live = Lessons(), EVERY.copy()
    live[3] = False
    lessons.learn("one", np.asarray([1]), 2, live, ~EVERY, 0.0)
    found = lessons.of("one", 8, 1.0)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [1, 3, 6, 7], "one fills the hole, two are new"


def test_a_sample_says_nothing_of_those_it_does_not_name() -> None:
    live = np.ones(500, np.bool_)
    assert sampled(230, 500)
    lessons = Lessons()
    lessons.learn("one", np.arange(230), 400, live, ~live, 0.0)
    found = lessons.of("one", 500, 1.0)
    assert found is not None
    assert np.flatnonzero(~found).tolist() == [400]


def test_a_node_without_room_is_not_held_against_the_pod_unless_it_was_tried() -> None:
    lessons, busy = Lessons(), ~EVERY
    busy[[2, 3, 5]] = True
    assert not lessons.learn("one", np.asarray([1]), 2, EVERY, busy, 0.0)
    found = lessons.of("one", 6, 1.0)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [1, 3, 5]
    assert not lessons.learn("one", np.asarray([1]), 2, EVERY, ~EVERY, 1.0), "less than before"
    assert lessons.learn("one", np.asarray([1, 4]), -1, EVERY, ~EVERY, 2.0), "one more"


def test_holes_do_not_count_as_nodes() -> None:
    live = np.ones(503, np.bool_)
    live[:3] = False
    lessons = Lessons()
    lessons.learn("one", np.arange(3, 233), -1, live, np.zeros(503, np.bool_), 0.0)
    found = lessons.of("one", 503, 1.0)
    assert found is not None
    assert found.all()


def test_lessons_are_bounded() -> None:
    lessons = Lessons()
    for number in range(LESSONS_MAX + 1):
        lessons.learn(str(number), np.asarray([0]), -1, EVERY, ~EVERY, 0.0)
    assert not lessons.knows("0")
    assert lessons.knows("1")
