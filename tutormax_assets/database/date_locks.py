"""One run at a time for each reference date, on whatever machine it is.

A run reads the platform once, keeps what it read as Parquet, and computes from there step by step.
Two runs of a date that interleave would compute from a mixture, so the second one waits for the
first. PostgreSQL's advisory locks are what all of them share: nothing but the end of the
transaction frees one, and whatever ends the process or the connection ends the transaction.
"""

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import sqlalchemy as sa
import tenacity

from tutormax_assets.database.connection import describe, lock_key, set_for_transaction
from tutormax_assets.database.faults import reason
from tutormax_assets.database.metrics_reading import MetricsTableError

MOST_LOCKS = 366
"""Dates that are locked one by one. The server has room for 6,400 locks unless it is told else, so
a longer range takes the one lock that stands for all dates."""

POLL_SECONDS = 0.5
"""Seconds between two tries. A statement that waits would hold back VACUUM as long as it does."""

RUNS = "reference date"
"""The scope of locks that a run has from its begin to its end."""

CHANGES = "tier changes"
"""The scope of locks that are held while changes of a date are computed or moved."""

_ALL_DATES = "every reference date"

# The transaction is meant to be idle. A machine that vanishes silently must not keep its dates
# for the two hours after which an operating system looks.
_LIMITS = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}


