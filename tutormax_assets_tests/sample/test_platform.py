from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal

from tutormax_assets.database.tables import source_metadata
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.sample.frames import sample_frames
from tutormax_assets.sample.kinds import KINDS
from tutormax_assets.sample.platform import (
    PlatformNotEmptyError,
    PlatformTablesMissingError,
    generate,
)

END = date(2025, 11, 7)
END_INSTANT = datetime(2025, 11, 7, tzinfo=UTC)
TABLES = ["tutors", "students", "sessions", "student_feedback", "tutor_events"]


def frames(
    *,
    tutors: int = 100,
    sessions_per_tutor: int = 40,
    days: int = 90,
    seed: int = 7,
    bad_rows: float = 0.0,
    first_tutor: int = 0,
) -> dict[str, pl.DataFrame]:
    return sample_frames(
        tutors=tutors,
        sessions_per_tutor=sessions_per_tutor,
        days=days,
        end=END,
        seed=seed,
        bad_rows=bad_rows,
        first_tutor=first_tutor,
    )


def bad_sessions(sessions: pl.DataFrame) -> int:
    return sessions.filter(
        ~pl.col("engagement_score").is_between(0, 1)
        | (pl.col("late_start_minutes") < 0)
        | (pl.col("session_number") < 1)
    ).height


def bad_feedback(feedback: pl.DataFrame, sessions: pl.DataFrame) -> int:
    taught_by = sessions.select("session_id", taught_by="tutor_id")
    joined = feedback.join(taught_by, on="session_id", validate="1:1")
    return joined.filter(
        ~pl.col("overall_rating").is_between(1, 5) | (pl.col("tutor_id") != pl.col("taught_by"))
    ).height


def bad_events(events: pl.DataFrame) -> int:
    return events.filter(
        pl.col("event_type") == "message_response",
        ~pl.col("metadata").str.contains(r'^\{"response_time_minutes": \d+\.\d{1,2}\}$'),
    ).height


def test_same_arguments_give_same_frames() -> None:
    first, second = frames(bad_rows=0.01), frames(bad_rows=0.01)
    assert list(first) == TABLES
    for table in TABLES:
        assert_frame_equal(first[table], second[table])


def test_another_seed_gives_other_frames() -> None:
    assert not frames(seed=1)["sessions"].equals(frames(seed=2)["sessions"])


@pytest.mark.parametrize("table", TABLES)
def test_frames_have_the_columns_of_the_tables(table: str) -> None:
    columns = source_metadata.tables[table].columns
    expected = [
        column.name
        for column in columns
        if column.server_default is None or (column.name == "created_at" and table != "students")
    ]
    assert frames(tutors=1)[table].columns == expected


@pytest.mark.parametrize("table", TABLES)
def test_columns_that_must_not_be_null_are_not(table: str) -> None:
    frame = frames()[table]
    required = [
        column.name
        for column in source_metadata.tables[table].columns
        if not column.nullable and column.name in frame.columns
    ]
    assert frame.select(required).null_count().row(0) == (0,) * len(required)


def test_kinds_have_their_exact_shares() -> None:
    tutors = frames(tutors=200)["tutors"]
    counts = dict(tutors["behavioral_archetype"].value_counts().iter_rows())
    assert counts == {kind.name: round(200 * kind.share) for kind in KINDS}


def test_shares_are_rounded_where_tutors_cannot_be_split() -> None:
    tutors = frames(tutors=7)["tutors"]
    counts = dict(tutors["behavioral_archetype"].value_counts().iter_rows())
    assert all(abs(counts.get(kind.name, 0) - 7 * kind.share) <= 1 for kind in KINDS)


def test_kinds_differ_as_their_names_say() -> None:
    made = frames(tutors=400)
    kinds = made["tutors"].select("tutor_id", "behavioral_archetype")
    rating = (
        made["student_feedback"]
        .join(kinds, on="tutor_id")
        .group_by("behavioral_archetype")
        .agg(pl.col("overall_rating").mean())
    )
    means = dict(rating.iter_rows())
    assert means["high_performer"] > 4.5 > means["steady"] > means["at_risk"] > 3


def test_status_is_mostly_active_in_either_case() -> None:
    status = frames(tutors=400)["tutors"]["status"]
    assert set(status.str.to_lowercase()) == {"active", "inactive", "churned"}
    assert {"active", "ACTIVE"} < set(status)
    assert (status.str.to_lowercase() == "active").mean() > 0.9  # type: ignore[operator]


