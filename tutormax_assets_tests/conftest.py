"""What every test stands on: an environment of its own, and databases of a real PostgreSQL."""

import gc
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import polars as pl
import psycopg
import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.script import ScriptDirectory
from filelock import FileLock
from psycopg import sql
from upath import UPath

from tutormax_assets.database import embedded, tables
from tutormax_assets.database.connection import conninfo, create_engine
from tutormax_assets.database.tables import metrics_metadata, source_metadata
from tutormax_assets.sample import platform as sample_platform
from tutormax_assets.settings import Settings, load_settings
from tutormax_assets.storage.partition import (
    list_partition,
    partition_of,
    scan_partition,
    store_parts,
)
from tutormax_assets.storage.shards import ALL_IN_ONE, Shards

if TYPE_CHECKING:
    from tutormax_assets.api.summary import AggregationSummary

GOLDEN = Path(__file__).parent / "golden"

SMALL_PLATFORM_END = date(2025, 11, 7)
"""Reference date up to which the small platform has rows."""

SMALL_PLATFORM: dict[str, Any] = {
    "tutors": 30,
    "sessions_per_tutor": 40,
    "days": 100,
    "end": SMALL_PLATFORM_END,
    "seed": 3,
    "bad_rows": 0.02,
}
"""How the small platform is generated."""

PARQUET_ASSETS = [
    "tutor_roster",
    "tutors_left_out",
    "sessions_snapshot",
    "sessions_set_aside",
    "tutor_events_snapshot",
    "tutor_events_set_aside",
    "metrics_7day",
    "metrics_30day",
    "metrics_90day",
    "window_edges",
    "tutor_tiers",
    "tutor_tier_reasons",
    "tutor_tier_changes",
]
STANDALONE_ASSETS = [asset for asset in PARQUET_ASSETS if asset != "tutor_tier_changes"]
"""Those whose partitions do not depend on which other dates are stored."""

PASSWORD = "hunter2-never-shown"
"""In the URL of every ``Platform``. The server trusts its socket, so any will do."""

