"""What the API server does to objects: defaults at creation, what an update may change, deletion, binding.

Pure functions on plain objects. An object that was stored is never changed: each function returns a new one, which
may share parts with its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from scheduler.kube.port import ApiError, Conflict, Kind, Object

API_VERSIONS: Mapping[Kind, tuple[str, str]] = {
    "pods": ("v1", "Pod"),
    "nodes": ("v1", "Node"),
    "leases": ("coordination.k8s.io/v1", "Lease"),
    "events": ("events.k8s.io/v1", "Event"),
    "secrets": ("v1", "Secret"),
    "mutatingwebhookconfigurations": ("admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration"),
    "namespaces": ("v1", "Namespace"),
    "queues": ("tessera.dev/v1alpha1", "Queue"),
}
_SUFFIX_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # what the API server draws generated names from
_POD_DEFAULTS: Object = {
    "restartPolicy": "Always",
    "terminationGracePeriodSeconds": 30,
    "dnsPolicy": "ClusterFirst",
    "securityContext": {},
    "schedulerName": "default-scheduler",
    "priority": 0,
    "enableServiceLinks": True,
    "preemptionPolicy": "PreemptLowerPriority",
}
_CONTAINER_DEFAULTS: Object = {
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
    "imagePullPolicy": "IfNotPresent",
}
_DEFAULT_TOLERATIONS = tuple(
    {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    for key in ("not-ready", "unreachable")
)
_EVENT_NEEDS = ("eventTime", "reportingController", "reportingInstance", "action", "reason", "type")
_IMMUTABLE = ("uid", "namespace", "name")
_KEPT = ("creationTimestamp", "generateName", "deletionTimestamp", "deletionGracePeriodSeconds", "generation")


def timestamp(wall_us: int) -> str:
    """Return a time as Kubernetes writes it: whole seconds, UTC."""
    return datetime.fromtimestamp(wall_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def invalid(kind: Kind, name: str, why: str) -> ApiError:
    """Return the 422 the API server answers to a change it does not allow."""
    return ApiError(422, "Invalid", f'{API_VERSIONS[kind][1]} "{name}" is invalid: {why}')


def created(kind: Kind, namespace: str, body: Object, uid: str, wall_us: int) -> Object:
    """Return a new object as the API server would store it, all but its resourceVersion.

    Raises:
        ApiError: 400 or 422 when the body cannot be an object of this kind.
    """
    api_version, kind_name = API_VERSIONS[kind]
    if body.get("kind", kind_name) != kind_name:
        raise ApiError(400, "BadRequest", f"{kind} are of kind {kind_name}, not {body['kind']}")
    metadata = dict(body.get("metadata") or {})
    if metadata.get("resourceVersion"):
        raise ApiError(400, "BadRequest", "resourceVersion should not be set on objects to be created")
    if metadata.get("namespace", namespace) != namespace:
        raise ApiError(400, "BadRequest", "the namespace of the object does not match the namespace on the request")
    if not metadata.get("name"):
        if not metadata.get("generateName"):
            raise invalid(kind, "", "metadata.name: Required value: name or generateName is required")
        metadata["name"] = metadata["generateName"] + _suffix(uid)
    if namespace:
        metadata["namespace"] = namespace
    for key in ("deletionTimestamp", "deletionGracePeriodSeconds", "generation"):
        metadata.pop(key, None)
    metadata |= {"uid": uid, "creationTimestamp": timestamp(wall_us)}
    fresh = {**body, "apiVersion": api_version, "kind": kind_name, "metadata": _tidy_metadata(metadata)}
    missing = [key for key in _EVENT_NEEDS if not body.get(key)] if kind == "events" else []
    if missing:
        raise invalid(kind, metadata["name"], f"{missing[0]}: Required value")
    make = _CREATED.get(kind)
    return make(fresh, wall_us) if make else fresh


def _suffix(uid: str) -> str:
    number, letters = int(uid.replace("-", ""), 16), []
    for _ in range(5):
        number, letter = divmod(number, len(_SUFFIX_LETTERS))
        letters.append(_SUFFIX_LETTERS[letter])
    return "".join(letters)


def _tidy_metadata(metadata: Object) -> Object:
    return {key: value for key, value in metadata.items() if value or key not in ("labels", "annotations")}


def _created_pod(pod: Object, wall_us: int) -> Object:
    name = pod["metadata"]["name"]
    spec = _tidy_spec({**_POD_DEFAULTS, **(pod.get("spec") or {})})
    if not spec.get("containers"):
        raise invalid("pods", name, "spec.containers: Required value")
    if spec.get("nodeName") and spec.get("schedulingGates"):
        raise invalid(
            "pods", name, "spec.nodeName: Forbidden: cannot be set until all schedulingGates have been cleared"
        )
    for key in ("containers", "initContainers"):
        if key in spec:
            spec[key] = [_with_defaults(container) for container in spec[key]]
    spec["tolerations"] = _with_default_tolerations(spec)
    status: Object = {"phase": "Pending", "qosClass": _qos_class(spec)}
    if spec.get("schedulingGates"):
        text = "Scheduling is blocked due to non-empty scheduling gates"
        status["conditions"] = [_scheduled("False", wall_us, reason="SchedulingGated", message=text)]
    return {**pod, "metadata": {**pod["metadata"], "generation": 1}, "spec": spec, "status": status}


def _created_namespace(namespace: Object, _: int) -> Object:
    """A namespace can be selected by its name, and is there at once."""
    metadata = namespace["metadata"]
    labels = {**metadata.get("labels", {}), "kubernetes.io/metadata.name": metadata["name"]}
    return {**namespace, "metadata": {**metadata, "labels": labels}, "status": {"phase": "Active"}}


def _created_queue(queue: Object, _: int) -> Object:
    """A custom resource has the generation of its spec, and a status that its creator cannot set."""
    kept = {key: value for key, value in queue.items() if key != "status"}
    return {**kept, "metadata": {**queue["metadata"], "generation": 1}}


_CREATED: Mapping[str, Callable[[Object, int], Object]] = {
    "pods": _created_pod,
    "namespaces": _created_namespace,
    "queues": _created_queue,
}


def _with_default_tolerations(spec: Object) -> list[Object]:
    """Add what the API server's admission adds, at creation and at every update."""
    given = spec.get("tolerations") or []
    tolerated = {one.get("key") for one in given if one.get("effect") in (None, "", "NoExecute")}
    return given + [dict(one) for one in _DEFAULT_TOLERATIONS if one["key"] not in tolerated]


