"""The metrics table is created, or adopted as a predecessor left it."""

from alembic import context, op

from tutormax_assets.schema import adoption

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create or adopt; the report goes to the caller by way of the configuration."""
    attributes = context.config.attributes
    attributes["report"] = adoption.adopt(op.get_bind(), timezone=attributes["timezone"])
