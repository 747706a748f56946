"""Runs the migrations on the connection, and in the transaction, that the caller hands over."""

from alembic import context

from tutormax_assets.schema.migrations import VERSION_TABLE, is_owned, target_metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=target_metadata,
    version_table=VERSION_TABLE,
    include_object=is_owned,
)
with context.begin_transaction():
    context.run_migrations()