def _with_defaults(container: Object) -> Object:
    filled = {**_CONTAINER_DEFAULTS, **container}
    resources = filled.get("resources") or {}
    if resources.get("limits"):
        resources = {**resources, "requests": {**resources["limits"], **(resources.get("requests") or {})}}
    return {**filled, "resources": resources}


def _qos_class(spec: Object) -> str:
    containers = [*spec["containers"], *spec.get("initContainers", ())]
    resources = [container.get("resources", {}) for container in containers]
    asked = [one.get(part, {}) for one in resources for part in ("requests", "limits")]
    if not any(key in amounts for amounts in asked for key in ("cpu", "memory")):
        return "BestEffort"
    guaranteed = all(
        key in one.get("limits", {}) and one["limits"][key] == one.get("requests", {}).get(key)
        for one in resources
        for key in ("cpu", "memory")
    )
    return "Guaranteed" if guaranteed else "Burstable"


def _tidy_spec(spec: Object) -> Object:
    """Leave out what the typed API server would not write."""
    return {key: value for key, value in spec.items() if value or key not in ("schedulingGates", "nodeName")}


def _scheduled(status: str, wall_us: int, **more: str) -> Object:
    times = {"lastProbeTime": None, "lastTransitionTime": timestamp(wall_us)}
    return {"type": "PodScheduled", "status": status, **times, **more}


