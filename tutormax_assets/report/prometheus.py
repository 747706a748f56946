"""The state of the product as Prometheus metrics, from Dagster's record of the last runs.

Names, units and labels follow https://prometheus.io/docs/practices/naming/. No label has an id.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import dagster as dg
from prometheus_client import CollectorRegistry, Gauge

from tutormax_assets.compute.tasks.changes import TUTOR_TIER_CHANGES
from tutormax_assets.compute.tasks.tiers import TUTOR_TIER_REASONS, TUTOR_TIERS
from tutormax_assets.database.tables import METRICS_TABLE
from tutormax_assets.dates import midnight
from tutormax_assets.report.record import DateRecord, newest_record, read_record

_ENDED = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]

_FRESHNESS = {
    "sessions": ("sessions_snapshot", "sessions_are_fresh"),
    "student_feedback": ("sessions_snapshot", "feedback_is_fresh"),
    "tutor_events": ("tutor_events_snapshot", "events_are_fresh"),
}
"""The check that names the newest row of a source table, by table."""

_SNAPSHOTS = ("sessions_snapshot", "tutor_events_snapshot")

Metadata = Mapping[str, dg.MetadataValue[Any]]


@dataclass
class _Metrics:
    """Adds samples to a registry; a metric that gets none is left out."""

    registry: CollectorRegistry

    def add(
        self, name: str, text: str, samples: Iterator[tuple[tuple[str, ...], float]], *labels: str
    ) -> None:
        gauge: Gauge | None = None
        for values, number in samples:
            if gauge is None:
                gauge = Gauge(name, text, labels, namespace="tutormax", registry=self.registry)
            (gauge.labels(*values) if labels else gauge).set(number)


def collect_metrics(
    instance: dg.DagsterInstance, *, job_name: str, timezone: str
) -> CollectorRegistry:
    """The metrics of the newest run that ended, and of the newest reference date that is saved.

    Args:
        instance: Where runs are on record.
        job_name: The job that computes reference dates.
        timezone: IANA timezone in which a reference date begins.
    """
    metrics = _Metrics(CollectorRegistry(auto_describe=False))
    own = version("tutormax-assets")
    metrics.add("build_info", "Version of tutormax_assets.", _one(1, own), "version")
    newest = _newest_run(instance, job_name, _ENDED)
    if newest is not None:
        _add_run(metrics, instance, newest)
    if (good := _newest_run(instance, job_name, _ENDED[:1])) is not None:
        metrics.add(
            "last_success_timestamp_seconds",
            "When the newest run that succeeded ended.",
            _one(good.end_time or 0),
        )
    saved = instance.get_materialized_partitions(dg.AssetKey(METRICS_TABLE))
    if saved:
        key = max(saved)
        record = newest_record(instance, METRICS_TABLE, key)
        _add_date(metrics, record, date.fromisoformat(key), timezone=timezone)
    return metrics.registry


def newest_ended_run(instance: dg.DagsterInstance, *, job_name: str) -> str | None:
    """Id of the newest run of a job that has ended; None if there is none.

    Args:
        instance: Where runs are on record.
        job_name: The job.
    """
    record = _newest_run(instance, job_name, _ENDED)
    return None if record is None else record.dagster_run.run_id


def _newest_run(
    instance: dg.DagsterInstance, job_name: str, statuses: list[dg.DagsterRunStatus]
) -> dg.RunRecord | None:
    wanted = dg.RunsFilter(job_name=job_name, statuses=statuses)
    return next(iter(instance.get_run_records(wanted, limit=1)), None)


def _add_run(metrics: _Metrics, instance: dg.DagsterInstance, record: dg.RunRecord) -> None:
    """Add what is known of a run, whatever became of it."""
    run = record.dagster_run
    metrics.add(
        "last_run_timestamp_seconds", "When the newest run ended.", _one(record.end_time or 0)
    )
    metrics.add(
        "last_run_success",
        "Whether the newest run succeeded: 1 or 0.",
        _one(run.status is dg.DagsterRunStatus.SUCCESS),
    )
    metrics.add(
        "last_run_duration_seconds",
        "Duration of the newest run.",
        _one((record.end_time or 0) - (record.start_time or record.end_time or 0)),
    )
    metrics.add(
        "stage_duration_seconds",
        "Duration of each step of the newest run.",
        (
            ((step.step_key,), step.end_time - step.start_time)
            for step in instance.get_run_step_stats(run.run_id)
            if step.start_time is not None and step.end_time is not None
        ),
        "stage",
    )
    counts = dict.fromkeys(("passed", "warned", "failed"), 0)
    for of_date in read_record(instance, run.run_id).values():
        for check in of_date.checks:
            status = "failed" if check.severity == "ERROR" else "warned"
            counts["passed" if check.passed else status] += 1
    metrics.add(
        "check_results",
        "Results of asset checks in the newest run; warned and failed differ by severity.",
        (((status,), count) for status, count in counts.items()),
        "status",
    )


def _add_date(metrics: _Metrics, record: DateRecord, day: date, *, timezone: str) -> None:
    """Add what is known of a reference date."""
    metrics.add(
        "reference_date_timestamp_seconds",
        "Beginning of the newest reference date that is saved.",
        _one(midnight(day, timezone=timezone).timestamp()),
    )
    saved = record.metadata.get(METRICS_TABLE, {})
    metrics.add(
        "tutors_computed", "Tutors that the run was to save.", _value(saved, "total_tutors")
    )
    metrics.add("tutors_failed", "Tutors whose rows could not be saved.", _value(saved, "failed"))
    metrics.add(
        "rows_written",
        "Rows of tutor_performance_metrics that the run inserted, updated or left as they were.",
        (
            ((operation,), number)
            for operation in ("inserted", "updated", "unchanged")
            for _, number in _value(saved, operation)
        ),
        "operation",
    )
    _add_tutors(metrics, record)
    metrics.add(
        "values_set_aside",
        "Values that break the source contract, by source table and reason.",
        _set_aside(record),
        "table",
        "reason",
    )
    metrics.add(
        "source_newest_row_timestamp_seconds",
        "Beginning of the day of the newest row that was read from a source table.",
        _newest_rows(record, timezone=timezone),
        "table",
    )


def _add_tutors(metrics: _Metrics, record: DateRecord) -> None:
    """Add the numbers of tutors by tier, with thin evidence, and that changed tier."""
    of_tiers = _rows(record.metadata.get(TUTOR_TIERS, {}), "tutors_by_tier")
    metrics.add(
        "tutors",
        "Tutors by window and tier.",
        (
            ((window, str(row["tier"])), float(number))
            for row in of_tiers
            for window, number in row.items()
            if window != "tier"
        ),
        "window",
        "tier",
    )
    index = "stability_index_"
    metrics.add(
        "tier_stability_index",
        "Population stability index of the tiers against the last saved date.",
        (
            ((name.removeprefix(index),), float(value.value))
            for check in record.checks
            if check.asset == TUTOR_TIERS
            for name, value in check.metadata.items()
            if name.startswith(index)
        ),
        "window",
    )
    thin = "thin_evidence_"
    metrics.add(
        "tutors_with_thin_evidence",
        "Tutors with fewer sessions in the window than evidence_min_sessions.",
        (
            ((name.removeprefix(thin),), float(value.value))
            for name, value in record.metadata.get(TUTOR_TIER_REASONS, {}).items()
            if name.startswith(thin)
        ),
        "window",
    )
    metrics.add(
        "tier_movers",
        "Tutors whose tier differs from that of so many days before, by direction.",
        (
            ((str(row["window"]), str(row["move"]), str(row["days"])), float(row["tutors"]))
            for row in _rows(record.metadata.get(TUTOR_TIER_CHANGES, {}), "movers")
            if row["move"] in ("up", "down")
        ),
        "window",
        "direction",
        "days",
    )


def _set_aside(record: DateRecord) -> Iterator[tuple[tuple[str, ...], float]]:
    counts: dict[tuple[str, ...], float] = {}
    for asset in _SNAPSHOTS:
        for row in _rows(record.metadata.get(asset, {}), "set_aside_by_reason"):
            key = str(row["source_table"]), str(row["reason"])
            counts[key] = counts.get(key, 0) + float(row["values"])
    yield from counts.items()


def _newest_rows(record: DateRecord, *, timezone: str) -> Iterator[tuple[tuple[str, ...], float]]:
    checks = {(check.asset, check.name): check.metadata for check in record.checks}
    for table, check in _FRESHNESS.items():
        newest = checks.get(check, {}).get("newest")
        if newest is not None and newest.value:
            day = date.fromisoformat(str(newest.value))
            yield (table,), midnight(day, timezone=timezone).timestamp()


def _one(number: float, *labels: str) -> Iterator[tuple[tuple[str, ...], float]]:
    yield labels, float(number)


def _value(metadata: Metadata, name: str) -> Iterator[tuple[tuple[str, ...], float]]:
    if (value := metadata.get(name)) is not None and value.value is not None:
        yield (), float(value.value)


def _rows(metadata: Metadata, name: str) -> list[dict[str, Any]]:
    table = metadata.get(name)
    if not isinstance(table, dg.TableMetadataValue):
        return []
    return [dict(record.data) for record in table.records]
