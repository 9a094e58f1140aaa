"""Why a request waits, in one word: as the last turn or /filter found it, and as the masks refine it."""

from __future__ import annotations

from scheduler.decision.reasons import OF_REQUEST
from scheduler.desk import Desk
from scheduler.ledger.ledger import NOBODY_THERE
from scheduler.model.reservation import Row, State

CAPACITY, PENDING = "WaitingForCapacity", "PendingEvaluation"


def waiting_word(desk: Desk, row: Row) -> str:
    """Return the word of the last turn, or of /filter where that tells more; empty for what does not wait."""
    if row.state is State.HELD:
        return "AllocatorUnavailable"
    if row.state is not State.QUEUED:
        return ""
    word = desk.order.words.get(row.id, "")
    if not word and row.not_before_us > desk.clock.wall_us():
        return "BackingOff"
    if not word and row.reason == NOBODY_THERE:
        return NOBODY_THERE  # it was let go once, and waits for a kube-scheduler to ask for it
    if word in {"", CAPACITY}:
        word = desk.last_refusal(row.id) or word
    return OF_REQUEST.get(word, word) or PENDING


def judged_word(desk: Desk, row: Row) -> str:
    """Return the word as `waiting_word` does; where that is capacity, judge on which nodes: some 0.3 ms."""
    word, pod = waiting_word(desk, row), desk.registry.pods.get(row.id)
    if word != CAPACITY or pod is None:
        return word
    found = desk.fits(pod).failed.headline()
    return OF_REQUEST.get(found, found) or PENDING
