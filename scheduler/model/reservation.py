"""The ledger's nouns: states, events, the row of a Request and the journal's entry for each transition."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a Request stands."""

    HELD = "HELD"
    QUEUED = "QUEUED"
    RESERVED = "RESERVED"
    BINDING = "BINDING"
    BOUND = "BOUND"
    RUNNING = "RUNNING"
    RECLAIMING = "RECLAIMING"
    RELEASED = "RELEASED"
    EXPIRED = "EXPIRED"
    CANCELLED = "CANCELLED"
    REJECTED = "REJECTED"
    FAILED = "FAILED"


class Event(StrEnum):
    """What happens to a Request."""

    SUBMIT = "submit"
    HOLD = "hold"
    JUDGE = "judge"
    RESERVE = "reserve"
    BIND = "bind"
    POST = "post"
    VOID = "void"
    EXPIRE = "expire"
    CANCEL = "cancel"
    REJECT = "reject"
    START = "start"
    RECLAIM = "reclaim"
    SPARE = "spare"
    FINISH = "finish"
    FAIL = "fail"
    ADOPT = "adopt"


@dataclass(frozen=True, slots=True)
class Row:
    """One Request in the ledger. Amounts are what it holds or asks; all integers.

    Attributes:
        epoch: grows with every void and every new life of the same id; commands carry it.
        fence: epoch of the writer that made the last change.
        workload: uid of the controller, or the pod's own.
        borrowed: quota class, frozen at the reservation.
        attempts: reservations that were voided so far.
        not_before_us: back-off; not eligible earlier.
        allocation: compact JSON of `tessera.dev/allocation`, empty until reserved.
        deadline_us: when a RESERVED or BINDING row must be left; 0 = none.
        reason: reason word shown to people.
    """

    id: str
    epoch: int
    fence: int
    state: State
    workload: str
    namespace: str
    name: str
    queue: str
    priority: int
    arrival_us: int
    gang: str = ""
    borrowed: bool = False
    attempts: int = 0
    reclaims: int = 0
    not_before_us: int = 0
    deadline_us: int = 0
    node: str = ""
    allocation: str = ""
    gpu_milli: int = 0
    cpu_milli: int = 0
    memory_mib: int = 0
    reason: str = ""
    created_us: int = 0
    updated_us: int = 0


@dataclass(frozen=True, slots=True)
class Credit:
    """What a workload's lost pod leaves to its next one: the place in line and the spent budget."""

    workload: str
    arrival_us: int
    attempts: int
    reclaims: int
    not_before_us: int
    count: int = 1  # pods that may still inherit it


@dataclass(frozen=True, slots=True)
class Entry:
    """One transition, before the store numbers and chains it."""

    at: int
    request: str
    workload: str
    epoch: int
    fence: int
    event: Event
    source: State | None  # journal key `from`
    target: State  # journal key `to`
    node: str
    queue: str
    namespace: str
    name: str
    reason: str = ""
    allocation: str = ""  # JSON text, kept with reserve and adopt
    decision: str = ""  # decision record, JSON text of at most 2,048 bytes
    gpu_milli: int = 0
    cpu_milli: int = 0
    memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One row before and after one event; a transaction is a tuple of changes, all or none."""

    before: Row | None
    after: Row
    entry: Entry
    credit: Credit | None = None  # new state of the workload's credit, where the event touches it
    credit_before: Credit | None = None  # what it was, so that a failed commit can be undone
