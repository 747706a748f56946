"""What the figures were measured on."""

import os
import platform as system
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.platforms import Platform


def machine(platform: Platform) -> dict[str, Any]:
    """Processor, cores, memory, and the versions of what does the work."""
    with platform.connect() as connection:
        [postgres] = connection.execute("SHOW server_version").fetchone() or ("",)
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": system.python_version(),
        "polars": version("polars"),
        "dagster": version("dagster"),
        "postgres": postgres,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return system.processor() or system.machine()
