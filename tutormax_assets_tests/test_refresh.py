"""A stored date is brought up to date by the tutors who changed: as if all were read again."""

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from upath import UPath

from tutormax_assets.api.drift import find_drift
from tutormax_assets.api.runs import aggregate
from tutormax_assets.api.summary import AggregationSummary
from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS, TUTOR_TIERS
from tutormax_assets.compute.tasks.windows import WINDOW_EDGES
from tutormax_assets.database import tables
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.defs.assets.platform_snapshot import SNAPSHOT_ASSETS
from tutormax_assets.defs.refresh import find_stale_dates, plan_refresh
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.runs.instance import dagster_instance
from tutormax_assets.runs.read_state import ReadState
from tutormax_assets.settings import load_settings
from tutormax_assets.source.horizon import UnknownChangesError
from tutormax_assets.source.postgres import Source, open_view
from tutormax_assets.storage.partition import delete_files
from tutormax_assets.storage.store import state_path
from tutormax_assets_tests.conftest import Platform, captured_log
from tutormax_assets_tests.users import open_users

DAY = "2025-11-07"
ASSETS = (
    *SNAPSHOT_ASSETS,
    "metrics_7day",
    "metrics_30day",
    "metrics_90day",
    WINDOW_EDGES,
    TUTOR_TIERS,
    TUTOR_TIER_REASONS,
    TUTOR_TIER_CHANGES,
)
TABLES = (METRICS_TABLE, TUTOR_TIER_REASONS, TUTOR_TIER_CHANGES)


def refresh(**options: Any) -> tuple[AggregationSummary, list[str]]:
    """The summary of a run that reads what has changed, and what it logs."""
    given = RunOptions(max_retries=0, retry_delay_seconds=0, **options)
    with captured_log() as lines:
        [summary] = aggregate(load_settings(), [date.fromisoformat(DAY)], given, changed_only=True)
    return summary, lines


def stored(platform: Platform) -> dict[str, pl.DataFrame]:
    return {asset: platform.partition(asset, DAY).sort(pl.all()) for asset in ASSETS}


def versions(platform: Platform) -> list[Sequence[sa.Row[tuple[object, ...]]]]:
    """Where each row is, and which transaction wrote it."""
    with platform.engine.connect() as connection:
        return [
            connection.execute(sa.text(f"SELECT xmin, ctid FROM {table}")).all() for table in TABLES
        ]


def assert_up_to_date(platform: Platform) -> None:
    """A run of all tutors changes nothing, neither in Parquet nor in the tables."""
    found, written = stored(platform), versions(platform)
    [summary] = platform.run(DAY)
    assert summary.all_saved
    for asset, rows in stored(platform).items():
        assert_frame_equal(found[asset], rows, check_exact=True)
    assert versions(platform) == written


def assert_nothing_is_left(platform: Platform) -> None:
    """Another run writes nothing.

    It may read tutors again while a transaction of another test is older than their changes.
    """
    written = versions(platform)
    assert refresh()[0].read in ("nothing", "changed tutors")
    assert versions(platform) == written


def causes_of_drift() -> dict[tuple[str, str], set[str]]:
    """Why stored values differ from the platform's, by tutor and metric, of any window."""
    values = find_drift(load_settings(), [date.fromisoformat(DAY)]).values
    found: dict[tuple[str, str], set[str]] = {}
    for tutor_id, metric, causes in values.select("tutor_id", "metric", "causes").iter_rows():
        found.setdefault((tutor_id, metric), set()).update(causes)
    return found


def tutors_read(lines: Sequence[str]) -> int:
    [line] = [line for line in lines if "tutors have changed since" in line]
    return int(line.split(": ")[1].split()[0])


def tutors_of(platform: Platform, number: int) -> list[str]:
    """Tutors of the roster with the most sessions."""
    roster = platform.partition("tutor_roster", DAY)["tutor_id"]
    sessions = platform.partition("sessions_snapshot", DAY).group_by("tutor_id").len()
    found = sessions.filter(pl.col("tutor_id").is_in(roster.implode()))
    return found.sort("len", "tutor_id", descending=True)["tutor_id"].head(number).to_list()


def one(platform: Platform, query: str) -> str:
    with platform.engine.connect() as connection:
        return str(connection.scalar(sa.text(query)))


IN_WINDOW = "scheduled_start >= '2025-09-01' AND scheduled_start < '2025-11-01'"


def session_of(platform: Platform, tutor_id: str, *, rated: bool) -> str:
    known = "" if rated else "NOT "
    return one(
        platform,
        f"SELECT min(session_id) FROM sessions AS s WHERE tutor_id = '{tutor_id}' AND {IN_WINDOW}"
        f" AND {known}EXISTS (SELECT FROM student_feedback WHERE session_id = s.session_id)",
    )


