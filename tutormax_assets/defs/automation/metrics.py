"""Publishing Prometheus metrics: to a file of the node exporter, and to a Pushgateway."""

import logging
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urlsplit

import dagster as dg

from tutormax_assets.database.faults import reason
from tutormax_assets.settings import Settings

SENSOR_NAME = "prometheus_metrics"

INTERVAL_SECONDS = 60

_PUSHGATEWAY_JOB = "tutormax"
_TIMEOUT_SECONDS = 10


def is_published(settings: Settings) -> bool:
    """Whether the settings name a place for metrics."""
    return settings.metrics_file is not None or settings.pushgateway is not None


def metrics_sensors(settings: Settings, job_name: str) -> list[dg.SensorDefinition]:
    """The sensor that publishes metrics after each run; none if the settings name no place.

    Args:
        settings: Where metrics are published, and whether the sensor runs unless it is stopped.
        job_name: The job that computes reference dates.
    """
    if not is_published(settings):
        return []

    @dg.sensor(
        name=SENSOR_NAME,
        description="Publishes Prometheus metrics after each run.",
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=(
            dg.DefaultSensorStatus.RUNNING
            if settings.automation
            else dg.DefaultSensorStatus.STOPPED
        ),
    )
    def prometheus_metrics(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        from tutormax_assets.report.prometheus import newest_ended_run

        newest = newest_ended_run(context.instance, job_name=job_name)
        if newest == context.cursor:
            return dg.SkipReason("No run has ended since the metrics were published.")
        if not publish_metrics(context.instance, settings, context.log, job_name=job_name):
            return dg.SkipReason("The metrics could not be published; the log says why.")
        context.update_cursor(newest or "")
        return dg.SkipReason("The metrics are published.")

    return [prometheus_metrics]


def publish_metrics(
    instance: dg.DagsterInstance, settings: Settings, log: logging.Logger, *, job_name: str
) -> bool:
    """Write and push the metrics where the settings say so.

    Args:
        instance: Where runs are on record.
        settings: Where metrics are published.
        log: Where a failure is logged, as a warning.
        job_name: The job that computes reference dates.

    Returns:
        Whether all of it succeeded.
    """
    if not is_published(settings):
        return True
    from tutormax_assets.report.prometheus import collect_metrics

    try:
        registry = collect_metrics(instance, job_name=job_name, timezone=settings.timezone)
    except Exception as error:
        # A run that has saved its date does not fail for its metrics.
        log.warning(f"Metrics cannot be collected: {reason(error)}")
        return False
    return all(
        [
            settings.metrics_file is None or _write(registry, settings.metrics_file, log),
            settings.pushgateway is None
            or _push(registry, settings.pushgateway.get_secret_value(), log),
        ]
    )


def _write(registry: Any, path: Path, log: logging.Logger) -> bool:
    from prometheus_client import write_to_textfile

    try:
        # It writes another file and renames it, so that the node exporter reads a whole one.
        write_to_textfile(str(path), registry)
    except OSError as error:
        log.warning(
            f"Metrics cannot be written to {path}: {error.strerror}. TUTORMAX_METRICS_FILE has to"
            " name a file in the folder that the node exporter's textfile collector reads."
        )
        return False
    return True


def _push(registry: Any, url: str, log: logging.Logger) -> bool:
    from prometheus_client import push_to_gateway

    address = urlsplit(url)
    where = f"{address.hostname}{f':{address.port}' if address.port else ''}"
    try:
        push_to_gateway(
            f"{address.scheme}://{where}{address.path}",
            job=_PUSHGATEWAY_JOB,
            registry=registry,
            timeout=_TIMEOUT_SECONDS,
            handler=_handler(address.username, address.password),
        )
    except (URLError, OSError) as error:
        said = getattr(error, "reason", None) or error
        log.warning(
            f"Metrics cannot be pushed to {where}: {said}. TUTORMAX_PUSHGATEWAY has to lead to a"
            " Pushgateway."
        )
        return False
    return True


def _handler(user: str | None, password: str | None) -> Callable[..., Callable[[], None]]:
    """Pushes with the user and password of the URL, if it has any."""
    from prometheus_client.exposition import default_handler

    if user is None:
        return default_handler
    pair = f"{unquote(user)}:{unquote(password or '')}"
    authorization = f"Basic {b64encode(pair.encode()).decode()}"

    def handler(
        url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        return default_handler(
            url, method, timeout, [*headers, ("Authorization", authorization)], data
        )

    return handler
