"""AdmissionReviews of new pods: which pods are Tessera's, and the patch that makes them ask and wait as it needs.

Invariant: the pod that the patch makes is the one that was judged, and judging it again gives no further patch.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from scheduler import GATE, SCHEDULER_NAME
from scheduler.errors import TesseraError
from scheduler.model.pod import Refusal

from .demand import read_needs
from .foreign import Container, Translation, is_foreign, translate
from .pod import read_pod
from .reading import NAME_MAX, Reader, Unreadable, mapping, sequence, shown
from .resources import is_device
from .wishes import DEFAULT_QUEUE, QUEUE

API_VERSION, KIND = "admission.k8s.io/v1", "AdmissionReview"
MIRROR = "kubernetes.io/config.mirror"
KUBELETS = "system:nodes"
DEPTH_MAX = 64
_UNPROCESSABLE = 422


class BadReview(TesseraError):  # noqa: N818 - it says what came
    """A request body that is no AdmissionReview of the API server."""

    code = "review.malformed"


@dataclass(frozen=True, slots=True)
class Review:
    """What the API server asks about.

    Attributes:
        uid: names the question; the answer repeats it.
        pod: the new pod; None when the question is about something that Tessera leaves alone.
    """

    uid: str
    pod: Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class Admission:
    """What is done with a new pod.

    Attributes:
        patch: RFC 6902 operations; empty = the pod stays as it is.
        warnings: sentences for whoever creates the pod.
        refusal: why the pod is not admitted, None when it is.
    """

    patch: tuple[Mapping[str, object], ...] = ()
    warnings: tuple[str, ...] = ()
    refusal: Refusal | None = None


UNTOUCHED = Admission()


def read_review(body: bytes) -> Review:
    """Return what the API server asks.

    Args:
        body: as it came; whoever calls bounds its size.

    Raises:
        BadReview: it is no AdmissionReview of `admission.k8s.io/v1`, or nests deeper than 64.
    """
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadReview(f"the body is not JSON: {error}; send an AdmissionReview.") from error
    if _deeper(raw, DEPTH_MAX):
        raise BadReview(f"the body nests deeper than {DEPTH_MAX}; send an AdmissionReview.")
    try:
        raw = mapping(raw, "the body")
        if raw.get("apiVersion") != API_VERSION or raw.get("kind") != KIND:
            raise BadReview(f"the body is no {KIND} of {API_VERSION}; list only v1 in admissionReviewVersions.")
        asked = mapping(raw.get("request"), "request")
        uid = asked.get("uid")
        if not isinstance(uid, str) or not 0 < len(uid) <= NAME_MAX:
            raise BadReview("request.uid must be a string; send what kube-apiserver sends to a webhook.")
        return Review(uid=uid, pod=_pod(asked))
    except Unreadable as error:
        raise BadReview(str(error)) from error


def admit(pod: Mapping[str, object]) -> Admission:
    """Return what is done with a new pod, as the API server shows it before admission.

    A pod is Tessera's when it names `schedulerName: tessera` or asks for GPUs, slices or shares, in whatever words.
    Pods that name their node, and mirror pods, are left alone: they are placed already.
    """
    try:
        return _admit(pod)
    except Unreadable as error:
        return Admission(refusal=error.refusal)


def answer(uid: str, admission: Admission) -> bytes:
    """Return the AdmissionReview that answers."""
    response: dict[str, object] = {"uid": uid, "allowed": admission.refusal is None}
    if admission.refusal is not None:
        message = f"{admission.refusal.code}: {admission.refusal.text}"
        response["status"] = {"code": _UNPROCESSABLE, "reason": "Invalid", "message": message}
    elif admission.patch:
        response["patchType"] = "JSONPatch"
        response["patch"] = base64.b64encode(orjson.dumps(admission.patch)).decode()
    if admission.warnings:
        response["warnings"] = admission.warnings
    return orjson.dumps({"apiVersion": API_VERSION, "kind": KIND, "response": response})


def _deeper(tree: object, most: int) -> bool:
    """Say whether JSON nests deeper than this, a level at a time."""
    level = [tree]
    for _ in range(most + 1):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


def _pod(asked: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the new pod, None where the question is about anything else. Raises Unreadable."""
    resource = mapping(asked.get("resource"), "request.resource")
    concerns = (resource.get("group") or "", resource.get("resource"), asked.get("subResource") or "")
    groups = sequence(mapping(asked.get("userInfo"), "request.userInfo").get("groups"), "request.userInfo.groups")
    if asked.get("operation") != "CREATE" or concerns != ("", "pods", "") or KUBELETS in groups:
        return None
    if not isinstance(asked.get("object"), dict):
        raise Unreadable("request.object must be a pod; send what kube-apiserver sends to a webhook.")
    return mapping(asked["object"], "request.object")


