"""What starting takes: the command line, the imports, and a run with hardly anything to do."""

from collections import defaultdict
from statistics import median
from typing import Any

from benchmarks import processes
from benchmarks.contestants import ORACLE, differing_from_oracle
from benchmarks.platforms import PRODUCT, TUTORMAX, Platform
from benchmarks.results import result


def measure(platform: Platform, *, repeats: int) -> dict[str, Any]:
    """Measure whole processes, in turn.

    Args:
        platform: One of a few tutors.
        repeats: Rounds.

    Returns:
        What ``report`` shows, as JSON can hold it. ``python`` is the interpreter alone.
    """
    import_definitions = (
        "from tutormax_assets.definitions import defs; defs().resolve_all_asset_specs()"
    )
    python = str(PRODUCT / "python")
    run = [TUTORMAX, "run", "--date", platform.end.isoformat(), "--json", "--quiet"]
    commands = {
        "python": [python, "-c", "pass"],
        "help": [TUTORMAX, "--help"],
        "import": [python, "-c", "import tutormax_assets"],
        "definitions": [python, "-c", import_definitions],
        "run": run,
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: list[int] = []
    for _ in range(repeats):
        platform.forget(platform.end, platform.end)
        for name, command in commands.items():
            done = processes.run(command, environment=platform.environment(), folder=platform.home)
            seconds[name].append(done.seconds)
            peaks.append(done.peak_rss_bytes)
    return result(
        "start-up",
        platform,
        ours={name: median(taken) for name, taken in seconds.items()},
        peers={},
        compared="run",
        peak_rss_bytes=max(peaks),
        peer_peak_rss_bytes={},
        differing={ORACLE: differing_from_oracle(platform, platform.end)},
        repeats=repeats,
    )