def test_keys_are_unique_and_references_exist() -> None:
    made = frames()
    for table in TABLES:
        key = source_metadata.tables[table].primary_key.columns.keys()[0]
        assert made[table][key].is_unique().all()
        for reference in source_metadata.tables[table].foreign_keys:
            target = made[reference.column.table.name][reference.column.name]
            assert made[table][reference.parent.name].is_in(target.implode()).all()
    assert made["student_feedback"]["session_id"].is_unique().all()
    assert made["tutors"]["email"].is_unique().all()


def test_the_number_of_sessions_is_exact() -> None:
    assert len(frames(tutors=30, sessions_per_tutor=20)["sessions"]) == 600


@pytest.mark.parametrize("days", [1, 7, 90, 400])
def test_sessions_and_events_lie_in_the_history(days: int) -> None:
    made = frames(days=days)
    begin = END_INSTANT - timedelta(days=days)
    assert made["sessions"]["scheduled_start"].is_between(begin, END_INSTANT, closed="left").all()
    assert made["tutor_events"]["event_timestamp"].is_between(begin, END_INSTANT, "left").all()


def test_no_tutor_works_before_onboarding() -> None:
    made = frames()
    joined = made["sessions"].join(made["tutors"], on="tutor_id")
    assert (joined["scheduled_start"] > joined["onboarding_date"]).all()


def test_churners_fade() -> None:
    made = frames(tutors=400)
    churners = made["tutors"].filter(behavioral_archetype="churner")
    sessions = made["sessions"].join(churners, on="tutor_id", how="semi")
    weeks_ago = (END_INSTANT - sessions["scheduled_start"]).dt.total_days() // 7
    assert 0 < (weeks_ago < 3).sum() < (weeks_ago.is_between(4, 6)).sum() / 2


def test_session_numbers_count_the_meetings_of_a_pair() -> None:
    sessions = frames()["sessions"].sort("scheduled_start", maintain_order=True)
    steps = sessions.select(pl.col("session_number").diff().over("tutor_id", "student_id"))
    assert (steps.to_series().drop_nulls() == 1).all()
    recent = sessions.filter(pl.col("scheduled_start") >= END_INSTANT - timedelta(days=7))
    assert 0 < (recent["session_number"] == 1).sum() < len(recent) / 2


def test_starts_agree_with_delays_and_no_shows() -> None:
    sessions = frames()["sessions"]
    assert sessions.filter("no_show")["actual_start"].is_null().all()
    took_place = sessions.filter(~pl.col("no_show"))
    late = (took_place["actual_start"] - took_place["scheduled_start"]).dt.total_minutes()
    assert (late == took_place["late_start_minutes"]).all()
    assert 0 < sessions["no_show"].sum() < len(sessions) / 10


def test_feedback_comes_after_its_session_and_before_the_end() -> None:
    made = frames()
    began = pl.coalesce("actual_start", "scheduled_start")
    joined = made["student_feedback"].join(
        made["sessions"].with_columns(ended=began + pl.duration(minutes="duration_minutes")),
        on=["session_id", "tutor_id", "student_id"],
    )
    assert len(joined) == len(made["student_feedback"])
    assert (joined["submitted_at"] > joined["ended"]).all()
    assert (joined["submitted_at"] < END_INSTANT).all()
    assert (joined["is_first_session"] == (joined["session_number"] == 1)).all()


def test_most_sessions_that_took_place_have_feedback() -> None:
    made = frames(tutors=400)
    took_place = made["sessions"].filter(~pl.col("no_show"))
    rated = took_place.join(made["student_feedback"], on="session_id", how="semi")
    assert 0.70 < len(rated) / len(took_place) < 0.75


def test_no_row_is_bad_unless_asked_for() -> None:
    made = frames()
    assert bad_sessions(made["sessions"]) == 0
    assert bad_feedback(made["student_feedback"], made["sessions"]) == 0
    assert bad_events(made["tutor_events"]) == 0


@pytest.mark.parametrize("tutors", [1, 100])
@pytest.mark.parametrize("share", [0.013, 0.5, 1.0])
def test_the_number_of_bad_rows_is_exact(tutors: int, share: float) -> None:
    made = frames(tutors=tutors, bad_rows=share)
    sessions, feedback = made["sessions"], made["student_feedback"]
    assert bad_sessions(sessions) == round(share * len(sessions))
    assert bad_feedback(feedback, sessions) == round(share * len(feedback))
    assert bad_events(made["tutor_events"]) == round(share * len(made["tutor_events"]))
    assert feedback["tutor_id"].is_in(made["tutors"]["tutor_id"].implode()).all()


