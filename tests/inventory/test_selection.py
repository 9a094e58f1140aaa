"""Where a pod may run, against an oracle written from the documentation of each field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies.columns import Mode
from scheduler.inventory.selection import admits
from scheduler.model.node import Node, Taint
from scheduler.model.pod import Amounts, Expression, Selection, Term, Toleration

CORDON = "node.kubernetes.io/unschedulable"


def node(name: str = "n1", *, taints: tuple[Taint, ...] = (), unschedulable: bool = False, **labels: str) -> Node:
    return Node(
        uid="u",
        name=name,
        resource_version="1",
        mode=Mode.OBSERVED,
        amounts=Amounts(),
        pods=1,
        labels=tuple(sorted(labels.items())),
        taints=taints,
        unschedulable=unschedulable,
    )


def term(*labels: Expression, fields: tuple[Expression, ...] = ()) -> Selection:
    return Selection(terms=(Term(labels, fields),))


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (Expression("a", "In", ("1", "2")), True),
        (Expression("a", "In", ("3",)), False),
        (Expression("z", "In", ("1",)), False),
        (Expression("z", "In", ("",)), False),
        (Expression("a", "NotIn", ("2",)), True),
        (Expression("a", "NotIn", ("1",)), False),
        (Expression("z", "NotIn", ("1",)), True),
        (Expression("a", "Exists"), True),
        (Expression("z", "Exists"), False),
        (Expression("a", "DoesNotExist"), False),
        (Expression("z", "DoesNotExist"), True),
        (Expression("a", "Gt", ("0",)), True),
        (Expression("a", "Gt", ("1",)), False),
        (Expression("a", "Lt", ("+2",)), False),  # no label value has a plus sign
        (Expression("a", "Lt", ("2",)), True),
        (Expression("a", "Lt", ("1",)), False),
        (Expression("z", "Lt", ("1",)), False),
        (Expression("word", "Gt", ("0",)), False),
        (Expression("a", "Lt", ("9223372036854775807",)), True),
        # what kube-scheduler cannot read matches nothing
        (Expression("a", "Lt", ("9223372036854775808",)), False),
        (Expression("a", "Gt", ("x",)), False),
        (Expression("a", "Gt", ("0", "0")), False),
        (Expression("a", "Gt"), False),
        (Expression("a", "In"), False),
        (Expression("z", "NotIn"), False),
        (Expression("a", "Exists", ("1",)), False),
        (Expression("z", "DoesNotExist", ("1",)), False),
        (Expression("a", "in", ("1",)), False),
        (Expression("a", "", ("1",)), False),
        (Expression("z", "NotIn", ("a b",)), False),
        (Expression("z", "NotIn", ("x" * 64,)), False),
        (Expression("z z", "DoesNotExist"), False),
        (Expression("Up.per/z", "DoesNotExist"), False),
        (Expression("example.com/z", "DoesNotExist"), True),
        (Expression("", "DoesNotExist"), False),
    ],
)
def test_label_operators(expression: Expression, expected: bool) -> None:
    assert admits(term(expression), node(a="1", word="x")) is expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (Expression("metadata.name", "In", ("n1",)), True),
        (Expression("metadata.name", "In", ("n2",)), False),
        (Expression("metadata.name", "NotIn", ("n2",)), True),
        (Expression("metadata.name", "NotIn", ("n1",)), False),
        (Expression("metadata.name", "In", ("n1", "n2")), False),
        (Expression("metadata.name", "Exists"), False),
        (Expression("metadata.uid", "In", ("u",)), False),
        (Expression("metadata.uid", "NotIn", ("u",)), True),
    ],
)
def test_fields(expression: Expression, expected: bool) -> None:
    assert admits(term(fields=(expression,)), node()) is expected


def test_terms() -> None:
    yes, no = Expression("a", "Exists"), Expression("z", "Exists")
    assert admits(Selection(terms=None), node())
    assert not admits(Selection(terms=()), node())
    assert not admits(Selection(terms=(Term(),)), node())
    assert admits(Selection(terms=(Term(), Term((yes,)))), node(a=""))
    assert not admits(term(yes, no), node(a=""))
    assert admits(Selection(terms=(Term((no,)), Term((yes,)))), node(a=""))
    assert not admits(term(yes, fields=(Expression("metadata.name", "In", ("n2",)),)), node(a=""))
    assert not admits(Selection(labels=(("z", ""),), terms=(Term((yes,)),)), node(a=""))


@pytest.mark.parametrize(
    ("toleration", "expected"),
    [
        (Toleration("k", "Equal", "v", "NoSchedule"), True),
        (Toleration("k", "", "v"), True),
        (Toleration("k", "Equal", "w"), False),
        (Toleration("k", "Exists"), True),
        (Toleration("k", "Exists", "", "NoExecute"), False),
        (Toleration("", "Exists"), True),
        (Toleration("", "Exists", "", "NoSchedule"), True),
        (Toleration("", "Equal", "v"), True),
        (Toleration("", "Equal", ""), False),
        (Toleration("j", "Exists"), False),
        (Toleration("k", "Lt", "9"), False),
        (Toleration("k", "Gt", "0"), False),
        (Toleration("k", "exists"), False),
    ],
)
def test_tolerations(toleration: Toleration, expected: bool) -> None:
    tainted = node(taints=(Taint("k", "v", "NoSchedule"),))
    assert admits(Selection(tolerations=(toleration,)), tainted) is expected


def test_taint_effects() -> None:
    assert not admits(Selection(), node(taints=(Taint("k", "", "NoExecute"),)))
    assert admits(Selection(), node(taints=(Taint("k", "", "PreferNoSchedule"),)))
    both = node(taints=(Taint("k", "", "NoSchedule"), Taint("j", "", "NoExecute")))
    assert not admits(Selection(tolerations=(Toleration("k", "Exists"),)), both)
    assert admits(Selection(tolerations=(Toleration("k", "Exists"), Toleration("j", "Exists"))), both)


@pytest.mark.parametrize(
    ("toleration", "expected"),
    [
        (Toleration(CORDON, "Exists", "", "NoSchedule"), True),
        (Toleration(CORDON, "Exists"), True),
        (Toleration(CORDON, "Equal", ""), True),
        (Toleration("", "Exists"), True),
        (Toleration(CORDON, "Equal", "x"), False),
        (Toleration(CORDON, "Exists", "", "NoExecute"), False),
    ],
)
def test_cordons(toleration: Toleration, expected: bool) -> None:
    cordoned = node(unschedulable=True)
    assert not admits(Selection(), cordoned)
    assert admits(Selection(tolerations=(toleration,)), cordoned) is expected


KEYS = st.sampled_from(["a", "b", "c"])
VALUES = st.sampled_from(["", "1", "2", "10", "x"])
EFFECTS = st.sampled_from(["NoSchedule", "NoExecute", "PreferNoSchedule"])


def expressions() -> st.SearchStrategy[Expression]:
    several = st.lists(VALUES, min_size=1, max_size=3).map(tuple)
    number = st.sampled_from(["1", "5", "-3"]).map(lambda value: (value,))
    return st.one_of(
        st.builds(Expression, KEYS, st.sampled_from(["In", "NotIn"]), several),
        st.builds(Expression, KEYS, st.sampled_from(["Exists", "DoesNotExist"])),
        st.builds(Expression, KEYS, st.sampled_from(["Gt", "Lt"]), number),
    )


FIELDS = st.builds(
    Expression,
    st.just("metadata.name"),
    st.sampled_from(["In", "NotIn"]),
    st.sampled_from(["n1", "n2"]).map(lambda n: (n,)),
)
TERMS = st.builds(Term, st.lists(expressions(), max_size=2).map(tuple), st.lists(FIELDS, max_size=1).map(tuple))
TOLERATIONS = st.builds(
    Toleration,
    KEYS | st.sampled_from(["", CORDON]),
    st.sampled_from(["Equal", "Exists", "Exists"]),
    VALUES,
    st.just("") | EFFECTS,
)
SELECTIONS = st.builds(
    Selection,
    labels=st.dictionaries(KEYS, VALUES, max_size=1).map(lambda found: tuple(sorted(found.items()))),
    terms=st.none() | st.lists(TERMS, max_size=3).map(tuple),
    tolerations=st.lists(TOLERATIONS, max_size=3).map(tuple),
)
NODES = st.builds(
    lambda name, labels, taints, unschedulable: node(name, taints=tuple(taints), unschedulable=unschedulable, **labels),
    st.sampled_from(["n1", "n2"]),
    st.dictionaries(KEYS, VALUES, max_size=3),
    st.lists(st.builds(Taint, KEYS, VALUES, EFFECTS), max_size=2),
    st.booleans(),
)

LABEL_RULES: dict[str, Callable[[dict[str, str], Expression], bool]] = {
    "In": lambda labels, e: any(labels.get(e.key) == value for value in e.values),
    "NotIn": lambda labels, e: not any(labels.get(e.key) == value for value in e.values),
    "Exists": lambda labels, e: e.key in labels,
    "DoesNotExist": lambda labels, e: e.key not in labels,
    "Gt": lambda labels, e: labels.get(e.key, "").isdigit() and int(labels[e.key]) > int(e.values[0]),
    "Lt": lambda labels, e: labels.get(e.key, "").isdigit() and int(labels[e.key]) < int(e.values[0]),
}


def oracle(selection: Selection, found: Node) -> bool:
    labels = dict(found.labels)
    named = {"metadata.name": found.name}
    problems = [taint for taint in found.taints if taint.effect != "PreferNoSchedule"]
    if found.unschedulable:
        problems.append(Taint(CORDON, "", "NoSchedule"))
    for problem in problems:
        helping = [t for t in selection.tolerations if t.effect in ("", problem.effect)]
        helping = [t for t in helping if t.key in ("", problem.key)]
        helping = [t for t in helping if t.operator == "Exists" or t.value == problem.value]
        if not helping:
            return False
    if not set(selection.labels) <= set(labels.items()):
        return False
    if selection.terms is None:
        return True
    for one in selection.terms:
        answers = [LABEL_RULES[e.operator](labels, e) for e in one.labels]
        answers += [LABEL_RULES[e.operator](named, e) for e in one.fields]
        if answers and all(answers):
            return True
    return False


@settings(max_examples=1500)
@given(SELECTIONS, NODES)
@example(Selection(terms=(Term(),)), node())
def test_equals_the_oracle(selection: Selection, found: Node) -> None:
    assert admits(selection, found) is oracle(selection, found)