def updated(kind: Kind, before: Object, after: Object, subresource: str) -> Object:
    """Return what an update from `before` to `after` really stores.

    Args:
        kind: of both objects.
        before: the object as it is stored.
        after: the object as the caller wants it.
        subresource: `status`, or empty for the object itself, which cannot change the status of pods and nodes.

    Raises:
        Conflict: the resourceVersion in `after` is another one.
        ApiError: 400 or 422 when a field would change that cannot.
    """
    old, new = before["metadata"], dict(after.get("metadata") or {})
    name = old["name"]
    if new.setdefault("resourceVersion", old["resourceVersion"]) != old["resourceVersion"]:
        raise modified(kind, name)
    for key in _IMMUTABLE:
        if new.setdefault(key, old.get(key)) != old.get(key):
            raise (
                invalid(kind, name, f'metadata.uid: Invalid value: "{new[key]}": field is immutable')
                if key == "uid"
                else ApiError(400, "BadRequest", f"the {key} of the object does not match the {key} on the URL")
            )
        if new[key] is None:
            del new[key]
    for key in _KEPT:
        new.pop(key, None)
        if key in old:
            new[key] = old[key]
    if subresource == "status":
        _keep(new, old, "ownerReferences")
    result = {**after, "apiVersion": before["apiVersion"], "kind": before["kind"], "metadata": _tidy_metadata(new)}
    if kind in ("pods", "nodes", "namespaces"):
        _keep(result, before, "spec" if subresource == "status" else "status")
    if kind == "events" and _but_series(result) != _but_series(before):
        raise invalid(kind, name, "field is immutable")
    refine = _UPDATED.get(kind)
    return refine(before, result, subresource) if refine else result


def _updated_queue(before: Object, after: Object, subresource: str) -> Object:
    """Change the status alone, or all but the status; another spec is another generation."""
    if subresource == "status":
        status = {"status": after["status"]} if "status" in after else {}
        return {**{key: value for key, value in before.items() if key != "status"}, **status}
    _keep(after, before, "status")
    if after.get("spec") != before.get("spec"):
        after["metadata"] = {**after["metadata"], "generation": before["metadata"]["generation"] + 1}
    return after


def _but_series(event: Object) -> Object:
    return {key: value for key, value in event.items() if key not in ("metadata", "series")}


def modified(kind: Kind, name: str) -> Conflict:
    """Return the 409 for a stale resourceVersion."""
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return Conflict(409, "Conflict", f'Operation cannot be fulfilled on {kind} "{name}": {why}')


def _keep(result: Object, before: Object, part: str) -> None:
    result.pop(part, None)
    if part in before:
        result[part] = before[part]


def _updated_pod(before: Object, after: Object, subresource: str) -> Object:
    """Let through what may change: images, a deadline, more tolerations, fewer gates; a gated pod's wider selector."""
    if subresource:
        return after
    old, new = before["spec"], _tidy_spec(dict(after.get("spec") or {}))
    new["tolerations"] = _with_default_tolerations(new)
    after = {**after, "spec": new}
    if new == old:
        return after
    name = before["metadata"]["name"]
    had = {gate["name"] for gate in old.get("schedulingGates", ())}
    for gate in new.get("schedulingGates", ()):
        if gate["name"] not in had:
            why = f"only deletion is allowed, but found new scheduling gate '{gate['name']}'"
            raise invalid("pods", name, f"spec.schedulingGates: Forbidden: {why}")
    kept = new.get("tolerations", [])
    if any(toleration not in kept for toleration in old.get("tolerations", ())):
        raise invalid("pods", name, "spec.tolerations: Forbidden: existing toleration can not be modified or removed")
    if _fixed(new) != _fixed(old) or not _selector_may_become(new, old, gated=bool(had)):
        raise invalid("pods", name, "spec: Forbidden: pod updates may not change fields other than images and gates")
    after["metadata"] = {**after["metadata"], "generation": before["metadata"].get("generation", 1) + 1}
    return after


