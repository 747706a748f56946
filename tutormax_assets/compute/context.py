"""What a task is computed with."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from tutormax_assets.source.platform import PlatformDatabase


@dataclass(frozen=True)
class TaskContext:
    """The surroundings of a task, in the process that computes it.

    A task is sent and holds no secret, so it does not say where the platform is: that is what the
    settings of the computing process say.

    Attributes:
        database: The platform's database.
        home_path: The home of that process, for rows that wait in files.
        log: Where the task logs.
        over: Set once the run of this process ends early: what has failed is not tried again then.
    """

    database: PlatformDatabase
    home_path: Path
    log: logging.Logger
    over: Event = field(default_factory=Event)
