"""Artifacts are found by kind and digest in the store that was opened, not by an address"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_column("artifact", "url")


def downgrade() -> None:
    op.add_column("artifact", sa.Column("url", sa.Text(), nullable=False, server_default=""))
