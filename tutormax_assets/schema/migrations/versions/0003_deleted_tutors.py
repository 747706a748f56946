"""A trigger in place of the foreign keys of reasons and changes."""

from alembic import op

from tutormax_assets.schema import other_tables

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the keys, and create the trigger, which a database at 0002 lacks."""
    other_tables.drop_foreign_keys(op.get_bind())
    other_tables.create(op.get_bind())
