"""Where a pod says it may run: nodeSelector, required node affinity and tolerations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scheduler.model.pod import Expression, Selection, Term, Toleration

from .reading import Unreadable, mapping, sequence, text

PARTS_MAX = 16_384
_CODE = "request.selection"

CHOOSING = ("nodeSelector", "affinity", "tolerations")
"""The fields of a spec that are read here."""


def read_selection(spec: Mapping[str, object]) -> Selection:
    """Return the selection of a pod's spec. Raises Unreadable."""
    selector = mapping(spec.get("nodeSelector"), "spec.nodeSelector")
    labels = tuple(sorted((key, text(value, "a value of spec.nodeSelector")) for key, value in selector.items()))
    affinity = mapping(spec.get("affinity"), "spec.affinity")
    near = mapping(affinity.get("nodeAffinity"), "spec.affinity.nodeAffinity")
    tolerations = sequence(spec.get("tolerations"), "spec.tolerations")
    selection = Selection(
        labels=labels,
        terms=_terms(near.get("requiredDuringSchedulingIgnoredDuringExecution")),
        tolerations=tuple(_toleration(mapping(raw, "spec.tolerations[]")) for raw in tolerations),
    )
    if _parts(selection) > PARTS_MAX:
        raise Unreadable("the pod's node affinity and tolerations are too long; write fewer values.", code=_CODE)
    return selection


def _terms(required: object) -> tuple[Term, ...] | None:
    if required is None:
        return None
    where = "the required node affinity"
    terms = sequence(mapping(required, where).get("nodeSelectorTerms"), f"nodeSelectorTerms of {where}")
    return tuple(_term(mapping(raw, f"a term of {where}")) for raw in terms)


def _term(raw: Mapping[str, object]) -> Term:
    return Term(
        labels=_expressions(sequence(raw.get("matchExpressions"), "matchExpressions")),
        fields=_expressions(sequence(raw.get("matchFields"), "matchFields")),
    )


def _expressions(raws: Sequence[object]) -> tuple[Expression, ...]:
    return tuple(_expression(mapping(raw, "an expression of the node affinity")) for raw in raws)


def _expression(raw: Mapping[str, object]) -> Expression:
    where = "of an expression of the node affinity"
    values = sequence(raw.get("values"), f"the values {where}")
    return Expression(
        key=text(raw.get("key"), f"the key {where}"),
        operator=text(raw.get("operator"), f"the operator {where}"),
        values=tuple(text(value, f"a value {where}") for value in values),
    )


def _toleration(raw: Mapping[str, object]) -> Toleration:
    return Toleration(
        key=text(raw.get("key"), "the key of a toleration"),
        operator=text(raw.get("operator"), "the operator of a toleration") or "Equal",
        value=text(raw.get("value"), "the value of a toleration"),
        effect=text(raw.get("effect"), "the effect of a toleration"),
    )


def _parts(selection: Selection) -> int:
    """Count what a node has to be compared with."""
    expressions = [e for term in selection.terms or () for e in (*term.labels, *term.fields)]
    return len(selection.labels) + len(selection.tolerations) + sum(1 + len(e.values) for e in expressions)
