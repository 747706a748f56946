"""What is asked of the rows that were read from the platform, whichever table they are from."""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Literal, cast
from zoneinfo import ZoneInfo

import polars as pl
import tenacity

from tutormax_assets.checks import ERROR, WARN, Finding, Metadata, first_keys
from tutormax_assets.metrics.policy import window_name
from tutormax_assets.metrics.window import within_window
from tutormax_assets.partitions import midnight
from tutormax_assets.platform import sources

NOT_OF_ALL = Finding(
    passed=True, description="Not looked at: the run is about some tutors only, and read no others."
)
"""Of a check that says something about the platform as a whole, in a filtered run."""

# Of normally distributed counts the median absolute deviation times this is one standard deviation.
_MAD_TO_DEVIATION = 1.4826


def few_rows_set_aside(
    read: pl.DataFrame,
    set_aside: pl.DataFrame,
    /,
    *,
    reference_date: date,
    windows: Sequence[int],
    warn_share: float,
    error_share: float,
    min_rows: int,
    hints: Mapping[str, str] | None = None,
) -> Finding:
    """Whether most rows of each table and window keep the source contract.

    It is looked at by window: a night that loaded nothing but broken rows is a percent of 90 days
    and a seventh of 7.

    Args:
        read: Rows that were read: ``source_table``, ``date``, ``rows``.
        set_aside: ``SetAside``.
        reference_date: The day after the last one of each window.
        windows: Lengths in days.
        warn_share: Share of the rows read above which the check warns.
        error_share: Share above which it fails, of at least ``min_rows`` rows.
        min_rows: Of fewer rows a share says little.
        hints: The likely cause and remedy, by the column that most of the rows break.
    """
    shares = pl.concat(
        _set_aside_shares(read, set_aside, reference_date=reference_date, days=days)
        for days in windows
    )
    by_reason = (
        set_aside.group_by("source_table", "column", "reason")
        .agg(pl.col("row_key").n_unique().alias("rows"))
        .sort("source_table", "column", "reason")
    )
    metadata: Metadata = {"rows_set_aside": int(by_reason["rows"].sum()), "by_reason": by_reason}
    worst = shares.filter(pl.col("share") > warn_share).sort(
        (pl.col("share") > error_share) & (pl.col("rows_read") >= min_rows),
        "share",
        descending=True,
    )
    if worst.is_empty():
        return Finding(True, metadata=metadata)
    row = worst.row(0, named=True)
    failed = row["share"] > error_share and row["rows_read"] >= min_rows
    hint = (hints or {}).get(_most_broken_column(set_aside, row["source_table"]), "")
    return Finding(
        False,
        f"{row['rows_set_aside']} of {row['rows_read']} rows of {row['source_table']} in the"
        f" {row['window']} window break the source contract: {row['share']:.1%}, with"
        f" {error_share if failed else warn_share:.1%} expected at most."
        f" {hint}{_see(reference_date)}"
        " Mend them in the platform and run the date again"
        + (", or raise checks.set_aside_error_share in the policy." if failed else "."),
        {
            **metadata,
            "share_by_window": shares,
            "first_rows": first_keys(set_aside, "source_table", "row_key", "column", "reason"),
            "see_the_rest": _command(reference_date),
        },
        ERROR if failed else WARN,
    )


def source_is_fresh(
    newest: date | None,
    /,
    *,
    what: str,
    reference_date: date,
    warn_days: int,
    error_days: int | None = None,
    since: date | None = None,
    look_at: str,
) -> Finding:
    """Whether the newest row is about as new as the reference date lets expect.

    Args:
        newest: Local date of the newest row before the reference date; null if there is none.
        what: What the rows are, such as ``sessions``.
        reference_date: The day after the last one that is looked at.
        warn_days: Days from the newest row to the reference date above which the check warns.
        error_days: Days above which it fails; it only ever warns without them.
        since: The first day that was looked at, unless that is the platform's first.
        look_at: Shows the same in the platform.
    """
    if newest is None:
        return Finding(
            False,
            f"There are no {what} before {reference_date}{f' from {since} on' if since else ''}."
            " If the platform had begun by then, see to what loads its database and run the date"
            " again.",
            {"see_in_the_platform": look_at},
            WARN,
        )
    age = (reference_date - newest).days
    metadata: Metadata = {"newest": newest.isoformat(), "days_before_reference_date": age}
    if age <= warn_days:
        return Finding(True, metadata=metadata)
    failed = error_days is not None and age > error_days
    return Finding(
        False,
        f"The newest of the {what} are of {newest}, {age} days before the reference date, with"
        f" {error_days if failed else warn_days} expected at most. See to what loads the"
        " platform's database, then run the date again"
        + ("; if it is right, raise checks.stale_error_days in the policy." if failed else "."),
        {**metadata, "see_in_the_platform": look_at},
        ERROR if failed else WARN,
    )