# Nothing in a test outlives a power failure.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@sa.event.listens_for(sa.Engine, "connect")
def _make_dagsters_files_fast(connection: object, _: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = off")


# The first two are about what Dagster does inside; the last is a beta that the assets rest on.
_DAGSTERS_OWN_WARNINGS = (
    "The `__fields__` attribute is deprecated",
    "InitResourceContext.dagster_run is deprecated",
    "Parameter `backfill_policy`",
    "Specifying a partitions_def on an AssetCheckSpec",
)

_MEMORY = Path("/dev/shm")
_ENOUGH_BYTES = 4 << 30
"""Free memory that holds whatever the tests write: they make and drop hundreds of databases."""

_TEMPLATE = "tutormax_template"
_SERVER_HOME = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """One home for the whole run: made here, and handed on to the workers of pytest-xdist."""
    # When the tests run as root, the server runs as another user, who must reach what they make.
    os.umask(0o022)
    for message in _DAGSTERS_OWN_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
    # Apprise imports it where Python still has it.
    config.addinivalue_line("filterwarnings", "ignore:'imghdr' is deprecated")
    if hasattr(config, "workerinput"):
        config.stash[_SERVER_HOME] = Path(config.workerinput["server_home"])
        return
    if "TMPDIR" not in os.environ and _is_fit_for_files(_MEMORY):
        os.environ["TMPDIR"] = str(_MEMORY)
        tempfile.tempdir = None
    home = Path(tempfile.mkdtemp(prefix="tutormax-tests-"))
    home.chmod(0o755)
    config.stash[_SERVER_HOME] = home


def _is_fit_for_files(folder: Path) -> bool:
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    is_large = found.f_bavail * found.f_frsize >= _ENOUGH_BYTES
    return is_large and os.access(folder, os.W_OK) and not found.f_flag & os.ST_NOEXEC


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What waits for the clock begins first, so that the others run meanwhile.

    Tests that share what takes seconds to make are run by one process.
    """
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
    for item in items:
        if "golden_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("golden"))
    if hasattr(config, "workerinput"):
        groups = {
            item.nodeid: mark.args[0]
            for item in items
            if (mark := item.get_closest_marker("xdist_group"))
        }
        folder, worker = config.stash[_SERVER_HOME], config.workerinput["workerid"]
        (folder / f"{worker}.groups").write_text(json.dumps(groups), encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Distribute tests by group.

    The scheduler of ``--dist loadgroup`` expects the group at the end of a node id, where
    pytest-xdist 3.8 cannot write it with pytest 9.2 (pytest-xdist issue 1386).
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    @cache
    def groups() -> dict[str, str]:
        # The first worker has collected the same tests as all others.
        [found, *_] = config.stash[_SERVER_HOME].glob("*.groups")
        return dict(json.loads(found.read_text(encoding="utf-8")))

    class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return groups().get(nodeid, nodeid)

    return GroupScheduling(config, log)


def pytest_collection_finish() -> None:
    """Leave what has been imported out of every collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["server_home"] = str(node.config.stash[_SERVER_HOME])


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and _SERVER_HOME in config.stash:
        embedded.stop(config.stash[_SERVER_HOME])
        shutil.rmtree(config.stash[_SERVER_HOME])


@pytest.fixture(autouse=True)
def _environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the developer's variables, ``.env`` or ``.tutormax``."""
    _forget_the_developers_environment(monkeypatch, tmp_path)


def _forget_the_developers_environment(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in os.environ:
        if name.startswith(("TUTORMAX_", "POSTGRES_")) or name == "DAGSTER_HOME":
            patch.delenv(name)
    patch.chdir(folder)


@pytest.fixture(scope="session", autouse=True)
def _dagsters_migrations_are_read_once() -> Iterator[None]:
    """Keep Dagster's migrations, which it reads anew for each run and each instance."""
    read = ScriptDirectory.from_config
    kept: dict[str, ScriptDirectory] = {}

    def from_config(config: Config) -> ScriptDirectory:
        location = config.get_main_option("script_location") or ""
        if not location.startswith("dagster:"):
            return read(config)
        if location not in kept:
            kept[location] = read(config)
        return kept[location]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", staticmethod(from_config))
        yield


@pytest.fixture(scope="session")
def server_url(pytestconfig: pytest.Config) -> sa.URL:
    """The server of this test run."""
    return embedded.start(pytestconfig.stash[_SERVER_HOME], options=FAST)


@pytest.fixture(scope="session")
def template_database(server_url: sa.URL, pytestconfig: pytest.Config) -> str:
    """Name of a database with all tables, empty, to make others from."""
    return _template(server_url, pytestconfig, _TEMPLATE, of="template1", fill=_create_tables)


@pytest.fixture(scope="session")
def golden_template(server_url: sa.URL, pytestconfig: pytest.Config, template_database: str) -> str:
    """Name of a database that holds the golden source rows."""
    name = f"{_TEMPLATE}_golden"
    return _template(server_url, pytestconfig, name, of=template_database, fill=fill_golden)


@pytest.fixture(scope="session")
def small_template(server_url: sa.URL, pytestconfig: pytest.Config, template_database: str) -> str:
    """Name of a database that holds a generated platform."""
    name = f"{_TEMPLATE}_small"
    return _template(server_url, pytestconfig, name, of=template_database, fill=_fill_small)


@pytest.fixture
def empty_database(server_url: sa.URL) -> Iterator[sa.URL]:
    """A database without tables."""
    with new_database(server_url, template="template1") as url:
        yield url


@pytest.fixture
def database(server_url: sa.URL, template_database: str) -> Iterator[sa.URL]:
    """A database with all tables, empty."""
    with new_database(server_url, template=template_database) as url:
        yield url


@pytest.fixture
def engine(database: sa.URL) -> Iterator[sa.Engine]:
    """An engine on ``database``."""
    engine = create_engine(database)
    yield engine
    engine.dispose()


def store(path: UPath, rows: pl.DataFrame, *, shards: Shards = ALL_IN_ONE) -> None:
    """Store a partition."""
    list_partition(partition_of(path, shards, [store_parts(path, rows.lazy(), shards=shards)]))


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Level and message of each line that the project logs within the block."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {record.getMessage()}")

    logger, collector = logging.getLogger("tutormax_assets"), Collector()
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.setLevel(level)
        logger.removeHandler(collector)


@dataclass(frozen=True)
class Platform:
    """A platform's database and a home of one's own, as the environment says while it is open.

    Attributes:
        settings: What the environment says.
        engine: An engine on the database.
    """

    settings: Settings
    engine: sa.Engine

    @property
    def url(self) -> sa.URL:
        return self.engine.url

    @property
    def storage(self) -> Path:
        return Path(self.settings.storage_path)

    def run(self, *days: str, **options: Any) -> "list[AggregationSummary]":
        """Run the job for consecutive reference dates."""
        from tutormax_assets.api.runs import aggregate
        from tutormax_assets.defs.resources import RunOptions

        options = {"max_retries": 0, "retry_delay_seconds": 0, **options}
        return aggregate(
            self.settings, [date.fromisoformat(day) for day in days], RunOptions(**options)
        )

    def add(self, table: sa.Table, *rows: Mapping[str, Any]) -> None:
        add(self.engine, table, *rows)

    def execute(self, statement: str) -> None:
        with self.engine.begin() as connection:
            connection.execute(sa.text(statement))

    def metrics(self) -> pl.DataFrame:
        """The metrics table, sorted by its key."""
        return metrics_of(self.engine)

    def partition(self, asset: str, day: str) -> pl.DataFrame:
        return scan_partition(UPath(self.storage) / asset / f"{day}.parquet").collect()


@cache
def _opened_dagster_home() -> tempfile.TemporaryDirectory[str]:
    """A Dagster home with tables, to copy: making them takes most of a second."""
    from tutormax_assets.runs.instance import dagster_instance

    folder = tempfile.TemporaryDirectory(prefix="tutormax-dagster-")
    with dagster_instance(Settings(dagster_home=Path(folder.name))):
        pass
    return folder


@contextmanager
def open_platform(
    url: sa.URL, home: Path, *, using: pytest.MonkeyPatch | None = None, **variables: str
) -> Iterator[Platform]:
    """Lead the environment to a database and a home, with further variables if need be.

    It is put back when the block ends, or by the given ``MonkeyPatch``: a fixture takes that of
    the test, so that what the test changes is put back before.
    """
    home.mkdir(parents=True, exist_ok=True)
    if "DAGSTER_HOME" not in variables and not (home / "dagster").exists():
        shutil.copytree(_opened_dagster_home().name, home / "dagster", symlinks=True)
    url = url.set(password=PASSWORD)
    with nullcontext(using) if using else pytest.MonkeyPatch.context() as patch:
        _forget_the_developers_environment(patch, home)
        patch.setenv("TUTORMAX_DATABASE_URL", url.render_as_string(hide_password=False))
        patch.setenv("TUTORMAX_HOME", str(home))
        for name, value in variables.items():
            patch.setenv(name, value)
        engine = create_engine(url)
        try:
            yield Platform(load_settings(), engine)
        finally:
            engine.dispose()


@pytest.fixture(scope="session")
def shared_dagster_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Dagster home for tests that do not look into it: making one takes half a second."""
    return tmp_path_factory.mktemp("dagster")


@pytest.fixture
def platform(
    database: sa.URL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_dagster_home: Path
) -> Iterator[Platform]:
    """A platform without rows."""
    variables = {"DAGSTER_HOME": str(shared_dagster_home)}
    with open_platform(database, tmp_path / "home", using=monkeypatch, **variables) as opened:
        yield opened


@pytest.fixture
def small_platform(
    server_url: sa.URL,
    small_template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared_dagster_home: Path,
) -> Iterator[Platform]:
    """A generated platform of 30 tutors, some rows of which break the source contract."""
    variables = {"DAGSTER_HOME": str(shared_dagster_home)}
    with (
        new_database(server_url, template=small_template) as url,
        open_platform(url, tmp_path / "home", using=monkeypatch, **variables) as opened,
    ):
        yield opened


@pytest.fixture(scope="session")
def computed_template(
    server_url: sa.URL,
    small_template: str,
    tmp_path_factory: pytest.TempPathFactory,
    shared_dagster_home: Path,
) -> Iterator[tuple[str, Path]]:
    """Name of a database, and a storage: the generated platform after a run of its last date."""
    home = tmp_path_factory.mktemp("computed") / "home"
    with new_database(server_url, template=small_template) as url:
        with open_platform(url, home, DAGSTER_HOME=str(shared_dagster_home)) as platform:
            [summary] = platform.run(str(SMALL_PLATFORM_END))
            assert summary.all_saved
        yield str(url.database), platform.storage


@pytest.fixture
def computed_platform(
    server_url: sa.URL,
    computed_template: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared_dagster_home: Path,
) -> Iterator[Platform]:
    """A copy of the generated platform after a run of its last date, for a test to change."""
    template, storage = computed_template
    shutil.copytree(storage, tmp_path / "home" / storage.name)
    variables = {"DAGSTER_HOME": str(shared_dagster_home)}
    with (
        new_database(server_url, template=template) as url,
        open_platform(url, tmp_path / "home", using=monkeypatch, **variables) as opened,
    ):
        yield opened


@pytest.fixture
def golden_platform(
    server_url: sa.URL,
    golden_template: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared_dagster_home: Path,
) -> Iterator[Platform]:
    """The platform of the golden rows."""
    variables = {"DAGSTER_HOME": str(shared_dagster_home)}
    with (
        new_database(server_url, template=golden_template) as url,
        open_platform(url, tmp_path / "home", using=monkeypatch, **variables) as opened,
    ):
        yield opened


_PLAUSIBLE: dict[str, dict[str, Any]] = {
    "tutors": {
        "name": "Private Name",
        "onboarding_date": datetime(2024, 1, 1, tzinfo=UTC),
        "status": "active",
        "subjects": ["algebra"],
    },
    "students": {"name": "Private Child"},
    "sessions": {
        "student_id": "a_student",
        "session_number": 2,
        "actual_start": None,
        "duration_minutes": 60,
        "subject": "algebra",
        "session_type": "one_on_one",
        "tutor_initiated_reschedule": False,
        "no_show": False,
        "late_start_minutes": 0,
        "engagement_score": None,
        "learning_objectives_met": None,
        "technical_issues": False,
    },
    "student_feedback": {
        "student_id": "a_student",
        "overall_rating": 5,
        "is_first_session": False,
        "free_text_feedback": "Private text",
        "submitted_at": datetime(2025, 11, 6, 12, tzinfo=UTC),
    },
    "tutor_events": {"event_type": "login", "metadata": sa.null()},
    "tutor_performance_metrics": {"sessions_completed": 0, "no_show_count": 0},
}


def add(engine: sa.Engine, table: sa.Table, *rows: Mapping[str, Any]) -> None:
    """Insert rows, each column that a row leaves out filled with a plausible constant.

    Tutors and the student who do not exist yet come with them.
    """
    with engine.begin() as connection:
        for row in rows:
            values = {**_PLAUSIBLE[table.name], **row}
            if table is tables.tutors:
                values.setdefault("email", f"{uuid4()}@private.example")
            elif "tutor_id" in table.c and not _exists(connection, tables.tutors, row["tutor_id"]):
                connection.execute(
                    tables.tutors.insert(),
                    {
                        **_PLAUSIBLE["tutors"],
                        "tutor_id": row["tutor_id"],
                        "email": f"{uuid4()}@private.example",
                    },
                )
            student = values.get("student_id")
            if (
                table is not tables.students
                and student is not None
                and not _exists(connection, tables.students, student)
            ):
                connection.execute(
                    tables.students.insert(), {**_PLAUSIBLE["students"], "student_id": student}
                )
            connection.execute(table.insert().values(**values))


def metrics_of(engine: sa.Engine) -> pl.DataFrame:
    """The metrics table, sorted by its key."""
    with engine.connect() as connection:
        rows = connection.execute(sa.select(tables.tutor_performance_metrics)).mappings().all()
    kinds: dict[type, pl.DataType] = {
        str: pl.String(),
        int: pl.Int64(),
        float: pl.Float64(),
        datetime: pl.Datetime("us", "UTC"),
    }
    schema = {
        column.name: kinds[column.type.python_type]
        for column in tables.tutor_performance_metrics.columns
    }
    return pl.DataFrame([dict(row) for row in rows], schema=schema, infer_schema_length=None).sort(
        "tutor_id", "calculation_date", "window"
    )


def _exists(connection: sa.Connection, table: sa.Table, key: str) -> bool:
    [column] = table.primary_key.columns
    return bool(connection.scalar(sa.select(sa.exists().where(column == key))))


def _create_tables(engine: sa.Engine) -> None:
    source_metadata.create_all(engine)
    metrics_metadata.create_all(engine)


def _fill_small(engine: sa.Engine) -> None:
    sample_platform.generate(engine, **SMALL_PLATFORM)


def fill_golden(engine: sa.Engine) -> None:
    """Copy the golden rows; the columns that they lack are filled with plausible constants."""
    read = partial(pl.read_parquet, memory_map=False)
    sessions = read(GOLDEN / "sessions.parquet")
    feedback = read(GOLDEN / "student_feedback.parquet")
    student_ids = pl.concat([sessions["student_id"], feedback["student_id"]]).unique().sort()
    frames = {
        "tutors": read(GOLDEN / "tutors.parquet").with_columns(subjects=pl.lit("{algebra}")),
        "students": student_ids.to_frame().with_columns(
            name="Child " + pl.col("student_id"), age=pl.lit(12)
        ),
        "sessions": sessions.with_columns(
            duration_minutes=pl.lit(60),
            subject=pl.lit("algebra"),
            session_type=pl.lit("one_on_one"),
            technical_issues=pl.lit(False),
        ),
        "student_feedback": feedback.with_columns(
            free_text_feedback="Free text " + pl.col("feedback_id")
        ),
        "tutor_events": read(GOLDEN / "tutor_events.parquet"),
    }
    with psycopg.connect(conninfo(engine.url)) as connection, connection.cursor() as cursor:
        for table, frame in frames.items():
            columns = sql.SQL(", ").join(map(sql.Identifier, frame.columns))
            statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)")
            with cursor.copy(statement.format(sql.Identifier(table), columns)) as copy:
                copy.write(frame.write_csv(include_header=False))
        cursor.execute("ANALYZE")


def _template(
    server_url: sa.URL,
    pytestconfig: pytest.Config,
    name: str,
    *,
    of: str,
    fill: Callable[[sa.Engine], None],
) -> str:
    """Make a database to make others from, unless a worker has made it already."""
    with FileLock(pytestconfig.stash[_SERVER_HOME] / "template.lock"), _admin(server_url) as admin:
        query = "SELECT 1 FROM pg_database WHERE datname = %s"
        if admin.execute(query, [name]).fetchone() is None:
            # It gets its name once it is whole.
            with new_database(server_url, template=of) as url:
                engine = create_engine(url)
                fill(engine)
                engine.dispose()
                create = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
                admin.execute(
                    create.format(sql.Identifier(name), sql.Identifier(str(url.database)))
                )
    return name


def _admin(server_url: sa.URL) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(conninfo(server_url.set(database="postgres")), autocommit=True)


@contextmanager
def new_database(
    server_url: sa.URL, *, template: str, options: sql.Composable | None = None
) -> Iterator[sa.URL]:
    """A database that is a copy of another one, for as long as the block lasts."""
    url = server_url.set(database=f"test_{uuid4().hex}")
    name = sql.Identifier(str(url.database))
    with _admin(server_url) as admin:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(template))
        admin.execute(create if options is None else create + options)
        try:
            yield url
        finally:
            _wait_for_backends_to_exit(admin, url)
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def _wait_for_backends_to_exit(admin: psycopg.Connection[tuple[Any, ...]], url: sa.URL) -> None:
    """End the backends of a database; DROP DATABASE checks for them only every 100 ms."""
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
    deadline = time.monotonic() + 1
    while admin.execute(end, [url.database]).fetchone() and time.monotonic() < deadline:
        time.sleep(0.001)
