"""What a tutor that PostgreSQL refuses adds to the time of a write: ``-m chaos.culprits``."""

import json
import logging
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import truediv
from pathlib import Path
from statistics import median
from time import perf_counter

import polars as pl
import sqlalchemy as sa

from tutormax_assets.database import embedded
from tutormax_assets.database.connection import Timeouts, create_engine
from tutormax_assets.database.faults import retrying
from tutormax_assets.database.metrics_writing import write_metrics
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.metrics.schemas import TutorTiers
from tutormax_assets.schema.status import initialize

BATCH_SIZE: int = RunOptions.model_fields["batch_size"].default

_DATE = datetime(2025, 11, 7, tzinfo=UTC)


def measure(
    engine: sa.Engine, *, tutors: int = 5000, rounds: int = 7, batch_size: int = BATCH_SIZE
) -> dict[str, float]:
    """Time the write of a date with and without one tutor who was deleted since the roster.

    The three writes of a round follow each other, so that what else the machine does is shared:
    without a culprit, and with the first or the last tutor as such. The last is the worst: all
    rows before its own are checked in vain.

    Args:
        engine: A database with all tables, all of them empty; tutors and metrics are left in it.
        tutors: Tutors that are written, with three rows each.
        rounds: How often each write is timed.
        batch_size: Tutors per transaction.

    Returns:
        Medians. Of rows that are all new, and of rows that all change: ``…_seconds`` without a
        culprit, and ``…_first`` and ``…_last``, the time with one as a multiple of the round's.
    """
    tutor_ids = [f"T{number:06}" for number in range(tutors)]
    _add_tutors(engine, tutor_ids)
    before, after = _tiers(tutor_ids, rating=4.0), _tiers(tutor_ids, rating=4.5)
    culprits = {"none": None, "first": tutor_ids[0], "last": tutor_ids[-1]}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for kind in ("new", "changed"):
            for name, culprit in culprits.items():
                _execute(engine, "TRUNCATE tutor_performance_metrics")
                if kind == "changed":
                    _write(engine, before, batch_size=batch_size)
                _execute(engine, "VACUUM ANALYZE tutor_performance_metrics")
                if culprit:
                    _execute(engine, "DELETE FROM tutors WHERE tutor_id = :id", id=culprit)
                began = perf_counter()
                left_out = _write(engine, after, batch_size=batch_size)
                seconds.setdefault((kind, name), []).append(perf_counter() - began)
                if left_out != ([culprit] if culprit else []):
                    raise AssertionError(f"{left_out} were left out, expected {culprit or 'none'}")
                if culprit:
                    _add_tutors(engine, [culprit])
    figures = {}
    for kind in ("new", "changed"):
        without = seconds[kind, "none"]
        figures[f"{kind}_seconds"] = median(without)
        for name in ("first", "last"):
            with_one = seconds[kind, name]
            figures[f"{kind}_{name}"] = median(map(truediv, with_one, without))
    return figures


def _write(engine: sa.Engine, tiers: pl.DataFrame, *, batch_size: int) -> list[str]:
    once = retrying(max_retries=0, retry_delay_seconds=0, log=logging.getLogger(__name__))
    batches = write_metrics(
        engine,
        tiers,
        calculation_date=_DATE,
        batch_size=batch_size,
        retrying=once,
        timeouts=Timeouts(),
    )
    return [tutor_id for batch in batches for tutor_id in batch.errors]


def _tiers(tutor_ids: Sequence[str], *, rating: float) -> pl.DataFrame:
    values = {
        "sessions_completed": 3,
        "avg_rating": rating,
        "first_session_success_rate": None,
        "reschedule_rate": 0.0,
        "no_show_count": 0,
        "engagement_score": 66.67,
        "learning_objectives_met_pct": 100.0,
        "response_time_avg_minutes": 12.5,
        "green_flags": 3,
        "red_flags": 0,
        "performance_tier": "Strong",
    }
    keys = pl.DataFrame({"tutor_id": tutor_ids}).join(
        pl.DataFrame({"window": ["7day", "30day", "90day"]}), how="cross"
    )
    schema = pl.Schema(TutorTiers)
    rows = keys.with_columns(pl.lit(value).alias(name) for name, value in values.items())
    return rows.select(schema.names()).cast(schema)


def _add_tutors(engine: sa.Engine, tutor_ids: Sequence[str]) -> None:
    _execute(
        engine,
        "INSERT INTO tutors (tutor_id, name, email, onboarding_date, status, subjects)"
        " SELECT id, id, id || '@example.org', now(), 'active', '{}'"
        " FROM unnest(CAST(:ids AS text[])) AS id",
        ids=list(tutor_ids),
    )


def _execute(engine: sa.Engine, statement: str, **values: object) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text(statement), values)


def main() -> None:
    """Print the figures, measured on an embedded server of its own."""
    with tempfile.TemporaryDirectory(prefix="tutormax-culprits-") as folder:
        home = Path(folder)
        # Run as root, the server is another user, who must pass.
        home.chmod(0o755)
        try:
            engine = create_engine(embedded.start(home))
            initialize(engine, timezone="UTC")
            figures = measure(engine)
            engine.dispose()
        finally:
            embedded.stop(home)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