_UPDATED: Mapping[str, Callable[[Object, Object, str], Object]] = {"pods": _updated_pod, "queues": _updated_queue}


def _fixed(spec: Object) -> Object:
    loose = ("schedulingGates", "tolerations", "activeDeadlineSeconds", "nodeSelector")
    fixed = {key: value for key, value in spec.items() if key not in loose}
    for key in ("containers", "initContainers"):
        fixed[key] = [{k: v for k, v in one.items() if k != "image"} for one in spec.get(key) or ()]
    return fixed


def _selector_may_become(new: Object, old: Object, *, gated: bool) -> bool:
    before, after = old.get("nodeSelector") or {}, new.get("nodeSelector") or {}
    return before.items() <= after.items() if gated else before == after


def bound(pod: Object, binding: Object, wall_us: int) -> Object:
    """Return the pod bound as the Binding says: node, annotations and labels change in one update.

    Raises:
        Conflict: wrong uid, stale resourceVersion, already bound, gated or being deleted.
        ApiError: 400 when the Binding names no node.
    """
    metadata, wanted = pod["metadata"], binding.get("metadata") or {}
    name, node = metadata["name"], (binding.get("target") or {}).get("name")
    if not node:
        raise ApiError(400, "BadRequest", "target.name: Required value")
    for key, what in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
        if wanted.get(key) and wanted[key] != metadata[key]:
            why = f"Precondition failed: {what} in precondition: {wanted[key]}, {what} in object meta: {metadata[key]}"
            raise unassignable(name, why)
    if "deletionTimestamp" in metadata:
        raise unassignable(name, f"pod {name} is being deleted, cannot be assigned to a host")
    if pod["spec"].get("nodeName"):
        raise unassignable(name, f'pod {name} is already assigned to node "{pod["spec"]["nodeName"]}"')
    if pod["spec"].get("schedulingGates"):
        raise unassignable(name, f"pod {name} has non-empty .spec.schedulingGates")
    merged = dict(metadata)
    for key in ("annotations", "labels"):
        if wanted.get(key):
            merged[key] = {**metadata.get(key, {}), **wanted[key]}
    status = {key: value for key, value in pod["status"].items() if key != "nominatedNodeName"}
    others = [one for one in status.get("conditions", ()) if one["type"] != "PodScheduled"]
    status["conditions"] = [*others, _scheduled("True", wall_us)]
    return {**pod, "metadata": merged, "spec": {**pod["spec"], "nodeName": node}, "status": status}


def unassignable(name: str, why: str) -> Conflict:
    """Return the 409 that a Binding gets."""
    return Conflict(409, "Conflict", f'Operation cannot be fulfilled on pods/binding "{name}": {why}')


def deleted(pod: Object, grace_s: int | None, wall_us: int) -> tuple[Object, bool]:
    """Return the pod with the marks of its deletion, and whether it goes at once.

    Only a bound pod that has not ended is given time; whoever asks for less time later shortens it.

    Args:
        pod: the pod as it is stored.
        grace_s: seconds its containers get; None takes what the pod says.
        wall_us: now.
    """
    metadata, spec = pod["metadata"], pod["spec"]
    grace: int = spec.get("terminationGracePeriodSeconds", 30) if grace_s is None else max(grace_s, 0)
    if not spec.get("nodeName") or pod["status"].get("phase") in ("Succeeded", "Failed"):
        grace = 0
    if metadata.get("deletionGracePeriodSeconds", grace + 1) <= grace:
        return pod, grace == 0
    marks: dict[str, Any] = {
        "deletionTimestamp": timestamp(wall_us + grace * 1_000_000),
        "deletionGracePeriodSeconds": grace,
    }
    if "deletionTimestamp" not in metadata:
        marks["generation"] = metadata.get("generation", 1) + 1
    return {**pod, "metadata": {**metadata, **marks}}, grace == 0
