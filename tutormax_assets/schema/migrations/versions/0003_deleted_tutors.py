"""A trigger in place of the foreign keys of reasons and changes."""

from alembic import op

from tutormax_assets.schema import reasons_and_changes

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Drop the keys, and create the trigger, which a database at 0002 lacks."""
    reasons_and_changes.drop_foreign_keys(op.get_bind())
    reasons_and_changes.create(op.get_bind())