def test_only_tutors_who_changed_are_read(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_REFRESH_MAX_SHARE", "0.5")
    first, lines = refresh()
    assert (first.read, first.all_saved) == ("all tutors", True)
    assert not [line for line in lines if "All tutors are read" in line]
    written = versions(small_platform)

    unchanged, lines = refresh()

    assert (unchanged.read, unchanged.total_tutors, unchanged.all_saved) == ("nothing", 0, True)
    assert versions(small_platform) == written
    assert not [line for line in lines if "tutors to process" in line]

    late, corrected, deleted, replaced, from_, to, out, event = tutors_of(small_platform, 8)
    feedback = "session_id, student_id, tutor_id, overall_rating, is_first_session, submitted_at"
    ids = {
        tutor: session_of(small_platform, tutor, rated=tutor != late)
        for tutor in (late, corrected, deleted, replaced, from_, to, out)
    }
    assert "None" not in ids.values(), ids
    for statement in (
        f"INSERT INTO student_feedback (feedback_id, {feedback}, created_at)"
        f" SELECT 'late', session_id, student_id, tutor_id, 1, false, now(), now() FROM sessions"
        f" WHERE session_id = '{ids[late]}'",
        "UPDATE student_feedback SET overall_rating = 6 - overall_rating"
        f" WHERE session_id = '{ids[corrected]}'",
        f"DELETE FROM student_feedback WHERE session_id = '{ids[deleted]}'",
        "CREATE TEMPORARY TABLE gone ON COMMIT DROP AS SELECT * FROM sessions"
        f" WHERE session_id = '{ids[replaced]}';"
        f" DELETE FROM sessions WHERE session_id = '{ids[replaced]}';"
        " UPDATE gone SET session_id = 'new'; INSERT INTO sessions SELECT * FROM gone",
        f"UPDATE sessions SET tutor_id = '{to}' WHERE session_id = '{ids[from_]}'",
        f"UPDATE sessions SET scheduled_start = '2020-01-01' WHERE session_id = '{ids[out]}'",
        f"DELETE FROM tutor_events WHERE tutor_id = '{event}' AND event_type = 'login'",
    ):
        small_platform.execute(statement)
    causes = causes_of_drift()
    assert causes[late, "avg_rating"] == {"late feedback"}
    assert causes[corrected, "avg_rating"] == {"corrected"}
    assert causes[deleted, "avg_rating"] == {"deleted"}
    assert causes[replaced, "avg_rating"] == {"deleted"}
    assert causes[from_, "sessions_completed"] == causes[out, "sessions_completed"] == {"deleted"}
    assert causes[to, "sessions_completed"] == {"new rows"}
    assert causes[event, "engagement_score"] == {"deleted"}
    assert {tutor for tutor, _ in causes} == {*ids, event}

    summary, lines = refresh(batch_size=3)

    assert (summary.read, summary.total_tutors, summary.all_saved) == ("changed tutors", 8, True)
    assert tutors_read(lines) == 8
    assert versions(small_platform) != written
    assert_nothing_is_left(small_platform)
    assert causes_of_drift() == {}
    assert_up_to_date(small_platform)


def test_what_commits_late_is_found_and_who_left_is_taken_out(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTORMAX_REFRESH_MAX_SHARE", "0.5")
    with small_platform.engine.connect() as connection, connection.begin():
        # The transaction has begun, and its savepoint has an id of its own.
        connection.execute(sa.text("CREATE TEMPORARY TABLE begun (id int)"))
        refresh()
        late, inactive, removed = tutors_of(small_platform, 3)
        with connection.begin_nested():
            connection.execute(
                sa.text(
                    "UPDATE sessions SET no_show = NOT no_show WHERE session_id ="
                    f" '{session_of(small_platform, late, rated=True)}'"
                )
            )
        for _ in range(3):
            small_platform.execute("SELECT pg_current_xact_id()")
        assert refresh()[0].read == "nothing"
    small_platform.execute(
        f"UPDATE tutors SET status = 'inactive' WHERE tutor_id = '{inactive}';"
        f" DELETE FROM tutors WHERE tutor_id = '{removed}'"
    )
    small_platform.add(tables.tutors, {"tutor_id": "joined"})

    summary, lines = refresh()

    assert (summary.read, summary.all_saved) == ("changed tutors", True)
    assert tutors_read(lines) == 4
    roster = small_platform.partition("tutor_roster", DAY)["tutor_id"].to_list()
    assert {"joined", late} <= set(roster)
    assert not {inactive, removed} & set(roster)
    assert_up_to_date(small_platform)


def why_all(**options: bool) -> str:
    """Why a run would read all tutors."""
    with dagster_instance(load_settings()) as instance:
        found = plan_refresh(
            load_settings(),
            instance,
            date.fromisoformat(DAY),
            **{"include_inactive": False} | options,
        )
    assert found.tutor_ids is None
    return found.why


def test_all_tutors_are_read_where_it_cannot_be_told_who_changed(
    small_platform: Platform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert why_all() == ""
    small_platform.run(DAY)
    tutor, *_ = tutors_of(small_platform, 1)

    assert "tutors of any status" in why_all(include_inactive=True)
    with monkeypatch.context() as patch:
        policy = tmp_path / "policy.toml"
        policy.write_text("late_limit_minutes = 11\n")
        patch.setenv("TUTORMAX_POLICY", str(policy))
        assert "was computed with version" in why_all()
    with monkeypatch.context() as patch:
        patch.setenv("TUTORMAX_REFRESH_MAX_TRANSACTIONS", "1")
        assert "transactions since it was read, expected at most 1" in why_all()
    small_platform.execute("UPDATE sessions SET no_show = NOT no_show")
    assert re.search(r"\d+ of 29 tutors have changed", why_all())
    small_platform.run(DAY)

    small_platform.run(DAY, tutor_ids=[tutor])
    small_platform.execute(f"DELETE FROM tutor_performance_metrics WHERE tutor_id = '{tutor}'")
    assert "lacks 3 rows of it, or has other values in them" in why_all()
    small_platform.run(DAY)
    small_platform.execute(
        "UPDATE tutor_performance_metrics SET avg_rating = 1"
        f" WHERE tutor_id = '{tutor}' AND \"window\" = '7day'"
    )
    assert "lacks 1 rows of it, or has other values in them" in why_all()
    small_platform.run(DAY)

    for change, undo, said in (
        (
            "ALTER TABLE sessions RENAME TO s; CREATE VIEW sessions AS SELECT * FROM s",
            "DROP VIEW sessions; ALTER TABLE s RENAME TO sessions",
            "no index keeps ids of sessions and feedback unique",
        ),
        (
            "ALTER TABLE tutor_events RENAME TO e; CREATE VIEW tutor_events AS SELECT * FROM e",
            "DROP VIEW tutor_events; ALTER TABLE e RENAME TO tutor_events",
            "tutor_events is a view or a foreign table",
        ),
        (
            "ALTER TABLE tutor_events ALTER tutor_id DROP NOT NULL;"
            " UPDATE tutor_events SET tutor_id = NULL WHERE event_type = 'login'",
            "",
            "rows without a tutor have changed",
        ),
        ("CLUSTER sessions USING sessions_pkey", "", "table sessions was rewritten"),
    ):
        small_platform.execute(change)
        assert said in why_all()
        small_platform.execute(undo or "SELECT")
    state = state_path(small_platform.settings.storage_path, DAY)
    known = ReadState.model_validate_json(state.read_text())
    for changed, said in (
        (known.model_copy(update={"run_ids": ("a-run-of-another-home",)}), "is not on record"),
        (known.model_copy(update={"horizon": None, "unknown": "it is a lake"}), "it is a lake"),
    ):
        state.write_text(changed.model_dump_json())
        assert said in why_all()
    state.write_text("{}")
    assert "has no read state" in why_all()
    state.write_text(known.model_dump_json())
    delete_files(UPath(small_platform.storage) / WINDOW_EDGES / f"{DAY}.parquet")
    assert f"{WINDOW_EDGES} is damaged or not there" in why_all()


def test_a_reader_may_tell_who_changed(server_url: sa.URL, small_template: str) -> None:
    with open_users(server_url, template=small_template) as users:
        users.grant()
        with open_view(Source(users.reader)) as view:
            assert view.horizon().feedback_rows > 0
        users.execute("REVOKE SELECT (xmin) ON sessions FROM {reader}")
        with (
            open_view(Source(users.reader)) as view,
            pytest.raises(
                UnknownChangesError, match=r"no right to read xmin of sessions.*db roles"
            ),
        ):
            view.horizon()


def test_only_dates_whose_windows_hold_a_changed_row_have_changed(
    small_platform: Platform,
) -> None:
    day_before = "2025-11-06"
    days = [date.fromisoformat(day) for day in (day_before, DAY, "2025-11-08")]

    def changed() -> list[bool | str]:
        return [*find_stale_dates(load_settings(), days).values()]

    small_platform.run(day_before, DAY)
    assert changed() == [False, False]

    for change, expected in (
        # Outside of both windows.
        ("UPDATE sessions SET no_show = true WHERE scheduled_start < '2025-08-01'", [False, False]),
        ("DELETE FROM tutor_events WHERE event_timestamp >= '2025-11-07'", [False, False]),
        # A window ends where its date begins.
        (
            "UPDATE tutor_events SET metadata = NULL WHERE event_timestamp >= '2025-11-06'",
            [False, True],
        ),
        (
            "DELETE FROM student_feedback WHERE session_id IN"
            " (SELECT session_id FROM sessions WHERE scheduled_start::date = '2025-11-01')",
            [True, True],
        ),
    ):
        small_platform.execute(change)
        assert changed() == expected
    small_platform.execute("CLUSTER sessions USING sessions_pkey")
    assert {str(why)[:28] for why in changed()} == {"table sessions was rewritten"}
