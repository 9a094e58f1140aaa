"""To which pod a process belongs: its cgroup says the pod's uid and the container's id, the kubelet's logs their names.

Read-only files of the host, which may be mounted anywhere: /proc (the host's) and /var/log/containers. Both are
optional: without them processes cannot be told from each other and count as external.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nodeagent.attribution import Holder, Owner

# cgroupfs: .../pod<uid>/<id>; systemd: ...-pod<uid with _>.slice/cri-containerd-<id>.scope. Static pods: uid without -.
_POD = re.compile(
    r"pod(?P<uid>[0-9a-f]{8}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{4}[-_]?[0-9a-f]{12})(?:\.slice)?"
    r"(?:/(?:[a-z][a-z-]*-)?(?P<id>[0-9a-f]{64})(?:\.scope)?)?(?=/|$)"
)
_LOG = re.compile(r"(?P<pod>[^_]+)_(?P<namespace>[^_]+)_(?P<container>.+)-(?P<id>[0-9a-f]{64})\.log")
_CGROUP_BYTES_MAX = 65536


def pod_of(cgroup: str) -> tuple[str, str | None] | None:
    """Return pod uid and container id from the text of /proc/PID/cgroup; None for a process outside every pod."""
    for line in cgroup.splitlines():
        if (found := _POD.search(line)) is not None:
            return found["uid"].replace("_", "-"), found["id"]
    return None


def names_of(logs: Iterable[str]) -> dict[str, Holder]:
    """Return container id -> names, from the file names in /var/log/containers."""
    matches = (_LOG.fullmatch(name) for name in logs)
    return {one["id"]: Holder(one["namespace"], one["pod"], one["container"]) for one in matches if one is not None}


class Owners:
    """Finds owners of processes and remembers them; a pid is asked anew when it was gone in between."""

    def __init__(self, proc: Path = Path("/proc"), logs: Path = Path("/var/log/containers")) -> None:
        """Read nothing yet."""
        self._proc, self._logs = proc, logs
        self._known: dict[tuple[int, str], Owner | None] = {}
        self._names: dict[str, Holder] = {}
        self._listed = False

    def of(self, pids: Iterable[int]) -> dict[int, Owner]:
        """Return the owner of each process that runs in a pod."""
        wanted = {(pid, started) for pid in set(pids) if (started := self._started(pid)) is not None}
        nameless = {key for key, owner in self._known.items() if owner is not None and owner.holder is None}
        self._known = {key: owner for key, owner in self._known.items() if key in wanted - nameless}
        self._listed = False
        for key in wanted - self._known.keys():
            self._known[key] = self._owner(key[0])
        return {pid: owner for (pid, _), owner in self._known.items() if owner is not None}

    def _started(self, pid: int) -> str | None:
        """Return when the process started, which tells it from a later one of the same number."""
        try:
            stat = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()
        return fields[19] if len(fields) > 19 else ""  # noqa: PLR2004 - field 22 of proc(5), counted behind the name

    def _owner(self, pid: int) -> Owner | None:
        try:
            with (self._proc / str(pid) / "cgroup").open(encoding="utf-8", errors="replace") as file:
                found = pod_of(file.read(_CGROUP_BYTES_MAX))
        except OSError:
            return None
        if found is None:
            return None
        uid, container = found
        return Owner(uid, None if container is None else self._name(container))

    def _name(self, container: str) -> Holder | None:
        """Return a container's names; the folder is listed at most once for each call of `of`."""
        if container not in self._names and not self._listed:
            self._listed = True
            try:
                self._names = names_of(one.name for one in self._logs.iterdir())
            except OSError:
                self._names = {}
        return self._names.get(container)
