"""The table of live metrics."""

from alembic import op

from tutormax_assets.schema import other_tables

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, which a database at 0003 lacks."""
    other_tables.create(op.get_bind())
