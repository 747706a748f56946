"""Where shards are computed: in the process of the run, or by the workers of a Dask cluster.

A function of a module is mapped over small tasks, one for each shard of tutors, and gives a small
report of each. Rows are read and written by whoever computes the shard.
"""

from collections.abc import Mapping
from itertools import islice

from tutormax_assets.database.faults import reason
from tutormax_assets.errors import TutormaxError

_NAMED = 3


class ShardsError(TutormaxError):
    """Some of several shards failed, and all others are done.

    Attributes:
        errors: What each failed shard raised, by its name and in the order of the tasks.
    """

    def __init__(self, errors: Mapping[str, BaseException], *, of: int) -> None:
        self.errors = dict(errors)
        named = "; ".join(
            f"{name}: {reason(error).rstrip('.')}"
            for name, error in islice(self.errors.items(), _NAMED)
        )
        more = len(self.errors) - _NAMED
        super().__init__(
            f"{len(self.errors)} of {of} shards failed: {named}"
            f"{f'; and {more} more, which the log names' if more > 0 else ''}."
            " The others are kept; fix the cause and run the date again."
        )


class EarlierStepError(TutormaxError):
    """A shard lacks what an earlier step should have computed; the message says why."""


class DaskError(TutormaxError):
    """The Dask cluster cannot be used, or not any more; the message says what to do."""

    affects_every_date = True


class KilledShardError(TutormaxError):
    """Each worker that computed a shard died of it."""
