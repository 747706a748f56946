"""What a failure of the database means: whether trying again helps, and what a person is told.

The error may come from SQLAlchemy, psycopg or ADBC. PostgreSQL's SQLSTATE decides
(https://www.postgresql.org/docs/current/errcodes-appendix.html); a connection that cannot be made
carries none, and then what libpq says decides.
"""

import logging
import re

import psycopg
import sqlalchemy as sa
import tenacity
from adbc_driver_manager import AdbcStatusCode
from adbc_driver_postgresql import dbapi

from tutormax_assets.errors import TutormaxError

LONGEST_DELAY_SECONDS = 60.0

_QUERY_CANCELED = "57014"

_PASSING = (
    "08",  # connection exceptions
    "40",  # serialization failure, deadlock, conflict with recovery on a standby
    "25P03",  # idle in a transaction for too long
    "53200",  # the server is out of memory
    "53300",  # too many connections
    "55006",  # object in use
    "55P03",  # lock not available
    "57P01",  # the server shuts down
    "57P02",  # it crashed
    "57P03",  # it is starting up
    "57P05",  # idle for too long
)
_OF_ROWS = (
    "09",  # a trigger
    "21",  # cardinality
    "22",  # data exceptions
    "23",  # constraints
    "27",  # a trigger
    "38",  # functions of the table's owner
    "39",
    "44",  # WITH CHECK OPTION
    "54",  # limits, such as that of an index row
    "P0",  # raised by PL/pgSQL
)
# What libpq or the server says of a connection that no second try brings about.
_REFUSED_FOR_GOOD = re.compile(
    r"authentication failed|does not exist|no pg_hba\.conf entry|certificate"
    r"|not permitted to log in|permission denied|does not support|no password supplied"
    r"|invalid connection option|invalid [\w ]+ (value|number)|requires a password"
    r"|channel binding|private key file|unsupported startup parameter",
    re.IGNORECASE,
)
_ADVICE = {
    "22021": (
        "Its encoding is SQL_ASCII, in which the server converts nothing: convert the text there to"
        " UTF-8"
    ),
    "25006": "The server is a read-only standby: let TUTORMAX_DATABASE_URL lead to the primary",
    "25P04": "The server's transaction_timeout ended it: raise it for this user",
    "42501": "`tutormax db roles` prints the rights that are needed",
    "53100": "Free space on the disk of the database server, then run the date again",
    "53400": "A limit of the server was reached: raise it for this user, then run the date again",
    "55P03": (
        "Another session holds a lock: see who in pg_locks, or raise TUTORMAX_LOCK_TIMEOUT_SECONDS"
    ),
    _QUERY_CANCELED: (
        "Unless someone cancelled it: see what slows the server down, or raise"
        " TUTORMAX_STATEMENT_TIMEOUT_SECONDS"
    ),
}


_SAID_IN_STREAMS = (
    ("invalid byte sequence", "22021"),
    ("statement timeout", _QUERY_CANCELED),
    ("user request", _QUERY_CANCELED),
    ("conflict with recovery", "40001"),
    ("could not serialize", "40001"),
    ("administrator command", "57P01"),
    ("temporary file size exceeds", "53400"),
    ("No space left", "53100"),
    ("out of memory", "53200"),
)
_DRIVERS_ERRORS = (sa.exc.DBAPIError, psycopg.Error, dbapi.Error)


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code of the error, or none where the server did not speak."""
    return getattr(_original(error), "sqlstate", None) or None


def may_pass(error: BaseException) -> bool:
    """Whether the same statement may succeed when it is tried again."""
    if any(isinstance(one, TutormaxError) and one.may_pass for one in (error, error.__cause__)):
        return True
    state = sqlstate(error)
    if state is not None:
        return state.startswith(_PASSING)
    original = _original(error)
    lost = isinstance(
        original,
        psycopg.OperationalError | psycopg.InterfaceError | dbapi.OperationalError,
    )
    return lost and not _REFUSED_FOR_GOOD.search(str(original))


def is_timeout(error: BaseException) -> bool:
    """Whether the server cancelled a statement, as it does when it takes too long."""
    return sqlstate(error) == _QUERY_CANCELED


def is_of_rows(error: BaseException) -> bool:
    """Whether the rows are what the database refuses, so that others may be accepted."""
    return (sqlstate(error) or "").startswith(_OF_ROWS)


def reason(error: BaseException) -> str:
    """The first line of what the database said, and what to do where that is known.

    Further lines may repeat values of the row.
    """
    said = _first_line(_original(error))
    advice = _ADVICE.get(sqlstate(error) or "")
    return f"{said.rstrip('.')}. {advice}" if advice else said


def retrying(
    *, max_retries: int, retry_delay_seconds: float, log: logging.Logger
) -> tenacity.Retrying:
    """Calls a function again when what it raises may pass.

    Args:
        max_retries: How often it is called again at most.
        retry_delay_seconds: Seconds before the second call; doubled before each further one, up
            to a minute or to the first delay if that is longer.
        log: Where each failure that is not the last one is told.
    """

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome and state.outcome.exception()
        log.warning(
            "%s; trying again in %g s (%d of %d)",
            reason(error) if error else "Failed",
            state.upcoming_sleep,
            state.attempt_number,
            max_retries,
        )

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        stop=tenacity.stop_after_attempt(max_retries + 1),
        wait=tenacity.wait_exponential(
            multiplier=retry_delay_seconds, max=max(LONGEST_DELAY_SECONDS, retry_delay_seconds)
        ),
        before_sleep=say,
        reraise=True,
    )


def of_stream(error: Exception, *, is_lost: bool) -> dbapi.Error:
    """The driver's error for one that ended a stream of rows, which Arrow has as text only.

    Args:
        error: What was raised.
        is_lost: Whether the connection is of no use any more.
    """
    said = str(error)
    kind = dbapi.OperationalError if is_lost else dbapi.InternalError
    state = next((state for text, state in _SAID_IN_STREAMS if text in said), None)
    return kind(said, status_code=AdbcStatusCode.IO, sqlstate=state)


def _original(error: BaseException) -> BaseException:
    if isinstance(error, sa.exc.DBAPIError) and error.orig:
        return error.orig
    # Of the sentences that say where it happened, the cause is the driver's error.
    cause = error.__cause__
    return _original(cause) if isinstance(cause, _DRIVERS_ERRORS) else error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, dbapi.Error):
        # The driver puts its status, its step and the query before what PostgreSQL or libpq says.
        text = re.sub(r"(?s)^.*?\[libpq\] ", "", text)
        text = re.sub(r"(?s)^Failed to execute query '.*': ", "", text)
        text = re.sub(r"(?s)^.*(?:ERROR|FATAL|PANIC): +", "", text)
    return text.splitlines()[0] if text else type(error).__name__
