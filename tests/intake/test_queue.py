from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scheduler.errors import ConfigError
from scheduler.intake.queue import API_VERSION, read_documents, read_queue, selects, sound
from scheduler.intake.reading import Unreadable
from scheduler.ledger.quota import grow
from scheduler.model.pod import Expression
from scheduler.model.queue import BUILT_IN, DEPTH_MAX, Queue, Selector


def raw(name: object = "vision", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": "Queue", "metadata": {"name": name}, "spec": spec}


def test_a_queue_is_read_in_the_units_of_its_keys() -> None:
    nominal = {
        "gpu": 16, "H100": "8", "mig:1g.10gb": 4, "mig:1g.10gb+me": 1, "milli": 2000,
        "cpu": "200", "memory": "1Ti", "storage:fast": 500,
    }  # fmt: skip
    found = read_queue(
        raw(
            parent="research",
            weight=3,
            nominal=nominal,
            borrowLimit={"cpu": "1500m"},
            lendLimit={"gpu": 0},
            namespaceSelector={
                "matchLabels": {"team": "a"},
                "matchExpressions": [{"key": "x/y", "operator": "Exists"}],
            },
            autoscale=True,
            stopped=True,
        )
    )
    assert found == Queue(
        "vision",
        "research",
        3,
        {
            "gpu": 16, "H100": 8, "mig:1g.10gb": 4, "mig:1g.10gb+me": 1, "milli": 2000,
            "cpu": 200_000, "memory": 1 << 20, "storage:fast": 500,
        },
        {"cpu": 1500},
        {"gpu": 0},
        Selector((("team", "a"),), (Expression("x/y", "Exists"),)),
        autoscale=True,
        stopped=True,
    )  # fmt: skip


def test_what_is_absent_has_its_default() -> None:
    assert read_queue(raw()) == Queue("vision")
    assert read_queue({"metadata": {"name": "a"}}) == Queue("a")
    assert read_queue(raw(namespaceSelector={})).namespaces == Selector()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        pytest.param({"nominl": {}}, "spec has no field 'nominl'; it has parent, weight", id="unknown field"),
        pytest.param({"nominal": {"gpu": -1}}, "spec.nominal, 'gpu' must be 0 or more; it is -1", id="negative"),
        pytest.param({"nominal": {"gpu": None}}, "'gpu' must be 0 or more; it is None", id="null"),
        pytest.param({"nominal": {"gpu": 1 << 50}}, "is too large", id="overflow"),
        pytest.param({"nominal": {"memory": "99999Ei"}}, "too large", id="overflowing quantity"),
        pytest.param({"nominal": {"gpu": "1.5"}}, "counted in whole pieces", id="half a GPU"),
        pytest.param({"nominal": {"storage:fast": "5Gi"}}, "counted in whole GiB", id="storage with a unit"),
        pytest.param({"nominal": {"memory": 64}}, "less than 1Mi; write it with its unit", id="memory in GiB"),
        pytest.param({"borrowLimit": {"cpu": "many"}}, "spec.borrowLimit, 'cpu': quantity 'many'", id="no quantity"),
        pytest.param({"nominal": {"GPU": 1}}, "write gpu", id="capital letters"),
        pytest.param({"nominal": {"nvidia.com/gpu": 1}}, "write gpu", id="resource name"),
        pytest.param({"nominal": {"mig-1g.10gb": 1}}, "write mig:<profile>", id="a profile spelled otherwise"),
        pytest.param({"nominal": {"mig:1g": 1}}, "names no MIG profile", id="no profile"),
        pytest.param({"nominal": {"storage:": 1}}, "is no key", id="no class"),
        pytest.param({"nominal": {"": 1}}, "is no key", id="empty key"),
        pytest.param({"nominal": {7: 1}}, "put it in quotes", id="number as key"),
        pytest.param({"nominal": {"H100": 1, "h100": 2}}, "twice", id="one model twice"),
        pytest.param({"nominal": {"mig:1g.10gb.me": 1, "mig:1g.10gb+me": 2}}, "twice", id="one profile twice"),
        pytest.param({"nominal": {f"m{n}": 1 for n in range(65)}}, "more than 64 keys", id="too many keys"),
        pytest.param({"nominal": [1]}, "spec.nominal must be an object", id="list"),
        pytest.param({"weight": 0}, "spec.weight must be a whole number between 1 and 1000000; it is 0", id="weight 0"),
        pytest.param({"weight": 0.5}, "spec.weight must be a whole number", id="half a weight"),
        pytest.param({"stopped": "yes"}, "spec.stopped must be true or false", id="no flag"),
        pytest.param({"parent": "A"}, "spec.parent must be lower-case", id="no name"),
        pytest.param({"namespaceSelector": {"team": "a"}}, "it has matchLabels and matchExpressions", id="selector"),
        pytest.param(
            {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}},
            "the operator must be In, NotIn, Exists, DoesNotExist",
            id="operator",
        ),
        pytest.param(
            {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}, "takes 1 to", id="no values"
        ),
        pytest.param({"namespaceSelector": {"matchLabels": {"a b": "c"}}}, "no key of a label", id="label key"),
    ],
)
def test_what_cannot_be_used_says_where_it_is_and_what_to_write(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(Unreadable) as refused:
        read_queue(raw(**spec))
    assert said in str(refused.value)


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["parent", "weight", "nominal", "borrowLimit", "namespaceSelector", "stopped", "x"])


