"""The tables of the ledger, as SQLAlchemy Core sees them; `migrations` makes the same ones on disk.

Invariant: what a table must never hold, the database itself refuses: amounts out of bounds, accounts below zero, a
second row of one Request, a second journal line of one number.
"""

from __future__ import annotations

import sqlalchemy as sa

from scheduler.ledger.ledger import AMOUNT_MAX
from scheduler.model.reservation import State

METADATA = sa.MetaData()

Int = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # a STRICT table knows INTEGER only


def _text(name: str, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, primary_key=key, nullable=False)


def _int(name: str, *, key: bool = False) -> sa.Column[int]:
    return sa.Column(name, Int, primary_key=key, nullable=False, autoincrement=False)


def _check(name: str, rule: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(rule, name=name)


_STATES = ", ".join(f"'{state.value}'" for state in State)

identity = sa.Table(
    "identity",
    METADATA,
    _int("id", key=True),
    _text("uuid"),
    _int("fence"),
    _int("head_seq"),
    _text("head_hash"),
    _check("identity_single", "id = 1"),
    _check("identity_counts", "fence >= 0 AND head_seq >= 0"),
    sqlite_strict=True,
)
"""One row: which database this is, who may write (fence), and where the journal ends."""

requests = sa.Table(
    "requests",
    METADATA,
    _text("id", key=True),
    *(_int(name) for name in ("epoch", "fence")),
    *(_text(name) for name in ("state", "workload", "namespace", "name", "queue")),
    *(_int(name) for name in ("priority", "arrival_us")),
    _text("gang"),
    *(_int(name) for name in ("borrowed", "attempts", "reclaims", "not_before_us", "deadline_us")),
    *(_text(name) for name in ("node", "allocation")),
    *(_int(name) for name in ("gpu_milli", "cpu_milli", "memory_mib")),
    _text("reason"),
    *(_int(name) for name in ("created_us", "updated_us")),
    _check("requests_state", f"state IN ({_STATES})"),
    _check("requests_counts", "epoch >= 1 AND fence >= 0 AND attempts >= 0 AND reclaims >= 0 AND borrowed IN (0, 1)"),
    _check(
        "requests_amounts",
        f"gpu_milli BETWEEN 0 AND {AMOUNT_MAX} AND cpu_milli BETWEEN 0 AND {AMOUNT_MAX}"
        f" AND memory_mib BETWEEN 0 AND {AMOUNT_MAX}",
    ),
    sqlite_strict=True,
)
"""One row per Request, live or ended."""

journal = sa.Table(
    "journal",
    METADATA,
    _int("seq", key=True),
    _int("at"),
    *(_text(name) for name in ("request", "workload")),
    *(_int(name) for name in ("epoch", "fence")),
    _text("event"),
    sa.Column("from", sa.Text, nullable=True),
    *(_text(name) for name in ("to", "node", "queue", "namespace", "name", "reason", "allocation", "decision")),
    *(_int(name) for name in ("gpu_milli", "cpu_milli", "memory_mib")),
    *(_text(name) for name in ("prev", "hash")),
    _check("journal_seq", "seq >= 1"),
    _check("journal_hash", "length(prev) = 64 AND length(hash) = 64"),
    sqlite_strict=True,
)
"""One line per transition, only ever appended."""

accounts = sa.Table(
    "accounts",
    METADATA,
    *(_text(name, key=True) for name in ("queue", "resource")),
    *(_int(name) for name in ("pending", "posted")),
    _check("accounts_positive", "pending >= 0 AND posted >= 0"),
    sqlite_strict=True,
)
"""What each queue has promised."""

credits_ = sa.Table(
    "credits",
    METADATA,
    _text("workload", key=True),
    *(_int(name) for name in ("arrival_us", "attempts", "reclaims", "not_before_us", "count")),
    _check("credits_positive", "count >= 1 AND attempts >= 0 AND reclaims >= 0"),
    sqlite_strict=True,
)
"""What lost pods of a workload leave to their successors."""

checkpoints = sa.Table(
    "checkpoints",
    METADATA,
    _int("seq", key=True),
    *(_text(name) for name in ("hash", "accounts")),
    sqlite_strict=True,
)
"""Journal lines up to here may be archived: their last hash and the digest of the accounts at that line."""
