"""The first steps of a Request as changes to commit together: from what is there to a reservation or a bind. Pure."""

from __future__ import annotations

from functools import partial

from policies.columns import Kind
from scheduler.intake.allocation import write_allocation
from scheduler.model.allocation import Allocation
from scheduler.model.pod import Request
from scheduler.model.reservation import Change, Credit, Event, Row, State

from .charges import MIB
from .ledger import advance
from .lifecycle import TERMINAL


def newborn(request: Request, *, fence: int, now_us: int) -> Row:
    """Return the row a Request starts its life with."""
    devices = request.devices
    return Row(
        id=request.id,
        epoch=1,
        fence=fence,
        state=State.QUEUED,
        workload=request.workload,
        namespace=request.namespace,
        name=request.name,
        queue=request.queue,
        priority=request.priority,
        arrival_us=request.arrival_us,
        gang=request.gang,
        gpu_milli=1000 * devices.count if devices.kind is Kind.WHOLE else 0,
        cpu_milli=request.amounts.cpu_milli,
        memory_mib=-(-request.amounts.memory_bytes // MIB),
        created_us=now_us,
        updated_us=now_us,
    )


def taken(
    known: Row | None,
    request: Request,
    allocation: Allocation,
    *,
    fence: int,
    now_us: int,
    until_us: int,
    record: str = "",
    borrowed: bool = False,
    credit: Credit | None = None,
    bind: bool = True,
) -> tuple[Change, ...]:
    """Return the changes that give a Request this allocation.

    Args:
        known: its row; None or an ended one starts a new life. A reservation moves, by the step that binds it.
        request: whose.
        allocation: node and devices.
        fence: the writer's fence epoch.
        now_us: wall time in microseconds.
        until_us: deadline of the reservation.
        record: decision record.
        borrowed: quota class.
        credit: of its workload, if it has one.
        bind: go on to BINDING.

    Raises:
        ValueError: the allocation cannot be written.
    """
    step = partial(advance, now_us=now_us, fence=fence)
    place = partial(step, node=allocation.node, allocation=write_allocation(allocation), decision=record)
    changes: list[Change] = []
    if known is None or known.state in TERMINAL:
        born = newborn(request, fence=fence, now_us=now_us)
        changes.append(step(known, Event.SUBMIT, born=born, credit=credit))
        known = changes[-1].after
    if known.state is State.RESERVED:  # what was reserved is given up by the same step
        return (place(known, Event.BIND),)
    changes.append(place(known, Event.RESERVE, deadline_us=until_us, borrowed=borrowed))
    return (*changes, step(changes[-1].after, Event.BIND)) if bind else tuple(changes)
