"""Artifacts, runs and versions are numbered in their order, which no clock can change"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

#: Table, key and time by which the rows of an older catalogue are numbered.
BY_TIME = (("artifact", "digest", "created_at"), ("run", "id", "started_at"))


def upgrade() -> None:
    for table in ("artifact", "run", "name"):
        column = sa.Column("number", sa.Integer(), nullable=False, server_default="0")
        op.add_column(table, column)
    for table, key, time in BY_TIME:
        rows = sa.table(table, sa.column(key), sa.column(time))
        query = sa.select(rows.c[key]).order_by(rows.c[time], rows.c[key])
        _number(table, [{key: found} for found in op.get_bind().scalars(query)])
        op.create_index(f"ix_{table}_number", table, ["number"])
    columns = ("name", "version", "predecessor", "created_at")
    versions = op.get_bind().execute(
        sa.select(*(sa.column(c) for c in columns)).select_from(sa.table("name"))
    )
    ordered = in_order([(str(n), str(v), p, t) for n, v, p, t in versions])
    _number("name", [{"name": name, "version": version} for name, version in ordered])
    op.create_index("ix_name_number", "name", ["number"], unique=True)


def in_order(versions: list[tuple[str, str, str | None, object]]) -> list[tuple[str, str]]:
    """Order versions so that each comes after its predecessor.

    Args:
        versions: name, version, predecessor and time of each. Where a clock was ahead, several
            versions have the same predecessor: these are ordered by their times.

    Returns:
        Name and version, oldest first.
    """
    known = {(name, version): (before, time) for name, version, before, time in versions}

    def sort_key(name: str, version: str) -> tuple[object, ...]:
        chain, at = [], version
        while (name, at) in known and at not in chain:
            chain.append(at)
            at = known[name, at][0] or ""
        # a version is not older than any that it follows, whatever its own clock said
        newest = max(str(known[name, step][1]) for step in chain)
        return newest, len(chain), str(known[name, version][1]), name, version

    return sorted(known, key=lambda row: sort_key(*row))


def _number(table: str, keys: list[dict[str, str]]) -> None:
    """Number the rows with these keys from 1."""
    rows = sa.table(table, sa.column("number"), *(sa.column(c) for key in keys[:1] for c in key))
    for number, key in enumerate(keys, start=1):
        there = sa.and_(*(rows.c[column] == value for column, value in key.items()))
        op.get_bind().execute(sa.update(rows).where(there).values(number=number))


def downgrade() -> None:
    for table in ("name", "run", "artifact"):
        op.drop_index(f"ix_{table}_number", table_name=table)
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.drop_column("number")
