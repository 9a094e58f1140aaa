"""The ledger on disk: schema, migrations and the one writer."""
