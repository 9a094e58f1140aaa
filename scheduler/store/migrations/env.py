"""What alembic runs: the pending revisions, on the connection and in the transaction that the store opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
