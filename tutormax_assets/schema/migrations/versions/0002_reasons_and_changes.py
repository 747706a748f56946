"""Tables of the reasons for tiers and of what moved, and a view of since when a tier is held."""

from alembic import op

from tutormax_assets.schema import other_tables

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables and the view; they are filled as dates are computed."""
    other_tables.create(op.get_bind())
