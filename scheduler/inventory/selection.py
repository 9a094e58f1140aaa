"""Whether a node is one where a pod says it may run: exactly the answer of kube-scheduler 1.36.

It joins what kube-scheduler's plugins NodeAffinity, TaintToleration and NodeUnschedulable say. The toleration
operators Lt and Gt are behind a feature gate that is off there; without it they tolerate nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from scheduler.model.node import Node, Taint
from scheduler.model.pod import Expression, Selection, Term, Toleration

_KEEPS_AWAY = ("NoSchedule", "NoExecute")
_CORDON = Taint(key="node.kubernetes.io/unschedulable", value="", effect="NoSchedule")
_SYSTEM_TAINTS = ("node.kubernetes.io/", "node.cloudprovider.kubernetes.io/")
_NAME_FIELD = "metadata.name"
_INT64 = range(-(2**63), 2**63)
_NUMBER = re.compile(r"[+-]?[0-9]+")
_PART = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_VALUE = re.compile(rf"({_PART})?")
_KEY_NAME = re.compile(_PART)
_KEY_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_MAX = 63
_PREFIX_MAX = 253


def admits(selection: Selection, node: Node) -> bool:
    """Say whether node selector, required node affinity, taints and cordon leave this node to the pod."""
    if node.unschedulable and not _tolerated(_CORDON, selection.tolerations):
        return False
    if not all(_tolerated(taint, selection.tolerations) for taint in node.taints if taint.effect in _KEEPS_AWAY):
        return False
    if not selection.labels and selection.terms is None:
        return True
    labels = dict(node.labels)
    if any(labels.get(key) != value for key, value in selection.labels):
        return False
    return selection.terms is None or any(_term_matches(term, labels, node.name) for term in selection.terms)


def obstacles(selection: Selection, node: Node) -> list[str]:
    """Return what of a selection keeps a pod from a node, each as the change that would take it away; empty = nothing.

    An empty string stands for what the pod should not change: a cordon, or a taint that Kubernetes sets itself.
    """
    found = [""] if node.unschedulable and not _tolerated(_CORDON, selection.tolerations) else []
    for taint in node.taints:
        if taint.effect in _KEEPS_AWAY and not _tolerated(taint, selection.tolerations):
            system = taint.key.startswith(_SYSTEM_TAINTS)
            found.append("" if system else f"tolerate the taint {taint.key}={taint.value}:{taint.effect}")
    labels = dict(node.labels)
    found += [f"drop the node selector {key}={value}" for key, value in selection.labels if labels.get(key) != value]
    if selection.terms is not None and not any(_term_matches(term, labels, node.name) for term in selection.terms):
        found += _unmet(selection.terms, labels)
    return found


def _unmet(terms: tuple[Term, ...], labels: Mapping[str, str]) -> list[str]:
    """Say what of a required node affinity is not met: single expressions where there is one sound term of labels."""
    if len(terms) != 1 or terms[0].fields or not _sound(terms[0]):
        return ["drop the required node affinity"]
    return [
        f"drop {e.key} {e.operator} ({', '.join(e.values)}) from the required node affinity"
        for e in terms[0].labels
        if not _label_matches(e, labels)
    ]


def _tolerated(taint: Taint, tolerations: Iterable[Toleration]) -> bool:
    return any(_tolerates(toleration, taint) for toleration in tolerations)


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    """Empty effect and key stand for all; an unknown operator tolerates nothing."""
    if toleration.effect not in {"", taint.effect} or toleration.key not in {"", taint.key}:
        return False
    if toleration.operator in {"", "Equal"}:
        return toleration.value == taint.value
    return toleration.operator == "Exists"


def _term_matches(term: Term, labels: Mapping[str, str], name: str) -> bool:
    if not _sound(term):
        return False
    fields = {_NAME_FIELD: name}
    return all(_label_matches(e, labels) for e in term.labels) and all(_field_matches(e, fields) for e in term.fields)


def _label_matches(expression: Expression, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression.key)
    match expression.operator:
        case "In":
            return value is not None and value in expression.values
        case "NotIn":
            return value is None or value not in expression.values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    number, bound = _int64(value or ""), _int64(expression.values[0])
    if number is None or bound is None:
        return False
    return number > bound if expression.operator == "Gt" else number < bound


def _field_matches(expression: Expression, fields: Mapping[str, str]) -> bool:
    """A field that a node does not have reads as empty."""
    return (fields.get(expression.key, "") == expression.values[0]) is (expression.operator == "In")


def _int64(written: str) -> int | None:
    """Return a decimal number of 64 bits."""
    number = int(written) if len(written) <= _LABEL_MAX and _NUMBER.fullmatch(written) else None
    return number if number is not None and number in _INT64 else None


@lru_cache(maxsize=4096)
def _sound(term: Term) -> bool:
    """Say whether kube-scheduler can read a term: one that is empty or has a flaw matches no node."""
    return (
        bool(term.labels or term.fields)
        and all(_sound_label(expression) for expression in term.labels)
        and all(e.operator in {"In", "NotIn"} and len(e.values) == 1 for e in term.fields)
    )


def _sound_label(expression: Expression) -> bool:
    values = expression.values
    wanted = {
        "In": bool(values),
        "NotIn": bool(values),
        "Exists": not values,
        "DoesNotExist": not values,
        "Gt": len(values) == 1 and _int64(values[0]) is not None,
        "Lt": len(values) == 1 and _int64(values[0]) is not None,
    }
    return wanted.get(expression.operator, False) and _sound_key(expression.key) and all(map(_sound_value, values))


def _sound_key(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > _PREFIX_MAX or _KEY_PREFIX.fullmatch(prefix) is None):
        return False
    return len(name) <= _LABEL_MAX and _KEY_NAME.fullmatch(name) is not None


def _sound_value(value: str) -> bool:
    return len(value) <= _LABEL_MAX and _VALUE.fullmatch(value) is not None
