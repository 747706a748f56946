"""Customers who write to the platform at a fixed rate: ``python -m chaos.writers``.

A process of its own, so that nothing of the harness slows them down. It reads one line of JSON, the
fields of ``Customers``, from standard input, prints when it begins, writes until its input ends,
and then prints the transactions that it made. A transaction has a time at which it is due; one that
begins late because another took long is as late as that, as it is for customers who do not wait for
each other.
"""

import json
import random
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

APPLICATION_NAME = "chaos_customer"

FIRST_NUMBER = 10_000_000
"""Session numbers from here on are those of the customers' sessions, each of which comes once."""

_SESSION = """
    INSERT INTO sessions (session_id, tutor_id, student_id, session_number, scheduled_start,
        actual_start, duration_minutes, subject, session_type, tutor_initiated_reschedule, no_show,
        late_start_minutes, engagement_score, learning_objectives_met, technical_issues)
    VALUES (%(session_id)s, %(tutor_id)s, %(student_id)s, %(number)s, %(start)s, %(start)s, 60,
        'algebra', 'one_on_one', false, false, 0, 0.9, true, false)
"""
_FEEDBACK = """
    INSERT INTO student_feedback (feedback_id, session_id, student_id, tutor_id, overall_rating,
        is_first_session, submitted_at)
    VALUES (%(session_id)s, %(session_id)s, %(student_id)s, %(tutor_id)s, %(rating)s, false, now())
"""
_UPDATE = "UPDATE sessions SET actual_start = now(), updated_at = now() WHERE session_id = %s"
_DELETE = "DELETE FROM sessions WHERE session_id = %s"
# The address is unique, so the row is locked as if its key changed: a foreign key waits for that.
_KEY_UPDATE = "UPDATE tutors SET email = %s WHERE tutor_id = %s"


@dataclass(frozen=True)
class Customers:
    """Who writes, how much, and where.

    Attributes:
        conninfo: The database.
        steady_tutors: Of these, rows are inserted only, so that each can be looked for later.
        busy_tutors: Of these, rows are updated and deleted as well.
        students: Ids to write for.
        first_day: First day of sessions that are inserted, ISO.
        days: Over how many days they are spread.
        threads: Connections.
        rate: Transactions a second, of all together.
        seed: Seed of all choices.
    """

    conninfo: str
    steady_tutors: list[str]
    busy_tutors: list[str]
    students: list[str]
    first_day: str
    days: int
    threads: int = 4
    rate: float = 100
    seed: int = 1

    def to_json(self) -> str:
        """One line for the process."""
        return json.dumps(asdict(self))


@dataclass
class Transaction:
    """One transaction of a customer. Instants are of the system's monotonic clock, seconds.

    Attributes:
        kind: ``write``, or ``key`` for one that changes a key that others refer to.
        due: When it was due.
        done: When its commit was confirmed.
        done_at: The same as seconds since 1970.
        number: Number of the session that it inserted for a steady tutor.
        error: What the database said if it failed.
    """

    kind: str
    due: float
    done: float = 0
    done_at: float = 0
    number: int | None = None
    error: str | None = None

    @property
    def latency(self) -> float:
        """Seconds from when it was due until it was confirmed."""
        return self.done - self.due


@dataclass
class _Customer:
    customers: Customers
    place: int
    random: random.Random
    connection: Any
    count: int = 0
    unrated: dict[str, Any] | None = None
    own: list[str] = field(default_factory=list)

    def write(self, transaction: Transaction) -> None:
        """Make the next transaction; each tenth is an update, each tenth a delete."""
        self.count += 1
        turn = self.count % 10
        if self.count % 50 == 0:
            transaction.kind = "key"
            tutor_id = self.random.choice(self.customers.busy_tutors)
            self._execute((_KEY_UPDATE, (f"{self.place}.{self.count}@example.com", tutor_id)))
        elif turn == 7 and self.unrated is not None:
            self._execute((_FEEDBACK, self.unrated))
            self.unrated = None
        elif turn == 8 and self.own:
            self._execute((_UPDATE, (self.random.choice(self.own),)))
        elif turn == 9 and len(self.own) > 10:
            self._execute((_DELETE, (self.own.pop(self.random.randrange(len(self.own))),)))
        else:
            self._insert(transaction, is_rated=turn != 6)

    def _insert(self, transaction: Transaction, *, is_rated: bool) -> None:
        is_steady = self.random.random() < 0.5
        tutors = self.customers.steady_tutors if is_steady else self.customers.busy_tutors
        number = FIRST_NUMBER * (self.place + 1) + self.count
        start = datetime.fromisoformat(self.customers.first_day).replace(tzinfo=UTC)
        start += timedelta(minutes=self.random.randrange(self.customers.days * 24 * 60))
        session_id = f"customer-{number}"
        row = {
            "session_id": session_id,
            "tutor_id": self.random.choice(tutors),
            "student_id": self.random.choice(self.customers.students),
            "number": number,
            "start": start,
            "rating": self.random.randint(1, 5),
        }
        if is_rated:
            self._execute((_SESSION, row), (_FEEDBACK, row))
        else:
            self._execute((_SESSION, row))
            self.unrated = row
        if is_steady:
            transaction.number = number
        else:
            self.own.append(session_id)

    def _execute(self, *statements: tuple[Any, Any]) -> None:
        with self.connection.transaction():
            for statement, values in statements:
                self.connection.execute(statement, values)


def _work(customers: Customers, place: int, begin: float, is_over: Callable[[], bool]) -> Any:
    made = []
    choice = random.Random(f"{customers.seed}-{place}")
    with psycopg.connect(customers.conninfo, autocommit=True) as connection:
        customer = _Customer(customers, place, choice, connection)
        interval = customers.threads / customers.rate
        due = begin + interval * place / customers.threads
        while not is_over():
            time.sleep(max(0.0, due - time.monotonic()))
            transaction = Transaction("write", due)
            try:
                customer.write(transaction)
            except psycopg.Error as error:
                transaction.error = str(error).partition("\n")[0]
            transaction.done, transaction.done_at = time.monotonic(), time.time()
            made.append(transaction)
            due += interval
    return made


def main() -> None:
    """Write until standard input ends."""
    customers = Customers(**json.loads(sys.stdin.readline()))
    over = threading.Event()
    begin = time.monotonic() + 0.2
    print(begin, flush=True)
    made: list[list[Transaction]] = []
    threads = [
        threading.Thread(
            target=lambda place=place: made.append(_work(customers, place, begin, over.is_set))
        )
        for place in range(customers.threads)
    ]
    for thread in threads:
        thread.start()
    select.select([sys.stdin], [], [])
    over.set()
    for thread in threads:
        thread.join()
    json.dump([asdict(transaction) for of_thread in made for transaction in of_thread], sys.stdout)


if __name__ == "__main__":
    main()
