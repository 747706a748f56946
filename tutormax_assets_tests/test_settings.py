"""The environment: what is accepted, what is refused, and that no secret shows."""

import grp
import traceback
from datetime import date
from pathlib import Path

import pytest

from tutormax_assets.settings import POSTGRES_VARIABLES, SettingsError, load_settings

SECRET = "hunter2"
POSTGRES = dict(
    zip(POSTGRES_VARIABLES, ["db.example", "5432", "reader", SECRET, "platform"], strict=True)
)


def refusal() -> str:
    with pytest.raises(SettingsError) as error:
        load_settings()
    shown = "".join(traceback.format_exception(error.value))
    assert SECRET not in shown
    return str(error.value)


def test_an_empty_environment_means_the_embedded_database(tmp_path: Path) -> None:
    settings = load_settings()

    assert settings.database_source == "embedded"
    assert settings.home_path == tmp_path / ".tutormax"
    assert settings.storage_path == str(tmp_path / ".tutormax" / "storage")
    assert settings.archive_path == str(tmp_path / ".tutormax" / "archive")
    assert (settings.retention_days, settings.snapshot_retention_days) == (90, 30)
    assert settings.run_retention_days is None
    assert settings.dagster_home_path == tmp_path / ".tutormax" / "dagster"
    assert (settings.timezone, settings.first_date) == ("UTC", date(2024, 1, 1))
    assert (settings.alerts, settings.ui_url) == (None, "http://127.0.0.1:3000")
    assert settings.max_dates_per_run == 31
    assert (settings.source_url, settings.files_group) == (None, None)
    assert (settings.dask_address, settings.dask_no_workers_timeout_seconds) == (None, 60)
    assert (settings.source, settings.lake_path) == ("postgres", None)
    assert (settings.statement_timeout_seconds, settings.lock_timeout_seconds) == (600, 5)
    assert list(tmp_path.iterdir()) == []


def test_everything_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("TUTORMAX_HOME", "~/data")
    monkeypatch.setattr("tutormax_assets.settings.find_spec", lambda module: object())
    monkeypatch.setenv("TUTORMAX_STORAGE", "s3://bucket/folder")
    monkeypatch.setenv("TUTORMAX_ARCHIVE", "gs://bucket/archive")
    monkeypatch.setenv("TUTORMAX_RETENTION_DAYS", "400")
    monkeypatch.setenv("TUTORMAX_SNAPSHOT_RETENTION_DAYS", "7")
    monkeypatch.setenv("TUTORMAX_RUN_RETENTION_DAYS", "7")
    monkeypatch.setenv("TUTORMAX_TIMEZONE", "America/New_York")
    monkeypatch.setenv("TUTORMAX_FIRST_DATE", "2025-02-03")
    monkeypatch.setenv("TUTORMAX_POLICY", "policy.toml")
    monkeypatch.setenv("TUTORMAX_ALERTS", f"slack://{SECRET} json://host")
    monkeypatch.setenv("TUTORMAX_UI_URL", "https://dagster.example.com")
    monkeypatch.setenv("TUTORMAX_MAX_DATES_PER_RUN", "0")
    monkeypatch.setenv("TUTORMAX_SOURCE_URL", f"postgresql://u:{SECRET}@replica/db")
    monkeypatch.setenv("TUTORMAX_SOURCE", "parquet")
    monkeypatch.setenv("TUTORMAX_LAKE", "s3://bucket/lake")
    monkeypatch.setenv("TUTORMAX_STATEMENT_TIMEOUT_SECONDS", "30")
    monkeypatch.setenv("TUTORMAX_LOCK_TIMEOUT_SECONDS", "1")
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", "tcp://[fd00::1]:8786")
    monkeypatch.setenv("TUTORMAX_DASK_NO_WORKERS_TIMEOUT_SECONDS", "5")
    monkeypatch.setenv("DAGSTER_HOME", "dagster-home")

    settings = load_settings()

    assert settings.home_path == tmp_path / "user" / "data"
    assert settings.storage_path == "s3://bucket/folder"
    assert settings.archive_path == "gs://bucket/archive"
    assert (settings.retention_days, settings.snapshot_retention_days) == (400, 7)
    assert settings.run_retention_days == 7
    assert settings.timezone == "America/New_York"
    assert settings.first_date == date(2025, 2, 3)
    assert settings.policy == Path("policy.toml")
    assert settings.alerts is not None
    assert settings.alerts.get_secret_value() == f"slack://{SECRET} json://host"
    assert settings.ui_url == "https://dagster.example.com"
    assert settings.max_dates_per_run == 0
    assert settings.source_url is not None
    assert settings.source_url.get_secret_value() == f"postgresql://u:{SECRET}@replica/db"
    assert (settings.source, settings.lake_path) == ("parquet", "s3://bucket/lake")
    assert (settings.statement_timeout_seconds, settings.lock_timeout_seconds) == (30, 1)
    assert settings.dask_address == "tcp://[fd00::1]:8786"
    assert settings.dask_no_workers_timeout_seconds == 5
    assert settings.dagster_home_path == tmp_path / "dagster-home"


