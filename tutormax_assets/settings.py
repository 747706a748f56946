"""The environment, resolved once: where the database is, where files live, which timezone rules."""

import grp
import os
import re
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tutormax_assets import environment
from tutormax_assets.dates import today
from tutormax_assets.errors import UsageError
from tutormax_assets.urls import postgres_url

POSTGRES_VARIABLES = (
    "POSTGRES_HOST",
    "POSTGRES_PORT",
    "POSTGRES_USER",
    "POSTGRES_PASSWORD",
    "POSTGRES_DB",
)

# The tag of the image in deploy/compose.yaml, whose .env the containers are given.
_NAMES_OF_DEPLOYMENTS = ["TUTORMAX_VERSION"]

# Module and extra of this package, by the scheme of a path.
_FILESYSTEMS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}

_TLS_FILES = ("dask_tls_ca_file", "dask_tls_cert", "dask_tls_key")

# They mean something else on each machine, or count leap seconds.
_NOT_A_PLACE = re.compile("localtime|posixrules|Factory|(posix|right)/.*")

Weekday = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]

LONGEST_RETENTION_DAYS = 36_500


class OptionsError(UsageError, ValueError):
    """An argument of a run or a cleanup is unusable; the message says what was expected."""


class SettingsError(UsageError):
    """The environment does not make sense; the message says what was found and what to do."""

    affects_every_date = True