def day_volume_is_usual(
    by_day: pl.DataFrame,
    /,
    *,
    what: str,
    reference_date: date,
    min_share: float,
    min_deviations: float,
    min_weeks: int,
) -> Finding:
    """Whether the newest day has about as many rows as the same weekday of the weeks before.

    The middle is the median, the spread the median absolute deviation or that of counts by chance,
    whichever is more: one odd week moves neither.

    Args:
        by_day: Rows by day: ``date``, ``rows``; a day without rows may be missing.
        what: What the rows are, such as ``sessions``.
        reference_date: The day after the newest one.
        min_share: Share of the median that the newest day has to be off by.
        min_deviations: Standard deviations that it has to be off by as well.
        min_weeks: Earlier weeks that it takes to compare.
    """
    newest = reference_date - timedelta(days=1)
    counts = dict(by_day.select("date", "rows").iter_rows())
    first = min(counts, default=newest)
    weeks = pl.Series(
        "rows",
        [
            counts.get(newest - timedelta(weeks=week), 0)
            for week in range(1, (newest - first).days // 7 + 1)
        ],
        pl.Float64,
    )
    rows = counts.get(newest, 0)
    metadata: Metadata = {"day": newest.isoformat(), "rows": rows}
    if len(weeks) < min_weeks:
        return Finding(
            True, f"Not compared: {len(weeks)} weeks before; {min_weeks} are needed.", metadata
        )
    middle = float(weeks.median())  # type: ignore[arg-type]
    spread = max(
        _MAD_TO_DEVIATION * float((weeks - middle).abs().median()),  # type: ignore[arg-type]
        middle**0.5,
        1.0,
    )
    off = abs(rows - middle)
    metadata |= {"median": middle, "deviations": round(off / spread, 2), "weeks": len(weeks)}
    if off <= min_share * middle or off <= min_deviations * spread:
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{newest} has {rows} {what}; the median of that weekday in the {len(weeks)} weeks before"
        f" is {middle:g}. If the day was not an odd one, see to what loads the platform's database"
        " and run the date again.",
        metadata,
        WARN,
    )


def newest_date(
    by_day: pl.DataFrame,
    source: sources.AnySource,
    table: Literal["sessions", "tutor_events"],
    *,
    retrying: tenacity.Retrying,
    reference_date: date,
    timezone: str,
) -> date | None:
    """The local date of the newest row before the reference date, if there is any.

    The platform is asked only where the snapshot is empty: then its days cannot tell a platform
    that had not begun from one that nothing is loaded into any more.
    """
    if not by_day.is_empty():
        return cast("date", by_day["date"].max())
    before = midnight(reference_date, timezone=timezone)
    found = retrying(sources.newest, source, table, before=before)
    return found and found.astimezone(ZoneInfo(timezone)).date()


def _most_broken_column(set_aside: pl.DataFrame, source_table: str) -> str:
    counts = set_aside.filter(pl.col("source_table") == source_table)["column"].value_counts()
    return str(counts.sort("count", "column", descending=True)["column"][0])


def _set_aside_shares(
    read: pl.DataFrame, set_aside: pl.DataFrame, *, reference_date: date, days: int
) -> pl.DataFrame:
    within = within_window("date", reference_date=reference_date, days=days)
    rows_read = read.filter(within).group_by("source_table").agg(pl.col("rows").sum())
    rows_set_aside = (
        set_aside.filter(within)
        .group_by("source_table")
        .agg(pl.col("row_key").n_unique().alias("rows_set_aside"))
    )
    return (
        rows_read.join(rows_set_aside, on="source_table", how="left")
        .select(
            pl.lit(window_name(days)).alias("window"),
            "source_table",
            pl.col("rows").cast(pl.Int64).alias("rows_read"),
            pl.col("rows_set_aside").fill_null(0).cast(pl.Int64),
        )
        .filter(pl.col("rows_read") > 0)
        .with_columns((pl.col("rows_set_aside") / pl.col("rows_read")).alias("share"))
        .sort("source_table")
    )


def _command(reference_date: date) -> str:
    return f"tutormax set-aside --date {reference_date}"


def _see(reference_date: date) -> str:
    return f"`{_command(reference_date)}` names them."
