"""Bodies of the extender protocol's requests: PascalCase keys, exactly as kube-scheduler writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import orjson

from scheduler.errors import TesseraError
from scheduler.model.pod import Pod

from .pod import read_pod


class BadBody(TesseraError):  # noqa: N818 - it says what came
    """A request body that is not one of kube-scheduler's."""

    code = "extender.malformed"


@dataclass(frozen=True, slots=True)
class FilterArgs:
    """Body of /filter and /prioritize: the pod and the nodes that passed so far."""

    pod: Pod
    names: list[str]


@dataclass(frozen=True, slots=True)
class BindArgs:
    """Body of /bind."""

    name: str
    namespace: str
    uid: str
    node: str


def read_filter(body: bytes, known: Mapping[str, Pod] = MappingProxyType({})) -> FilterArgs:
    """Return what /filter or /prioritize was sent.

    Args:
        body: as it came.
        known: pods by uid, as the API server showed them; the one of the same uid and version is not read again.

    Raises:
        BadBody: it is not what kube-scheduler sends.
    """
    raw = _object(body)
    pod = raw.get("Pod")
    if not isinstance(pod, dict):
        raise BadBody("Pod must be a pod object; send what kube-scheduler sends to an extender.")
    names = raw.get("NodeNames")
    if names is None and raw.get("Nodes") is not None:
        raise BadBody("Nodes came without NodeNames; set nodeCacheCapable: true for this extender.")
    if not isinstance(names, list) or not _all_text(names):
        raise BadBody("NodeNames must be a list of node names; send what kube-scheduler sends to an extender.")
    return FilterArgs(pod=_same(pod, known) or read_pod(pod), names=names)


def _all_text(names: list[object]) -> bool:
    """Say whether all of them are strings; joining them finds out sooner than looking at each."""
    try:
        "".join(names)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _same(raw: Mapping[str, object], known: Mapping[str, Pod]) -> Pod | None:
    """Return the known pod of this very uid and version, which stands for one state and no other."""
    meta = raw.get("metadata")
    uid, version = (meta.get("uid"), meta.get("resourceVersion")) if isinstance(meta, dict) else (None, None)
    if not isinstance(uid, str) or not isinstance(version, str) or not version:
        return None
    found = known.get(uid)
    return found if found is not None and found.resource_version == version else None


def read_bind(body: bytes) -> BindArgs:
    """Return what /bind was sent. Raises BadBody."""
    raw = _object(body)
    return BindArgs(
        name=_name(raw, "PodName"),
        namespace=_name(raw, "PodNamespace"),
        uid=_name(raw, "PodUID"),
        node=_name(raw, "Node"),
    )


def _object(body: bytes) -> Mapping[str, object]:
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadBody(f"the body is not JSON ({error}); send what kube-scheduler sends to an extender.") from error
    if not isinstance(raw, dict):
        raise BadBody("the body must be a JSON object; send what kube-scheduler sends to an extender.")
    return raw


def _name(raw: Mapping[str, object], key: str) -> str:
    found = raw.get(key)
    if not isinstance(found, str) or not found:
        raise BadBody(f"{key} must be a name; send what kube-scheduler sends to an extender.")
    return found
