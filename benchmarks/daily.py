"""One reference date, computed by the product and by its peers in turn."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.contestants import (
    ORACLE,
    Measured,
    differing,
    differing_from_oracle,
    peer,
    product,
)
from benchmarks.peers import ROSTER
from benchmarks.platforms import Platform
from benchmarks.results import median_seconds, peak, result


def measure(
    platform: Platform, *, peers: Sequence[str], repeats: int, loop_tutors: int
) -> dict[str, Any]:
    """Measure one reference date.

    Args:
        platform: Whose last date is computed.
        peers: Names of peers; the loop is measured once, the others in each round.
        repeats: Rounds. In each, every contestant computes the date from the same state.
        loop_tutors: Tutors that the loop computes; its time is scaled to all.

    Returns:
        What ``report`` shows, as JSON can hold it.
    """
    ours: list[Measured] = []
    theirs: dict[str, list[Measured]] = defaultdict(list)
    rows_differing: Counter[str] = Counter()
    day = platform.end
    for _ in range(repeats):
        platform.forget(day, day)
        ours.append(product(platform, "run", "--date", day.isoformat()))
        for name in peers:
            is_loop = name == "loop"
            if is_loop and theirs[name]:
                continue
            platform.renew_twin()
            tutors = loop_tutors if is_loop else None
            theirs[name].append(peer(platform, name, day, tutors=tutors))
            rows_differing[name] += differing(platform, day, exact=name == "floor", sample=is_loop)
    rows_differing[ORACLE] = differing_from_oracle(platform, day)
    seconds = median_seconds(ours)
    totals = {name: median_seconds(measured)["total"] for name, measured in theirs.items()}
    scaled_from = {}
    if "loop" in totals and loop_tutors < (roster := _roster_size(platform)):
        scaled_from["loop"] = {"tutors": loop_tutors, "of": roster, "seconds": totals["loop"]}
        totals["loop"] *= roster / loop_tutors
    return result(
        "daily",
        platform,
        ours=seconds,
        peers=totals,
        compared="read_to_persisted",
        peak_rss_bytes=peak(ours),
        peer_peak_rss_bytes={name: peak(measured) for name, measured in theirs.items()},
        differing=rows_differing,
        scaled_from=scaled_from,
        repeats=repeats,
    )


def _roster_size(platform: Platform) -> int:
    with platform.connect() as connection:
        return len(connection.execute(ROSTER).fetchall())
