"""The rights Tessera needs, one by one: what `deploy/` grants its account (a test compares them)."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler import PREFIX
from scheduler.kube.lease import NAME as LEASE
from scheduler.kube.port import Object


@dataclass(frozen=True, slots=True)
class Right:
    """One verb on one resource; `here` = only in Tessera's own namespace."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""
    here: bool = False
    name: str = ""

    def __str__(self) -> str:
        """Return it as people write it, such as `patch pods/status`."""
        resource = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {resource}" + (f".{self.group}" if self.group else "")

    def attributes(self, namespace: str) -> Object:
        """Return the resourceAttributes of an access review."""
        named = {
            "verb": self.verb,
            "group": self.group,
            "resource": self.resource,
            "subresource": self.subresource,
            "namespace": namespace if self.here else "",
            "name": self.name,
        }
        return {key: value for key, value in named.items() if value or key == "group"}


_LEASES = "coordination.k8s.io"
RIGHTS: tuple[Right, ...] = (
    *(Right(verb, "nodes") for verb in ("get", "list", "watch")),
    *(Right(verb, "namespaces") for verb in ("get", "list", "watch")),
    *(Right(verb, "queues", PREFIX[:-1]) for verb in ("get", "list", "watch")),
    Right("patch", "queues", PREFIX[:-1], subresource="status"),
    *(Right(verb, "pods") for verb in ("get", "list", "watch", "patch")),
    Right("patch", "pods", subresource="status"),
    Right("create", "pods", subresource="binding"),
    *(Right(verb, "events", group) for group in ("", "events.k8s.io") for verb in ("create", "patch")),
    Right("create", "tokenreviews", "authentication.k8s.io"),
    Right("create", "leases", _LEASES, here=True),
    *(Right(verb, "leases", _LEASES, here=True, name=LEASE) for verb in ("get", "update", "patch")),
    Right("get", "leases", _LEASES, here=True, name="tessera-kube-scheduler"),
)
