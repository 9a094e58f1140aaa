"""Pod objects to the model. Never raises: what cannot be read becomes the Request's refusal."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TypeAlias

from scheduler import ADMITTED, ALLOCATION, AUTOSCALE, SCHEDULER_NAME, TOUCH
from scheduler.model.pod import AMOUNT_MAX, Amounts, DeviceAsk, Pod, Request, Selection

from .allocation import read_allocation
from .demand import ASKING, HELD, amounts_and_tokens, pod_total, read_needs, total
from .devices import SIZING, read_devices
from .memo import Memo
from .reading import Reader, Unreadable, integer, mapping, name, sequence, shown, text
from .selection import CHOOSING, read_selection
from .times import micros
from .wishes import QUEUE, misspelt, read_wishes

_PRIORITY_MAX = 2**31 - 1
_TOUCH_DIGITS = 18  # below AMOUNT_MAX
_Asks: TypeAlias = tuple[Amounts, tuple[tuple[str, int], ...], DeviceAsk]  # with tokens, see `Pod`
_SELECTION_BYTES = 4096  # a selection keeps every word that is written there, three times as large
_ASKS, _SELECTIONS = Memo[_Asks](), Memo[Selection](_SELECTION_BYTES)


def read_pod(raw: Mapping[str, object]) -> Pod:
    """Return a pod as Tessera sees it.

    Args:
        raw: the Pod object, from the API server or an extender body; any JSON is accepted.

    Returns:
        A Pod whose `request.refusal` tells the first thing that could not be read or granted. A pod without uid has
        the uid "". Amounts and tokens are as good as they could be read even then, so that a bound pod is booked.
    """
    reader = Reader()
    raw = reader.mapping(raw, "the pod")
    meta = reader.mapping(raw.get("metadata"), "metadata")
    spec = reader.mapping(raw.get("spec"), "spec")
    status = reader.mapping(raw.get("status"), "status")
    notes, labels = _texts(meta, "annotations", reader), _texts(meta, "labels", reader)
    phase = reader.name(status.get("phase"), "phase") or "Pending"
    terminal = phase in {"Succeeded", "Failed"}
    amounts, tokens, devices = _asks(spec, status, notes, reader)
    version, scheduler = (
        reader.name(meta.get("resourceVersion"), "resourceVersion"),
        reader.name(spec.get("schedulerName"), "schedulerName"),
    )
    node, nominated = (
        reader.name(spec.get("nodeName"), "nodeName"),
        reader.name(status.get("nominatedNodeName"), "nominatedNodeName"),
    )
    gates = _names(spec, "schedulingGates", reader)
    return Pod(
        request=_request(meta, spec, labels.get(QUEUE), notes, Amounts() if terminal else amounts, devices, reader),
        resource_version=version,
        ours=scheduler == SCHEDULER_NAME,
        node=node,
        phase=phase,
        terminal=terminal,
        deleting=meta.get("deletionTimestamp") is not None,
        gates=gates,
        nominated=nominated,
        unschedulable=bool(_condition(status, "PodScheduled", "Unschedulable")),
        asked_us=_since(_condition(status, ADMITTED, AUTOSCALE)),
        touch=_touch(notes.get(TOUCH, "")),
        tokens=() if terminal else tokens,
        allocation=read_allocation(notes[ALLOCATION]) if ALLOCATION in notes else None,
        warnings=misspelt(labels, notes),
        owner=reader.take(partial(_owner, part="kind"), meta, ""),
    )


def _asks(spec: Mapping[str, object], status: Mapping[str, object], notes: Mapping[str, str], reader: Reader) -> _Asks:
    """Return what the pod takes of its node and what it asks of devices."""
    given = ([spec.get(key) for key in ASKING], [status.get(key) for key in HELD], [notes.get(key) for key in SIZING])

    def read(reader: Reader) -> _Asks:
        needs = read_needs(spec, status, reader)
        together = total(needs)
        amounts, tokens = amounts_and_tokens(pod_total(spec, status, together, reader), reader)
        return amounts, tokens, read_devices(needs, together, notes, reader)

    return _ASKS.take(given, read, reader)


def _selection(spec: Mapping[str, object], reader: Reader) -> Selection:
    given = [spec.get(key) for key in CHOOSING]
    return _SELECTIONS.take(given, lambda own: own.take(read_selection, spec, Selection()), reader)


def _request(  # noqa: PLR0917 - the parts of one pod
    meta: Mapping[str, object],
    spec: Mapping[str, object],
    queue: str | None,
    notes: Mapping[str, str],
    amounts: Amounts,
    devices: DeviceAsk,
    reader: Reader,
) -> Request:
    """Return the Request; read last, because it carries the refusal of all reading."""
    uid, namespace, called = (reader.name(meta.get(key), key) for key in ("uid", "namespace", "name"))
    wishes = read_wishes(queue, notes, reader)
    priority = reader.take(_priority, spec.get("priority"), 0)
    selection = _selection(spec, reader)
    claims = reader.sequence(spec.get("resourceClaims"), "spec.resourceClaims")
    arrival_us = reader.take(_arrival, meta.get("creationTimestamp"), 0)
    owner = reader.take(_owner, meta, "")
    return Request(
        id=uid,
        namespace=namespace,
        name=called,
        workload=owner or uid,
        arrival_us=arrival_us,
        priority=priority,
        queue=wishes.queue,
        gang=wishes.gang,
        gang_size=wishes.gang_size,
        workload_class=wishes.workload_class,
        max_runtime_s=wishes.max_runtime_s,
        claims=bool(claims),
        amounts=amounts,
        devices=devices,
        selection=selection,
        refusal=reader.refusal,
    )


def _texts(meta: Mapping[str, object], key: str, reader: Reader) -> dict[str, str]:
    """Return labels or annotations; what is no string is refused and left out."""
    listed = reader.mapping(meta.get(key), f"metadata.{key}")
    found = {called: value for called, value in listed.items() if isinstance(value, str)}
    if len(found) < len(listed):
        reader.refuse(Unreadable(f"the values of metadata.{key} must be strings; put them in quotes."))
    return found


def _names(spec: Mapping[str, object], key: str, reader: Reader) -> tuple[str, ...]:
    """Return the names of a list of named objects."""
    where = f"spec.{key}"
    items = reader.sequence(spec.get(key), where)
    return tuple(reader.name(reader.mapping(item, where + "[]").get("name"), where + "[].name") for item in items)


def _priority(value: object) -> int:
    return integer(value, "spec.priority", -_PRIORITY_MAX - 1, _PRIORITY_MAX)


def _owner(meta: Mapping[str, object], part: str = "uid") -> str:
    """Return the uid, or another part, of the controller among the owners, or nothing."""
    where = "metadata.ownerReferences"
    for item in sequence(meta.get("ownerReferences"), where):
        owner = mapping(item, f"{where}[]")
        if owner.get("controller") is True:
            return name(owner.get(part), f"{where}[].{part}")
    return ""


def _arrival(value: object) -> int:
    written = text(value, "metadata.creationTimestamp")
    instant = micros(written) if written else 0
    if instant is None or not 0 <= instant <= AMOUNT_MAX:
        raise Unreadable(f"metadata.creationTimestamp must be an instant since 1970; it is {shown(written)}.")
    return instant


def _condition(status: Mapping[str, object], kind: str, reason: str) -> Mapping[str, object]:
    """Return the condition of a type that is False for a reason; what cannot be read is none."""
    wanted = {"type": kind, "status": "False", "reason": reason}
    listed = status.get("conditions")
    for condition in listed if isinstance(listed, list) else ():
        if isinstance(condition, dict) and all(condition.get(key) == value for key, value in wanted.items()):
            return condition
    return {}


def _since(condition: Mapping[str, object]) -> int:
    """Return since when a condition is so, in microseconds; 0 where it does not say."""
    written = condition.get("lastTransitionTime")
    return max(micros(written) or 0, 0) if isinstance(written, str) else 0


def _touch(note: str) -> int:
    """Return the epoch up to which bindings are void; 0 where the note is no number."""
    return int(note) if note.isascii() and note.isdigit() and len(note) <= _TOUCH_DIGITS else 0
