"""Where the time of a run went, from what the run itself put on record in Dagster."""

from collections import defaultdict
from datetime import datetime
from pathlib import Path

import dagster as dg

_EXPLAINING = "explain"
# The stage that a number of seconds in the metadata of a materialization belongs to.
_STAGES = {
    "read_seconds": "read",
    "clean_seconds": "compute",
    "all_windows_compute_seconds": "compute",
    "compute_seconds": "compute",
    "write_seconds": "persist",
    "reasons_write_seconds": _EXPLAINING,
}
# Whatever these assets say of their seconds is not of the metrics.
_EXPLAINING_ASSETS = {"tutor_tier_reasons", "window_edges"}
# The steps of these are counted as a whole.
_LEFT_OUT = {"tutor_tier_changes", "daily_report"}
# Of the run as a whole, and repeated on each of its dates.
_ONCE_A_RUN = {"read_seconds", "clean_seconds"}
# Of the reading as a whole, and repeated on each of its assets.
_ONCE_A_READING = {"read_seconds"}
_LAST_STEP = "tutor_performance_metrics"
_EXPLAINING_STEPS = {"tutor_tier_changes", "tutor_tier_changes_checks", "daily_report"}


class StagesError(Exception):
    """The records of a run are not as expected; the message says how."""


def stages(home: Path, *, since: datetime) -> dict[str, float]:
    """Seconds by stage of the runs that began since then, added up.

    Args:
        home: The home that they ran in.
        since: Runs that were put on record before do not count.

    Returns:
        ``read``, ``compute`` and ``persist``; ``read_to_persisted``, which is their sum;
        ``explain``, what the tables of reasons and changes and the report took; and ``run``, from
        the start of the first step to the end of the metrics table's, Dagster's own work and the
        checks included.

    Raises:
        StagesError: There is no such run, or it says something of which the stage is not known.
    """
    seconds: dict[str, float] = defaultdict(float)
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        records = instance.get_run_records(dg.RunsFilter(created_after=since))
        if not records:
            raise StagesError(f"{home} has no run on record since {since}; expected at least one")
        for record in records:
            run_id = record.dagster_run.run_id
            for stage, of_stage in _of_run(instance, run_id).items():
                seconds[stage] += of_stage
            steps = instance.get_run_step_stats(run_id)
            began = min(step.start_time for step in steps if step.start_time is not None)
            ends = [step.end_time for step in steps if step.step_key == _LAST_STEP]
            last = next(iter(ends), None)
            if last is None:
                raise StagesError(f"Run {run_id} has not ended the step {_LAST_STEP}; expected it")
            seconds["run"] += last - began
            seconds[_EXPLAINING] += sum(
                step.end_time - step.start_time
                for step in steps
                if step.step_key in _EXPLAINING_STEPS and step.start_time and step.end_time
            )
    seconds["read_to_persisted"] = sum(
        seconds[stage] for stage in set(_STAGES.values()) - {_EXPLAINING}
    )
    return dict(seconds)


def _of_run(instance: dg.DagsterInstance, run_id: str) -> dict[str, float]:
    found: dict[tuple[str, str, str], float] = {}
    for record in instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
    ).records:
        materialization = record.asset_materialization
        if materialization is None:
            continue
        asset = materialization.asset_key.to_user_string()
        if asset in _LEFT_OUT:
            continue
        for key, value in materialization.metadata.items():
            if not key.endswith("_seconds"):
                continue
            if key not in _STAGES:
                raise StagesError(
                    f"{asset} says {key}; expected one of {', '.join(_STAGES)}."
                    " Name its stage in benchmarks/stages.py."
                )
            partition = "" if key in _ONCE_A_RUN else materialization.partition or ""
            of = "" if key in _ONCE_A_READING else asset
            found[of, partition, key] = float(str(value.value))
    seconds = dict.fromkeys(_STAGES.values(), 0.0)
    for (asset, _, key), of_asset in found.items():
        seconds[_EXPLAINING if asset in _EXPLAINING_ASSETS else _STAGES[key]] += of_asset
    return seconds