def test_the_path_of_a_lake_is_absolute_and_counts_where_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUTORMAX_LAKE", "lake")
    assert load_settings().lake_path is None

    monkeypatch.setenv("TUTORMAX_SOURCE", "parquet")
    assert load_settings().lake_path == str(tmp_path / "lake")
    monkeypatch.setenv("TUTORMAX_LAKE", "")
    assert refusal().startswith("TUTORMAX_SOURCE is parquet but TUTORMAX_LAKE is not set; set it")


@pytest.mark.parametrize("missing", POSTGRES_VARIABLES)
@pytest.mark.parametrize("as_empty", [False, True])
def test_a_missing_postgres_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, as_empty: bool
) -> None:
    for name, value in POSTGRES.items():
        if name != missing:
            monkeypatch.setenv(name, value)
        elif as_empty:
            monkeypatch.setenv(name, "")

    if as_empty and missing == "POSTGRES_PASSWORD":
        assert load_settings().database_source == "POSTGRES_*"
        return
    message = refusal()
    found, _, rest = message.partition(" are set but ")
    assert found.split(", ") == [name for name in POSTGRES if name != missing]
    assert rest.startswith(f"{missing} is not; set all five, or TUTORMAX_DATABASE_URL, or none")


def test_one_postgres_variable_alone_names_the_other_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_HOST", "db.example")

    assert refusal().startswith(
        "POSTGRES_HOST is set but "
        "POSTGRES_PORT, POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB are not; set all five"
    )


def test_a_dot_env_file_is_read_and_the_real_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        f"# our database\nTUTORMAX_DATABASE_URL=postgresql://u:{SECRET}@in-file/db\n"
        "TUTORMAX_TIMEZONE='Europe/Berlin'\nSOMEBODY_ELSES=1\nTUTORMAX_HOME=\n",
        encoding="utf-8",
    )
    settings = load_settings()
    assert settings.database_source == "TUTORMAX_DATABASE_URL"
    assert settings.timezone == "Europe/Berlin"
    assert settings.home_path == tmp_path / ".tutormax"

    monkeypatch.setenv("TUTORMAX_TIMEZONE", "Asia/Tokyo")
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://u:p@in-environment/db")
    settings = load_settings()
    assert settings.timezone == "Asia/Tokyo"
    assert settings.database_url is not None
    assert "in-environment" in settings.database_url.get_secret_value()