def _admit(pod: Mapping[str, object]) -> Admission:
    meta, spec = mapping(pod.get("metadata"), "metadata"), mapping(pod.get("spec"), "spec")
    if not (meta and spec):
        raise Unreadable("a pod must have metadata and spec; send what kube-apiserver sends to a webhook.")
    notes = mapping(meta.get("annotations"), "metadata.annotations")
    if spec.get("nodeName") or MIRROR in notes:
        return UNTOUCHED
    reader = Reader()
    containers = _containers(spec, reader)
    foreign = is_foreign(containers, notes)
    asks = any(amount and is_device(name) for one in containers for name, amount in one.needs.amounts.items())
    if not (foreign or asks or spec.get("schedulerName") == SCHEDULER_NAME):
        return UNTOUCHED
    if reader.refusal is not None:
        return Admission(refusal=reader.refusal)
    translation = translate(containers, _texts(notes)) if foreign else Translation()
    admitted = _changed(pod, translation)
    judged = read_pod(admitted)
    warnings = (*translation.warnings, *judged.warnings)
    if judged.request.refusal is not None:
        return Admission(warnings=warnings, refusal=judged.request.refusal)
    return Admission(patch=tuple(_patch(pod, admitted, translation)), warnings=warnings)


def _containers(spec: Mapping[str, object], reader: Reader) -> list[Container]:
    """Return all containers, init containers first, as `read_needs` returns what they take."""
    found = [
        (listed, index, mapping(one, f"spec.{listed}[]"))
        for listed in ("initContainers", "containers")
        for index, one in enumerate(sequence(spec.get(listed), f"spec.{listed}"))
    ]
    needs = read_needs(spec, {}, reader)
    return [Container(*place, need) for place, need in zip(found, needs, strict=True)]


def _texts(notes: Mapping[str, object]) -> dict[str, str]:
    for key, value in notes.items():
        if not isinstance(value, str):
            raise Unreadable(f"the annotation {shown(key)} must be a string; put it in quotes.")
    return {key: str(value) for key, value in notes.items()}


def _changed(pod: Mapping[str, object], translation: Translation) -> dict[str, object]:
    """Return the pod as the patch makes it."""
    meta, spec = dict(mapping(pod.get("metadata"), "metadata")), dict(mapping(pod.get("spec"), "spec"))
    for (listed, index), resources in translation.resources.items():
        containers = list(sequence(spec.get(listed), f"spec.{listed}"))
        containers[index] = {**mapping(containers[index], listed), "resources": resources}
        spec[listed] = containers
    if translation.notes or translation.dropped:
        notes = {**mapping(meta.get("annotations"), "metadata.annotations"), **translation.notes}
        meta["annotations"] = {key: note for key, note in notes.items() if key not in translation.dropped}
    meta["labels"] = {QUEUE: DEFAULT_QUEUE, **mapping(meta.get("labels"), "metadata.labels")}
    gates = list(sequence(spec.get("schedulingGates"), "spec.schedulingGates"))
    if not any(mapping(gate, "spec.schedulingGates[]").get("name") == GATE for gate in gates):
        gates.append({"name": GATE})
    spec |= {"schedulerName": SCHEDULER_NAME, "schedulingGates": gates}
    return {**pod, "metadata": meta, "spec": spec}


def _patch(
    pod: Mapping[str, object], admitted: Mapping[str, object], translation: Translation
) -> list[dict[str, object]]:
    """Return the operations that turn one into the other: whole parts, each only where it differs."""
    operations: list[dict[str, object]] = [
        {"op": "add", "path": f"/spec/{listed}/{index}/resources", "value": resources}
        for (listed, index), resources in translation.resources.items()
    ]
    for part, keys in (("metadata", ("annotations", "labels")), ("spec", ("schedulerName", "schedulingGates"))):
        before, after = mapping(pod.get(part), part), mapping(admitted.get(part), part)
        operations += [
            {"op": "add", "path": f"/{part}/{key}", "value": after[key]}
            for key in keys
            if key in after and after[key] != before.get(key)
        ]
    return operations
