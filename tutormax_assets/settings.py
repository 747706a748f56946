"""The environment, resolved once: where the database is, where files live, which timezone rules."""

import grp
import os
import re
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

POSTGRES_VARIABLES = (
    "POSTGRES_HOST",
    "POSTGRES_PORT",
    "POSTGRES_USER",
    "POSTGRES_PASSWORD",
    "POSTGRES_DB",
)

# Module and extra of this package, by the scheme of a path.
_FILESYSTEMS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


LONGEST_RETENTION_DAYS = 36_500


class OptionsError(ValueError):
    """An argument of a run or a cleanup is unusable; the message says what was expected."""


class SettingsError(Exception):
    """The environment does not make sense; the message says what was found and what to do."""


class Settings(BaseSettings):
    """Everything that is read from the environment or from a ``.env`` file in the current folder.

    A variable that is set in the environment wins over the same one in ``.env``; a variable that
    is set but empty counts as not set, except ``POSTGRES_PASSWORD``, which may be empty.
    """

    model_config = SettingsConfigDict(
        env_prefix="TUTORMAX_", env_file=".env", env_file_encoding="utf-8", extra="ignore"
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
        default=date(2024, 1, 1), description="First reference date that can be computed."
    )
    policy: Path | None = Field(
        default=None, description="TOML file that overrides the metrics policy."
    )
    alerts: SecretStr | None = Field(
        default=None, description="Apprise URLs that alerts go to, separated by spaces."
    )
    ui_url: str = Field(
        default="http://127.0.0.1:3000", description="Where the UI is, for the links in alerts."
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
    dagster_home: Path | None = Field(
        default=None,
        validation_alias="DAGSTER_HOME",
        description="Folder of the Dagster instance; dagster under the home unless it is set.",
    )
    postgres_host: str | None = Field(default=None, validation_alias="POSTGRES_HOST")
    postgres_port: int | None = Field(default=None, validation_alias="POSTGRES_PORT")
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

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(
                f"{value!r} is not an IANA timezone; expected a name such as 'America/New_York'"
            ) from error
        return value

    @field_validator("storage", "lake", "archive")
    @classmethod
    def _filesystem_is_installed(cls, value: str | None) -> str | None:
        scheme, is_url, _ = (value or "").partition("://")
        module, extra = _FILESYSTEMS.get(scheme, ("", ""))
        if is_url and module and find_spec(module) is None:
            raise ValueError(
                f"{scheme}:// needs {module}, which is not installed:"
                f" pip install 'tutormax-assets[{extra}]'"
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

    @field_validator("dask_address")
    @classmethod
    def _scheme_host_and_port(cls, value: str | None) -> str | None:
        # A password in it would show in the log; nothing that is refused is repeated.
        if value is not None and not re.fullmatch(r"(tcp|tls)://[^@/\s]+:\d+", value):
            raise ValueError("expected tcp://host:port or tls://host:port, such as tcp://dask:8786")
        return value

    @model_validator(mode="after")
    def _dask_has_tls_wholly_or_not(self) -> Self:
        files = {
            f"TUTORMAX_{name.upper()}": getattr(self, name)
            for name in ("dask_tls_ca_file", "dask_tls_cert", "dask_tls_key")
        }
        is_tls = (self.dask_address or "").startswith("tls://")
        missing = [name for name, file in files.items() if file is None]
        if is_tls and missing:
            raise ValueError(f"TUTORMAX_DASK_ADDRESS is tls://, which needs {', '.join(missing)}")
        if self.dask_address and not is_tls and len(missing) < len(files):
            found = ", ".join(name for name in files if name not in missing)
            raise ValueError(f"{found} set, but TUTORMAX_DASK_ADDRESS is not tls://host:port")
        for name, file in files.items():
            if is_tls and file is not None and not file.is_file():
                raise ValueError(f"{name} names {file}, where there is no file")
        return self

    @model_validator(mode="after")
    def _a_lake_has_a_path(self) -> Self:
        if self.source == "parquet" and self.lake is None:
            raise ValueError(
                "TUTORMAX_SOURCE is parquet but TUTORMAX_LAKE is not set; set it to the base path"
                " of the lake: a folder, s3://… or gs://…"
            )
        return self

    @model_validator(mode="after")
    def _postgres_variables_are_all_set_or_none(self) -> Self:
        if self.database_url is not None:
            return self
        missing = [name for name in POSTGRES_VARIABLES if getattr(self, name.lower()) is None]
        if missing and len(missing) < len(POSTGRES_VARIABLES):
            found = [name for name in POSTGRES_VARIABLES if name not in missing]
            raise ValueError(
                f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set but "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; set all five, "
                "or TUTORMAX_DATABASE_URL, or none to use the embedded database"
            )
        return self

    @property
    def database_source(self) -> Literal["TUTORMAX_DATABASE_URL", "POSTGRES_*", "embedded"]:
        """Where the connection comes from."""
        if self.database_url is not None:
            return "TUTORMAX_DATABASE_URL"
        return "embedded" if self.postgres_host is None else "POSTGRES_*"

    @property
    def home_path(self) -> Path:
        """``home`` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def dagster_home_path(self) -> Path:
        """Folder of the Dagster instance as an absolute path."""
        return (self.dagster_home or self.home_path / "dagster").expanduser().absolute()

    @property
    def storage_path(self) -> str:
        """Base path of the Parquet partitions; ``storage`` under the home unless it is set."""
        return self.storage or str(self.home_path / "storage")

    @property
    def lake_path(self) -> str | None:
        """Base path of the lake, absolute where it is a folder; none unless it is read."""
        if self.source == "postgres" or self.lake is None:
            return None
        return self.lake if "://" in self.lake else str(Path(self.lake).expanduser().absolute())

    @property
    def archive_path(self) -> str:
        """Base path of the archive of old metrics; ``archive`` under the home unless it is set."""
        return self.archive or str(self.home_path / "archive")


def checked_retention_days(days: int) -> int:
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
        SettingsError: A variable is malformed, or the ``POSTGRES_*`` set is incomplete. No value
            is repeated in the message, since it may be a secret.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("; ".join(_sentence(e) for e in error.errors())) from None


def _sentence(error: object) -> str:
    assert isinstance(error, dict)  # noqa: S101
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    own = name not in (*POSTGRES_VARIABLES, "DAGSTER_HOME")
    return f"{'TUTORMAX_' + name.upper() if own else name}: {message}"
