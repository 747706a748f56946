"""The assets, one file a stage: each plans tasks, has them computed and keeps what they stored.

They are built by functions, because the timezone and the windows are settings. Rows do not pass
through Dagster: the process that computes a shard stores it, and the partition store lists it.
"""

import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import dagster as dg
import dataframely as dy
import sqlalchemy as sa

from tutormax_assets.storage.partition import Partition
from tutormax_assets.storage.store import PartitionStore

# Range runs rest on it, and the version that it may change in is pinned.
warnings.filterwarnings("ignore", message="Parameter `backfill_policy`", category=dg.BetaWarning)

OWNERS = ["team:tutor-quality"]

PLATFORM_POOL = "platform"
"""Pool of whatever reads or writes the platform's database; the instance says how many at once."""


def reference_dates(context: dg.AssetExecutionContext) -> dict[str, date]:
    """The reference dates of a run by partition key: one, or all of a range."""
    return {key: date.fromisoformat(key) for key in context.partition_keys}


def keep_partitions(
    context: dg.AssetExecutionContext,
    store: PartitionStore,
    asset: str,
    partitions: Mapping[str, Partition],
) -> None:
    """Make partitions of an asset, by key, those that are read, and record what they hold.

    Raises:
        StorageError: The storage cannot be written, or another run has written what this one had
            kept.
    """
    for key, partition in store.keep(partitions).items():
        failed = {str(number): partition.failed[number] for number in sorted(partition.failed)}
        context.add_asset_metadata(
            {
                "path": dg.MetadataValue.path(str(partition.path)),
                "shards": len(partition.parts),
                **({"failed_shards": dg.MetadataValue.json(failed)} if failed else {}),
                "size_bytes": sum(part.size_bytes for part in partition.parts),
                "dagster/partition_row_count": sum(part.rows for part in partition.parts),
                "write_seconds": round(partition.seconds, 3),
            },
            asset_key=asset,
            partition_key=key,
        )


Lineage = Mapping[str, Sequence[tuple[str, str]]]
"""By column, the columns that it is made from, each as asset and column."""


def frame_metadata(schema: type[dy.Schema], lineage: Lineage) -> Mapping[str, Any]:
    """Column names, types, descriptions and lineage of a frame, as the UI shows them."""
    columns = [
        dg.TableColumn(
            name,
            type=str(column.dtype),
            description=column.description,
            constraints=dg.TableColumnConstraints(
                nullable=column.nullable, unique=schema.primary_key() == [name]
            ),
        )
        for name, column in schema.columns().items()
    ]
    return {"dagster/column_schema": dg.TableSchema(columns), **lineage_metadata(lineage)}


def table_metadata(table: sa.Table, schema: type[dy.Schema]) -> Mapping[str, Any]:
    """Name, column names, types and descriptions of a database table, as the UI shows them.

    Args:
        table: The table.
        schema: Describes those of its columns that have the same name.
    """
    described = {name: column.description for name, column in schema.columns().items()}
    keys = list(table.primary_key)
    columns = [
        dg.TableColumn(
            column.name,
            type=str(column.type),
            description=described.get(column.name),
            constraints=dg.TableColumnConstraints(
                nullable=bool(column.nullable), unique=keys == [column]
            ),
        )
        for column in table.columns
    ]
    return {
        "dagster/table_name": table.name,
        "dagster/column_schema": dg.TableSchema(columns),
    }


def lineage_metadata(lineage: Lineage) -> Mapping[str, Any]:
    """Column lineage, as the UI shows it."""
    return {
        "dagster/column_lineage": dg.TableColumnLineage(
            {
                column: [
                    dg.TableColumnDep(asset_key=dg.AssetKey(asset), column_name=source)
                    for asset, source in sources
                ]
                for column, sources in lineage.items()
            }
        )
    }