def test_empty_variables_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    without = load_settings()
    for name in (
        "TUTORMAX_HOME",
        "TUTORMAX_DATABASE_URL",
        "TUTORMAX_STORAGE",
        "TUTORMAX_TIMEZONE",
        "TUTORMAX_FIRST_DATE",
        "TUTORMAX_POLICY",
        "DAGSTER_HOME",
        "POSTGRES_HOST",
        "POSTGRES_PORT",
        "POSTGRES_USER",
        "POSTGRES_DB",
    ):
        monkeypatch.setenv(name, "")

    assert load_settings().model_dump() == without.model_dump()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("TUTORMAX_TIMEZONE", "Mars/Olympus", "TUTORMAX_TIMEZONE: 'Mars/Olympus' is not an IANA"),
        ("TUTORMAX_TIMEZONE", "../etc/passwd", "TUTORMAX_TIMEZONE: .* is not an IANA timezone"),
        ("TUTORMAX_TIMEZONE", "America", "TUTORMAX_TIMEZONE: 'America' is not an IANA timezone"),
        ("TUTORMAX_TIMEZONE", "localtime", "TUTORMAX_TIMEZONE: 'localtime' is not an IANA"),
        ("TUTORMAX_TIMEZONE", "posixrules", "TUTORMAX_TIMEZONE: 'posixrules' is not an IANA"),
        ("TUTORMAX_TIMEZONE", "Factory", "TUTORMAX_TIMEZONE: 'Factory' is not an IANA timezone"),
        ("TUTORMAX_TIMEZONE", "right/UTC", "TUTORMAX_TIMEZONE: 'right/UTC' is not an IANA"),
        ("TUTORMAX_FIRST_DATE", "2999-01-01", "^TUTORMAX_FIRST_DATE: 2999-01-01 is in the future"),
        ("TUTORMAX_FIRST_DATE", "0001-01-01", "^TUTORMAX_FIRST_DATE: .*1971-01-01"),
        ("TUTORMAX_ALERTS", "slack", "^TUTORMAX_ALERTS: receiver 1 is not an Apprise URL; expect"),
        ("TUTORMAX_ALERTS", f"json://host {SECRET}", "^TUTORMAX_ALERTS: receiver 2 is not an Appr"),
        ("TUTORMAX_UI_URL", "dagster.example.com", "^TUTORMAX_UI_URL: expected http"),
        ("TUTORMAX_STORAGE", "ftp://host/x", "^TUTORMAX_STORAGE: expected a folder, s3://bucket"),
        ("TUTORMAX_STORAGE", "s3://", "^TUTORMAX_STORAGE: s3:// "),
        ("TUTORMAX_ARCHIVE", "file://host/x", "^TUTORMAX_ARCHIVE: file:// takes an absolute path"),
        ("TUTORMAX_LAKE", "~nobody-here/x", "^TUTORMAX_LAKE: ~ leads nowhere"),
        ("TUTORMAX_HOME", "s3://bucket/home", "^TUTORMAX_HOME: expected a path on this machine"),
        ("TUTORMAX_HOME", "/dev/null", "^TUTORMAX_HOME: /dev/null is not a folder"),
        ("DAGSTER_HOME", "~nobody-here/x", "^DAGSTER_HOME: ~ leads nowhere"),
        ("POSTGRES_PORT", "65536", "^POSTGRES_PORT: .*65535"),
        ("TUTORMAX_FIRST_DATE", "2025-13-01", "^TUTORMAX_FIRST_DATE: .*date"),
        ("TUTORMAX_FIRST_DATE", "yesterday", "^TUTORMAX_FIRST_DATE: .*date"),
        ("TUTORMAX_STATEMENT_TIMEOUT_SECONDS", "0", "^TUTORMAX_STATEMENT_TIMEOUT_SECONDS: .*1"),
        ("TUTORMAX_SOURCE", "delta", "^TUTORMAX_SOURCE: .*'postgres' or 'parquet'"),
        ("TUTORMAX_LOCK_TIMEOUT_SECONDS", "long", "^TUTORMAX_LOCK_TIMEOUT_SECONDS: .*integer"),
    ],
)
def test_a_malformed_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=expected):
        load_settings()


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"TUTORMAX_DATABSE_URL={SECRET}\n", encoding="utf-8")
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", f"mysql://{SECRET}")
    monkeypatch.setenv("TUTORMAX_TIMEZONE", "Mars")

    message = refusal()

    for part in ("did you mean TUTORMAX_DATABASE_URL?", "DATABASE_URL begins with", "'Mars' is"):
        assert part in message