@pytest.mark.parametrize("first_tutor", [10, 999_995])
def test_slices_do_not_collide(first_tutor: int) -> None:
    slices = [
        frames(tutors=10, first_tutor=first_tutor),
        frames(tutors=10, first_tutor=first_tutor + 10),
    ]
    for table in TABLES:
        key = source_metadata.tables[table].primary_key.columns.keys()[0]
        assert pl.concat([made[table] for made in slices])[key].is_unique().all()


def test_no_sessions_leave_the_tutors() -> None:
    made = frames(tutors=3, sessions_per_tutor=0, bad_rows=0.5)
    assert [len(made[table]) for table in TABLES] == [3, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "wrong", [{"tutors": 0}, {"days": 0}, {"sessions_per_tutor": -1}, {"bad_rows": 1.5}]
)
def test_arguments_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        frames(**wrong)


def counts(engine: sa.Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {
            table: connection.execute(
                sa.select(sa.func.count()).select_from(source_metadata.tables[table])
            ).scalar_one()
            for table in TABLES
        }


def constraints(engine: sa.Engine) -> dict[str, list[object]]:
    inspector = sa.inspect(engine)
    return {
        table: [
            sorted(inspector.get_foreign_keys(table), key=lambda key: str(key["name"])),
            sorted(inspector.get_indexes(table), key=lambda index: str(index["name"])),
        ]
        for table in TABLES
    }


def write(engine: sa.Engine, *, tutors: int = 20, append: bool = False) -> dict[str, int]:
    return generate(
        engine,
        tutors=tutors,
        sessions_per_tutor=10,
        days=30,
        end=END,
        seed=7,
        bad_rows=0.05,
        append=append,
    )


def test_generate_fills_the_tables(engine: sa.Engine) -> None:
    before = constraints(engine)
    rows = write(engine)
    assert counts(engine) == rows
    assert rows["tutors"] == 20
    assert rows["sessions"] == 200
    assert constraints(engine) == before


def test_what_is_written_is_what_the_frames_hold(engine: sa.Engine) -> None:
    write(engine)
    made = sample_frames(tutors=20, sessions_per_tutor=10, days=30, end=END, seed=7, bad_rows=0.05)
    for name, frame in made.items():
        table = source_metadata.tables[name]
        with engine.connect() as connection:
            columns = [table.c[column] for column in frame.columns if column != "metadata"]
            stored = connection.execute(sa.select(*columns).order_by(columns[0])).all()
        expected = frame.select(column.name for column in columns).sort(columns[0].name)
        assert [tuple(row) for row in stored] == expected.rows()


def test_generate_refuses_a_platform_with_tutors(engine: sa.Engine) -> None:
    rows = write(engine)
    with pytest.raises(PlatformNotEmptyError, match=r"already holds 20 tutors; append"):
        write(engine)
    assert counts(engine) == rows


def test_append_continues_the_numbering(engine: sa.Engine) -> None:
    first, second = write(engine), write(engine, tutors=5, append=True)
    assert counts(engine) == {table: first[table] + second[table] for table in TABLES}
    with engine.connect() as connection:
        last = connection.execute(sa.text("SELECT max(tutor_id) FROM tutors")).scalar_one()
    assert last == "T000024"


def test_students_of_deleted_tutors_are_in_nobodys_way(engine: sa.Engine) -> None:
    write(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM tutors"))
    write(engine)
    assert counts(engine)["tutors"] == 20


def test_slices_report_progress(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_platform, "SLICE_TUTORS", 20)
    reports: list[tuple[int, int]] = []
    generate(
        engine,
        tutors=50,
        sessions_per_tutor=2,
        days=30,
        end=END,
        seed=7,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert reports == [(20, 50), (40, 50), (50, 50)]
    assert counts(engine)["sessions"] == 100


def test_nothing_is_kept_of_a_failed_fill(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = constraints(engine)
    monkeypatch.setattr(sample_platform, "SLICE_TUTORS", 10)

    def fail(done: int, total: int) -> None:
        raise RuntimeError(f"stopped at {done} of {total}")

    with pytest.raises(RuntimeError, match="stopped at 10 of 20"):
        generate(engine, tutors=20, sessions_per_tutor=2, days=30, end=END, seed=7, progress=fail)
    assert counts(engine)["tutors"] == 0
    assert constraints(engine) == before


def test_missing_tables_name_the_command_that_makes_them(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE tutor_events"))
    with pytest.raises(
        PlatformTablesMissingError, match=r"no table tutor_events; run `tutormax db init`"
    ):
        write(engine)
