"""The horizon of a run: distinguishes the rows that it read from rows that came later.

A row that a snapshot may not contain has an ``xmin`` that is no older than the oldest transaction
running at that time. A watermark on ``updated_at`` misses rows that are committed late, and
``pg_visible_in_snapshot`` misses rows written in savepoints.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import dataframely as dy
from adbc_driver_postgresql import dbapi
from pydantic import BaseModel

from tutormax_assets.database.faults import reason
from tutormax_assets.errors import TutormaxError
from tutormax_assets.source.contract import NEEDED_COLUMNS
from tutormax_assets.source.streams import fetch_frame


class Horizon(BaseModel, frozen=True):
    """Distinguishes the rows that a run read from rows that came later.

    Attributes:
        server: The server, its timeline, its start and the database; of a lake, its location.
        snapshot: The transactions that the run saw, as PostgreSQL's type ``pg_snapshot`` writes
            them; of a lake, a digest of the listing of its files.
        files: Of each table, the relations that hold its rows and their files.
        feedback_rows: Number of rows of ``student_feedback``, of all tutors and dates.
    """

    server: str
    snapshot: str
    files: Mapping[str, str] = {}
    feedback_rows: int = 0

    @property
    def xmin(self) -> int:
        """The oldest transaction that was running."""
        return int(self.snapshot.partition(":")[0])


class UnknownChangesError(TutormaxError):
    """The changes since a run cannot be determined; the message says why."""


# Of tutors all rows are compared.
TRACKED_TABLES = tuple(table for table in NEEDED_COLUMNS if table != "tutors")
"""The tables whose changes are found by the transaction ids of their rows."""

# A server whose disk is set back to an earlier state assigns transaction ids again, and only its
# start tells. So does one that a killed backend takes down, if it has not flushed them; it does not
# start anew, but loses its statistics.
_SERVER = """
SELECT
    (SELECT system_identifier FROM pg_control_system())::text AS system,
    CASE
        WHEN pg_is_in_recovery()
        THEN 'standby on ' || (SELECT timeline_id FROM pg_control_checkpoint())
        ELSE left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)
    END AS timeline,
    concat_ws(
        '/',
        extract(epoch FROM pg_postmaster_start_time()),
        (SELECT extract(epoch FROM stats_reset) FROM pg_stat_bgwriter)
    ) AS started,
    (SELECT oid FROM pg_database WHERE datname = current_database())::text AS database
"""

_TABLES = f"""
WITH RECURSIVE part AS (
    SELECT name, to_regclass(name)::oid AS oid
    FROM unnest(ARRAY[{", ".join(f"'{name}'" for name in TRACKED_TABLES)}]) AS name
    UNION
    SELECT part.name, i.inhrelid FROM part JOIN pg_inherits AS i ON i.inhparent = part.oid
)
SELECT
    part.name AS table_name,
    bool_and(c.relkind IN ('r', 'p')) AS is_table,
    bool_or(c.relrowsecurity AND row_security_active(c.oid)) AS is_filtered,
    bool_and(
        CASE
            WHEN c.oid = to_regclass(part.name) AND c.relkind IN ('r', 'p')
            THEN has_column_privilege(c.oid, 'xmin', 'SELECT')
            ELSE true
        END
    ) AS has_right,
    string_agg(
        c.oid || '/' || coalesce(pg_relation_filenode(c.oid), 0), ',' ORDER BY c.oid
    ) AS files
FROM part JOIN pg_class AS c ON c.oid = part.oid
GROUP BY part.name
ORDER BY part.name
"""  # noqa: S608 - constants only

_FEEDBACK_ROWS = "SELECT count(*) AS rows FROM student_feedback"


class _Server(dy.Schema):
    system = dy.String()
    timeline = dy.String()
    started = dy.String()
    database = dy.String()


class _Tables(dy.Schema):
    table_name = dy.String()
    is_table = dy.Bool()
    is_filtered = dy.Bool()
    has_right = dy.Bool()
    files = dy.String()


class _Rows(dy.Schema):
    rows = dy.Int64()


def read_horizon(cursor: dbapi.Cursor, snapshot: str) -> Horizon:
    """The horizon of a snapshot.

    Args:
        cursor: Of a transaction that reads one snapshot.
        snapshot: That, as PostgreSQL writes it.

    Raises:
        UnknownChangesError: The server does not identify itself, or the transaction ids of a
            table's rows cannot be read.
    """
    cursor.execute("SAVEPOINT horizon")
    try:
        server = fetch_frame(cursor, _SERVER, _Server).row(0)
        tables = fetch_frame(cursor, _TABLES, _Tables)
        feedback_rows = fetch_frame(cursor, _FEEDBACK_ROWS, _Rows).item()
    except dbapi.Error as error:
        cursor.execute("ROLLBACK TO SAVEPOINT horizon")
        raise UnknownChangesError(
            f"the server does not identify itself: {reason(error)}"
        ) from error
    # From within a savepoint no snapshot can be given to another connection.
    cursor.execute("RELEASE SAVEPOINT horizon")
    for table in tables.iter_rows(named=True):
        for problem in _problems(table):
            raise UnknownChangesError(problem)
    return Horizon(
        server=" ".join(server),
        snapshot=snapshot,
        files=dict(tables.select("table_name", "files").iter_rows()),
        feedback_rows=feedback_rows,
    )


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    name = table["table_name"]
    if not table["is_table"]:
        yield f"{name} is a view or a foreign table, or has one as a partition"
    if table["is_filtered"]:
        yield f"{name} has row security, so rows may come and go without a change"
    if not table["has_right"]:
        yield f"there is no right to read xmin of {name}; `tutormax db roles` prints it"


def expect_same_server(then: Horizon, now: Horizon) -> None:
    """Check that transaction ids mean the same as then.

    Raises:
        UnknownChangesError: They do not.
    """
    if then.server != now.server:
        raise UnknownChangesError(
            "the server crashed or was restarted, restored, failed over or replaced:"
            f" found {now.server}, expected {then.server}"
        )
    for table, files in now.files.items():
        if then.files.get(table) != files:
            raise UnknownChangesError(f"table {table} was rewritten, or has other partitions")
