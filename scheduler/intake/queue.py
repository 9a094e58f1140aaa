"""Queue objects and documents to the model: what one says alone, and whether all of them together make trees.

A queue that cannot be used as it is written never ends anything: it admits nothing until it is corrected, and its
sentence names the field and what to write there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import yaml

from scheduler import GPU, MIG_PREFIX, PREFIX
from scheduler.errors import ConfigError
from scheduler.model.pod import Expression
from scheduler.model.queue import (
    BUILT_IN,
    CPU_KEY,
    DEPTH_MAX,
    GPU_KEY,
    LIMIT_MAX,
    MEMORY_KEY,
    MIG_KEY,
    MILLI_KEY,
    STORAGE_KEY,
    WEIGHT_MAX,
    Queue,
    Selector,
    is_model,
)

from .quantity import NANO, QuantityError, nano
from .reading import Unreadable, integer, mapping, sequence, shown, text
from .resources import profile_of

_T = TypeVar("_T")

API_VERSION = PREFIX + "v1alpha1"
KEYS_MAX = 64
PARTS_MAX = 256  # of a namespaceSelector
NAME_MAX = 63  # as long as the value of the label that names a queue
FIELDS = ("parent", "weight", "nominal", "borrowLimit", "lendLimit", "namespaceSelector", "autoscale", "stopped")
_MIB = 1 << 20
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"({_NAME.pattern}/)?{_PART.pattern}")
_OPERATORS = {"In": True, "NotIn": True, "Exists": False, "DoesNotExist": False}  # whether it takes values
_HINTS = {GPU: GPU_KEY, "gpus": GPU_KEY, "mem": MEMORY_KEY, PREFIX + "share": MILLI_KEY}


def read_queue(raw: Mapping[str, object]) -> Queue:
    """Return a queue as its object or document says.

    Raises:
        Unreadable: the sentence names the field, and what to write there.
    """
    meta = mapping(raw.get("metadata"), "metadata")
    name = queue_name(meta.get("name"), "metadata.name")
    spec = mapping(raw.get("spec"), "spec")
    if unknown := sorted(spec.keys() - set(FIELDS), key=str):
        raise _wrong(f"spec has no field {shown(unknown[0])}; it has {', '.join(FIELDS)}.")
    return Queue(
        name=name,
        parent=queue_name(spec["parent"], "spec.parent") if spec.get("parent") else "",
        weight=integer(spec["weight"], "spec.weight", 1, WEIGHT_MAX) if spec.get("weight") is not None else 1,
        nominal=_limits(spec, "nominal"),
        borrow_limit=_limits(spec, "borrowLimit"),
        lend_limit=_limits(spec, "lendLimit"),
        namespaces=_selector(spec["namespaceSelector"]) if spec.get("namespaceSelector") is not None else None,
        autoscale=_flag(spec, "autoscale"),
        stopped=_flag(spec, "stopped"),
        uid=text(meta.get("uid"), "metadata.uid"),
        resource_version=text(meta.get("resourceVersion"), "metadata.resourceVersion"),
        generation=integer(meta.get("generation"), "metadata.generation", 0, LIMIT_MAX),
    )


def told_queue(raw: Mapping[str, object]) -> tuple[Queue, str]:
    """Return the queue of an object in a cluster; one that cannot be read is stopped, and the sentence says why."""
    try:
        return read_queue(raw), ""
    except Unreadable as error:
        meta = raw.get("metadata")
        named = meta if isinstance(meta, dict) else {}
        name, uid = (str(named.get(key) or "") for key in ("name", "uid"))
        return Queue(name, stopped=True, uid=uid), str(error)


def queue_name(value: object, where: str) -> str:
    """Return a name that a queue may have. Raises Unreadable."""
    found = text(value, where)
    if len(found) > NAME_MAX or _NAME.fullmatch(found) is None:
        raise _wrong(
            f"{where} must be lower-case letters, digits, '-' and '.', at most {NAME_MAX} characters, since a label "
            f"names the queue; it is {shown(found)}."
        )
    return found


def _wrong(sentence: str) -> Unreadable:
    return Unreadable(sentence, code="queue.invalid", reason="QueueStopped")


def _flag(spec: Mapping[str, object], field: str) -> bool:
    value = spec.get(field)
    if not isinstance(value, bool | None):
        raise _wrong(f"spec.{field} must be true or false; it is {shown(value)}.")
    return bool(value)


def _limits(spec: Mapping[str, object], field: str) -> dict[str, int]:
    listed = mapping(spec.get(field), f"spec.{field}")
    if len(listed) > KEYS_MAX:
        raise _wrong(f"spec.{field} lists more than {KEYS_MAX} keys; list fewer.")
    found: dict[str, int] = {}
    for key, value in listed.items():
        where = f"spec.{field}, {shown(key)}"
        known = _key(key, where)
        if known in found or (is_model(known) and known.casefold() in map(str.casefold, found)):
            raise _wrong(f"{where}: the key is there twice; write it once.")
        found[known] = _amount(known, value, where)
    return dict(sorted(found.items()))


def _key(key: object, where: str) -> str:
    """Return a key in the one way it is written."""
    if not isinstance(key, str):
        raise _wrong(f"{where}: a key must be text such as gpu or H100; put it in quotes.")
    lower = key.casefold()
    if lower in {GPU_KEY, MILLI_KEY, CPU_KEY, MEMORY_KEY} or lower in _HINTS:
        wanted = _HINTS.get(lower, lower)
        if key != wanted:
            raise _wrong(f"{where}: write {wanted}.")
        return key
    if lower.startswith(("mig-", MIG_PREFIX)):
        raise _wrong(f"{where}: write mig:<profile>, such as mig:1g.10gb.")
    if key.startswith(MIG_KEY):
        profile = profile_of(MIG_PREFIX + key.removeprefix(MIG_KEY).replace("+", "."))
        if not profile:
            raise _wrong(f"{where} names no MIG profile; write one such as mig:1g.10gb.")
        return MIG_KEY + profile
    name = key.removeprefix(STORAGE_KEY)
    if len(name) > NAME_MAX or _PART.fullmatch(name) is None:
        raise _wrong(
            f"{where} is no key; write gpu, a GPU model, mig:<profile>, milli, cpu, memory or storage:<class>."
        )
    return key


def _amount(key: str, value: object, where: str) -> int:
    """Return a limit in the unit of its key: thousandths of a core, MiB, else whole pieces."""
    try:
        amount = nano(value)
    except QuantityError as error:
        raise _wrong(f"{where}: {error}") from error
    if value is None or amount < 0:
        raise _wrong(f"{where} must be 0 or more; it is {shown(value)}.")
    unit = {CPU_KEY: NANO // 1000, MEMORY_KEY: _MIB * NANO}.get(key, NANO)
    plain = not isinstance(value, str) or value.strip().isdigit()
    if unit == NANO and (amount % NANO or not plain):
        raise _wrong(f"{where} is counted in whole {_unit(key)}; write a whole number.")
    if key == MEMORY_KEY and 0 < amount < unit:
        raise _wrong(f"{where} is {shown(value)} bytes, less than 1Mi; write it with its unit, such as 64Gi.")
    if amount // unit > LIMIT_MAX:
        raise _wrong(f"{where} is too large; no cluster has {shown(value)}.")
    return amount // unit


def _unit(key: str) -> str:
    if key.startswith(STORAGE_KEY):
        return "GiB"
    return "thousandths of a GPU" if key == MILLI_KEY else "pieces"


def _selector(value: object) -> Selector:
    where = "spec.namespaceSelector"
    raw = mapping(value, where)
    if unknown := sorted(raw.keys() - {"matchLabels", "matchExpressions"}, key=str):
        raise _wrong(f"{where} has no field {shown(unknown[0])}; it has matchLabels and matchExpressions.")
    labels = mapping(raw.get("matchLabels"), f"{where}.matchLabels")
    listed = sequence(raw.get("matchExpressions"), f"{where}.matchExpressions")
    if len(labels) + len(listed) > PARTS_MAX:
        raise _wrong(f"{where} has more than {PARTS_MAX} conditions; write fewer.")
    return Selector(
        tuple(sorted((_label_key(key, where), text(one, f"a value of {where}")) for key, one in labels.items())),
        tuple(_expression(mapping(one, f"{where}.matchExpressions[]"), where) for one in listed),
    )


def _expression(raw: Mapping[str, object], where: str) -> Expression:
    operator = text(raw.get("operator"), f"the operator of {where}")
    values = tuple(text(one, f"a value of {where}") for one in sequence(raw.get("values"), f"the values of {where}"))
    if operator not in _OPERATORS:
        raise _wrong(f"{where}: the operator must be {', '.join(_OPERATORS)}; it is {shown(operator)}.")
    if _OPERATORS[operator] != bool(values) or len(values) > PARTS_MAX:
        wanted = f"1 to {PARTS_MAX} values" if _OPERATORS[operator] else "no values"
        raise _wrong(f"{where}: the operator {operator} takes {wanted}.")
    return Expression(_label_key(raw.get("key"), where), operator, values)


def _label_key(value: object, where: str) -> str:
    found = text(value, f"a key of {where}")
    if _LABEL_KEY.fullmatch(found) is None:
        raise _wrong(f"{where}: {shown(found)} is no key of a label.")
    return found


def selects(selector: Selector | None, labels: Mapping[str, str]) -> bool:
    """Say whether a namespace with these labels may use a queue; None selects nothing."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.labels):
        return False
    return all(_holds(one, labels) for one in selector.expressions)


