"""Other ways to the rows of a reference date, each with the rules of the product.

A peer is a module with a function ``measure``: it imports and connects, and then takes the time
from its first query to its last commit, by stage. It writes the twin so that it can be run again.
"""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from typing import Any, Protocol, cast

from benchmarks.platforms import midnight

WINDOWS = {"7day": 7, "30day": 30, "90day": 90}

ROSTER = "SELECT tutor_id FROM tutors WHERE lower(status) = 'active'"


_MODULES = {
    "sql": "in_sql",
    "pandas": "in_pandas",
    "duckdb": "in_duckdb",
    "loop": "loop",
    "floor": "floor",
    "upsert_floor": "upsert_floor",
}


class Peer(Protocol):
    """The module of a peer."""

    def measure(self, task: "Task", /) -> dict[str, float]:
        """Compute a reference date and write the twin; seconds by stage."""


@dataclass(frozen=True)
class Task:
    """What a peer is asked for.

    Attributes:
        conninfo: libpq's connection string of the platform.
        day: The reference date, ISO.
        cores: How many cores there are.
        tutors: Only so many tutors, if the peer can be asked for fewer than all.
    """

    conninfo: str
    day: str
    cores: int
    tutors: int | None = None

    @property
    def end(self) -> datetime:
        """The instant at which all windows end."""
        return midnight(date.fromisoformat(self.day))

    def start(self, days: int) -> datetime:
        """The instant at which a window of so many days starts."""
        return self.end - timedelta(days=days)

    def bounds(self) -> dict[str, datetime]:
        """The instants as parameters of a query."""
        starts = {f"start_{days}": self.start(days) for days in WINDOWS.values()}
        return {**starts, "end": self.end}

    def to_dict(self) -> dict[str, object]:
        """The task as JSON can hold it."""
        return asdict(self)


def named(name: str) -> Peer:
    """The peer of that name; its libraries are imported when it measures."""
    peer: Any = importlib.import_module(f"benchmarks.peers.{_MODULES[name]}")
    return cast(Peer, peer)


def sampled(tutor_ids: Sequence[str], tutors: int | None) -> list[str]:
    """So many of the tutors, evenly spread."""
    if tutors is None or tutors >= len(tutor_ids):
        return list(tutor_ids)
    return [tutor_ids[n * len(tutor_ids) // tutors] for n in range(tutors)]
