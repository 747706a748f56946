"""Rows that break the source contract, as real platforms have some."""

from collections.abc import Sequence

import numpy as np
import polars as pl


def break_rows(
    rng: np.random.Generator,
    share: float,
    tutor_ids: pl.Series,
    sessions: pl.DataFrame,
    feedback: pl.DataFrame,
    events: pl.DataFrame,
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Sessions, feedback and events with this share of the rows of each broken."""
    breaches_of_sessions = [
        {"engagement_score": pl.lit(1.7)},
        {"engagement_score": pl.lit(-0.2)},
        {"late_start_minutes": pl.lit(-5, dtype=pl.Int32)},
        {"session_number": pl.lit(0, dtype=pl.Int32)},
    ]
    breaches_of_feedback = [
        {"overall_rating": pl.lit(0, dtype=pl.Int32)},
        {"overall_rating": pl.lit(6, dtype=pl.Int32)},
    ]
    if len(tutor_ids) > 1:
        # The neighbour is a tutor that exists, as the foreign key demands.
        neighbours = tutor_ids.gather((np.arange(len(tutor_ids)) + 1) % len(tutor_ids))
        other = pl.col("tutor_id").replace_strict(tutor_ids, neighbours)
        breaches_of_feedback.append({"tutor_id": other})
    breaches_of_events = [
        {
            "event_type": pl.lit("message_response"),
            "metadata": pl.lit(f'{{"response_time_minutes": {value}}}'),
        }
        for value in ('"fast"', "-5", '"NaN"')
    ]
    return (
        _breach(rng, share, sessions, breaches_of_sessions),
        _breach(rng, share, feedback, breaches_of_feedback),
        _breach(rng, share, events, breaches_of_events),
    )


def _breach(
    rng: np.random.Generator,
    share: float,
    frame: pl.DataFrame,
    breaches: Sequence[dict[str, pl.Expr]],
) -> pl.DataFrame:
    """Overwrite columns in ``round(share * rows)`` rows; the breaches take turns."""
    chosen = rng.choice(len(frame), round(share * len(frame)), replace=False)
    turn = np.full(len(frame), -1)
    turn[chosen] = np.arange(len(chosen)) % len(breaches)
    for place, breach in enumerate(breaches):
        is_hit = pl.lit(pl.Series(turn == place))
        frame = frame.with_columns(
            pl.when(is_hit).then(value).otherwise(name).alias(name)
            for name, value in breach.items()
        )
    return frame