def _holds(expression: Expression, labels: Mapping[str, str]) -> bool:
    value = labels.get(expression.key)
    if expression.operator in {"Exists", "DoesNotExist"}:
        return (value is not None) is (expression.operator == "Exists")
    return (value in expression.values) is (expression.operator == "In")


def sound(queues: Iterable[Queue]) -> tuple[list[Queue], dict[str, str]]:
    """Return queues that make trees, the built-in `default` among them, and a sentence for each that did not.

    A queue with an unknown parent, in a circle or too deep becomes a root that admits nothing, and with it all below.
    Model names are spelled everywhere as the first queue by name spells them.
    """
    by_name = {queue.name: queue for queue in sorted(queues, key=lambda queue: queue.name)}
    by_name.setdefault(BUILT_IN.name, BUILT_IN)
    wrong: dict[str, str] = {}
    for name in sorted(by_name):
        if sentence := _parent_trouble(name, by_name):
            wrong[name] = sentence
    for name in wrong:
        by_name[name] = replace(by_name[name], parent="", stopped=True)
    return _spelled_alike(by_name), wrong


def _parent_trouble(name: str, by_name: Mapping[str, Queue]) -> str:
    parent = by_name[name].parent
    if parent and parent not in by_name:
        return f"spec.parent: there is no queue {parent}; create it, or name another one."
    path = [name]
    while (above := by_name[path[-1]].parent) in by_name:
        if above in path and above != name:
            return ""  # the circle is above: whoever is in it is told
        path.append(above)
        if above == name:
            return f"spec.parent: the queues go round in a circle, {' < '.join(path)}; give one of them another parent."
        if len(path) > DEPTH_MAX:
            return f"spec.parent: the queue lies more than {DEPTH_MAX} levels deep; make the tree flatter."
    return ""


