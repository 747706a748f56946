"""``python -m benchmarks.peers NAME``: measure one peer, in a process of its own.

The task comes as JSON on standard input; seconds and peak memory go as JSON to standard output.
"""

import json
import resource
import sys
from pathlib import Path

from benchmarks.peers import Task, named


def _peak_rss_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says begins with the memory of the process that started this one.
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure the peer that the argument names."""
    task = Task(**json.load(sys.stdin))
    seconds = named(sys.argv[1]).measure(task)
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": _peak_rss_bytes()}))


main()
