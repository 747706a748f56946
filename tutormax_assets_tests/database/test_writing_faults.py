"""Writing the metrics while PostgreSQL refuses, waits, loses the connection or is full."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from time import monotonic
from uuid import uuid4

import dagster as dg
import polars as pl
import pytest
import sqlalchemy as sa

from chaos import culprits
from chaos.proxy import Proxy
from tutormax_assets.database.connection import Timeouts, create_engine, lock_for_transaction
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_reading import MetricsTableError, read_metrics
from tutormax_assets.database.metrics_writing import Batch, write_metrics
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets_tests.conftest import Platform, captured_log, metrics_of
from tutormax_assets_tests.database.test_metrics_writing import DAY, WINDOWS, tiers

DELETED = (
    "The tutor is not in the database's tutors: deleted since the roster of the date was read, or"
    " in the lake only"
)


def write(
    engine: sa.Engine,
    rows: pl.DataFrame,
    *,
    batch_size: int = 100,
    max_retries: int = 0,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 - it is immutable
) -> tuple[list[Batch], str | None]:
    """What became of each batch, and why the writing ended early if it did."""
    batches = []
    writing = write_metrics(
        engine,
        rows,
        calculation_date=DAY,
        batch_size=batch_size,
        retrying=retrying(
            max_retries=max_retries, retry_delay_seconds=0, log=logging.getLogger("write")
        ),
        timeouts=timeouts,
    )
    try:
        for batch in writing:
            batches.append(batch)
    except MetricsTableError as error:
        return batches, str(error)
    return batches, None


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def add_tutors(engine: sa.Engine, count: int) -> list[str]:
    tutor_ids = [f"t{number:03}" for number in range(count)]
    execute(
        engine,
        "INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects)"
        f" SELECT id, id, id, now(), 'active', '{{}}' FROM unnest(ARRAY{tutor_ids}) AS id",
    )
    return tutor_ids


def saved(engine: sa.Engine) -> list[str]:
    """The tutors who are in the table with all windows."""
    counts = metrics_of(engine).group_by("tutor_id").len()
    assert counts["len"].unique().to_list() in ([], [len(WINDOWS)])
    return counts["tutor_id"].sort().to_list()


def provoke(engine: sa.Engine, body: str, *, when: str = "BEFORE INSERT", each: str = "") -> None:
    """Run PL/pgSQL at each statement that writes the table, or each row.

    ``n`` is its number, which no rollback takes back.
    """
    execute(
        engine,
        "CREATE SEQUENCE writes",
        "CREATE FUNCTION provoke() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" DECLARE n bigint := nextval('writes'); BEGIN {body} RETURN NEW; END $$",
        f"CREATE TRIGGER provoke {when} ON tutor_performance_metrics"
        f" FOR EACH {each or 'STATEMENT'} EXECUTE FUNCTION provoke()",
    )


def until(engine: sa.Engine, condition: str) -> None:
    """Wait until a session of the database is as the condition on pg_stat_activity says."""
    deadline = monotonic() + 30
    query = sa.text(
        "SELECT EXISTS (SELECT FROM pg_stat_activity"
        f" WHERE datname = current_database() AND {condition})"
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.scalar(query):
            assert monotonic() < deadline, condition


def writes(engine: sa.Engine) -> int:
    """How often the table has been written since ``provoke``, also in vain."""
    with engine.connect() as connection:
        return int(connection.exec_driver_sql("SELECT last_value FROM writes").scalar_one())


@contextmanager
def captured_retries() -> Iterator[list[str]]:
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collector = Collector()
    logging.getLogger("write").addHandler(collector)
    try:
        yield lines
    finally:
        logging.getLogger("write").removeHandler(collector)


def run_ids(platform: Platform) -> set[str]:
    with dagster_instance(platform.settings) as instance:
        return {run.run_id for run in instance.get_runs()}


def records(platform: Platform, *, but: set[str]) -> tuple[set[str | None], set[str | None]]:
    """The dates of the table that later runs have materialized, and that they have observed."""
    key = dg.AssetKey(METRICS_TABLE)
    with dagster_instance(platform.settings) as instance:
        materialized = instance.fetch_materializations(key, limit=50).records
        observed = instance.fetch_observations(key, limit=50).records
    # Some are of no run at all.
    later = run_ids(platform) - but
    return (
        {record.partition_key for record in materialized if record.run_id in later},
        {record.partition_key for record in observed if record.run_id in later},
    )


@pytest.fixture
def proxy(server_url: sa.URL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("p") / "s"
    with Proxy(Path(str(server_url.query["host"])), folder) as opened:
        yield opened


@pytest.fixture
def through(proxy: Proxy, database: sa.URL) -> Iterator[sa.Engine]:
    engine = create_engine(proxy.url(database))
    yield engine
    engine.dispose()


def test_what_was_written_is_read_back_though_connections_break(
    proxy: Proxy, engine: sa.Engine, through: sa.Engine
) -> None:
    rows = tiers(add_tutors(engine, 300))
    write(engine, rows)
    dates = [DAY, DAY, DAY]
    proxy.refuse()
    proxy.cut_after(bytes_from_server=20_000, spare=1)

    with captured_log() as log:
        found = read_metrics(
            through,
            calculation_dates=dates,
            retrying=retrying(
                max_retries=2, retry_delay_seconds=0, log=logging.getLogger("tutormax_assets")
            ),
            timeouts=Timeouts(),
        )
        first = next(found)
        proxy.cut_all()
        rest = list(found)

    assert [len(date) for date in (first, *rest)] == [len(rows)] * len(dates)
    assert proxy.strikes == 2
    assert sum("trying again" in line for line in log) == 3


@pytest.mark.parametrize("state", ["40001", "40P01", "53200", "53300", "55006", "57P03", "08006"])
def test_what_may_pass_is_tried_again_and_saved(engine: sa.Engine, state: str) -> None:
    tutor_ids = add_tutors(engine, 3)
    provoke(engine, f"IF n < 3 THEN RAISE 'provoked' USING ERRCODE = '{state}'; END IF;")

    batches, failure = write(engine, tiers(tutor_ids), max_retries=2)

    assert (failure, batches) == (None, [Batch(1, 1, tutor_ids, inserted=6)])
    assert writes(engine) == 3


def test_what_does_not_pass_is_not_tried_with_the_other_batches(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 4)
    provoke(engine, "IF n > 1 THEN RAISE 'provoked' USING ERRCODE = '40001'; END IF;")

    batches, failure = write(engine, tiers(tutor_ids), batch_size=1, max_retries=2)

    assert failure == (
        "tutor_performance_metrics cannot be written: provoked. Trying again did not help; run the"
        " date again when it has passed."
    )
    assert [(batch.saved, batch.errors) for batch in batches] == [(2, {}), (0, {"t001": failure})]
    assert saved(engine) == ["t000"]
    assert writes(engine) == 4


@pytest.mark.parametrize("when", ["BEFORE INSERT", "AFTER INSERT"])
def test_a_server_process_that_ends_in_mid_write_loses_nothing(
    engine: sa.Engine, when: str
) -> None:
    tutor_ids = add_tutors(engine, 3)
    die = "IF n = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
    provoke(engine, die, when=when)

    batches, failure = write(engine, tiers(tutor_ids), max_retries=1)

    assert (failure, saved(engine), writes(engine)) == (None, tutor_ids, 2)
    assert batches[0].inserted == 6


def test_a_server_process_that_ends_in_mid_commit_loses_nothing(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 3)
    execute(
        engine,
        "CREATE SEQUENCE writes",
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('writes') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
        " RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON tutor_performance_metrics"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()",
    )

    batches, failure = write(engine, tiers(tutor_ids), max_retries=1)

    assert (failure, saved(engine), batches[0].inserted) == (None, tutor_ids, 6)
    # Once at the first commit, and for each of the six rows at the second.
    assert writes(engine) == 7


def test_a_connection_that_is_lost_in_mid_copy_loses_nothing(
    proxy: Proxy, through: sa.Engine, engine: sa.Engine
) -> None:
    tutor_ids = add_tutors(engine, 300)
    rows = tiers(tutor_ids)
    assert len(rows.write_csv()) > 25_000
    proxy.cut_after(bytes_to_server=20_000)

    batches, failure = write(through, rows, batch_size=300, max_retries=1)

    assert (failure, saved(engine), proxy.strikes) == (None, tutor_ids, 1)
    assert batches[0].inserted == 600


@pytest.mark.parametrize(("is_forwarded", "kind"), [(True, "unchanged"), (False, "inserted")])
def test_a_commit_without_an_answer_is_neither_lost_nor_done_twice(
    proxy: Proxy, through: sa.Engine, engine: sa.Engine, is_forwarded: bool, kind: str
) -> None:
    tutor_ids = add_tutors(engine, 3)
    proxy.swallow_commit(of="INSERT INTO tutor_performance_metrics", is_forwarded=is_forwarded)

    batches, failure = write(through, tiers(tutor_ids), max_retries=1)

    assert (failure, saved(engine), proxy.strikes) == (None, tutor_ids, 1)
    assert getattr(batches[0], kind) == batches[0].saved == 6


def test_a_server_that_is_gone_ends_in_one_sentence(
    proxy: Proxy, through: sa.Engine, engine: sa.Engine
) -> None:
    tutor_ids = add_tutors(engine, 3)
    with proxy.down():
        batches, failure = write(through, tiers(tutor_ids), batch_size=1, max_retries=2)

    assert failure is not None
    assert "Connection refused" in failure
    assert failure.endswith("Trying again did not help; run the date again when it has passed.")
    assert [batch.errors for batch in batches] == [{"t000": failure}]


def test_a_deadlock_with_a_customer_is_ours_to_end(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    provoke(engine, "")
    with engine.connect() as customer, ThreadPoolExecutor(1) as pool:
        # Only the other side looks for a deadlock in time.
        customer.exec_driver_sql("SET deadlock_timeout = '1h'")
        customer.exec_driver_sql("SELECT FROM tutors WHERE tutor_id = 't001' FOR UPDATE")
        writing = pool.submit(write, engine, tiers(tutor_ids), max_retries=1)
        until(engine, "wait_event_type = 'Lock'")
        customer.exec_driver_sql("SELECT FROM tutors WHERE tutor_id = 't000' FOR UPDATE")
        customer.commit()

        batches, failure = writing.result(30)

    assert (failure, saved(engine), batches[0].errors) == (None, tutor_ids, {})
    assert writes(engine) == 2


def test_a_row_that_changed_meanwhile_is_tried_again_where_postgresql_refuses_that(
    engine: sa.Engine,
) -> None:
    tutor_ids = add_tutors(engine, 2)
    write(engine, tiers(tutor_ids))
    provoke(engine, "")
    execute(
        engine,
        f'ALTER DATABASE "{engine.url.database}" SET default_transaction_isolation = serializable',
    )
    engine.dispose()
    with engine.connect() as other, ThreadPoolExecutor(1) as pool:
        other.exec_driver_sql("UPDATE tutor_performance_metrics SET no_show_count = 1")
        writing = pool.submit(write, engine, tiers(tutor_ids, no_show_count=2), max_retries=1)
        until(engine, "wait_event = 'transactionid'")
        other.commit()

        batches, failure = writing.result(30)

    assert (failure, batches[0].updated) == (None, 4)
    assert metrics_of(engine)["no_show_count"].unique().to_list() == [2]
    assert writes(engine) == 2


def test_waiting_for_ones_turn_is_no_lock_timeout(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    with engine.connect() as other, ThreadPoolExecutor(1) as pool:
        lock_for_transaction(other, f"{METRICS_TABLE}:{DAY.timestamp():.0f}")
        patient = Timeouts(statement_seconds=30, lock_seconds=0.05)
        writing = pool.submit(write, engine, tiers(tutor_ids), timeouts=patient)
        until(engine, "wait_event = 'advisory' AND clock_timestamp() - query_start > '0.3 s'")
        other.commit()

        _, failure = writing.result(30)
    assert (failure, saved(engine)) == (None, tutor_ids)


def test_waiting_for_ones_turn_ends_with_the_statement_timeout(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    with engine.connect() as other:
        lock_for_transaction(other, f"{METRICS_TABLE}:{DAY.timestamp():.0f}")
        _, failure = write(
            engine, tiers(tutor_ids), timeouts=Timeouts(statement_seconds=0.2), max_retries=3
        )
    assert failure is not None
    assert "TUTORMAX_STATEMENT_TIMEOUT_SECONDS" in failure


def test_every_transaction_is_bounded(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 1)
    provoke(
        engine,
        "RAISE '%% %% %%', current_setting('statement_timeout'), current_setting('lock_timeout'),"
        " current_setting('idle_in_transaction_session_timeout');",
    )
    [batch], _ = write(engine, tiers(tutor_ids), timeouts=Timeouts(90, 2.5))
    assert batch.errors == {"t000": "90s 2500ms 90s"}


def test_a_tutor_whose_row_a_customer_keeps_locked_is_left_out(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 64)
    provoke(engine, "")
    with engine.connect() as customer:
        customer.exec_driver_sql("SELECT FROM tutors WHERE tutor_id = 't031' FOR UPDATE")
        [batch], failure = write(
            engine, tiers(tutor_ids), max_retries=2, timeouts=Timeouts(30, lock_seconds=0.05)
        )

    assert failure is None
    assert batch.errors == {
        "t031": "canceling statement due to lock timeout. Another session holds a lock: see who in"
        " pg_locks, or raise TUTORMAX_LOCK_TIMEOUT_SECONDS"
    }
    assert saved(engine) == [one for one in tutor_ids if one != "t031"]
    # All of them three times, then four parts each of 64, 16 and 4.
    assert writes(engine) == 3 + 3 * 4


def test_many_locked_rows_are_not_waited_for_one_by_one(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 64)
    provoke(engine, "")
    with engine.connect() as customer:
        customer.exec_driver_sql("SELECT FROM tutors FOR UPDATE")
        [batch], failure = write(
            engine, tiers(tutor_ids), timeouts=Timeouts(statement_seconds=0.5, lock_seconds=0.05)
        )

    assert failure is not None
    assert "lock timeout" in failure
    assert batch.errors.keys() == set(tutor_ids)
    assert writes(engine) == 11


@pytest.mark.parametrize("table", ["tutors", "tutor_performance_metrics"])
def test_a_locked_table_is_not_waited_for_tutor_by_tutor(engine: sa.Engine, table: str) -> None:
    tutor_ids = add_tutors(engine, 8)
    with engine.connect() as owner:
        owner.exec_driver_sql(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        with captured_retries() as retries:
            batches, failure = write(
                engine,
                tiers(tutor_ids),
                batch_size=4,
                max_retries=1,
                timeouts=Timeouts(30, lock_seconds=0.05),
            )

    assert failure is not None
    assert "see who in pg_locks" in failure
    assert len(retries) == 1
    assert [batch.errors for batch in batches] == [dict.fromkeys(tutor_ids[:4], failure)]


# The rows are refused.


def test_tutors_who_were_deleted_meanwhile_are_left_out_alone(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 64)
    provoke(engine, "")
    execute(engine, "DELETE FROM tutors WHERE tutor_id = 't063'")

    [batch], failure = write(engine, tiers(tutor_ids))

    assert failure is None
    assert batch == Batch(1, 1, tutor_ids, inserted=126, errors={"t063": DELETED})
    assert saved(engine) == tutor_ids[:-1]
    # The COPY and the batch, then four parts each of 64, 16 and 4.
    assert writes(engine) == 2 + 3 * 4


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_any_number_of_tutors_may_be_left_out(engine: sa.Engine, batch_size: int) -> None:
    tutor_ids = add_tutors(engine, 21)
    deleted = ["t000", "t005", "t006", "t013", "t020"]
    execute(engine, f"DELETE FROM tutors WHERE tutor_id = ANY(ARRAY{deleted})")

    batches, failure = write(engine, tiers(tutor_ids), batch_size=batch_size)

    errors = {tutor_id: said for batch in batches for tutor_id, said in batch.errors.items()}
    assert (failure, errors) == (None, dict.fromkeys(deleted, DELETED))
    assert saved(engine) == [one for one in tutor_ids if one not in deleted]
    assert sum(batch.inserted for batch in batches) == 2 * 16


def test_all_tutors_may_be_left_out(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 9)
    execute(engine, "DELETE FROM tutors")

    [batch], failure = write(engine, tiers(tutor_ids))

    assert (failure, batch.saved, batch.errors) == (None, 0, dict.fromkeys(tutor_ids, DELETED))


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            "ALTER TABLE tutor_performance_metrics ADD CONSTRAINT rating_in_range"
            " CHECK (avg_rating <= 5) NOT VALID",
            'new row for relation "tutor_performance_metrics" violates check constraint'
            ' "rating_in_range"',
        ),
        (
            "ALTER TABLE tutor_performance_metrics ALTER avg_rating TYPE numeric(3, 2)",
            "numeric field overflow",
        ),
        (
            "CREATE DOMAIN rating AS float CONSTRAINT at_most_five CHECK (VALUE <= 5);"
            "ALTER TABLE tutor_performance_metrics ALTER avg_rating TYPE rating",
            'value for domain rating violates check constraint "at_most_five"',
        ),
        (
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.avg_rating"
            " > 5 THEN RAISE 'not this one' USING CONSTRAINT = 'by_hand'; END IF; RETURN NEW;"
            " END $$; CREATE TRIGGER look BEFORE INSERT ON tutor_performance_metrics"
            " FOR EACH ROW EXECUTE FUNCTION look()",
            "not this one (constraint by_hand)",
        ),
    ],
    ids=["check", "range", "domain", "trigger"],
)
def test_a_tutor_whose_values_are_refused_is_left_out_with_the_reason(
    engine: sa.Engine, statement: str, expected: str
) -> None:
    tutor_ids = add_tutors(engine, 10)
    execute(engine, statement)
    is_culprit = (pl.col("tutor_id") == "t004") & (pl.col("window") == "30day")
    rows = tiers(tutor_ids).with_columns(
        avg_rating=pl.when(is_culprit).then(98.76).otherwise("avg_rating")
    )

    [batch], failure = write(engine, rows)

    assert (failure, batch.errors) == (None, {"t004": expected})
    assert saved(engine) == [one for one in tutor_ids if one != "t004"]


# Whatever the rows.


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("53100", "Free space on the disk of the database server, then run the date again."),
        ("53400", "A limit of the server was reached: raise it for this user, then run the"),
        ("XX000", ""),
        ("58030", ""),
    ],
)
def test_what_no_row_is_to_blame_for_ends_the_writing(
    engine: sa.Engine, state: str, advice: str
) -> None:
    tutor_ids = add_tutors(engine, 9)
    provoke(engine, f"IF n > 1 THEN RAISE 'provoked' USING ERRCODE = '{state}'; END IF;")

    batches, failure = write(engine, tiers(tutor_ids), batch_size=3, max_retries=3)

    assert failure is not None
    assert failure.startswith("tutor_performance_metrics cannot be written: provoked.")
    assert advice in failure
    assert [batch.errors for batch in batches] == [{}, dict.fromkeys(tutor_ids[3:6], failure)]
    assert saved(engine) == tutor_ids[:3]
    assert writes(engine) == 2


def test_what_ends_the_writing_while_culprits_are_looked_for_keeps_the_batches_before(
    engine: sa.Engine,
) -> None:
    tutor_ids = add_tutors(engine, 8)
    # Of the second batch, the first of four parts is refused, and the third not for its rows.
    provoke(
        engine,
        "IF n IN (2, 3) THEN RAISE 'this row'; END IF;"
        " IF n > 4 THEN RAISE 'provoked' USING ERRCODE = '53100'; END IF;",
    )

    batches, failure = write(engine, tiers(tutor_ids), batch_size=4)

    assert failure is not None
    assert [batch.inserted for batch in batches] == [8, 0]
    assert batches[1].errors == dict.fromkeys(tutor_ids[4:], failure)
    assert saved(engine) == tutor_ids[:4]


def test_a_slow_statement_ends_the_writing(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    provoke(engine, "PERFORM pg_sleep(30);")

    batches, failure = write(
        engine, tiers(tutor_ids), batch_size=1, timeouts=Timeouts(statement_seconds=0.5)
    )

    assert (len(batches), writes(engine)) == (1, 1)
    assert failure == (
        "tutor_performance_metrics cannot be written: canceling statement due to statement timeout."
        " Unless someone cancelled it: see what slows the server down, or raise"
        " TUTORMAX_STATEMENT_TIMEOUT_SECONDS."
    )


def test_a_read_only_standby_is_named(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    execute(
        engine, f'ALTER DATABASE "{engine.url.database}" SET default_transaction_read_only = on'
    )
    engine.dispose()

    batches, failure = write(engine, tiers(tutor_ids), batch_size=1, max_retries=3)

    assert len(batches) == 1
    assert failure is not None
    assert "read-only transaction" in failure
    assert "let TUTORMAX_DATABASE_URL lead to the primary" in failure


def test_a_user_without_the_rights_is_told_which_command_names_them(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    role = f"role_{uuid4().hex}"
    execute(engine, f"CREATE ROLE {role}")
    bounded = sa.create_engine(engine.url, connect_args={"options": f"-c role={role}"})
    try:
        batches, failure = write(bounded, tiers(tutor_ids), batch_size=1, max_retries=3)
    finally:
        bounded.dispose()
        execute(engine, f"DROP ROLE {role}")

    assert len(batches) == 1
    assert failure == (
        "tutor_performance_metrics cannot be written: permission denied for table"
        " tutor_performance_metrics. `tutormax db roles` prints the rights that are needed."
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_disk_that_is_full_ends_the_writing(engine: sa.Engine) -> None:
    tutor_ids = add_tutors(engine, 2)
    with engine.connect() as connection:
        [[folder, relation]] = connection.exec_driver_sql(
            "SELECT current_setting('data_directory'),"
            " pg_relation_filepath('tutor_performance_metrics')"
        )
    engine.dispose()
    path = Path(folder, relation)
    assert path.stat().st_size == 0
    path.unlink()
    path.symlink_to("/dev/full")

    batches, failure = write(engine, tiers(tutor_ids), batch_size=1, max_retries=3)

    assert len(batches) == 1
    assert failure is not None
    assert "No space left on device" in failure
    assert "Free space on the disk of the database server, then run the date again." in failure


# The summary and the records of the run.


def test_a_run_that_is_broken_off_says_who_is_saved_and_who_is_not(
    small_platform: Platform,
) -> None:
    before = run_ids(small_platform)
    provoke(
        small_platform.engine,
        "IF n > 1 THEN RAISE 'provoked' USING ERRCODE = '53100'; END IF;",
    )
    with captured_log() as log:
        [summary] = small_platform.run("2025-11-07", batch_size=10)

    assert summary.total_tutors == summary.successful + summary.failed
    assert (summary.successful, summary.total_metrics_saved) == (10, 30)
    stored = small_platform.metrics()["tutor_id"].unique()
    computed = small_platform.partition("tutor_roster", "2025-11-07")["tutor_id"]
    assert {error["tutor_id"] for error in summary.errors} == set(computed) - set(stored)
    [reason] = {error["error"] for error in summary.errors}
    assert reason.startswith("tutor_performance_metrics cannot be written: provoked. Free space")
    assert writes(small_platform.engine) == 2
    assert [line for line in log if "tutors left out" in line] == [
        "ERROR Batch 2/3 of 2025-11-07: 10 of 10 tutors left out"
        " (0 inserted, 0 updated, 0 unchanged)"
    ]
    assert records(small_platform, but=before) == (set(), {"2025-11-07"})


@pytest.mark.parametrize(
    ("refused", "saved"), [("2025-11-07", "2025-11-06"), ("2025-11-06", "2025-11-07")]
)
def test_dates_that_were_saved_before_or_meanwhile_are_on_record(
    small_platform: Platform, refused: str, saved: str
) -> None:
    before = run_ids(small_platform)
    provoke(
        small_platform.engine,
        f"IF NEW.calculation_date = '{refused} 00:00+00' THEN"
        " RAISE 'provoked' USING ERRCODE = '53100'; END IF;",
        each="ROW",
    )
    summaries = small_platform.run("2025-11-06", "2025-11-07", batch_size=15)

    assert [summary.all_saved for summary in summaries] == [False, False]
    stored = small_platform.metrics()["calculation_date"].dt.date()
    assert stored.unique().to_list() == [date.fromisoformat(saved)]
    assert records(small_platform, but=before) == ({saved}, set())


def test_culprits_are_in_the_summary_and_in_the_log(small_platform: Platform) -> None:
    before = run_ids(small_platform)
    small_platform.execute(
        "ALTER TABLE tutor_performance_metrics ADD CONSTRAINT not_these"
        " CHECK (tutor_id NOT IN ('T000002', 'T000003'))"
    )
    with captured_log() as log:
        [summary] = small_platform.run("2025-11-07")

    assert [error["tutor_id"] for error in summary.errors] == ["T000002", "T000003"]
    assert summary.successful == summary.total_tutors - 2
    [line, culprits] = [line for line in log if "eft out" in line]
    assert f"Batch 1/1 of 2025-11-07: 2 of {summary.total_tutors} tutors left out" in line
    assert culprits.startswith("ERROR Left out T000002, T000003: new row for relation")
    assert records(small_platform, but=before) == ({"2025-11-07"}, set())


def test_the_time_that_a_culprit_adds_is_measured(engine: sa.Engine) -> None:
    """Whoever else is left out ends the measurement with an error."""
    figures = culprits.measure(engine, tutors=8, rounds=1, batch_size=4)
    kinds = ("seconds", "first", "last")
    assert list(figures) == [f"{rows}_{kind}" for rows in ("new", "changed") for kind in kinds]
    assert min(figures.values()) > 0
