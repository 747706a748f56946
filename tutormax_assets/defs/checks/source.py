"""What is asked of the rows that were read from the platform, whichever table they are from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal, NamedTuple, cast
from zoneinfo import ZoneInfo

import polars as pl
import tenacity

from tutormax_assets.dates import midnight
from tutormax_assets.defs.checks import (
    ERROR,
    NOT_OF_ALL,
    WARN,
    Finding,
    Metadata,
    first_keys,
)
from tutormax_assets.defs.checks.volumes import Volumes, What
from tutormax_assets.metrics.policy import Policy, window_name
from tutormax_assets.metrics.window import within_window
from tutormax_assets.source import view
from tutormax_assets.storage.store import PartitionStore


@dataclass(frozen=True)
class SourceTable:
    """A table of the platform, and how the checks of its snapshot call it.

    Attributes:
        name: The table in the platform.
        instant: Its column that a row belongs to a day by.
        is_fresh: Name of the check whether the newest row is new.
        what: What its rows are.
        day_what: What the rows of a day are.
        usual: Which of its rows come in about the same number each week.
        other: Rows of another table that fall with them, as over holidays.
    """

    name: Literal["sessions", "tutor_events"]
    instant: str
    is_fresh: str
    what: str
    day_what: str
    usual: What
    other: What

    def look_at(
        self,
        volumes: Volumes,
        store: PartitionStore,
        source: view.AnySource,
        *,
        partition_key: str,
        retrying: tenacity.Retrying,
        timezone: str,
        policy: Policy,
        more: Mapping[str, Callable[[], Finding]] | None = None,
    ) -> dict[str, Finding]:
        """What the checks about the platform as a whole find, by name.

        A run of some tutors does not know the platform as a whole.

        Args:
            volumes: Rows by day of the date's snapshots.
            store: Where the snapshots are.
            source: Where the platform is read.
            partition_key: The reference date.
            retrying: Asks the platform again.
            timezone: In which a date begins.
            policy: Its windows, and the limits of checks.
            more: Further checks of the platform as a whole.
        """
        more = more or {}
        if store.active_tutors_left_out(partition_key):
            names = (self.is_fresh, "shortest_window_is_whole", "day_volume_is_usual", *more)
            return dict.fromkeys(names, NOT_OF_ALL)
        reference_date = date.fromisoformat(partition_key)
        by_day = (volumes.sessions if self.name == "sessions" else volumes.events)[partition_key]
        newest = newest_date(
            by_day,
            source,
            self.name,
            retrying=retrying,
            reference_date=reference_date,
            timezone=timezone,
        )
        return {
            self.is_fresh: source_is_fresh(
                newest,
                what=self.what,
                reference_date=reference_date,
                warn_days=policy.checks.stale_warn_days,
                error_days=policy.checks.stale_error_days,
                look_at=view.where_to_look(source, self.name, instant=self.instant),
            ),
            **self._volumes(
                by_day,
                volumes.by_day(self.usual, partition_key),
                volumes.by_day(self.other, partition_key),
                reference_date,
                policy,
            ),
            **{name: check() for name, check in more.items()},
        }

    def _volumes(
        self,
        by_day: pl.DataFrame,
        usual_by_day: pl.DataFrame,
        other_by_day: pl.DataFrame,
        reference_date: date,
        policy: Policy,
    ) -> dict[str, Finding]:
        limits = policy.checks
        return {
            "shortest_window_is_whole": shortest_window_is_whole(
                usual_by_day,
                other_by_day,
                what=self.usual,
                reference_date=reference_date,
                days=policy.windows[0],
                max_loss=limits.window_loss_error_share,
            ),
            "day_volume_is_usual": day_volume_is_usual(
                by_day,
                what=self.day_what,
                reference_date=reference_date,
                min_share=limits.volume_share,
                min_deviations=limits.volume_deviations,
                min_weeks=limits.volume_min_weeks,
            ),
        }


# Of normally distributed counts the median absolute deviation times this is one standard deviation.
_MAD_TO_DEVIATION = 1.4826

# Beyond so many standard deviations a platform of a handful of tutors is never by chance.
_CHANCE_DEVIATIONS = 4

# Of fewer, one odd week moves the median.
_MIN_EARLIER_WINDOWS = 3


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
    first = first_keys(set_aside, "source_table", "row_key", "column", "reason")
    command = f"tutormax set-aside --date {reference_date}"
    return Finding(
        False,
        f"{row['rows_set_aside']} of {row['rows_read']} rows of {row['source_table']} in the"
        f" {row['window']} window break the source contract: {row['share']:.1%}, with"
        f" {error_share if failed else warn_share:.1%} expected at most.",
        {**metadata, "share_by_window": shares, "first_rows": first, "see_the_rest": command},
        ERROR if failed else WARN,
        f"{hint}`{command}` names them. Fix them in the platform and run the date again"
        + (", or raise checks.set_aside_error_share in the policy." if failed else "."),
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
            f"There are no {what} before {reference_date}{f' from {since} on' if since else ''}.",
            {"see_in_the_platform": look_at},
            WARN,
            "If the platform had begun by then, see to what loads its database and run the date"
            " again.",
        )
    age = (reference_date - newest).days
    metadata: Metadata = {"newest": newest.isoformat(), "days_before_reference_date": age}
    if age <= warn_days:
        return Finding(True, metadata=metadata)
    failed = error_days is not None and age > error_days
    return Finding(
        False,
        f"The newest of the {what} are of {newest}, {age} days before the reference date, with"
        f" {error_days if failed else warn_days} expected at most.",
        {**metadata, "see_in_the_platform": look_at},
        ERROR if failed else WARN,
        "See to what loads the platform's database, then run the date again"
        + ("; if it is right, raise checks.stale_error_days in the policy." if failed else "."),
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
    middle, spread = _middle_and_spread(weeks)
    off = abs(rows - middle)
    metadata |= {"median": middle, "deviations": round(off / spread, 2), "weeks": len(weeks)}
    if off <= min_share * middle or off <= min_deviations * spread:
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"{newest} has {rows} {what}; the median of that weekday in the {len(weeks)} weeks before"
        f" is {middle:g}.",
        metadata,
        WARN,
        "If the day was not an odd one, see to what loads the platform's database and run the date"
        " again.",
    )


def shortest_window_is_whole(
    by_day: pl.DataFrame,
    other_by_day: pl.DataFrame,
    /,
    *,
    what: str,
    reference_date: date,
    days: int,
    max_loss: float,
) -> Finding:
    """Whether the shortest window has about as many rows as windows of its length had before.

    Usual is the median of the windows of the same length that ended one, two, three weeks earlier
    and so on, as far as the snapshot goes: each has the same weekdays. Where another source has
    fallen as well, as over holidays, as much less is expected. A few rows more or less are chance.

    Args:
        by_day: Rows by day: ``date``, ``rows``; a day without rows may be missing.
        other_by_day: The same of the other source.
        what: What the rows are, such as ``sessions``.
        reference_date: The day after the window.
        days: Length of the window.
        max_loss: Share of the expected rows that may be missing.
    """
    volume = _window_volume(by_day, reference_date=reference_date, days=days)
    other = _window_volume(other_by_day, reference_date=reference_date, days=days)
    metadata: Metadata = {"rows": volume.rows, "earlier_windows": volume.earlier}
    if volume.earlier < _MIN_EARLIER_WINDOWS:
        return Finding(
            True,
            f"Not compared: {volume.earlier} earlier windows of {days} days in the snapshot;"
            f" {_MIN_EARLIER_WINDOWS} are needed.",
            metadata,
        )
    expected = volume.usual
    if other.earlier >= _MIN_EARLIER_WINDOWS and other.usual:
        expected *= min(1, other.rows / other.usual)
    missing = expected - volume.rows
    loss = missing / expected if missing > 0 else 0.0
    metadata |= {
        "usual_rows": volume.usual,
        "expected_rows": round(expected, 1),
        "missing_share": round(loss, 4),
    }
    if loss <= max_loss or missing <= _CHANCE_DEVIATIONS * volume.spread:
        return Finding(True, metadata=metadata)
    return Finding(
        False,
        f"The {days} days before {reference_date} have {volume.rows} {what}, and {expected:.0f} are"
        f" expected from the weeks before: {loss:.0%} are missing, with {max_loss:.0%} at most.",
        metadata,
        advice="See to what loads the platform's database, then run the date again; if the drop is"
        " real, raise checks.window_loss_error_share in the policy.",
    )


class _WindowVolume(NamedTuple):
    rows: int
    usual: float
    spread: float
    earlier: int


def _window_volume(by_day: pl.DataFrame, *, reference_date: date, days: int) -> _WindowVolume:
    """Rows of a window, and what is usual for one of its length; see the check."""
    counts = dict(by_day.select("date", "rows").iter_rows())
    first = min(counts, default=reference_date)

    def total(end: date) -> int:
        return sum(counts.get(end - timedelta(days=day), 0) for day in range(1, days + 1))

    weeks = range(1, max((reference_date - first).days - days, 0) // 7 + 1)
    earlier = pl.Series(
        [total(reference_date - timedelta(weeks=week)) for week in weeks], dtype=pl.Float64
    )
    usual, spread = _middle_and_spread(earlier)
    return _WindowVolume(total(reference_date), usual, spread, len(earlier))


def _middle_and_spread(counts: pl.Series) -> tuple[float, float]:
    """The median, and the median absolute deviation or that of counts by chance if it is more."""
    middle = float(counts.median() or 0)  # type: ignore[arg-type]
    deviation = float((counts - middle).abs().median() or 0)  # type: ignore[arg-type]
    return middle, max(_MAD_TO_DEVIATION * deviation, middle**0.5, 1.0)


def newest_date(
    by_day: pl.DataFrame,
    source: view.AnySource,
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
    found = retrying(view.newest, source, table, before=before)
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
