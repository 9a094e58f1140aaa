"""What may go wrong with an API server, as a knob: refusals, lost replies, late and broken watches."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from scheduler.kube.port import ApiError, Conflict, Gone, UnknownOutcome

Verb: TypeAlias = Literal["list", "watch", "get", "create", "replace", "patch", "delete", "bind"]
Failure: TypeAlias = Literal["conflict", "throttled", "failed", "lost_reply", "gone"]


@dataclass(frozen=True, slots=True)
class Rates:
    """How often a verb fails, each 0..1 and together at most 1.

    Attributes:
        conflict: 409, nothing is done.
        throttled: 429 with Retry-After, nothing is done.
        failed: 500 before anything was done; the caller sees an UnknownOutcome.
        lost_reply: everything was done and the caller sees an UnknownOutcome.
        gone: 410; for list and watch.
    """

    conflict: float = 0.0
    throttled: float = 0.0
    failed: float = 0.0
    lost_reply: float = 0.0
    gone: float = 0.0


class Faults:
    """The weather of one embedded cluster. Everything may be changed while the cluster runs.

    Attributes:
        rates: per verb; a verb that is absent never fails.
        retry_after_s: what a 429 says.
        watch_delay_s: every event of a watch comes up to this much later; the order stays.
        watch_end: probability, per event, that the stream ends instead.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        rates: Mapping[Verb, Rates] | None = None,
        retry_after_s: float = 1.0,
        watch_delay_s: float = 0.0,
        watch_end: float = 0.0,
    ) -> None:
        """Draw from `rng`; without rates nothing fails until `force` says so."""
        self._rng = rng
        self._forced: dict[Verb, deque[Failure]] = {}
        self.rates = dict(rates or {})
        self.retry_after_s = retry_after_s
        self.watch_delay_s = watch_delay_s
        self.watch_end = watch_end

    def force(self, verb: Verb, *failures: Failure) -> None:
        """Let the next calls of a verb fail in this way, one failure each."""
        self._forced.setdefault(verb, deque()).extend(failures)

    def calm(self) -> None:
        """End all trouble, forced failures included."""
        self.rates.clear()
        self._forced.clear()
        self.watch_delay_s = self.watch_end = 0.0

    def strike(self, verb: Verb) -> bool:
        """Decide about one call before anything is done; return whether its reply will be lost.

        Raises:
            ApiError: 409, 410 or 429.
            UnknownOutcome: the server failed; nothing was done, but the caller cannot know.
        """
        failure = self._drawn(verb)
        if failure == "conflict":
            raise Conflict(409, "Conflict", f"injected: {verb} met another writer")
        if failure == "throttled":
            raise ApiError(
                429, "TooManyRequests", "injected: slow down, please", retry_after_s=float(self.retry_after_s)
            )
        if failure == "gone":
            raise Gone(410, "Expired", "injected: too old resource version")
        if failure == "failed":
            raise UnknownOutcome(f"injected: {verb} failed on the server")
        return failure == "lost_reply"

    def lateness_s(self) -> float:
        """Draw how much later the next event of a watch comes."""
        return self._rng.uniform(0.0, self.watch_delay_s) if self.watch_delay_s else 0.0

    def ends_watch(self) -> bool:
        """Draw whether a watch ends here."""
        return self.watch_end > 0 and self._rng.random() < self.watch_end

    def _drawn(self, verb: Verb) -> Failure | None:
        if self._forced.get(verb):
            return self._forced[verb].popleft()
        rates = self.rates.get(verb)
        if rates is None:
            return None
        drawn = self._rng.random()
        table: tuple[tuple[Failure, float], ...] = (
            ("conflict", rates.conflict),
            ("throttled", rates.throttled),
            ("failed", rates.failed),
            ("lost_reply", rates.lost_reply),
            ("gone", rates.gone),
        )
        for failure, rate in table:
            if drawn < rate:
                return failure
            drawn -= rate
        return None
