"""The code location: what is in it, and that loading it needs and starts nothing."""

import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tutormax_assets.dates import today
from tutormax_assets.definitions import JOB_NAME, build_definitions, kept_in_storage
from tutormax_assets.metrics.policy import Policy, PolicyError
from tutormax_assets.settings import Settings, SettingsError, load_settings
from tutormax_assets_tests.conftest import PARQUET_ASSETS
from tutormax_assets_tests.defs.checks.test_runs import ALL as ALL_CHECKS

PLATFORM = {"tutors", "sessions", "student_feedback", "tutor_events"}
COMPUTED = {*PARQUET_ASSETS, "tutor_performance_metrics", "daily_report"}
ASKED_FOR = {"tutor_metrics_as_of", "live_metrics"}
"""Assets of no schedule: somebody asks for them."""
TABLES = {
    "tutor_performance_metrics": "tutor_performance_metrics",
    "live_metrics": "tutor_live_metrics",
}
GROUPS = {
    **dict.fromkeys(PLATFORM, "platform"),
    **dict.fromkeys(COMPUTED, "snapshots"),
    **dict.fromkeys(
        [
            asset
            for asset in PARQUET_ASSETS
            if asset.startswith(("metrics_", "window_", "tutor_tier"))
        ],
        "metrics",
    ),
    "tutor_performance_metrics": "persisted",
    "daily_report": "persisted",
    "tutor_metrics_as_of": "training",
    "live_metrics": "live",
}


@pytest.fixture
def definitions() -> dg.Definitions:
    return build_definitions(load_settings())


def specs_of(definitions: dg.Definitions) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}


def assets_of(definitions: dg.Definitions) -> list[dg.AssetsDefinition]:
    return [asset for asset in definitions.assets or [] if isinstance(asset, dg.AssetsDefinition)]


def test_they_load_without_a_database_or_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://nobody@/none?host=/nowhere")

    dg.Definitions.validate_loadable(build_definitions(load_settings()))

    assert list(tmp_path.iterdir()) == []


def test_importing_them_starts_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tutormax_assets.definitions"],
        cwd=tmp_path,
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_there_are_exactly_these_assets(definitions: dg.Definitions) -> None:
    specs = specs_of(definitions)

    assert set(specs) == PLATFORM | COMPUTED | ASKED_FOR
    assert {key: spec.group_name for key, spec in specs.items()} == GROUPS
    assert {
        asset.key.to_user_string()
        for asset in definitions.assets or []
        if isinstance(asset, dg.AssetSpec)
    } == PLATFORM


def test_every_asset_says_what_it_is_and_whose(definitions: dg.Definitions) -> None:
    for key, spec in specs_of(definitions).items():
        assert len(str(spec.description)) > 30, key
        grain = "one page" if key == "daily_report" else "one row"
        assert grain in str(spec.description).lower() or key in PLATFORM, key
        assert spec.owners == ["team:tutor-quality"], key
        if key == "daily_report":
            expected = {"html"}
        elif key in {*PLATFORM, *TABLES}:
            expected = {"postgres"}
        else:
            expected = {"polars", "parquet"}
        if key == "tutor_tier_changes":
            # Its step writes the table of the same name.
            expected.add("postgres")
        assert spec.kinds == expected, key


def test_what_every_night_stores_is_cleaned_up(definitions: dg.Definitions) -> None:
    specs = specs_of(definitions).values()

    stored = {spec.key for spec in specs if {"parquet", "html"} & spec.kinds}
    assert stored == {*kept_in_storage(Policy()), dg.AssetKey("tutor_metrics_as_of")}


def test_every_asset_says_its_columns_or_its_table(definitions: dg.Definitions) -> None:
    for key, spec in specs_of(definitions).items():
        schema = spec.metadata.get("dagster/column_schema")
        if key in {*PLATFORM, *TABLES}:
            assert spec.metadata["dagster/table_name"] == TABLES.get(key, key)
            continue
        if key == "daily_report":
            continue
        assert isinstance(schema, dg.TableSchema), key
        assert schema.columns[0].name in ("tutor_id", "source_table"), key
        assert all(column.description for column in schema.columns), key


