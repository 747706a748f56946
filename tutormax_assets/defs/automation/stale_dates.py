"""The sensor that observes which stored dates have changed in the platform since they were read."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import today
from tutormax_assets.defs.refresh import find_stale_dates
from tutormax_assets.runs.read_state import load_state
from tutormax_assets.settings import Settings
from tutormax_assets.source.streams import SourceError
from tutormax_assets.storage.files import StorageError

SENSOR_NAME = "stale_dates"

STALE_SINCE_METADATA = "stale_since"
"""Metadata key of the instant at which a date was first found changed."""

EXAMINED_DATES = 90

INTERVAL_SECONDS = 3_600

_MOST_OBSERVATIONS = 20


def _now() -> datetime:
    return datetime.now(UTC)


def last_dates(settings: Settings) -> list[date]:
    """The reference dates that are examined, newest first."""
    newest = today(timezone=settings.timezone)
    return [newest - timedelta(days=n) for n in range(EXAMINED_DATES)]


def stale_dates_sensor(
    settings: Settings, *, now: Callable[[], datetime] = _now
) -> dg.SensorDefinition:
    """Build the sensor that observes ``tutor_performance_metrics`` where a date becomes stale.

    It observes a date once when rows of it are first found changed, and once when the date has been
    brought up to date.

    Args:
        settings: Where everything is, and whether the sensor runs unless it is stopped.
        now: The clock.
    """

    @dg.sensor(
        name=SENSOR_NAME,
        description=(
            f"Observes which of the last {EXAMINED_DATES} dates have changed in the platform since"
            " they were read."
        ),
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=(
            dg.DefaultSensorStatus.RUNNING if settings.late_data else dg.DefaultSensorStatus.STOPPED
        ),
    )
    def stale_dates(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            found = find_stale_dates(settings, last_dates(settings))
        except (SourceError, StorageError) as error:
            return dg.SkipReason(str(error))
        before: Mapping[str, str] = json.loads(context.cursor) if context.cursor else {}
        since = dict(_stale_since(settings, found, before, now()))
        unknown = sum(isinstance(one, str) for one in found.values())
        return dg.SensorResult(
            asset_events=list(_observations(found, before, since)),
            cursor=json.dumps(since),
            skip_reason=(
                f"{len(since)} of {len(found)} stored dates are stale; of {unknown} it is unknown."
            ),
        )

    return stale_dates


def _stale_since(
    settings: Settings,
    found: Mapping[date, bool | str],
    before: Mapping[str, str],
    now: datetime,
) -> Iterator[tuple[str, str]]:
    """The dates that are stale, and since when."""
    for day, is_changed in found.items():
        known = before.get(str(day))
        if is_changed is True:
            if known is None or _is_read_since(settings, day, datetime.fromisoformat(known)):
                known = now.isoformat()
            yield str(day), known
        elif known is not None and isinstance(is_changed, str):
            # Where it is unknown now, what was known stays.
            yield str(day), known


def _is_read_since(settings: Settings, day: date, instant: datetime) -> bool:
    state = load_state(settings.storage_path, str(day))
    return state is not None and state.read_at > instant


def _observations(
    found: Mapping[date, bool | str], before: Mapping[str, str], since: Mapping[str, str]
) -> Iterator[dg.AssetObservation]:
    for day in found:
        instant = since.get(str(day))
        if instant == before.get(str(day)):
            continue
        metadata: dict[str, Any] = {"is_stale": instant is not None}
        if instant is None:
            description = "The date is up to date with the platform again."
        else:
            description = "Rows of this date have changed in the platform since it was read."
            seconds = datetime.fromisoformat(instant).timestamp()
            metadata[STALE_SINCE_METADATA] = dg.MetadataValue.timestamp(seconds)
        yield dg.AssetObservation(
            METRICS_TABLE, partition=str(day), description=description, metadata=metadata
        )


def observed_stale_since(
    settings: Settings, instance: dg.DagsterInstance, days: Sequence[date]
) -> dict[date, datetime]:
    """Since when the sensor has found dates stale; those that it has not are left out.

    Args:
        settings: Where everything is.
        instance: Where observations are on record.
        days: Reference dates that are stale.
    """
    found = {}
    for day in days:
        wanted = dg.AssetRecordsFilter(
            asset_key=dg.AssetKey(METRICS_TABLE), asset_partitions=[str(day)]
        )
        for record in instance.fetch_observations(wanted, limit=_MOST_OBSERVATIONS).records:
            observation = record.asset_observation
            if observation is None or "is_stale" not in observation.metadata:
                continue
            if instant := observation.metadata.get(STALE_SINCE_METADATA):
                seconds: Any = instant.value
                since = datetime.fromtimestamp(seconds, UTC)
                if not _is_read_since(settings, day, since):
                    found[day] = since
            break
    return found
