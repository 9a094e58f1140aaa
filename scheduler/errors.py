"""The error tree: every error a caller may see has a stable dotted code and a sentence that names the next step."""

from __future__ import annotations


class TesseraError(Exception):
    """Something went wrong that a person can act on.

    Attributes:
        code: stable dotted code, such as `store.newer`.
    """

    code = "internal"


class ConfigError(TesseraError):
    """The configuration cannot be used as it stands."""

    code = "config.invalid"


class StoreError(TesseraError):
    """The ledger's database cannot be used, or a commit did not happen."""

    code = "store.failed"


class ConflictError(StoreError):
    """The row in the database is not the one this change was made from; nothing was written."""

    code = "store.conflict"


class NewerError(StoreError):
    """The database was written by a newer Tessera than this one."""

    code = "store.newer"


class CorruptError(StoreError):
    """The database is damaged and must not be written to."""

    code = "store.corrupt"


class BusyError(StoreError):
    """Too many commits wait already; try again."""

    code = "store.busy"


class UnavailableError(StoreError):
    """The database has failed of late and was not asked; nothing was written."""

    code = "store.unavailable"


class OccupiedError(TesseraError):
    """Another Tessera already works on this database or this cluster."""

    code = "start.occupied"
