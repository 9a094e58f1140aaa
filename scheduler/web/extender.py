"""kube-scheduler's three questions: bytes in, bytes out, no socket needed. Parse, decide, encode.

Invariant: a reply names only nodes that were offered, its texts are constants of a closed list, and an answer comes
within the deadline or is an `Error` that leaves no intent behind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import orjson

from scheduler.clock import Clock
from scheduler.desk import Desk
from scheduler.intake.extender import BadBody, BindArgs, FilterArgs, read_bind, read_filter
from scheduler.metrics import Metrics

from .http1 import Reply

BODY_MAX = 16 * 1024 * 1024
"""Bytes: 50,000 node names of the longest legal length (253) and a pod of 1.5 MiB fit, no more."""
NAMES_MAX = 50_000
LARGE, PARTS_MAX = 1024 * 1024, 250_000
"""A body above so many bytes has at most so many commas: the names and a pod of 1.5 MiB have fewer. With more it is not
read, because a million small texts leave the allocator's memory in pieces."""
QUIET_S = 0.01
"""Without a call: shorter than what kube-scheduler leaves between two pods when it is not in a hurry. Ten times as much
makes /filter half as long again, because each call then judges what the calls before it have changed. Between pods that
come at an even pace nothing is done ahead: all classes of asks would be judged for each of them, and it takes one."""
PACE, GAP_S_MAX = 3, 0.1
"""So many times the usual time between two calls is a pause; a longer time than this says nothing of the pace."""


@dataclass(slots=True)
class Extender:
    """The extender's verbs over one desk.

    Attributes:
        unready: why no decision may be made now; until it is empty every answer is an `Error`.
        bind_pod: binds and returns an empty string or the reason why not.
    """

    desk: Desk
    clock: Clock
    metrics: Metrics
    unready: Callable[[], str]
    bind_pod: Callable[[BindArgs], Awaitable[str]]
    filter_deadline_s: float = 0.8
    _asked_s: float = field(default=0.0, init=False)
    _gap_s: float = field(default=0.0, init=False)  # usual time between two calls
    _tidying: bool = field(default=False, init=False)
    _left: Callable[[], None] | None = field(default=None, init=False)

    async def filter(self, body: bytes) -> Reply:
        """As `filtered`, for callers to whom each verb is something to wait for."""
        reply = self.filtered(body)
        self.settle()
        return reply

    async def prioritize(self, body: bytes) -> Reply:
        """As `prioritized`."""
        return self.prioritized(body)

    def filtered(self, body: bytes) -> Reply:
        """Answer POST /scheduler/filter; `settle` is to follow as soon as the reply is written."""
        with self.metrics.timed("filter"):
            now_s = self.clock.monotonic()
            self._gap_s += (min(now_s - self._asked_s, GAP_S_MAX) - self._gap_s) / 8
            self._asked_s = now_s
            if not self._tidying:
                self._tidying = True
                self._look_later()
            return self._filter(body)

    def settle(self) -> None:
        """Note what the last answer intends: kube-scheduler need not wait for it, and nobody else comes before it."""
        left, self._left = self._left, None
        if left is not None:
            left()

    def _leave(self, act: Callable[[], None]) -> None:
        self._left = act

    def _look_later(self) -> None:
        self.clock.call_later(max(QUIET_S, PACE * self._gap_s), partial(self._tidy, self._asked_s))

    def _tidy(self, asked_s: float) -> None:
        """Once nobody has asked for a moment, do the next call's work ahead of it, a little at a time."""
        if asked_s != self._asked_s:
            self._look_later()
            return
        self._tidying = False
        if not self.unready() and self.desk.tidy():
            self._tidying = True
            self.clock.call_later(0, partial(self._tidy, asked_s))

    def prioritized(self, body: bytes) -> Reply:
        """Answer POST /scheduler/prioritize; there is no error field, so trouble means equal scores."""
        with self.metrics.timed("prioritize"):
            try:
                args = self._read(body)
            except BadBody as error:
                return self._bad("prioritize", error)
            if self.unready() or len(args.names) > NAMES_MAX:
                scores = [(name, 0) for name in args.names[:NAMES_MAX]]
            else:
                scores = self.desk.prioritize(args.pod, args.names)
            self.metrics.answered("prioritize", "ok")
            return 200, orjson.dumps([{"Host": name, "Score": score} for name, score in scores])

    async def bind(self, body: bytes) -> Reply:
        """Answer POST /scheduler/bind."""
        with self.metrics.timed("bind"):
            if self.unready():
                return self._not_now("bind")
            try:
                args = read_bind(body)
            except BadBody as error:
                return self._bad("bind", error)
            problem = await self.bind_pod(args)
            if problem:
                return self._error("bind", problem)
            self.metrics.answered("bind", "ok")
            return 200, b'{"Error":""}'

    def _filter(self, body: bytes) -> Reply:
        started = self._asked_s
        if self.unready():
            return self._not_now("filter")
        try:
            args = self._read(body)
        except BadBody as error:
            return self._bad("filter", error)
        if len(args.names) > NAMES_MAX:
            return self._bad("filter", BadBody(f"more than {NAMES_MAX} node names in one call"))
        answer = self.desk.filter(args.pod, args.names, self._leave)
        if self.clock.monotonic() - started > self.filter_deadline_s:
            self.settle()
            self.desk.drop_intent(args.pod.uid)
            return self._error("filter", "the decision took longer than its deadline")
        if answer.reason:
            self.metrics.rejected(answer.reason)
        self.metrics.answered("filter", "refused" if answer.reason else "ok")
        return 200, orjson.dumps(
            {
                "NodeNames": answer.names,
                "FailedNodes": {},
                "FailedAndUnresolvableNodes": dict.fromkeys(args.names, answer.reason) if answer.reason else {},
                "Error": "",
            }
        )

    def _read(self, body: bytes) -> FilterArgs:
        if len(body) > LARGE and body.count(b",") > PARTS_MAX:
            raise BadBody(f"more than {NAMES_MAX} node names in one call")
        return read_filter(body, self.desk.registry.pods)

    def _not_now(self, verb: str) -> Reply:
        """Answer at once, whatever was asked; that somebody asked is noted."""
        self.desk.called_s = self.clock.monotonic()
        return self._error(verb, "Tessera decides nothing now: its view, its store or the API server fails")

    def _bad(self, verb: str, error: BadBody) -> Reply:
        self.metrics.answered(verb, "malformed")
        return 400, orjson.dumps({"Error": f"{error.code}: {error}"})

    def _error(self, verb: str, sentence: str) -> Reply:
        self.metrics.answered(verb, "error")
        return 200, orjson.dumps({"Error": sentence})
