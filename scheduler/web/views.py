"""What people may look at: nodes, GPUs, Requests, health. Read-only, from the live state of the desk."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import orjson
from aiohttp import web

from policies.columns import Health, Mode, Use
from scheduler.desk import Desk
from scheduler.inventory.registry import Part
from scheduler.ledger.queues import WAITING
from scheduler.ledger.standing import Standing, line_of, standings
from scheduler.metrics import Metrics
from scheduler.model.node import Node
from scheduler.model.reservation import Row, State
from scheduler.model.subject import Reach
from scheduler.waiting import all_unwritten, unwritten, waiting_word

from .access import REACH, SUBJECT
from .explanation import SHOWN, explanation, positions
from .problems import problem

PAGE_MAX = 500
LATEST_US = 1 << 62
LINE_MAX = 100  # requests shown of a queue's line, of those within reach
NOT_FOUND = ("request.not_found", "no Request has this id; list them with GET /api/v1/requests")
FILTERS = ("state", "queue", "namespace", "name")
STATES = tuple(dict.fromkeys(SHOWN.get(state, state).value for state in State))
SORTS: dict[str, Callable[[Row], str]] = {
    "arrival": lambda row: f"{row.arrival_us:020}/{row.id}",
    "-arrival": lambda row: f"{LATEST_US - row.arrival_us:020}/{row.id}",
    "name": lambda row: f"{row.namespace}/{row.name}/{row.arrival_us:020}/{row.id}",
    "state": lambda row: f"{STATES.index(SHOWN.get(row.state, row.state).value):02}/{row.arrival_us:020}/{row.id}",
}
"""What requests may be sorted by, each as a text that sorts so and never changes, but for `state`."""


@dataclass(slots=True)
class Views:
    """The read-only answers.

    Attributes:
        unready: returns an empty string, or the sentence why Tessera is not ready.
    """

    desk: Desk
    metrics_source: Metrics
    unready: Callable[[], str]

    def live(self, _: bytes) -> tuple[int, bytes]:
        """The process lives and its loop turns."""
        return 200, b"ok"

    def ready(self, _: bytes) -> tuple[int, bytes]:
        """The inventory is complete and fresh, and the cluster is ours."""
        reason = self.unready()
        return (503, reason.encode()) if reason else (200, b"ok")

    async def healthz(self, _: web.Request) -> web.Response:
        """As `live`."""
        return web.Response(text="ok")

    async def readyz(self, _: web.Request) -> web.Response:
        """As `ready`."""
        status, text = self.ready(b"")
        return web.Response(status=status, text=text.decode())

    async def metrics(self, _: web.Request) -> web.Response:
        """The exposition text."""
        await self.metrics_source.refresh()
        body = await asyncio.to_thread(self.metrics_source.render)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def nodes(self, http: web.Request) -> web.Response:
        """All nodes by name."""
        names = sorted(self.desk.registry.nodes)
        return _page(http, names, self.node_view)

    async def gpus(self, http: web.Request) -> web.Response:
        """All devices, by node name and slot."""
        nodes = self.desk.registry.nodes
        keys = [f"{name}/{slot:02}" for name in sorted(nodes) for slot in range(len(nodes[name].devices))]
        reach = http[REACH]
        return _page(http, keys, lambda key: self.gpu_view(key, reach))

    async def queues(self, http: web.Request) -> web.Response:
        """All queues by name, the built-in one among them."""
        stands = self._standings()
        return _page(http, sorted(self.desk.queues.quota.queues), lambda name: stands(name).view())

    async def queue(self, http: web.Request) -> web.Response:
        """One queue, with the namespaces that may use it and the head of its line."""
        name, queues, reach = http.match_info["name"], self.desk.queues, http[REACH]
        if name not in queues.quota.queues:
            return problem(404, "queue.not_found", "there is no queue of this name; list them with GET /api/v1/queues")
        line = enumerate(line_of(self.desk.book.rows.values(), name), start=1)
        own = islice(((place, row) for place, row in line if reach.covers(row.namespace, row.queue)), LINE_MAX)
        waiting = [
            {**self.request_view(row), "position": place, "priority": row.priority, "arrival": row.arrival_us}
            for place, row in own
        ]
        view = self._standings()(name).view()
        return _json(
            {**view, "path": queues.quota.path(name), "namespaces": queues.namespaces(name), "waiting": waiting}
        )

    def _standings(self) -> Callable[[str], Standing]:
        """Return what says where a queue stands, now."""
        registry, rows, queues = self.desk.registry, self.desk.book.rows, self.desk.queues
        usage, pending = queues.usage(rows, registry.pods, registry.nodes), queues.pending(rows)
        return standings(queues, usage, pending)

    async def requests(self, http: web.Request) -> web.Response:
        """Requests, filtered by state, queue, namespace and name, oldest first or as `sort` says."""
        wanted = {key: set(http.query[key].split(",")) for key in FILTERS if key in http.query}
        if unknown := wanted.get("state", set()) - set(STATES):
            named = ", ".join(sorted(unknown))
            return problem(400, "request.malformed", f"there is no state {named!r}; states are {', '.join(STATES)}")
        sort = http.query.get("sort", "arrival")
        if sort not in SORTS:
            return problem(400, "request.malformed", f"requests are not sorted by {sort!r}; try {', '.join(SORTS)}")
        every, reach = chain(self.desk.book.rows.values(), all_unwritten(self.desk)), http[REACH]
        rows = {
            f"{sort} {SORTS[sort](row)}": row
            for row in every
            if reach.covers(row.namespace, row.queue) and _matches(row, wanted)
        }
        place = self._places()
        return _page(
            http, sorted(rows), lambda key: self.request_view(rows[key]) | {"position": place(rows[key])}, sort
        )

    def _places(self) -> Callable[[Row], int | None]:
        """Return what says where a request stands in its queue; every line is sorted once, when it is asked for."""
        lines: dict[str, dict[str, int]] = {}
        own: dict[str, list[Row]] = {}

        def place(row: Row) -> int | None:
            if row.state not in WAITING or row.id not in self.desk.book.rows:
                return None
            if not own:
                for one in self.desk.book.rows.values():
                    own.setdefault(one.queue, []).append(one)
            if row.queue not in lines:
                line = line_of(own[row.queue], row.queue)
                lines[row.queue] = {one.id: at for at, one in enumerate(line, start=1)}
            return lines[row.queue][row.id]

        return place

    def _row(self, http: web.Request) -> Row | None:
        """Return the row of the Request in the path, also of one that the ledger does not know yet; None: no such row.

        Nor is there one for whom it is out of reach.
        """
        uid = http.match_info["id"]
        pod = self.desk.registry.pods.get(uid)
        row = self.desk.book.rows.get(uid) or (unwritten(self.desk, pod) if pod is not None else None)
        return row if row is not None and http[REACH].covers(row.namespace, row.queue) else None

    async def request(self, http: web.Request) -> web.Response:
        """One Request by id."""
        row = self._row(http)
        if row is None:
            return problem(404, *NOT_FOUND)
        pod = self.desk.registry.pods.get(row.id)
        refusal = pod.request.refusal if pod else None
        view = self.request_view(row) | {
            "position": positions(self.desk, row)["position"],
            "text": refusal.text if refusal else "",
            "allocation": orjson.loads(row.allocation) if row.allocation else None,
            "created": row.created_us,
            "updated": row.updated_us,
            "epoch": row.epoch,
            "asked": {"gpuMilli": row.gpu_milli, "cpuMilli": row.cpu_milli, "memoryMiB": row.memory_mib},
        }
        return _json(view)

    async def explanation(self, http: web.Request) -> web.Response:
        """Why one Request is where it is."""
        row = self._row(http)
        return problem(404, *NOT_FOUND) if row is None else _json(explanation(self.desk, row))

    async def me(self, http: web.Request) -> web.Response:
        """Who asks, with what roles and where."""
        subject = http[SUBJECT]
        grants = [
            {"role": one.role.value, "namespaces": sorted(one.namespaces), "queues": sorted(one.queues)}
            for one in subject.grants
        ]
        return _json({"name": subject.name, "grants": grants})

    def node_view(self, name: str) -> dict[str, Any]:
        """Return one node as people see it."""
        node, row = self.desk.registry.nodes[name], self.desk.registry.columns.rows[name]
        snapshot = self.desk.registry.snapshot()
        exact = node.mode is Mode.EXACT
        free = snapshot.exists[:, row] & (snapshot.use[:, row] == Use.FREE) & ~snapshot.mig_mode[:, row]
        gpus_free = min(int(free.sum()), int(snapshot.gpus_free[row])) if exact else int(snapshot.gpus_free[row])
        return {
            "name": name,
            "mode": "exact" if exact else "observed",
            "product": node.product,
            "gpus": {"total": node.gpus, "free": max(gpus_free, 0)},
            "slices": {} if exact else self._slices(node, row),
            "cpuMilli": {"total": node.amounts.cpu_milli, "free": int(snapshot.cpu_milli_free[row])},
            "memoryBytes": {"total": node.amounts.memory_bytes, "free": int(snapshot.memory_bytes_free[row])},
            "schedulable": not node.unschedulable,
            "ready": node.ready,
            "wholeGpus": node.whole_gpus,
            "unnamedHolder": bool(snapshot.foreign[row]),
            "warnings": list(node.warnings),
            "pods": len(self.desk.registry.holders(name)),
        }

    def _slices(self, node: Node, row: int) -> dict[str, dict[str, int]]:
        """Return the MIG slices that an observed node offers, by profile; an exact one makes them as they are asked."""
        profiles, left = self.desk.registry.columns.profiles, self.desk.registry.snapshot().slices_free[:, row]
        return {
            profile: {"total": count, "free": max(int(left[profiles.find(profile)]), 0)}
            for profile, count in node.slices
        }

    def gpu_view(self, key: str, reach: Reach) -> dict[str, Any]:
        """Return one device with its holders within reach; an observed node's are known to NVIDIA's plugin alone."""
        name, _, number = key.partition("/")
        slot, registry = int(number), self.desk.registry
        node, row, snapshot = registry.nodes[name], registry.columns.rows[name], registry.snapshot()
        device = node.devices[slot]
        holders = sorted(one for one in registry.holders(name).items() if self._within(reach, one[0]))
        parts = [(uid, part) for uid, held in holders for part in held.parts if part.slot == slot]
        use = Use(int(snapshot.use[slot, row])).name.lower() if node.mode is Mode.EXACT else "unknown"
        return {
            "node": name,
            "dev": slot,
            "uuid": device.uuid or None,
            "model": device.model,
            "product": node.product,
            "memoryMiB": device.memory_mib,
            "migMode": device.mig_mode,
            "use": use,
            "memoryMiBFree": int(snapshot.memory_mib_free[slot, row]) if use != "unknown" else None,
            "milliFree": int(snapshot.milli_free[slot, row]) if use != "unknown" else None,
            "parts": [_part(uid, part) for uid, part in parts],
            "health": Health(int(snapshot.health[slot, row])).name.lower(),
            "requests": [uid for uid, held in holders if slot in {taken for taken, _ in held.devices}],
        }

    def _within(self, reach: Reach, uid: str) -> bool:
        pod = self.desk.registry.pods.get(uid)
        row = self.desk.book.rows.get(uid)
        namespace = pod.request.namespace if pod else row.namespace if row else ""
        return reach.covers(namespace, row.queue if row else "")

    def request_view(self, row: Row) -> dict[str, Any]:
        """Return one Request as a list shows it."""
        return {
            "id": row.id,
            "name": row.name,
            "namespace": row.namespace,
            "queue": row.queue,
            "state": SHOWN.get(row.state, row.state).value,
            "reason": waiting_word(self.desk, row) or row.reason,
            "node": row.node or None,
            "workload": row.workload,
            "links": {
                "self": f"/api/v1/requests/{row.id}",
                "explanation": f"/api/v1/requests/{row.id}/explanation",
            },
        }


def _part(uid: str, part: Part) -> dict[str, Any]:
    """Return a MIG instance or a share on a device."""
    if part.profile:
        return {"request": uid, "profile": part.profile, "start": part.start, "size": part.size}
    return {"request": uid, "milli": part.milli, "mib": part.mib}


def _matches(row: Row, wanted: dict[str, set[str]]) -> bool:
    """Say whether a row has one of the wanted values under every key."""
    for key, values in wanted.items():
        shown = SHOWN.get(row.state, row.state).value if key == "state" else getattr(row, key)
        if shown not in values:
            return False
    return True


def _page(http: web.Request, keys: list[str], view: Callable[[str], dict[str, Any]], sort: str = "") -> web.Response:
    """Return one page of sorted keys; the cursor is the last key seen, so changes between pages lose nothing."""
    try:
        limit = int(http.query.get("limit", "100"))
        after = base64.b64decode(http.query.get("cursor", ""), b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        return problem(400, "request.malformed", "limit is a whole number and cursor a value of `next`")
    if sort and after and not after.startswith(f"{sort} "):
        return problem(400, "request.malformed", "the cursor is of a list that was sorted otherwise; begin anew")
    if not 1 <= limit <= PAGE_MAX:
        return problem(400, "request.malformed", f"limit must be 1 to {PAGE_MAX}")
    rest = [key for key in keys if key > after]
    page = rest[:limit]
    more = base64.urlsafe_b64encode(page[-1].encode()).decode() if len(rest) > limit else None
    return _json({"items": [view(key) for key in page], "next": more})


def _json(body: object) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json")
