"""What must hold after every step, judged from rows, journal and the API server's own objects; see `Inspector.look`.

Amounts are counted here once more, from the pods' own text: nothing of what the program counted is believed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from bench.oracle import bound_to, demand, ours, terminal
from scheduler import GPU
from scheduler.app import App
from scheduler.breaker import Phase
from scheduler.embedded import audit
from scheduler.kube.port import Object
from scheduler.ledger.lifecycle import HOLDING
from scheduler.ledger.quota import Quota, Usage, charge
from scheduler.model.reservation import Row, State
from tests.simulation.town import Town

GRACE_S = 30.0
FULL_MILLI = 1000
OUT = frozenset({State.RESERVED, State.BINDING})


class Violation(AssertionError):  # noqa: N818 - a finding, not an error of this program
    """An invariant does not hold."""


def require(holds: object, name: str, what: object) -> None:
    if not holds:
        raise Violation(f"{name}: {what}")


@dataclass
class Inspector:
    """Looks at one town.

    Attributes:
        looks: how often something had changed and everything was looked at.
        pods: every pod that ever was, by uid, as it was seen last.
        up_s: for how long Tessera has been up with all that it depends on, monotonic; None = it is not.
    """

    place: Town
    looks: int = 0
    pods: dict[str, Object] = field(default_factory=dict)
    up_s: float | None = None
    _seen: object = None
    _bound: bool = False
    _epochs: dict[str, int] = field(default_factory=dict)
    _excess: Counter[tuple[str, str]] = field(default_factory=Counter)
    _holding: dict[str, State] = field(default_factory=dict)
    _judged: object = None  # the tree and the Tessera that the excess was counted for
    _line: tuple[int, str, int] = (0, "0" * 64, 0)  # of the journal: number, hash, fence

    def __post_init__(self) -> None:
        """See every write of the API server in the moment in which it happens."""
        cluster = self.place.world.cluster
        tell = cluster._tell

        def seen(kind: Any, event: str, changed: Object) -> Any:
            if kind == "pods":
                self._write(changed)
            elif kind == "nodes":
                self._bound = True
            return tell(kind, event, changed)

        cluster._tell = seen  # type: ignore[method-assign]

    def _write(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        before = self.pods.get(uid)
        self.pods[uid] = pod
        if not bound_to(pod) or (before is not None and bound_to(before)):
            return
        self._bound = True
        text = (pod["metadata"].get("annotations") or {}).get("tessera.dev/allocation", "")
        if not ours(pod) or not text:
            return  # somebody else bound it
        allocation, row = orjson.loads(text), self.place.store.row(uid)
        require(row is not None and row.state is State.BINDING, "I7 bound without a BINDING row", (uid, row))
        assert row is not None
        told = allocation["epoch"], allocation["node"], text
        require(told == (row.epoch, row.node, row.allocation), "I7 bound otherwise than committed", (uid, told, row))
        require(bound_to(pod) == row.node, "I7 bound to another node", (uid, row.node))

    def look(self) -> None:
        """Look at everything, if anything has changed."""
        app, store = self.place.app, self.place.store
        if app is not None and self.up_s is not None and self._outage(app):
            self.up_s = self.place.clock.monotonic()
        seen = (id(app), store.head, app.desk.registry.generation if app is not None else 0)
        if seen == self._seen and not self._bound:
            return
        self._seen, self.looks = seen, self.looks + 1
        self._journal()
        if self._bound:
            self._bound = False
            found = audit.look(self._nodes(), list(self._living()))
            require(not found, "I1 the cluster", found)
        if app is not None and app.recovered:
            rows = [row for row in app.desk.book.rows.values() if row.state in HOLDING]
            self._devices(rows)
            self._accounts(rows)
            self._deadlines(rows)

    @staticmethod
    def _outage(app: App) -> bool:
        """Say whether it is left alone by its store or the API server; an outage without end is found by its calm."""
        behind = app.desk.dependencies
        return any(one._breaker.phase is not Phase.CLOSED for one in (behind.store, behind.api))

    def _nodes(self) -> list[Object]:
        return self.place.world.cluster.snapshot("nodes")

    def _living(self) -> Iterable[Object]:
        there = self.place.world.cluster._objects["pods"].values()
        return [stored.object for stored in there]

    def _journal(self) -> None:
        """I5, I8, I12: the chain goes on, each request's epoch never falls, and the fence never falls."""
        if self.place.store.head[0] == self._line[0]:
            return
        for line in self.place.store.journal(self._line[0] + 1):
            seq, hash_, fence = self._line
            require((line["seq"], line["prev"]) == (seq + 1, hash_), "I5 the journal's chain", line)
            require(line["fence"] >= fence, "I12 a line of an old fence", line)
            epoch = self._epochs.get(line["request"], 0)
            require(line["epoch"] >= epoch, "I8 an epoch fell", line)
            self._epochs[line["request"]] = line["epoch"]
            self._line = line["seq"], line["hash"], line["fence"]

    def _devices(self, rows: list[Row]) -> None:
        """I1, I2: counting what is only claimed or reserved, no device is taken twice. Who is gone holds none."""
        there = {pod["metadata"]["uid"] for pod in self._living() if not terminal(pod)}
        held: dict[tuple[str, int], list[Any]] = defaultdict(list)
        for row in rows:
            if row.id not in there:
                continue
            containers = orjson.loads(row.allocation)["containers"] if row.allocation else {}
            once = {
                (grant["dev"], grant.get("start", -1), name if grant["kind"] == "share" else ""): grant
                for name, grants in containers.items()
                for grant in grants
                if isinstance(grant.get("dev"), int) and grant["dev"] >= 0
            }
            for grant in once.values():
                held[row.node, grant["dev"]].append((row.id, grant))
        for place, grants in held.items():
            self._device(place, grants)

    def _device(self, place: tuple[str, int], grants: list[Any]) -> None:
        kinds = {grant["kind"] for _, grant in grants}
        require(len(kinds) == 1, "I1 a device of two uses", (place, grants))
        if kinds == {"whole"}:
            require(len({uid for uid, _ in grants}) == 1, "I1 a device of two pods", (place, grants))
        elif kinds == {"mig"}:
            taken = Counter(
                slot for _, grant in grants for slot in range(grant["start"], grant["start"] + grant["size"])
            )
            require(not taken or max(taken.values()) == 1, "I2 slices overlap", (place, grants))
        else:
            most = defaultdict(int)  # type: ignore[var-annotated]
            for uid, grant in grants:
                most[uid] += grant.get("milli", 0)
            if len(most) > 1:  # containers of one pod may follow one another
                require(sum(most.values()) <= FULL_MILLI, "I1 a device shared too far", (place, grants))

    def _accounts(self, rows: list[Row]) -> None:
        """I3, I4: the usage is the sum of what is held, and no grant takes a queue beyond its limit."""
        desk = self.place.tessera.desk
        quota = desk.queues.quota
        holding = {row.id: row.state for row in rows}
        usage = Usage()
        settler, known = self.place.tessera.settler, desk.registry.pods
        quiet = not settler.working and not settler.dirty  # a charge is given back after the commit that gives it up
        for row in rows:
            if row.id not in known or known[row.id].terminal:
                quiet = False  # it is over, and the row will be
                continue
            needs = demand({**self.pods[row.id], "status": {}})  # as it asked while it lived
            charge(quota, usage, row.queue, {"gpu": needs[GPU], "cpu": needs["cpu"]})
        if desk.order.charging.limits and desk.order.charging._quota is quota:
            told = desk.order.charging.usage.held
            for key in usage.held.keys() | told.keys():
                if key[1] in {"gpu", "cpu"}:
                    mine, theirs = usage.held.get(key, 0), told.get(key, 0)
                    require(mine == theirs if quiet else mine <= theirs, "I3 usage", (key, theirs, mine))
        excess = _excess(quota, usage)
        # what is found bound is booked whatever the limits say: that is no grant
        found = any(state not in OUT and uid not in self._holding for uid, state in holding.items())
        judged = id(quota), id(desk)
        if judged == self._judged and not found:
            for key, beyond in excess.items():
                require(beyond <= max(self._excess[key], 0), "I4 beyond the quota", (key, beyond, usage.held))
        self._judged, self._excess, self._holding = judged, excess, holding

    def _deadlines(self, rows: list[Row]) -> None:
        """I6: whoever is on the way is bound or given back in time."""
        if self.up_s is None:
            return
        now_us, up_us = self.place.clock.wall_us(), round((self.place.clock.monotonic() - self.up_s) * 1e6)
        limit_us = round((self.place.settings.queue.reservationTimeout + GRACE_S) * 1e6)
        for row in rows:
            age_us = min(now_us - row.updated_us, up_us)
            require(row.state not in OUT or age_us <= limit_us, "I6 on the way for too long", (age_us / 1e6, row))


def _excess(quota: Quota, usage: Usage) -> Counter[tuple[str, str]]:
    """Return how far each queue is beyond what it may use at most."""
    found: Counter[tuple[str, str]] = Counter()
    for (name, key), counted in usage.counted.items():
        queue, total = quota.queues[name], quota.total.get((name, key), 0)
        limit = queue.borrow_limit.get(key)
        if not queue.parent:
            found[name, key] = counted - total
        elif limit is not None:
            found[name, key] = counted - total - limit
    return found
