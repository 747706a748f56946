"""The check of refreshes: stored dates equal a full computation."""

from collections.abc import Sequence
from datetime import timedelta

import dagster as dg
import polars as pl

from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import today
from tutormax_assets.defs.assets import PLATFORM_POOL
from tutormax_assets.defs.checks import (
    Finding,
    Metadata,
    first_keys,
    shown_metadata,
)
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.defs.verification import VerifiedDate, verify_dates
from tutormax_assets.settings import Settings
from tutormax_assets.source.platform import PlatformDatabase

REFRESHES_ARE_RIGHT = dg.AssetCheckKey(dg.AssetKey(METRICS_TABLE), "refreshes_are_right")

VERIFIED_DATES = 7
"""Reference dates that are verified, the newest ones."""


def refreshes_check(settings: Settings) -> dg.AssetChecksDefinition:
    """Build the check of refreshes, which no daily run executes."""

    @dg.asset_check(
        asset=METRICS_TABLE,
        name=REFRESHES_ARE_RIGHT.name,
        description=(
            f"The rows of the last {VERIFIED_DATES} dates equal a full computation, for tutors"
            " whose rows in the platform have not changed since."
        ),
        pool=PLATFORM_POOL,
    )
    def refreshes_are_right(
        context: dg.AssetCheckExecutionContext,
        database: dg.ResourceParam[PlatformDatabase],
        run_options: RunOptions,
    ) -> dg.AssetCheckResult:
        last = today(timezone=settings.timezone)
        days = [last - timedelta(days=n) for n in range(VERIFIED_DATES)]
        verified = run_options.retrying(context.log)(
            verify_dates, settings, database, context.instance, days
        )
        finding = refreshes_are_as_computed(verified)
        if not finding.passed:
            context.log.error(
                f"{METRICS_TABLE}, check {REFRESHES_ARE_RIGHT.name}: {finding.description}"
            )
        return dg.AssetCheckResult(
            passed=finding.passed,
            severity=finding.severity,
            description=finding.description,
            metadata=shown_metadata(finding),
        )

    return refreshes_are_right


def refreshes_are_as_computed(verified: Sequence[VerifiedDate], /) -> Finding:
    """Whether stored dates equal a full computation; passes if none can be compared.

    Args:
        verified: The comparisons, at most one for each date.
    """
    compared = [one for one in verified if not one.unknown]
    dates = pl.DataFrame(
        [
            (str(one.day), one.tutors, one.changed, len(one.wrong), one.unknown)
            for one in sorted(verified, key=lambda one: one.day)
        ],
        schema=["date", "tutors", "changed_tutors", "wrong_rows", "not_compared"],
        orient="row",
        infer_schema_length=None,
    )
    wrong_rows = sum(len(one.wrong) for one in compared)
    metadata: Metadata = {"wrong_rows": wrong_rows, "dates": dates}
    if not compared:
        # Where changes cannot be determined, no run refreshes a date.
        why = verified[0].unknown if verified else "none of the dates is stored"
        return Finding(True, f"Not compared: {why}.", metadata)
    if not wrong_rows:
        return Finding(True, metadata=metadata)
    of_dates = [one.wrong.with_columns(pl.lit(str(one.day)).alias("date")) for one in compared]
    wrong = pl.concat(of_dates)
    days = wrong["date"].unique().sort()
    return Finding(
        False,
        f"{wrong_rows} rows of {wrong['tutor_id'].n_unique()} tutors on {', '.join(days)} differ"
        " from a full computation, although nothing of these tutors has changed in the platform.",
        {**metadata, "first_rows": first_keys(wrong, "date", "tutor_id", "window")},
        advice=(
            f"`tutormax run --date {days[0]} --full` corrects a date. Find out whether something"
            " else has written the rows; if not, turn late_data off and report it."
        ),
    )