@pytest.mark.parametrize("name", ["STORAGE", "LAKE", "ARCHIVE"])
def test_a_folder_may_be_named_in_any_usual_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for text, expected in (
        ("~/a [b]*", tmp_path / "user" / "a [b]*"),
        ("a folder", tmp_path / "a folder"),
        ("file:///srv/a%20folder", Path("/srv/a folder")),
        ("file://localhost/srv", Path("/srv")),
    ):
        monkeypatch.setenv(f"TUTORMAX_{name}", text)
        assert getattr(load_settings(), name.lower()) == str(expected)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("TUTORMAX_DATABSE_URL", "did you mean TUTORMAX_DATABASE_URL?"),
        ("tutormax_time_zone", "did you mean TUTORMAX_TIMEZONE?"),
        ("TUTORMX_HOME", "did you mean TUTORMAX_HOME?"),
        ("TUTORMAX_COLOR", "the README lists the settings"),
        ("POSTGRES_PASWORD", "did you mean POSTGRES_PASSWORD?"),
    ],
)
def test_a_name_that_no_setting_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, advice: str
) -> None:
    file = tmp_path / ".env"
    file.write_text(f"# ours\n\nexport {name}={SECRET}\n", encoding="utf-8")
    assert refusal() == f"{name} in {file}, line 3, is not a setting; {advice}"

    file.unlink()
    monkeypatch.setenv(name, SECRET)
    assert refusal() == f"{name} in the environment is not a setting; {advice}"


def test_names_of_others_are_no_concern_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "TUTORMAX_VERSION",
        "TUTORMAX_WEB_SERVICE_HOST",
        "TUTORMAX_WEB_SERVICE_PORT_HTTP",
        "TUTORMAX_WEB_PORT",
        "TUTORMAX_WEB_PORT_80_TCP_ADDR",
        "POSTGRES_INITDB_ARGS",
        "POSTGRES_PASSWORD_FILE",
        "TUTORIAL",
    ):
        monkeypatch.setenv(name, "tcp://10.0.0.1:80")
    assert load_settings().database_source == "embedded"

    monkeypatch.setenv("TUTORMAX_DATABASE_URL", "postgresql://u@h/db")
    monkeypatch.setenv("POSTGRES_HOSTS", "10.0.0.1")
    assert load_settings().database_source == "TUTORMAX_DATABASE_URL"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"A=1\n\n\nTUTORMAX_DATABASE_URL {SECRET}\n", "line 4: expected NAME=value, or #"),
        (f"TUTORMAX_DATABASE_URL: {SECRET}\nB=2\nwhat ?\n", "lines 1, 3: expected NAME=value"),
        (f'POSTGRES_PASSWORD="{SECRET}\nB=2\n', "line 1: expected NAME=value"),
        ("B=2\nTUTORMAX_HOME\n", "line 2: expected NAME=value"),
        (f"B=2\nPOSTGRES_USER=Zoé\nPOSTGRES_PASSWORD={SECRET}", "line 2: expected UTF-8; save"),
    ],
)
def test_a_dot_env_file_that_does_not_parse_is_refused(
    tmp_path: Path, content: str, expected: str
) -> None:
    file = tmp_path / ".env"
    file.write_bytes(content.encode("latin-1"))

    assert refusal().startswith(f"{file}, {expected}")


def test_the_mark_of_an_editor_before_the_first_name_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TUTORMAX_TIMEZONE=Asia/Tokyo\n", encoding="utf-8-sig")

    assert load_settings().timezone == "Asia/Tokyo"


def test_the_embedded_database_says_why_and_where_a_dot_env_file_was_looked_for(
    tmp_path: Path,
) -> None:
    assert load_settings().whence == (
        "embedded, because neither TUTORMAX_DATABASE_URL nor POSTGRES_* is set in the environment"
        f" or in {tmp_path}/.env (there is no such file)"
    )
    (tmp_path / ".env").touch()
    assert load_settings().whence.endswith(f" or in {tmp_path}/.env")


