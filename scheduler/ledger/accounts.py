"""What each queue has promised, per resource: pending (reserved) and posted (bound) amounts. Pure.

Invariant: accounts are a sum over rows or over journal lines, never a count kept beside them; the two sums are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from scheduler.model.reservation import Row, State

RESOURCES = ("gpu_milli", "cpu_milli", "memory_mib")

Accounts: TypeAlias = dict[tuple[str, str], tuple[int, int]]
"""(queue, resource) -> (pending, posted); keys whose both sums are 0 are left out."""

PENDING = frozenset({State.RESERVED, State.BINDING})
POSTED = frozenset({State.BOUND, State.RUNNING, State.RECLAIMING})


def post(accounts: Accounts, queue: str, state: str | None, amounts: Mapping[str, int], sign: int) -> None:
    """Add (sign 1) or take away (sign -1) what one Request in this state holds; a state that holds nothing does not."""
    pending, posted = int(state in PENDING), int(state in POSTED)
    if not pending + posted:
        return
    for resource in RESOURCES:
        before = accounts.get((queue, resource), (0, 0))
        amount = sign * amounts[resource]
        after = (before[0] + pending * amount, before[1] + posted * amount)
        if after == (0, 0):
            accounts.pop((queue, resource), None)
        else:
            accounts[queue, resource] = after


def account_rows(rows: Iterable[Row]) -> Accounts:
    """Sum what rows hold."""
    accounts: Accounts = {}
    for row in rows:
        post(accounts, row.queue, row.state, {name: getattr(row, name) for name in RESOURCES}, 1)
    return accounts


def post_line(accounts: Accounts, line: Mapping[str, Any]) -> None:
    """Add what one journal line changed.

    Queue and amounts are fixed while a Request holds something, so a line takes away with `from` just what an earlier
    one added with `to`.
    """
    post(accounts, line["queue"], line["from"], line, -1)
    post(accounts, line["queue"], line["to"], line, 1)


def account_lines(lines: Iterable[Mapping[str, Any]]) -> Accounts:
    """Sum what journal lines changed: all of a journal gives the accounts, a part of it the difference it made."""
    accounts: Accounts = {}
    for line in lines:
        post_line(accounts, line)
    return accounts
