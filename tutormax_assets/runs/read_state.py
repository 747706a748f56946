"""What a stored reference date was read from: a mark beside the roster of the date.

It is written before the rows that it is about. It holds only once the runs that it names have
succeeded, which Dagster records last: a run that is killed leaves a mark that does not hold.
"""

from datetime import datetime
from importlib.metadata import version

from pydantic import BaseModel, ValidationError

from tutormax_assets.metrics.policy import Policy
from tutormax_assets.source.horizon import Horizon, UnknownChangesError, expect_same_server
from tutormax_assets.storage.files import read_text, write_text
from tutormax_assets.storage.store import state_path


class ReadState(BaseModel, frozen=True):
    """What a stored reference date was read from.

    Attributes:
        run_ids: The runs whose rows are stored.
        read_at: When the platform was read; rows of some tutors may be newer.
        computed_with: Whatever else the rows follow from, as ``computed_with`` writes it.
        horizon: What later rows are told by, if the platform tells.
        unknown: Why it does not.
    """

    run_ids: tuple[str, ...]
    read_at: datetime
    computed_with: str
    horizon: Horizon | None = None
    unknown: str = ""

    def of_some_tutors(self, before: "ReadState", refreshed: str | None) -> "ReadState":
        """The state once a run has stored the rows of some tutors only.

        Args:
            before: The state of the others' rows.
            refreshed: That with a later horizon, up to which only these tutors have changed, as
                JSON; None if others may have.
        """
        found = None if refreshed is None else ReadState.model_validate_json(refreshed)
        if found is None or found.horizon is None or found.run_ids != before.run_ids:
            # Another run may have stored rows meanwhile.
            return before.model_copy(update={"run_ids": (*before.run_ids, *self.run_ids)})
        if self.horizon is None:
            return self
        try:
            expect_same_server(found.horizon, self.horizon)
        except UnknownChangesError as error:
            return self.model_copy(update={"horizon": None, "unknown": str(error)})
        return self.model_copy(update={"horizon": found.horizon, "read_at": found.read_at})


def computed_with(policy: Policy, *, timezone: str, include_inactive: bool) -> str:
    """The version and the options that the rows of a date follow from, in words."""
    tutors = "tutors of any status" if include_inactive else "active tutors"
    return (
        f"version {version('tutormax-assets')}, policy {policy.digest}, timezone {timezone},"
        f" {tutors}"
    )


def load_state(base_path: str, partition_key: str) -> ReadState | None:
    """The state of a reference date; None where it has none that this version can read."""
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