def test_a_malformed_port_is_named_without_any_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**POSTGRES, "POSTGRES_PORT": SECRET}.items():
        monkeypatch.setenv(name, value)

    assert refusal().startswith("POSTGRES_PORT: ")


def test_no_secret_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORMAX_DATABASE_URL", f"postgresql://u:{SECRET}@h/db")
    monkeypatch.setenv("TUTORMAX_SOURCE_URL", f"postgresql://u:{SECRET}@replica/db")
    monkeypatch.setenv("TUTORMAX_ALERTS", f"slack://{SECRET}")
    for name, value in POSTGRES.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()

    for shown in (str(settings), repr(settings), settings.model_dump_json()):
        assert SECRET not in shown
    monkeypatch.setenv("TUTORMAX_TIMEZONE", "nowhere")
    refusal()


@pytest.mark.parametrize(
    "address", ["dask:8786", f"tcp://user:{SECRET}@dask:8786", "http://dask:8787", "tcp://dask"]
)
def test_an_address_that_dask_would_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", address)

    assert refusal() == (
        "TUTORMAX_DASK_ADDRESS: expected tcp://host:port or tls://host:port,"
        " such as tcp://dask:8786"
    )


@pytest.mark.parametrize("name", ["TUTORMAX_STORAGE", "TUTORMAX_LAKE", "TUTORMAX_ARCHIVE"])
def test_a_filesystem_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tutormax_assets.settings.find_spec", lambda module: None)
    monkeypatch.setenv(name, "gs://bucket/folder")

    with pytest.raises(
        SettingsError,
        match=rf"^{name}: gs:// needs gcsfs, .*: pip install 'tutormax-assets\[gcs\]'$",
    ):
        load_settings()


def test_runs_stay_as_long_as_the_parquet_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORMAX_RUN_RETENTION_DAYS", "29")

    assert refusal() == (
        "TUTORMAX_RUN_RETENTION_DAYS is 29, but TUTORMAX_SNAPSHOT_RETENTION_DAYS is 30: a stored"
        " date needs the runs that computed it; expected the same number of days or more"
    )


def test_tls_of_dask_takes_three_files_and_an_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", "tls://dask:8786")
    file = tmp_path / "dask.pem"
    for name in ("CA_FILE", "CERT"):
        monkeypatch.setenv(f"TUTORMAX_DASK_TLS_{name}", str(file))
    assert refusal() == "TUTORMAX_DASK_ADDRESS is tls://, which needs TUTORMAX_DASK_TLS_KEY"

    monkeypatch.setenv("TUTORMAX_DASK_TLS_KEY", str(file))
    assert refusal() == f"TUTORMAX_DASK_TLS_CA_FILE names {file}, where there is no file"

    file.touch()
    assert load_settings().dask_tls_key == file

    monkeypatch.setenv("TUTORMAX_DASK_ADDRESS", "tcp://dask:8786")
    assert refusal() == (
        "TUTORMAX_DASK_TLS_CA_FILE, TUTORMAX_DASK_TLS_CERT, TUTORMAX_DASK_TLS_KEY set, but"
        " TUTORMAX_DASK_ADDRESS is not tls://host:port"
    )


def test_the_group_of_the_files_is_one_of_this_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTORMAX_FILES_GROUP", "no such group")
    assert refusal().startswith("TUTORMAX_FILES_GROUP: found no group 'no such group'")
    monkeypatch.setenv("TUTORMAX_FILES_GROUP", "daemon")
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    monkeypatch.setattr("os.getegid", lambda: 12345)
    monkeypatch.setattr("os.getgroups", list)
    assert "not in the group 'daemon'" in refusal()
    monkeypatch.setattr("os.getgroups", lambda: [grp.getgrnam("daemon").gr_gid])
    assert load_settings().files_group == "daemon"