def _spelled_alike(by_name: Mapping[str, Queue]) -> list[Queue]:
    spelling: dict[str, str] = {}

    def alike(limits: Mapping[str, int]) -> dict[str, int]:
        named = {spelling.setdefault(k.casefold(), k) if is_model(k) else k: limits[k] for k in limits}
        return dict(sorted(named.items()))

    return [
        replace(
            queue,
            nominal=alike(queue.nominal),
            borrow_limit=alike(queue.borrow_limit),
            lend_limit=alike(queue.lend_limit),
        )
        for _, queue in sorted(by_name.items())
    ]


def read_documents(written: str, where: str) -> list[Queue]:
    """Return the queues of a YAML file: one Queue a document, or a List of them.

    Args:
        written: the file's text.
        where: its name, for the sentences.

    Raises:
        ConfigError: not YAML, not a Queue, two of one name, or no tree; the sentence names file, line and queue.
    """
    queues: dict[str, Queue] = {}
    lines: dict[str, int] = {}
    try:
        nodes = list(yaml.compose_all(written, Loader=yaml.SafeLoader))
        documents = list(yaml.safe_load_all(written))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not YAML: {error}") from error
    for node, document in zip(nodes, documents, strict=True):
        line = node.start_mark.line + 1
        for raw in _listed(document, f"{where}:{line}") if document is not None else ():
            queue = _document(raw, f"{where}:{line}")
            if queue.name in queues:
                raise ConfigError(f"{where}:{line}: queue {queue.name} is there twice; rename one of them")
            queues[queue.name], lines[queue.name] = queue, line
    _, wrong = sound(queues.values())
    for name, sentence in wrong.items():
        raise ConfigError(f"{where}:{lines[name]}: queue {name}: {sentence}")
    return list(queues.values())


def _listed(document: object, where: str) -> Iterable[object]:
    if isinstance(document, dict) and document.get("kind") in {"List", "QueueList"}:
        return _reading(lambda: sequence(document.get("items"), "items"), where)
    return [document]


def _document(raw: object, where: str) -> Queue:
    if not isinstance(raw, dict) or (raw.get("apiVersion"), raw.get("kind")) != (API_VERSION, "Queue"):
        raise ConfigError(f"{where}: must be a Queue with apiVersion: {API_VERSION} and kind: Queue")
    meta = raw.get("metadata")
    name = meta.get("name") if isinstance(meta, dict) else None
    return _reading(lambda: read_queue(raw), f"{where}: queue {name if isinstance(name, str) else '?'}")


def _reading(read: Callable[[], _T], where: str) -> _T:
    try:
        return read()
    except Unreadable as error:
        raise ConfigError(f"{where}: {error}") from error
