"""What is asked of the PostgreSQL table, and that reading it back gives what was written."""

from datetime import UTC, datetime

import polars as pl
import pytest
import sqlalchemy as sa
from polars.testing import assert_frame_equal
from tenacity import Retrying, stop_after_attempt

from tutormax_assets.database.connection import Timeouts
from tutormax_assets.database.metrics_reading import MetricsTableError, read_metrics
from tutormax_assets.database.metrics_writing import write_metrics
from tutormax_assets.database.tables import tutors
from tutormax_assets.defs.checks import ERROR, WARN, Finding
from tutormax_assets.defs.checks.tutor_performance_metrics import rows_are_as_computed
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets_tests.conftest import add
from tutormax_assets_tests.defs.checks.test_tutor_tiers import NONE, table, tiers

AT = datetime(2025, 11, 7, tzinfo=UTC)
ONCE = Retrying(stop=stop_after_attempt(1), reraise=True)
COMPUTED = tiers(
    {"tutor_id": "a", "avg_rating": 4.33, "sessions_completed": 3},
    {"tutor_id": "a", "window": "30day", "performance_tier": "Needs Attention"},
    {"tutor_id": "b", "response_time_avg_minutes": 1e16},
    {"tutor_id": "b", "window": "30day", "engagement_score": 0.07},
)
STORED = COMPUTED.drop("green_flags", "red_flags").with_columns(
    pl.col("performance_tier").cast(pl.String)
)


def compared(stored: pl.DataFrame, computed: pl.DataFrame = COMPUTED) -> Finding:
    return rows_are_as_computed(computed, stored, query="SELECT 1")


def test_equal_rows_in_any_order_pass() -> None:
    finding = compared(STORED.reverse())
    assert finding.passed
    assert finding.metadata["failed_tutors"] == 0
    assert compared(STORED.clear(), NONE).passed


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("avg_rating", 4.34),
        ("avg_rating", None),
        ("reschedule_rate", 0.0),
        ("sessions_completed", 4),
        ("performance_tier", "At Risk"),
        ("performance_tier", None),
    ],
)
def test_a_value_that_differs_is_found_and_not_shown(column: str, value: object) -> None:
    first = (pl.col("tutor_id") == "a") & (pl.col("window") == "7day")
    stored = STORED.with_columns(
        pl.when(first).then(pl.lit(value, STORED.schema[column])).otherwise(column).alias(column)
    )

    finding = compared(stored)

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert table(finding, "first_rows") == [("a", "7day", "other values")]
    assert finding.metadata["failed_tutors"] == 1
    assert finding.metadata["see_the_table"] == "SELECT 1"


def test_missing_rows_are_counted_by_tutor() -> None:
    finding = compared(STORED.filter(pl.col("tutor_id") == "a"))

    assert (finding.passed, finding.severity) == (False, ERROR)
    assert table(finding, "problems") == [("missing in the table", 2)]
    assert finding.metadata["failed_tutors"] == 1


def test_rows_of_a_window_that_is_no_more_only_warn() -> None:
    stored = pl.concat([STORED, STORED.head(1).with_columns(window=pl.lit("14day"))])

    finding = compared(stored)

    assert (finding.passed, finding.severity) == (False, WARN)
    assert table(finding, "first_rows") == [("a", "14day", "not computed")]
    assert finding.metadata["failed_tutors"] == 0


def test_rows_of_another_service_lead_to_what_removes_them() -> None:
    old = STORED.head(1).with_columns(
        window=pl.lit("SEVEN_DAY"), performance_tier=pl.lit("AT_RISK")
    )
    for finding in (
        compared(pl.concat([STORED, old])),
        rows_are_as_computed(COMPUTED, STORED, query="SELECT 1", at_other_times=3),
    ):
        assert (finding.passed, finding.severity) == (False, WARN)
        assert finding.metadata["failed_tutors"] == 0
        assert str(finding.description).endswith(
            "Another service writes to the table: stop it, then run `tutormax db upgrade`, which"
            " converts its rows or sets them aside."
        )
        assert "policy" not in str(finding.description)


def test_what_was_written_is_read_back(engine: sa.Engine) -> None:
    odd = 'o\'dd, "id"\\N'
    computed = COMPUTED.with_columns(pl.col("tutor_id").replace({"b": odd}))
    add(engine, tutors, {"tutor_id": "a"}, {"tutor_id": odd}, {"tutor_id": "other"})
    for frame, at in (
        (computed, AT),
        (tiers({"tutor_id": "other"}), AT),
        (tiers({"tutor_id": "a"}), AT.replace(day=6)),
    ):
        [batch] = write_metrics(
            engine,
            frame,
            calculation_date=at,
            batch_size=10,
            retrying=ONCE,
            timeouts=Timeouts(),
        )
        assert batch.errors == {}

    stored, later, none = read_metrics(
        engine,
        calculation_dates=[AT, AT.replace(day=6), AT.replace(day=5)],
        tutor_ids=["a", odd],
        retrying=ONCE,
        timeouts=Timeouts(),
    )

    assert compared(stored, computed).passed
    assert_frame_equal(
        stored.sort("tutor_id", "window"),
        STORED.with_columns(pl.col("tutor_id").replace({"b": odd})).sort("tutor_id", "window"),
        check_column_order=False,
    )
    assert set(later["tutor_id"]) == {"a"}
    for tutor_ids, expected in (
        ([odd], {odd}),
        ([], {"a", odd, "other"}),
        (["unknown"], set()),
    ):
        [rows] = read_metrics(
            engine,
            calculation_dates=[AT],
            tutor_ids=tutor_ids,
            retrying=ONCE,
            timeouts=Timeouts(),
        )
        assert set(rows["tutor_id"]) == expected
    for empty in (none, rows):
        assert empty.is_empty()
        assert empty.schema == stored.schema
    assert set(stored.columns) < set(TutorTiers.column_names())


def test_a_table_that_is_not_there_ends_in_a_sentence(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE tutor_performance_metrics CASCADE"))

    with pytest.raises(
        MetricsTableError, match=r"cannot be read: relation .* `tutormax db status`"
    ):
        next(
            read_metrics(
                engine,
                calculation_dates=[AT],
                tutor_ids=["a"],
                retrying=ONCE,
                timeouts=Timeouts(),
            )
        )
