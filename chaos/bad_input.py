"""Breaks source rows at shares from one row to all of them, and compares with an oracle."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import polars as pl
import sqlalchemy as sa
from upath import UPath

from chaos import oracle
from chaos.ground import END, Ground, database, ground, ground_on, query, silent_log
from chaos.report import Report
from tutormax_assets.api.runs import aggregate
from tutormax_assets.database.tables import METRICS_TABLE, sessions, student_feedback, tutor_events
from tutormax_assets.defs.resources import RunOptions
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import load_settings
from tutormax_assets.storage.partition import scan_partition

TUTORS = 40
SHARES: Sequence[float | None] = (None, 0.001, 0.01, 0.05, 0.2, 0.5, 1.0)
"""Shares of the rows of each table that are broken; none stands for one row in all."""

BLOCKED_FROM = 0.2
"""From this share on the checks must block the date, unless the policy allows it."""

_POLICY = """
[checks]
set_aside_warn_share = 1.0
set_aside_error_share = 1.0
"""

# A column that may not be null in one installation may be in another.
_NULLABLE = {
    "sessions": (
        "late_start_minutes",
        "session_number",
        "no_show",
        "tutor_initiated_reschedule",
    ),
    "student_feedback": ("overall_rating",),
}
_MINUTES = (
    '"fast"', '"12"', '""', '"NaN"', '"Infinity"', "-5", "-0.001", "1e400", "true", "[1]", "{}",
    # These are not broken: there is none, or a good one.
    "null", "0", "0.0", "12.5", "1e3",
)  # fmt: skip
_METADATA = (None, "null", "[]", '"text"', "7", '{"other": 1}')

_SESSION_BREACHES: Sequence[Mapping[str, Any]] = (
    *({"engagement_score": score} for score in (1.7, -0.2, "NaN", "Infinity", "-Infinity", 1.0001)),
    *({"late_start_minutes": minutes} for minutes in (-1, -2_147_483_648, None)),
    *({"session_number": number} for number in (0, -3, -2_147_483_648, None)),
    {"no_show": None},
    {"tutor_initiated_reschedule": None},
)
_FEEDBACK_BREACHES: Sequence[Mapping[str, Any]] = (
    *({"overall_rating": rating} for rating in (0, 6, -1, 2_147_483_647, -2_147_483_648, None)),
    {"tutor_id": "another"},
)
_EVENT_BREACHES: Sequence[Mapping[str, Any]] = (
    *({"metadata": f'{{"response_time_minutes": {minutes}}}'} for minutes in _MINUTES),
    *({"metadata": metadata} for metadata in _METADATA),
)


@dataclass(frozen=True)
class _Broken:
    table: sa.Table
    key: str
    breaches: Sequence[Mapping[str, Any]]


_TABLES = (
    _Broken(sessions, "session_id", _SESSION_BREACHES),
    _Broken(student_feedback, "feedback_id", _FEEDBACK_BREACHES),
    _Broken(tutor_events, "event_id", _EVENT_BREACHES),
)


def run(*, inputs: int, seconds: float, seed: int) -> Report:
    """Compute dates of broken platforms and compare every number and every value set aside.

    Args:
        inputs: How many platforms, each broken in its own way.
        seconds: When to stop at the latest.
        seed: Seed of what is broken.

    Returns:
        Figures of what was broken, set aside and wrong.
    """
    deadline = time.monotonic() + seconds
    names = ("inputs tried", "rows broken", "values set aside", "numbers compared", "wrong")
    report = Report("bad_input", dict.fromkeys(names, 0))
    with ground() as template, silent_log():
        sample_platform.generate(
            template.engine, tutors=TUTORS, sessions_per_tutor=40, days=100, end=END, seed=seed
        )
        with template.engine.begin() as connection:
            for table, columns in _NULLABLE.items():
                for column in columns:
                    connection.exec_driver_sql(f"ALTER TABLE {table} ALTER {column} DROP NOT NULL")
        choice = random.Random(seed)
        for number in range(inputs):
            if time.monotonic() > deadline:
                break
            share = SHARES[number % len(SHARES)]
            with database(template) as engine, ground_on(engine) as here:
                _try(here, report, share, choice)
    return report


def _try(here: Ground, report: Report, share: float | None, choice: random.Random) -> None:
    report.count("inputs tried")
    report.count("rows broken", _break(here.engine, share, choice))
    expected = oracle.answer(here.engine, END)
    name = "one row" if share is None else f"{share:.1%} of the rows"
    wrong = []
    errors = _run(here, {})
    if share is not None and share >= BLOCKED_FROM:
        report.count("dates that had to be blocked")
        if not errors or "break the source contract" not in errors[0]:
            wrong.append(f"was not blocked with a sentence: {errors[:1]}")
        if len(here.frames()[METRICS_TABLE]):
            wrong.append("was blocked, but saved")
    if errors:
        report.count("dates blocked")
        policy = here.home / "policy.toml"
        policy.write_text(_POLICY)
        errors = _run(here, {"TUTORMAX_POLICY": str(policy)})
    if errors:
        wrong.append(f"failed: {errors[0][:300]}")
    else:
        wrong += _compare(here, report, expected)
    report.count("wrong", len(wrong))
    report.wrong += [f"{name}: {sentence}" for sentence in wrong]


def _run(here: Ground, variables: Mapping[str, str]) -> list[str]:
    with here.as_environment(**variables):
        options = RunOptions(max_retries=0, retry_delay_seconds=0)
        [summary] = aggregate(load_settings(), [END], options)
    return [error["error"] for error in summary.errors]


def _break(engine: sa.Engine, share: float | None, choice: random.Random) -> int:
    """Break rows in place; how many."""
    chosen_tables = [choice.choice(_TABLES)] if share is None else _TABLES
    count = 0
    with engine.begin() as connection:
        tutor_ids = sorted(connection.exec_driver_sql("SELECT tutor_id FROM tutors").scalars())
        for broken in chosen_tables:
            key = broken.table.c[broken.key]
            keys = sorted(connection.execute(sa.select(key)).scalars())
            size = 1 if share is None else max(1, round(share * len(keys)))
            for row_key in choice.sample(keys, size):
                # Some rows are broken in more than one way.
                for breach in choice.sample(broken.breaches, choice.choice((1, 1, 2))):
                    values = dict(breach)
                    if values.get("tutor_id") == "another":
                        values["tutor_id"] = choice.choice(tutor_ids)
                    if "metadata" in values:
                        values["event_type"] = "message_response"
                        metadata = sa.literal(values["metadata"], sa.Text)
                        values["metadata"] = metadata.cast(tutor_events.c.metadata.type)
                    statement = broken.table.update().where(key == row_key).values(**values)
                    connection.execute(statement)
                count += 1
    return count


def _compare(here: Ground, report: Report, expected: oracle.Answer) -> list[str]:
    wrong = []
    parts = [
        scan_partition(UPath(here.storage) / asset / f"{END}.parquet").collect()
        for asset in ("sessions_set_aside", "tutor_events_set_aside")
    ]
    rows = pl.concat(parts).select("source_table", "row_key", "column", "reason").rows()
    report.count("values set aside", len(rows))
    if len(set(rows)) < len(rows):
        wrong.append("a value was set aside twice")
    if extra := set(rows) - expected.aside:
        wrong.append(f"{len(extra)} values were set aside and are good, such as {min(extra)}")
    if missing := expected.aside - set(rows):
        wrong.append(f"{len(missing)} values are broken and were used, such as {min(missing)}")

    table = query(here.engine.url, f"SELECT * FROM {METRICS_TABLE}")
    found = {(row["tutor_id"], row["window"]): row for row in table.iter_rows(named=True)}
    if found.keys() != expected.metrics.keys():
        wrong.append(f"{len(found)} rows in the table, expected {len(expected.metrics)}")
        return wrong
    for key, numbers in expected.metrics.items():
        for name, number in numbers.items():
            report.count("numbers compared")
            if not _is(found[key][name], number):
                wrong.append(f"{name} of {key} is {found[key][name]}, expected {number}")
        if found[key]["performance_tier"] != oracle.tier(found[key]):
            wrong.append(f"tier of {key} is {found[key]['performance_tier']}")
    return wrong


def _is(found: float | None, exact: Fraction | int | None) -> bool:
    """Whether a number is the exact one, rounded to two decimals where it is no count."""
    if found is None or exact is None:
        return found is exact
    if isinstance(exact, int):
        return found == exact
    # A float beside a half may be rounded to either side.
    return round(found, 2) == found and abs(Fraction(found) - exact) <= Fraction(5_000_001, 10**9)
