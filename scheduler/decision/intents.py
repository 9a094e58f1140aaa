"""What /filter answered and /bind has not yet confirmed: notes in memory that lapse by themselves.

Invariant: an intent is a note, never a reservation, and losing all of them costs one retry. Every pod noted is given
back exactly once, by `drop` or by `lapse`, so that whoever books devices for it knows when to un-book them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .combine import Rows

TTL_S = 15.0
EXCLUDED_S = 60.0
INTENTS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Intent:
    """One pod is expected on one node until `until_s` on the monotonic clock.

    `named` is the answer, best first; `offered` are the rows it was chosen from, None where they are not kept.
    """

    uid: str
    node: str
    until_s: float
    named: tuple[str, ...] = ()
    offered: Rows | None = field(default=None, compare=False)


class Intents:
    """Intents by pod UID, oldest first, and the (pod, node) pairs whose intent lapsed of late; both bounded."""

    def __init__(self) -> None:
        """Start empty."""
        self._intents: dict[str, Intent] = {}
        self._lapsed: dict[str, dict[str, float]] = {}  # uid -> node -> excluded until

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._intents)

    def get(self, uid: str) -> Intent | None:
        """Return the pod's intent; it counts until it is dropped or lapses."""
        return self._intents.get(uid)

    def note(self, uid: str, node: str, now_s: float, named: tuple[str, ...] = (), offered: Rows | None = None) -> None:
        """Note where a pod is expected for the next 15 s, in place of any former note.

        `now_s` is monotonic time and never goes back between calls.
        """
        self._intents.pop(uid, None)
        self._intents[uid] = Intent(uid, node, now_s + TTL_S, named, offered)

    def drop(self, uid: str) -> Intent | None:
        """Forget the pod's intent, because it was bound, refused or is gone; return what there was."""
        return self._intents.pop(uid, None)

    def lapse(self, now_s: float) -> list[str]:
        """Take out and return the pods whose time is over, and the oldest beyond 4,096; call it before each `note`.

        A pod whose time is over keeps off that node for 60 s.
        """
        beyond = len(self._intents) - INTENTS_MAX
        gone: list[Intent] = []
        for intent in self._intents.values():
            if intent.until_s > now_s and len(gone) >= beyond:
                break
            gone.append(intent)
        for intent in gone:
            del self._intents[intent.uid]
            if intent.until_s <= now_s:
                self._exclude(intent, now_s)
        return [intent.uid for intent in gone]

    def excluded(self, uid: str, now_s: float) -> set[str]:
        """Return the nodes this pod should not be offered now."""
        lapsed = self._lapsed.get(uid)
        return {node for node, until_s in lapsed.items() if until_s > now_s} if lapsed else set()

    def _exclude(self, intent: Intent, now_s: float) -> None:
        nodes = {node: until_s for node, until_s in self._lapsed.pop(intent.uid, {}).items() if until_s > now_s}
        self._lapsed[intent.uid] = {**nodes, intent.node: now_s + EXCLUDED_S}
        if len(self._lapsed) > INTENTS_MAX:
            del self._lapsed[next(iter(self._lapsed))]
