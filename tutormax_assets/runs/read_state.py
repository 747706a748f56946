"""The read state of a reference date: the runs that stored its rows, and their horizon.

It is written before the rows, and becomes valid when Dagster records the success of the runs that
it names. A killed run therefore leaves an invalid state.
"""

from datetime import datetime
from importlib.metadata import version

from pydantic import BaseModel, ValidationError

from tutormax_assets.metrics.policy import Policy
from tutormax_assets.source.horizon import Horizon, UnknownChangesError, expect_same_server
from tutormax_assets.storage.files import read_text, write_text
from tutormax_assets.storage.store import state_path


class ReadState(BaseModel, frozen=True):
    """The read state of a reference date.

    Attributes:
        run_ids: The runs that stored rows of the date.
        read_at: The instant of the read; rows of some tutors may be newer.
        computed_with: Version and options of the runs, as the function of this name writes them.
        horizon: Distinguishes rows that came later; None if the platform does not support it.
        unknown: The reason for None.
    """

    run_ids: tuple[str, ...]
    read_at: datetime
    computed_with: str
    horizon: Horizon | None = None
    unknown: str = ""

    def of_some_tutors(self, before: "ReadState", refreshed: str | None) -> "ReadState":
        """Merge the state of a run of some tutors into that of the date.

        Args:
            before: The state of the date before the run.
            refreshed: The same state with a later horizon as JSON, if only the tutors of the run
                have changed up to that horizon; None if others may have changed.
        """
        found = None if refreshed is None else ReadState.model_validate_json(refreshed)
        if found is None or found.horizon is None or found.run_ids != before.run_ids:
            # The horizon is not valid for rows that another run has stored meanwhile.
            return before.model_copy(update={"run_ids": (*before.run_ids, *self.run_ids)})
        if self.horizon is None:
            return self
        try:
            expect_same_server(found.horizon, self.horizon)
        except UnknownChangesError as error:
            return self.model_copy(update={"horizon": None, "unknown": str(error)})
        return self.model_copy(update={"horizon": found.horizon, "read_at": found.read_at})


def computed_with(policy: Policy, *, timezone: str, include_inactive: bool) -> str:
    """The version and the options that determine the rows of a date, as text."""
    tutors = "tutors of any status" if include_inactive else "active tutors"
    return (
        f"version {version('tutormax-assets')}, policy {policy.digest}, timezone {timezone},"
        f" {tutors}"
    )


def load_state(base_path: str, partition_key: str) -> ReadState | None:
    """The state of a reference date; None if it is missing or unreadable."""
    text = read_text(state_path(base_path, partition_key))
    try:
        return None if text is None else ReadState.model_validate_json(text)
    except ValidationError:
        return None


def keep_state(base_path: str, partition_key: str, state: ReadState) -> None:
    """Store the state of a reference date.

    Raises:
        StorageError: The storage cannot be written.
    """
    write_text(state_path(base_path, partition_key), state.model_dump_json())
