"""The first tables. A revision is never edited once released: what it makes is what older databases have."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STATES = "HELD QUEUED RESERVED BINDING BOUND RUNNING RECLAIMING RELEASED EXPIRED CANCELLED REJECTED FAILED"


def texts(names: str, *, key: bool = False) -> list[sa.Column[str]]:
    """Return text columns that are never null."""
    return [sa.Column(name, sa.Text, primary_key=key, nullable=False) for name in names.split()]


def ints(names: str, *, key: bool = False) -> list[sa.Column[int]]:
    """Return 64-bit columns that are never null."""
    return [sa.Column(name, INT, primary_key=key, nullable=False, autoincrement=False) for name in names.split()]


def upgrade() -> None:
    """Make all tables of the ledger."""
    op.create_table(
        "identity",
        *ints("id", key=True),
        *texts("uuid"),
        *ints("fence head_seq"),
        *texts("head_hash"),
        sa.CheckConstraint("id = 1", name="identity_single"),
        sa.CheckConstraint("fence >= 0 AND head_seq >= 0", name="identity_counts"),
        sqlite_strict=True,
    )
    _requests()
    _journal()
    op.create_table(
        "accounts",
        *texts("queue resource", key=True),
        *ints("pending posted"),
        sa.CheckConstraint("pending >= 0 AND posted >= 0", name="accounts_positive"),
        sqlite_strict=True,
    )
    op.create_table(
        "credits",
        *texts("workload", key=True),
        *ints("arrival_us attempts reclaims not_before_us count"),
        sa.CheckConstraint("count >= 1 AND attempts >= 0 AND reclaims >= 0", name="credits_positive"),
        sqlite_strict=True,
    )
    op.create_table("checkpoints", *ints("seq", key=True), *texts("hash accounts"), sqlite_strict=True)


def _requests() -> None:
    states = ", ".join(f"'{state}'" for state in STATES.split())
    bounds = " AND ".join(f"{name} BETWEEN 0 AND {1 << 40}" for name in ("gpu_milli", "cpu_milli", "memory_mib"))
    counts = "epoch >= 1 AND fence >= 0 AND attempts >= 0 AND reclaims >= 0 AND borrowed IN (0, 1)"
    op.create_table(
        "requests",
        *texts("id", key=True),
        *ints("epoch fence"),
        *texts("state workload namespace name queue"),
        *ints("priority arrival_us"),
        *texts("gang"),
        *ints("borrowed attempts reclaims not_before_us deadline_us"),
        *texts("node allocation"),
        *ints("gpu_milli cpu_milli memory_mib"),
        *texts("reason"),
        *ints("created_us updated_us"),
        sa.CheckConstraint(f"state IN ({states})", name="requests_state"),
        sa.CheckConstraint(counts, name="requests_counts"),
        sa.CheckConstraint(bounds, name="requests_amounts"),
        sqlite_strict=True,
    )


def _journal() -> None:
    op.create_table(
        "journal",
        *ints("seq", key=True),
        *ints("at"),
        *texts("request workload"),
        *ints("epoch fence"),
        *texts("event"),
        sa.Column("from", sa.Text, nullable=True),
        *texts("to node queue namespace name reason allocation decision"),
        *ints("gpu_milli cpu_milli memory_mib"),
        *texts("prev hash"),
        sa.CheckConstraint("seq >= 1", name="journal_seq"),
        sa.CheckConstraint("length(prev) = 64 AND length(hash) = 64", name="journal_hash"),
        sqlite_strict=True,
    )
