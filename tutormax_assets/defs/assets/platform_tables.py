"""The platform's own tables: read, never written."""

from typing import Literal

import dagster as dg

from tutormax_assets.defs.assets import OWNERS

_DESCRIPTIONS = {
    "tutors": "One row per tutor. Only the id and the status are read.",
    "sessions": "One row per tutoring session, scheduled or held.",
    "student_feedback": "At most one row per session. Only ids and the overall rating are read.",
    "tutor_events": "One row per thing a tutor did. Only logins and message responses are read.",
}

PLATFORM_TABLES = tuple(_DESCRIPTIONS)
"""The names of these assets."""


def platform_tables(source: Literal["postgres", "parquet"]) -> list[dg.AssetSpec]:
    """The four source tables as external assets.

    Args:
        source: What holds them.
    """
    return [
        dg.AssetSpec(
            table,
            description=description,
            group_name="platform",
            owners=OWNERS,
            kinds={source},
            metadata={"dagster/table_name": table},
        )
        for table, description in _DESCRIPTIONS.items()
    ]
