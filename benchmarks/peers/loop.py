"""The loop that the replaced service is: for each tutor and window three queries, ORM objects.

As there, the session is asynchronous, each object has all columns of its table, and nothing is
done at once.

Its arithmetic is plain Python over the objects; of the product it shares the tables' declarations.
"""

import asyncio
import math
from collections.abc import Collection, Sequence
from datetime import datetime
from decimal import Decimal
from time import perf_counter
from typing import Any
from uuid import uuid4

import psycopg
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks.answers import TWIN_NAME
from benchmarks.peers import WINDOWS, Task, sampled
from chaos.oracle import tier
from tutormax_assets.database import tables

_BATCH = 100
"""Tutors in a transaction, as the replaced service has them."""


_registry = orm.registry()
_metadata = sa.MetaData()


def _mapped(table: sa.Table, *, name: str | None = None, **properties: str) -> Any:
    """A class whose objects are the rows of a table, with all its columns."""
    own = table.to_metadata(_metadata, name=name or table.name)
    mapped = type(own.name, (), {})
    columns = {attribute: own.c[column] for attribute, column in properties.items()}
    _registry.map_imperatively(mapped, own, properties=columns)
    return mapped


_mapped(tables.students)
_Tutor = _mapped(tables.tutors)
_Session = _mapped(tables.sessions)
_Feedback = _mapped(tables.student_feedback)
_Event = _mapped(tables.tutor_events, details="metadata")
_Metrics = _mapped(tables.tutor_performance_metrics, name=TWIN_NAME)


def measure(task: Task) -> dict[str, float]:
    """Compute the tutors one after the other and write the twin, a transaction per batch."""
    return {"all": asyncio.run(_seconds(task))}


async def _seconds(task: Task) -> float:
    engine = create_async_engine(
        "postgresql+psycopg://",
        async_creator=lambda: psycopg.AsyncConnection.connect(task.conninfo),
    )
    async with AsyncSession(engine, expire_on_commit=False) as session:
        # Connects, and lets SQLAlchemy look at the mapping.
        (await session.scalars(sa.select(_Tutor).limit(1))).all()
        await session.rollback()
        started = perf_counter()
        active = sa.select(_Tutor).where(sa.func.lower(_Tutor.status) == "active")
        roster = (await session.scalars(active.order_by(_Tutor.tutor_id))).all()
        tutor_ids = sampled([tutor.tutor_id for tutor in roster], task.tutors)
        for start in range(0, len(tutor_ids), _BATCH):
            batch = tutor_ids[start : start + _BATCH]
            await session.execute(
                sa.delete(_Metrics).where(
                    _Metrics.tutor_id.in_(batch), _Metrics.calculation_date == task.end
                )
            )
            for tutor_id in batch:
                for window, days in WINDOWS.items():
                    start_of_window = task.start(days)
                    session.add(await _row(session, task, tutor_id, window, start_of_window))
            await session.commit()
            session.expunge_all()
        ended = perf_counter()
    await engine.dispose()
    return ended - started


async def _row(
    session: AsyncSession, task: Task, tutor_id: str, window: str, start: datetime
) -> Any:
    of_window = (
        _Session.tutor_id == tutor_id,
        _Session.scheduled_start >= start,
        _Session.scheduled_start < task.end,
    )
    sessions = sa.select(_Session).where(*of_window)
    feedback = (
        sa.select(_Feedback)
        .join(_Session, _Session.session_id == _Feedback.session_id)
        .where(*of_window)
    )
    events = sa.select(_Event).where(
        _Event.tutor_id == tutor_id,
        _Event.event_type.in_(["login", "message_response"]),
        _Event.event_timestamp >= start,
        _Event.event_timestamp < task.end,
    )
    # The new rows are sent with the batch, not before each query.
    with session.no_autoflush:
        values = _values(
            (await session.scalars(sessions)).all(),
            (await session.scalars(feedback)).all(),
            (await session.scalars(events)).all(),
        )
    row = _Metrics()
    row.metric_id = str(uuid4())
    row.tutor_id = tutor_id
    row.calculation_date = task.end
    row.window = window
    row.performance_tier = tier(values)
    for name, value in values.items():
        setattr(row, name, value)
    return row


def _values(
    sessions: Sequence[Any], feedback: Sequence[Any], events: Sequence[Any]
) -> dict[str, Any]:
    good = {row.session_id: row.overall_rating for row in feedback if 1 <= row.overall_rating <= 5}
    tutors = {row.session_id: row.tutor_id for row in feedback}
    ratings = {
        row.session_id: good[row.session_id]
        for row in sessions
        if row.session_id in good and tutors[row.session_id] == row.tutor_id
    }
    firsts = [
        ratings[row.session_id] >= 4
        for row in sessions
        if row.session_number == 1 and row.session_id in ratings
    ]
    scores = [
        row.engagement_score
        for row in sessions
        if row.engagement_score is not None and 0 <= row.engagement_score <= 1
    ]
    lateness = [row.late_start_minutes <= 10 for row in sessions if row.late_start_minutes >= 0]
    objectives = [
        row.learning_objectives_met for row in sessions if row.learning_objectives_met is not None
    ]
    logins = sum(event.event_type == "login" for event in events)
    minutes = [m for event in events if (m := _minutes(event)) is not None]
    engagement = None
    if lateness:
        login = min(100.0, 100.0 * logins / len(sessions))
        score = 50.0 if (mean := _mean(scores)) is None else 100 * mean
        engagement = 0.4 * login + 0.4 * score + 0.2 * (100.0 * sum(lateness) / len(lateness))
    return {
        "sessions_completed": sum(
            row.actual_start is not None and not row.no_show for row in sessions
        ),
        "avg_rating": _rounded(_mean(ratings.values())),
        "first_session_success_rate": _rounded(_percent(firsts)),
        "reschedule_rate": _rounded(_percent([r.tutor_initiated_reschedule for r in sessions])),
        "no_show_count": sum(row.no_show for row in sessions),
        "engagement_score": _rounded(engagement),
        "learning_objectives_met_pct": _rounded(_percent(objectives)),
        "response_time_avg_minutes": _rounded(_mean(minutes)),
    }


def _minutes(event: Any) -> float | None:
    if event.event_type != "message_response" or not isinstance(event.details, dict):
        return None
    minutes: Any = event.details.get("response_time_minutes")
    is_number = isinstance(minutes, int | float) and not isinstance(minutes, bool)
    return float(minutes) if is_number and math.isfinite(minutes) and minutes >= 0 else None


def _mean(values: Collection[float]) -> float | None:
    # A sum of floats depends on the order of the rows, and with it on which side of a half it is.
    return float(sum(Decimal(repr(v)) for v in values) / len(values)) if values else None


def _percent(outcomes: Sequence[bool]) -> float | None:
    return 100.0 * sum(outcomes) / len(outcomes) if outcomes else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