class Settings(BaseSettings):
    """Everything that is read from the environment or from a ``.env`` file in the current folder.

    A variable that is set in the environment wins over the same one in ``.env``; a variable that
    is set but empty counts as not set, except ``POSTGRES_PASSWORD``, which may be empty.
    """

    model_config = SettingsConfigDict(
        env_prefix="TUTORMAX_",
        env_file=environment.DOTENV,
        env_file_encoding="utf-8-sig",
        extra="ignore",
        hide_input_in_errors=True,
    )

    home: Path = Field(
        default=Path(".tutormax"),
        description="Folder of everything local: embedded database, Dagster home, Parquet.",
    )
    database_url: SecretStr | None = Field(
        default=None, description="postgresql://user:password@host:port/database"
    )
    source_url: SecretStr | None = Field(
        default=None,
        description=(
            "Where the source tables are read unless it is the same: with another user, or from a"
            " read replica."
        ),
    )
    source: Literal["postgres", "parquet"] = Field(
        default="postgres",
        description="Whether the source tables are PostgreSQL's, or Parquet datasets of a lake.",
    )
    lake: str | None = Field(
        default=None,
        description="Base path of the lake: a folder, s3://… or gs://….",
    )
    statement_timeout_seconds: int = Field(
        default=600,
        ge=1,
        le=86_400,
        description="Seconds after which PostgreSQL ends a statement of a run.",
    )
    lock_timeout_seconds: int = Field(
        default=5,
        ge=1,
        le=86_400,
        description="Seconds that a statement of a run waits for another session's lock.",
    )
    storage: str | None = Field(
        default=None,
        description="Base path of the Parquet partitions: a folder, s3://… or gs://….",
    )
    shards: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Shards that a date's tutors are divided into; 0 for one for each 25,000.",
    )
    timezone: str = Field(
        default="UTC", description="IANA timezone in which a reference date begins."
    )
    first_date: date = Field(
        default=date(2024, 1, 1),
        ge=date(1971, 1, 1),
        description="First reference date that can be computed.",
    )
    policy: Path | None = Field(
        default=None, description="TOML file that overrides the metrics policy."
    )
    alerts: SecretStr | None = Field(
        default=None, description="Apprise URLs that alerts go to, separated by spaces."
    )
    metrics_file: Path | None = Field(
        default=None,
        description="File of the node exporter's textfile collector that Prometheus metrics go to.",
    )
    pushgateway: SecretStr | None = Field(
        default=None, description="Pushgateway that Prometheus metrics go to: http://host:9091."
    )
    ui_url: str = Field(
        default="http://127.0.0.1:3000", description="Where the UI is, for the links in alerts."
    )
    reports_url: str | None = Field(
        default=None,
        description="Where a web server shows the folder daily_report, for the links in the UI.",
    )
    refresh_max_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Share of the tutors above which a stored date is read anew as a whole.",
    )
    refresh_max_transactions: int = Field(
        default=1_000_000_000,
        ge=1,
        le=2**31 - 1,
        description="Transactions of the platform's server after which it is read as a whole.",
    )
    late_data: bool = Field(
        default=False,
        description="Whether the sensors late_data and stale_dates run unless they are stopped.",
    )
    late_data_minutes: int = Field(
        default=5, ge=1, le=1_440, description="Minutes between two looks of the sensor late_data."
    )
    verify_weekday: Weekday | Literal["never"] = Field(
        default="sunday",
        description="Day of the week on which stored dates are compared with a full computation.",
    )
    late_days: int = Field(
        default=0,
        ge=0,
        le=90,
        description="Dates before the night's own that the schedule computes again.",
    )
    live_seconds: float = Field(
        default=30,
        ge=1,
        le=3_600,
        description="Seconds between two refreshes by `tutormax live --watch`.",
    )
    max_dates_per_run: int = Field(
        default=31,
        ge=0,
        description="Reference dates that a range run takes at most; 0 for a whole range.",
    )
    archive: str | None = Field(
        default=None,
        description="Base path of the archive of old metrics: a folder, s3://… or gs://….",
    )
    files_group: str | None = Field(
        default=None,
        description="Unix group that can read the Parquet and the archive; only the owner else.",
    )
    retention_days: int = Field(
        default=90,
        ge=1,
        le=LONGEST_RETENTION_DAYS,
        description="Age in days beyond which metrics move from the table to the archive.",
    )
    snapshot_retention_days: int = Field(
        default=30,
        ge=1,
        le=LONGEST_RETENTION_DAYS,
        description="Age in days beyond which Parquet partitions are deleted.",
    )
    run_retention_days: int | None = Field(
        default=None,
        ge=1,
        le=LONGEST_RETENTION_DAYS,
        description="Age in days beyond which runs leave Dagster's record; unset to keep all.",
    )
    dask_address: str | None = Field(
        default=None,
        description="Address of the Dask scheduler whose workers compute: tcp:// or tls://host:port.",
    )
    dask_tls_ca_file: Path | None = Field(
        default=None, description="PEM file of the authority that all certificates there are of."
    )
    dask_tls_cert: Path | None = Field(
        default=None, description="PEM file of the certificate that a run shows the scheduler."
    )
    dask_tls_key: Path | None = Field(default=None, description="PEM file of its key.")
    dask_no_workers_timeout_seconds: int = Field(
        default=60,
        ge=1,
        le=86_400,
        description="Seconds that a run waits for a worker of the Dask cluster when it has none.",
    )
    automation: bool = Field(
        default=False, description="Whether schedules and sensors run unless they are stopped."
    )
    code_location: str = Field(
        default="tutormax_assets.definitions",
        description="Name that the Dagster UI shows for the code location of tutormax_assets.",
    )
    dagster_home: Path | None = Field(
        default=None,
        validation_alias="DAGSTER_HOME",
        description="Folder of the Dagster instance; dagster under the home unless it is set.",
    )
    postgres_host: str | None = Field(default=None, validation_alias="POSTGRES_HOST")
    postgres_port: int | None = Field(
        default=None, ge=1, le=65_535, validation_alias="POSTGRES_PORT"
    )
    postgres_user: str | None = Field(default=None, validation_alias="POSTGRES_USER")
    postgres_password: SecretStr | None = Field(default=None, validation_alias="POSTGRES_PASSWORD")
    postgres_db: str | None = Field(default=None, validation_alias="POSTGRES_DB")

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object, info: object) -> object:
        if value == "" and getattr(info, "field_name", "") != "postgres_password":
            field = cls.model_fields[getattr(info, "field_name", "")]
            return field.get_default()
        return value

    @field_validator("home", "dagster_home", "policy", "metrics_file", *_TLS_FILES)
    @classmethod
    def _path_of_this_machine(cls, value: Path | None) -> Path | None:
        if value is not None and re.match(r"\w+:/", str(value)):
            raise ValueError("expected a path on this machine, not a URL")
        return None if value is None else _without_tilde(value)

    @field_validator("home", "dagster_home")
    @classmethod
    def _folder_or_nothing(cls, value: Path | None) -> Path | None:
        if value is not None and value.exists() and not value.is_dir():
            raise ValueError(f"{value} is not a folder")
        return value

    @field_validator("storage", "lake", "archive")
    @classmethod
    def _folder_or_object_store(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, is_url, rest = value.partition("://")
        if is_url and scheme == "file":
            url = urlsplit(value)
            if url.netloc not in ("", "localhost") or url.query or url.fragment:
                raise ValueError("file:// takes an absolute path, such as file:///srv/tutormax")
            value, is_url = unquote(url.path), ""
        if not is_url:
            return str(_without_tilde(Path(value)).absolute())
        if scheme not in _FILESYSTEMS:
            # What precedes :// may be anything, such as the key of a store.
            raise ValueError("expected a folder, s3://bucket/… or gs://bucket/…")
        module, extra = _FILESYSTEMS[scheme]
        if find_spec(module) is None:
            raise ValueError(
                f"{scheme}:// needs {module}, which is not installed:"
                f" pip install 'tutormax-assets[{extra}]'"
            )
        if not rest.strip("/"):
            raise ValueError(f"{scheme}:// names no bucket; expected {scheme}://bucket/…")
        return value

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            is_known = False
        else:
            is_known = _NOT_A_PLACE.fullmatch(value) is None
        if not is_known:
            raise ValueError(
                f"{value!r} is not an IANA timezone; expected a name such as 'America/New_York'"
            )
        return value

    @field_validator("files_group")
    @classmethod
    def _group_of_this_user(cls, value: str | None) -> str | None:
        if value is None:
            return value
        try:
            group = grp.getgrnam(value)
        except KeyError:
            raise ValueError(
                f"found no group {value!r} on this machine; expected the name of one"
            ) from None
        if os.geteuid() != 0 and group.gr_gid not in (os.getegid(), *os.getgroups()):
            raise ValueError(
                f"the user of this process is not in the group {value!r}; expected one of its own"
            )
        return value

    @field_validator("database_url", "source_url")
    @classmethod
    def _leads_to_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            postgres_url(value)
        return value

    @field_validator("metrics_file")
    @classmethod
    def _of_textfile_collector(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if not value.is_absolute() or value.suffix != ".prom":
            raise ValueError(
                "expected an absolute path that ends in .prom, since the textfile collector reads"
                " no other files, such as /var/lib/prometheus/node-exporter/tutormax.prom"
            )
        return value

    @field_validator("pushgateway")
    @classmethod
    def _address_of_pushgateway(cls, value: SecretStr | None) -> SecretStr | None:
        # It may hold a password, so nothing of it is repeated.
        if value is not None and not re.fullmatch(
            r"https?://[^\s/?#]+(/[^\s?#]*)?", value.get_secret_value()
        ):
            raise ValueError(
                "expected http://host:port or https://host:port, such as http://pushgateway:9091"
            )
        return value

    @field_validator("alerts")
    @classmethod
    def _urls(cls, value: SecretStr | None) -> SecretStr | None:
        for number, url in enumerate(value.get_secret_value().split() if value else (), start=1):
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://.+", url):
                raise ValueError(
                    f"receiver {number} is not an Apprise URL; expected one such as"
                    " slack://token_a/token_b/token_c or mailto://user:password@example.com"
                )
        return value

    @field_validator("ui_url", "reports_url")
    @classmethod
    def _web_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not re.fullmatch(r"https?://[^\s/]\S*", value):
            raise ValueError("expected http://… or https://…, such as https://dagster.example.com")
        return value.rstrip("/")

    @field_validator("dask_address")
    @classmethod
    def _scheme_host_and_port(cls, value: str | None) -> str | None:
        # A password in it would show in the log; nothing that is refused is repeated.
        if value is not None and not re.fullmatch(r"(tcp|tls)://[^@/\s]+:\d+", value):
            raise ValueError("expected tcp://host:port or tls://host:port, such as tcp://dask:8786")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        found = (
            self._tls_of_dask(),
            self._path_of_a_lake(),
            self._postgres_variables(),
            self._first_date_in_the_future(),
            self._runs_of_stored_dates(),
        )
        if problems := [problem for problem in found if problem]:
            raise ValueError("; ".join(problems))
        return self

    def _tls_of_dask(self) -> str | None:
        files = {f"TUTORMAX_{name.upper()}": getattr(self, name) for name in _TLS_FILES}
        is_tls = (self.dask_address or "").startswith("tls://")
        missing = [name for name, file in files.items() if file is None]
        if is_tls and missing:
            return f"TUTORMAX_DASK_ADDRESS is tls://, which needs {', '.join(missing)}"
        if self.dask_address and not is_tls and len(missing) < len(files):
            found = ", ".join(name for name in files if name not in missing)
            return f"{found} set, but TUTORMAX_DASK_ADDRESS is not tls://host:port"
        for name, file in files.items():
            if is_tls and file is not None and not file.is_file():
                return f"{name} names {file}, where there is no file"
        return None

    def _path_of_a_lake(self) -> str | None:
        if self.source == "postgres" or self.lake is not None:
            return None
        return (
            "TUTORMAX_SOURCE is parquet but TUTORMAX_LAKE is not set; set it to the base path"
            " of the lake: a folder, s3://… or gs://…"
        )

    def _postgres_variables(self) -> str | None:
        missing = [name for name in POSTGRES_VARIABLES if getattr(self, name.lower()) is None]
        if self.database_url is not None or not 0 < len(missing) < len(POSTGRES_VARIABLES):
            return None
        found = [name for name in POSTGRES_VARIABLES if name not in missing]
        return (
            f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; set all five, "
            "or TUTORMAX_DATABASE_URL, or none to use the embedded database"
        )

    def _first_date_in_the_future(self) -> str | None:
        last = today(timezone=self.timezone)
        if self.first_date <= last:
            return None
        return (
            f"TUTORMAX_FIRST_DATE: {self.first_date} is in the future, so no date could be"
            f" computed; expected {last} or earlier"
        )

    def _runs_of_stored_dates(self) -> str | None:
        days = self.run_retention_days
        if days is None or days >= self.snapshot_retention_days:
            return None
        return (
            f"TUTORMAX_RUN_RETENTION_DAYS is {days}, but TUTORMAX_SNAPSHOT_RETENTION_DAYS is"
            f" {self.snapshot_retention_days}: a stored date needs the runs that computed it;"
            " expected the same number of days or more"
        )

    @property
    def database_source(self) -> Literal["TUTORMAX_DATABASE_URL", "POSTGRES_*", "embedded"]:
        """Where the connection comes from."""
        if self.database_url is not None:
            return "TUTORMAX_DATABASE_URL"
        return "embedded" if self.postgres_host is None else "POSTGRES_*"

    @property
    def whence(self) -> str:
        """Where the connection comes from, and why if nothing was set."""
        if self.database_source != "embedded":
            return f"from {self.database_source}"
        return (
            "embedded, because neither TUTORMAX_DATABASE_URL nor POSTGRES_* is set in the"
            f" environment or in {environment.dotenv_state()}"
        )

    @property
    def home_path(self) -> Path:
        """``home`` as an absolute path."""
        return self.home.absolute()

    @property
    def dagster_home_path(self) -> Path:
        """Folder of the Dagster instance as an absolute path."""
        return (self.dagster_home or self.home_path / "dagster").absolute()

    @property
    def storage_path(self) -> str:
        """Base path of the Parquet partitions; ``storage`` under the home unless it is set."""
        return self.storage or str(self.home_path / "storage")

    @property
    def lake_path(self) -> str | None:
        """Base path of the lake, absolute where it is a folder; none unless it is read."""
        return None if self.source == "postgres" else self.lake

    @property
    def archive_path(self) -> str:
        """Base path of the archive of old metrics; ``archive`` under the home unless it is set."""
        return self.archive or str(self.home_path / "archive")


def check_retention_days(days: int) -> int:
    """The age in days up to which metrics stay, if it is one.

    Raises:
        OptionsError: It is no whole number, or out of range.
    """
    is_whole = isinstance(days, int) and not isinstance(days, bool)
    if not is_whole or not 1 <= days <= LONGEST_RETENTION_DAYS:
        raise OptionsError(
            f"retention_days is {days!r}; expected a whole number from 1 to"
            f" {LONGEST_RETENTION_DAYS}."
        )
    return days


def load_settings() -> Settings:
    """Read the environment.

    Returns:
        The settings.

    Raises:
        SettingsError: A file ``.env`` cannot be read, a variable has a name that no setting has or
            is malformed, or some do not fit together; the message says all of it. No value is
            repeated that may be a secret.
    """
    try:
        problems = environment.unknown_names(_names(), other=_NAMES_OF_DEPLOYMENTS)
    except environment.DotenvError as error:
        raise SettingsError(str(error)) from None
    try:
        settings = Settings()
    except ValidationError as error:
        problems += [_sentence(e) for e in error.errors()]
    if problems:
        raise SettingsError("; ".join(problems))
    return settings


def _without_tilde(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("~ leads nowhere: that user has no home folder") from None


def _names() -> list[str]:
    """The names of all variables that are read."""
    return [
        str(field.validation_alias or f"TUTORMAX_{name.upper()}")
        for name, field in Settings.model_fields.items()
    ]


def _sentence(error: object) -> str:
    assert isinstance(error, dict)  # noqa: S101
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    own = name not in (*POSTGRES_VARIABLES, "DAGSTER_HOME")
    colon = "" if name in ("database_url", "source_url") else ":"
    return f"{'TUTORMAX_' + name.upper() if own else name}{colon} {message}"
