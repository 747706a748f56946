"""What this package needs of Dagster that has no public name, each with its reason.

Nothing else in the package imports a private module of Dagster's or touches a private attribute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import dagster as dg
import sqlalchemy as sa
from dagster._core.definitions.asset_checks.asset_check_evaluation import (  # noqa: TID251
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.remote_origin import (  # noqa: TID251
    RegisteredCodeLocationOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.storage.event_log import SqliteEventLogStorage  # noqa: TID251
from dagster._serdes import ConfigurableClassData  # noqa: TID251

__all__ = [
    # A storage is handed what dagster.yaml says of it in this type, and gives it back.
    "ConfigurableClassData",
    # The public base classes of an event log hold none of its SQL, which is a thousand lines.
    "SqliteEventLogStorage",
    "TargetMaterialization",
    "engines",
    "forget_file_of_run",
    "runs_of_code_location",
]

_REPOSITORY = "__repository__"
"""Dagster's name for the definitions of a code location."""

TargetMaterialization = AssetCheckEvaluationTargetMaterializationData
"""The materialization that the result of a check is about.

A plain ``dg.AssetCheckResult`` loses its partition in a range. A ``dg.AssetCheckEvaluation`` keeps
it, but the UI counts it only if it points to the partition's newest materialization.
"""


@contextmanager
def runs_of_code_location(
    instance: dg.DagsterInstance, *, code_location: str, job_name: str
) -> Iterator[None]:
    """Put runs of this process on record as runs of a code location, until the block ends.

    The UI then shows them in the timeline and with their job, and can re-execute them: it goes by
    the origin on a run's record, for which ``execute_in_process`` has no argument. The code
    location itself is neither loaded nor reached.

    Args:
        instance: Where the runs are on record.
        code_location: Its name in the UI.
        job_name: The job that is run.
    """
    origin = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(code_location), _REPOSITORY)
    recorder: Any = instance
    recorder.create_run_for_job = partial(
        instance.create_run_for_job, remote_job_origin=origin.get_job_origin(job_name)
    )
    try:
        yield
    finally:
        del recorder.create_run_for_job


def forget_file_of_run(storage: SqliteEventLogStorage, run_id: str) -> None:
    """Have the tables of a run's file made again when the file is opened next.

    Dagster remembers for which runs it has made them, and has no way to hear that another process
    has deleted the file.
    """
    vars(storage)["_initialized_dbs"].discard(run_id)


def engines(instance: dg.DagsterInstance) -> list[sa.Engine]:
    """The engines of those storages of an instance that are in PostgreSQL.

    Dagster neither probes the connections of a pool before use nor closes the pool.
    """
    storages: tuple[Any, ...] = (
        instance.run_storage,
        instance.event_log_storage,
        instance.schedule_storage,
    )
    found = (getattr(storage, "_engine", None) for storage in storages)
    return [
        engine
        for engine in found
        if isinstance(engine, sa.Engine) and engine.dialect.name == "postgresql"
    ]