def test_assets_depend_on_what_they_read(definitions: dg.Definitions) -> None:
    upstream = {
        key: {dep.asset_key.to_user_string() for dep in spec.deps}
        for key, spec in specs_of(definitions).items()
    }
    frames = {"tutor_roster", "sessions_snapshot", "tutor_events_snapshot"}
    windows = {"metrics_7day", "metrics_30day", "metrics_90day"}
    assert upstream == {
        **{key: set() for key in PLATFORM},
        "tutor_roster": {"tutors"},
        "tutors_left_out": {"tutors"},
        "sessions_snapshot": {"sessions", "student_feedback"},
        "sessions_set_aside": {"sessions", "student_feedback"},
        "tutor_events_snapshot": {"tutor_events"},
        "tutor_events_set_aside": {"tutor_events"},
        **{key: frames for key in windows},
        "tutor_tiers": windows,
        "tutor_tier_reasons": windows,
        "window_edges": frames,
        "tutor_tier_changes": {"tutor_tier_reasons", "window_edges", *windows},
        "tutor_performance_metrics": {"tutor_tiers", "tutor_tier_reasons"},
        "daily_report": {
            "tutor_tiers",
            "tutor_tier_reasons",
            "tutor_tier_changes",
            "tutor_performance_metrics",
        },
        **dict.fromkeys(ASKED_FOR, PLATFORM),
    }


def test_one_job_computes_everything_in_process(definitions: dg.Definitions) -> None:
    job = definitions.resolve_job_def(JOB_NAME)

    assert job.name == "daily_metrics"
    assert {key.to_user_string() for key in job.asset_layer.selected_asset_keys} == COMPUTED
    assert {check.to_user_string() for check in job.asset_layer.asset_graph.asset_check_keys} == {
        f"{asset}:{check}" for asset, check in ALL_CHECKS
    }
    assert job.executor_def is dg.in_process_executor
    assert [job.name for job in definitions.jobs or []] == [
        "daily_metrics",
        "metrics_as_of",
        "refresh_live_metrics",
        "refresh_verification",
        "retention",
    ]


@pytest.mark.parametrize(
    ("setting", "policy"),
    [
        ("", dg.BackfillPolicy.multi_run(max_partitions_per_run=31)),
        ("7", dg.BackfillPolicy.multi_run(max_partitions_per_run=7)),
        ("0", dg.BackfillPolicy.single_run()),
    ],
)
def test_all_share_their_partitions_and_how_many_a_run_takes(
    monkeypatch: pytest.MonkeyPatch, setting: str, policy: dg.BackfillPolicy
) -> None:
    monkeypatch.setenv("TUTORMAX_MAX_DATES_PER_RUN", setting)
    definitions = build_definitions(load_settings())
    assets = [asset for asset in assets_of(definitions) if asset.partitions_def]

    [daily] = {asset.partitions_def for asset in assets}
    assert isinstance(daily, dg.DailyPartitionsDefinition)
    assert {asset.backfill_policy for asset in assets} == {policy}
    keys = {key.to_user_string() for asset in assets for key in asset.keys}
    assert keys == COMPUTED | {"tutor_metrics_as_of"}
    assert definitions.resolve_job_def(JOB_NAME).partitions_def == daily


# Between these two it is never the same day.
@pytest.mark.parametrize("timezone", ["Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_partitions_go_from_the_first_date_up_to_today_there(
    monkeypatch: pytest.MonkeyPatch, timezone: str
) -> None:
    monkeypatch.setenv("TUTORMAX_TIMEZONE", timezone)
    monkeypatch.setenv("TUTORMAX_FIRST_DATE", "2025-03-01")

    before = today(timezone=timezone)
    daily: Any = assets_of(build_definitions(load_settings()))[0].partitions_def
    keys = daily.get_partition_keys()
    after = today(timezone=timezone)

    assert daily.timezone == timezone
    assert keys[0] == "2025-03-01"
    assert before <= date.fromisoformat(keys[-1]) <= after


def settings_with(policy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (folder / "policy.toml").write_text(policy, encoding="utf-8")
    monkeypatch.setenv("TUTORMAX_POLICY", "policy.toml")
    return load_settings()


def test_windows_of_the_policy_file_are_the_assets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_with("windows = [14, 60]", tmp_path, monkeypatch)

    specs = specs_of(build_definitions(settings))

    assert {key for key in specs if key.startswith("metrics_")} == {
        "metrics_14day",
        "metrics_60day",
    }
    assert {dep.asset_key.to_user_string() for dep in specs["tutor_tiers"].deps} == {
        "metrics_14day",
        "metrics_60day",
    }


def test_a_wrong_policy_file_is_refused_when_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_with("[weights]\nlogin = 0.9", tmp_path, monkeypatch)
    with pytest.raises(PolicyError, match=r"login 0\.9 \+ .* expected 1"):
        build_definitions(settings)

    (tmp_path / "policy.toml").unlink()
    with pytest.raises(SettingsError, match=r"TUTORMAX_POLICY names policy\.toml, which cannot"):
        build_definitions(settings)
