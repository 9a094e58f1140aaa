"""Why a request waits, in one word: as the last turn or /filter found it, and as the masks refine it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from scheduler.decision.reasons import OF_REQUEST
from scheduler.desk import Desk
from scheduler.ledger.ledger import NOBODY_THERE
from scheduler.ledger.reconcile import HELD_UP, Door
from scheduler.ledger.taking import newborn
from scheduler.model.pod import Pod
from scheduler.model.reservation import Row, State

CAPACITY, PENDING, TOO_MANY = "WaitingForCapacity", "PendingEvaluation", "TooManyHeld"
BEHIND = "WaitingBehindPriority"


def waiting_word(desk: Desk, row: Row) -> str:
    """Return the word of the last turn, or of /filter where that tells more; empty for what does not wait."""
    if row.state is State.HELD:
        return row.reason
    if row.state is not State.QUEUED:
        return ""
    if not desk.dependencies.closed:
        return HELD_UP
    word = desk.order.words.get(row.id, "")
    if not word and row.not_before_us > desk.clock.wall_us():
        return "BackingOff"
    if not word and row.reason == NOBODY_THERE:
        return NOBODY_THERE  # it was let go once, and waits for a kube-scheduler to ask for it
    if word in {"", CAPACITY}:
        word = desk.last_refusal(row.id) or word
    return OF_REQUEST.get(word, word) or PENDING


def unwritten(desk: Desk, pod: Pod) -> Row | None:
    """Return how a pod is shown that the ledger does not know yet; None for one that it knows, or never will.

    During an outage of the store the pod itself, with its gate, is the record of what was asked.
    """
    over = pod.node or pod.terminal or pod.deleting or pod.request.refusal is not None
    if not pod.ours or over or pod.uid in desk.book.rows:
        return None
    row = newborn(pod.request, fence=desk.fence, now_us=pod.request.arrival_us)
    if desk.dependencies.closed:
        return row
    full = desk.dependencies.store.closed and desk.door(pod.request.namespace) is Door.FULL
    return replace(row, state=State.HELD, reason=TOO_MANY if full else HELD_UP)


def all_unwritten(desk: Desk) -> Iterator[Row]:
    """Yield all of them."""
    return (row for pod in desk.registry.pods.values() if (row := unwritten(desk, pod)) is not None)


def judged_word(desk: Desk, row: Row) -> str:
    """Return the word as `waiting_word` does; where that is capacity, judge on which nodes: some 0.3 ms."""
    word, pod = waiting_word(desk, row), desk.registry.pods.get(row.id)
    if word != CAPACITY or pod is None:
        return word
    return masked_word(desk, pod) or PENDING


def masked_word(desk: Desk, pod: Pod) -> str:
    """Return what the masks say of a pod on all nodes now, as of a request; empty where one takes it."""
    found = desk.fits(pod).failed.headline()
    return OF_REQUEST.get(found, found)