class DateLocks:
    """The right to compute some reference dates, from ``take`` until ``release``.

    They belong to a transaction on a connection of its own, so they pass through a transaction
    pooler. A READ COMMITTED transaction that rests has no snapshot (``backend_xmin`` in
    ``pg_stat_activity`` is null), so being held for hours costs the server a connection only.
    """

    def __init__(
        self,
        engine: sa.Engine,
        keys: Collection[str],
        *,
        retrying: tenacity.Retrying,
        log: logging.Logger,
        scope: str = RUNS,
    ) -> None:
        """Name the dates; nothing is connected to.

        Args:
            engine: The database that holds the metrics.
            keys: Reference dates in ISO form, at least one.
            retrying: Takes the locks again when the failure may pass.
            log: Where it is said that, and for which date, another run is waited for.
            scope: What the dates are locked for. Locks of different scopes are independent.
        """
        self._scope = scope
        self._engine = engine
        self._keys = sorted(keys)
        self._retrying = retrying
        self._log = log
        self._connection: sa.Connection | None = None
        self._holder: int | None = None

    @property
    def holder(self) -> int | None:
        """The server's process that holds them; none before ``take`` and after ``release``."""
        return None if self._connection is None else self._holder

    def take(self) -> None:
        """Wait for other runs of these dates to end, and keep further ones waiting.

        Raises:
            MetricsTableError: The database cannot be reached.
        """
        try:
            self._retrying(self._take)
        except sa.exc.DBAPIError as error:
            raise MetricsTableError(
                f"The platform at {describe(self._engine.url)} cannot be reached: {reason(error)}."
                " `tutormax db status` shows what is there."
            ) from error

    def renew(self) -> bool:
        """Take the locks again if their connection was lost, as when the server restarted.

        Returns:
            Whether they were lost, so that another run may have come in between.

        Raises:
            MetricsTableError: The database cannot be reached.
        """
        if self._connection is None:
            return False
        try:
            _rest(self._connection)
            return False
        except sa.exc.DBAPIError as error:
            self._log.warning(
                f"The connection that holds {self._name()} was lost: {reason(error)}."
                " Connecting again"
            )
            self.release()
            self.take()
            return True

    def release(self) -> None:
        """Let the next run of these dates begin."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # What cannot be reached any more holds nothing.
            connection.invalidate()
            connection.close()

    def _take(self) -> None:
        connection = self._engine.connect()
        try:
            _make_patient(connection)
            # Everyone takes them in the same order, so nobody waits in a circle.
            if len(self._keys) > MOST_LOCKS:
                self._wait(connection, _ALL_DATES)
            else:
                self._wait(connection, _ALL_DATES, shared=True)
                for key in self._keys:
                    self._wait(connection, key)
            self._holder = connection.scalar(sa.select(sa.func.pg_backend_pid()))
            _rest(connection)
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        self._connection = connection

    def _wait(self, connection: sa.Connection, name: str, *, shared: bool = False) -> None:
        waited = False
        while not connection.scalar(_try(name, shared=shared, scope=self._scope)):
            if not waited:
                what = f"some dates of {self._name()}" if name == _ALL_DATES else name
                self._log.info(f"Another run of {what} is under way; waiting until it has ended")
            waited = True
            _rest(connection)
            time.sleep(POLL_SECONDS)
        if waited:
            self._log.info(f"The other run of {what} has ended")

    def _name(self) -> str:
        first, last = self._keys[0], self._keys[-1]
        return first if first == last else f"{first} to {last}"


def _make_patient(connection: sa.Connection) -> None:
    limits = dict(_LIMITS)
    if (connection.dialect.server_version_info or ()) >= (17,):
        limits["transaction_timeout"] = "0"
    set_for_transaction(connection, limits)


def _rest(connection: sa.Connection) -> None:
    # A statement with parameters leaves its portal behind, and with it its snapshot, until the next
    # statement; one without leaves none.
    connection.exec_driver_sql("SELECT 1")


@contextmanager
def date_lock(engine: sa.Engine, key: str) -> Iterator[bool]:
    """Hold a reference date for the block, unless a run or another block holds it. Never waits.

    Yields:
        Whether the date is held.
    """
    with engine.begin() as connection:
        _make_patient(connection)
        is_mine = try_lock_date(connection, key)
        _rest(connection)
        yield is_mine


def try_lock_date(connection: sa.Connection, key: str) -> bool:
    """Lock a reference date until the transaction ends, unless a run of it is under way.

    Returns:
        Whether the date is locked.
    """
    return bool(connection.scalar(_try(_ALL_DATES, shared=True)) and connection.scalar(_try(key)))


def is_held(holder: int) -> sa.Select[bool]:
    """Whether a process of the server's still holds its dates for a run, as a query.

    Args:
        holder: As ``DateLocks.holder`` says.
    """
    columns = ("locktype", "database", "granted", "pid", "classid", "objid")
    locks = sa.table("pg_locks", *map(sa.column, columns))
    database = sa.table("pg_database", sa.column("oid"), sa.column("datname"))
    here = sa.select(database.c.oid).where(database.c.datname == sa.func.current_database())
    upper, lower = (sa.cast(locks.c[name], sa.BigInteger) for name in ("classid", "objid"))
    bits = sa.cast(32, sa.Integer)
    # Whoever has a date has a part in the lock of all dates.
    return sa.select(
        sa.exists().where(
            locks.c.locktype == "advisory",
            locks.c.database == here.scalar_subquery(),
            locks.c.granted,
            locks.c.pid == holder,
            upper.bitwise_lshift(bits).bitwise_or(lower) == _key(_ALL_DATES),
        )
    )


def lock_changes(connection: sa.Connection, key: str) -> None:
    """Lock the changes of a date until the transaction ends, once nobody else has them."""
    for lock, name in (
        (sa.func.pg_advisory_xact_lock_shared, _ALL_DATES),
        (sa.func.pg_advisory_xact_lock, key),
    ):
        connection.execute(sa.select(lock(_key(name, CHANGES))))


def _key(name: str, scope: str = RUNS) -> sa.ColumnElement[int]:
    return lock_key(f"{scope}:{name}")


def _try(name: str, *, shared: bool = False, scope: str = RUNS) -> sa.Select[bool]:
    lock = sa.func.pg_try_advisory_xact_lock_shared if shared else sa.func.pg_try_advisory_xact_lock
    return sa.select(lock(_key(name, scope)))
