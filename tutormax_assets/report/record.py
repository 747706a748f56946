"""What a run has put on record in Dagster of a reference date."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

_TYPES = {
    dg.DagsterEventType.ASSET_CHECK_EVALUATION,
    dg.DagsterEventType.ASSET_MATERIALIZATION,
    dg.DagsterEventType.ASSET_OBSERVATION,
}


@dataclass(frozen=True)
class CheckResult:
    """What a check found.

    Attributes:
        asset: The asset.
        name: The check.
        passed: Whether it passed.
        severity: ``WARN`` or ``ERROR``, of one that did not.
        says: Its sentence, if any.
        metadata: What shows with it in the UI.
    """

    asset: str
    name: str
    passed: bool
    severity: str
    says: str
    metadata: Mapping[str, dg.MetadataValue[Any]] = field(default_factory=dict)


@dataclass
class DateRecord:
    """What is on record of a reference date.

    Attributes:
        checks: By asset and name.
        metadata: Of the newest event of each asset.
    """

    checks: list[CheckResult] = field(default_factory=list)
    metadata: dict[str, Mapping[str, dg.MetadataValue[Any]]] = field(default_factory=dict)


def read_record(instance: dg.DagsterInstance, run_id: str) -> dict[str, DateRecord]:
    """What a run has put on record, by partition key."""
    found: dict[str, DateRecord] = {}
    for record in instance.get_records_for_run(run_id, of_type=_TYPES).records:
        event = record.event_log_entry.get_dagster_event()
        if event.event_type is dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            evaluation = event.asset_check_evaluation_data
            if evaluation.partition is not None:
                of_date = found.setdefault(evaluation.partition, DateRecord())
                of_date.checks.append(_check_result(evaluation))
            continue
        said = record.asset_materialization or record.asset_observation
        if said is not None and said.partition is not None:
            of_date = found.setdefault(said.partition, DateRecord())
            of_date.metadata[said.asset_key.to_user_string()] = said.metadata
    return found


def _check_result(evaluation: dg.AssetCheckEvaluation) -> CheckResult:
    return CheckResult(
        evaluation.asset_key.to_user_string(),
        evaluation.check_name,
        evaluation.passed,
        evaluation.severity.value,
        evaluation.description or "",
        evaluation.metadata,
    )


def newest_record(instance: dg.DagsterInstance, asset: str, key: str) -> DateRecord:
    """What the newest run of a reference date has put on record; nothing if there is none."""
    wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key])
    records: Sequence[dg.EventLogRecord] = instance.fetch_materializations(wanted, limit=1).records
    for record in records:
        return read_record(instance, record.run_id).get(key, DateRecord())
    return DateRecord()


def recorded_numbers(
    instance: dg.DagsterInstance, asset: str, keys: Sequence[str], names: Collection[str]
) -> dict[str, dict[str, float]]:
    """Numbers in the metadata of the newest materialization of partitions, by key and name.

    Args:
        instance: Where they are on record.
        asset: The asset.
        keys: The partitions; those that are not on record are left out.
        names: Names of the metadata.
    """
    found: dict[str, dict[str, float]] = {}
    for key in keys:
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[key])
        for record in instance.fetch_materializations(wanted, limit=1).records:
            said = record.asset_materialization
            found[key] = {
                name: value.value
                for name, value in (said.metadata if said else {}).items()
                if name in names and isinstance(value, dg.FloatMetadataValue)
                if value.value is not None
            }
    return found
