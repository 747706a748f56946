"""A case's result: medians, ratios and whether the answers are equal, as JSON can hold it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from benchmarks.contestants import Measured
from benchmarks.machine import machine
from benchmarks.platforms import Platform


def result(
    case: str,
    platform: Platform,
    *,
    ours: Mapping[str, float],
    peers: Mapping[str, float],
    compared: str,
    peak_rss_bytes: int,
    peer_peak_rss_bytes: Mapping[str, int],
    differing: Mapping[str, int],
    **more: Any,
) -> dict[str, Any]:
    """Compose the result of a case.

    Args:
        case: Its name.
        platform: What it was measured on.
        ours: Our seconds by stage.
        peers: Seconds by peer.
        compared: The stage of ours that the peers' seconds are compared with.
        peak_rss_bytes: Memory of our processes.
        peer_peak_rss_bytes: That of each peer.
        differing: Number of rows that differ from ours, by who computed them.
        more: What else the case says.

    Returns:
        The result; a peer's ratio, its time over ours, is none where any row differs.
    """
    equal = {name: not rows for name, rows in differing.items()}
    return {
        "case": case,
        "tutors": platform.tutors,
        "sessions": platform.sessions,
        "date": platform.end.isoformat(),
        "seconds": {**_rounded(ours), "peers": _rounded(peers)},
        "compared": compared,
        "ratio_to": {
            name: round(seconds / ours[compared], 2) if equal.get(name, True) else None
            for name, seconds in peers.items()
        },
        "peak_rss_bytes": peak_rss_bytes,
        "peer_peak_rss_bytes": dict(peer_peak_rss_bytes),
        "answers_equal": {**equal, "all": all(equal.values())},
        "rows_differing": dict(differing),
        **more,
        "measured_on": datetime.now(UTC).date().isoformat(),
        "machine": machine(platform),
    }


def median_seconds(measured: Sequence[Measured]) -> dict[str, float]:
    """The median of each stage."""
    return {stage: median(one.seconds[stage] for one in measured) for stage in measured[0].seconds}


def peak(measured: Sequence[Measured]) -> int:
    """The most memory that any of them took."""
    return max(one.peak_rss_bytes for one in measured)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in seconds.items()}