@given(spec=st.dictionaries(fields, json) | json, meta=st.just({"name": "a"}) | json)
def test_no_object_does_more_than_be_refused(spec: object, meta: object) -> None:
    try:
        found = read_queue({"metadata": meta, "spec": spec})
    except Unreadable:
        return
    assert all(amount >= 0 for amount in found.nominal.values())


@pytest.mark.parametrize(
    ("selector", "labels", "chosen"),
    [
        pytest.param(None, {"a": "1"}, False, id="absent selects nothing"),
        pytest.param(Selector(), {}, True, id="empty selects everything"),
        pytest.param(Selector((("a", "1"),)), {"a": "1", "b": "2"}, True, id="label"),
        pytest.param(Selector((("a", "1"),)), {"a": "2"}, False, id="other label"),
        pytest.param(Selector((), (Expression("a", "In", ("1", "2")),)), {"a": "2"}, True, id="in"),
        pytest.param(Selector((), (Expression("a", "In", ("1",)),)), {}, False, id="in, absent"),
        pytest.param(Selector((), (Expression("a", "NotIn", ("1",)),)), {}, True, id="not in, absent"),
        pytest.param(Selector((), (Expression("a", "NotIn", ("1",)),)), {"a": "1"}, False, id="not in"),
        pytest.param(Selector((), (Expression("a", "Exists"),)), {"a": ""}, True, id="exists"),
        pytest.param(Selector((), (Expression("a", "DoesNotExist"),)), {"a": ""}, False, id="does not exist"),
    ],
)
def test_which_namespaces_may_use_a_queue(selector: Selector | None, labels: dict[str, str], chosen: bool) -> None:
    assert selects(selector, labels) is chosen


def test_the_built_in_queue_is_there_unless_somebody_made_one() -> None:
    assert sound([]) == ([BUILT_IN], {})
    mine = Queue("default", nominal={"gpu": 1})
    assert sound([mine]) == ([mine], {})


def test_queues_without_a_tree_admit_nothing_and_say_why() -> None:
    queues, wrong = sound(
        [Queue("a", "b"), Queue("b", "a"), Queue("c", "a"), Queue("lost", "nobody"), Queue("self", "self"), Queue("ok")]
    )
    tree = grow(queues)
    assert [name for name in tree.queues if tree.stopped(name)] == ["a", "b", "c", "lost", "self"]
    assert wrong == {
        "a": "spec.parent: the queues go round in a circle, a < b < a; give one of them another parent.",
        "b": "spec.parent: the queues go round in a circle, b < a < b; give one of them another parent.",
        "lost": "spec.parent: there is no queue nobody; create it, or name another one.",
        "self": "spec.parent: the queues go round in a circle, self < self; give one of them another parent.",
    }


def test_a_tree_too_deep_is_cut() -> None:
    queues, wrong = sound([Queue("q000"), *(Queue(f"q{n:03}", f"q{n - 1:03}") for n in range(1, DEPTH_MAX + 3))])
    assert sorted(wrong) == [f"q{DEPTH_MAX + n:03}" for n in range(3)]
    grow(queues)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", *"abcdefg"])), unique_by=lambda one: one[0]))
def test_whatever_the_parents_there_is_a_tree(links: list[tuple[str, str]]) -> None:
    queues, wrong = sound(Queue(name, parent) for name, parent in links)
    tree = grow(queues)
    assert {name for name in wrong if not tree.stopped(name)} == set()


def test_one_model_is_spelled_in_one_way_everywhere() -> None:
    queues, _ = sound([Queue("a", nominal={"H100": 1}), Queue("b", "a", nominal={"h100": 2}, lend_limit={"h100": 0})])
    assert [(dict(one.nominal), dict(one.lend_limit)) for one in queues if one.name == "b"] == [
        ({"H100": 2}, {"H100": 0})
    ]


def test_a_file_holds_documents_and_lists() -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": [raw("b", parent="a"), raw("c")]}
    written = yaml.safe_dump_all([raw("a", nominal={"gpu": 4}), None, listed])
    assert [(one.name, one.parent) for one in read_documents(written, "q.yaml")] == [("a", ""), ("b", "a"), ("c", "")]
    assert read_documents("", "q.yaml") == []


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        pytest.param([raw("a"), raw("a")], "q.yaml:6: queue a is there twice", id="twice"),
        pytest.param([raw("a", parent="b")], "q.yaml:1: queue a: spec.parent: there is no queue b", id="parent"),
        pytest.param([raw("a", weight=-1)], "q.yaml:1: queue a: spec.weight must be", id="amount"),
        pytest.param([raw("A")], "q.yaml:1: queue A: metadata.name must be lower-case", id="name"),
        pytest.param([{"kind": "Pod"}], "q.yaml:1: must be a Queue with apiVersion: tessera.dev/v1alpha1", id="kind"),
        pytest.param([3], "q.yaml:1: must be a Queue", id="no object"),
        pytest.param([{"kind": "List", "items": 3}], "q.yaml:1: items must be a list", id="no list"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(documents: list[Any], said: str) -> None:
    flow = "\n---\n".join(yaml.safe_dump(one, default_flow_style=None).strip() for one in documents)
    with pytest.raises(ConfigError) as refused:
        read_documents(flow, "q.yaml")
    assert said in str(refused.value)


def test_a_file_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"q\.yaml: not YAML"):
        read_documents("a: [", "q.yaml")
