"""The platform's database, as the settings name it."""

from functools import cached_property

import sqlalchemy as sa

from tutormax_assets.database.connection import Timeouts, create_engine, database_url
from tutormax_assets.settings import Settings
from tutormax_assets.source.view import AnySource, source_of


class PlatformDatabase:
    """The PostgreSQL that holds the metrics, and where the source tables are read.

    Nothing is connected to or started before it is first used.
    """

    def __init__(self, settings: Settings) -> None:
        """Name the database, the source and the limits of statements."""
        self._settings = settings
        self.timeouts = Timeouts.of(settings)

    @cached_property
    def url(self) -> sa.URL:
        """Where the database is that holds the metrics.

        Raises:
            EmbeddedServerError: The embedded server does not start.
        """
        return database_url(self._settings)

    @cached_property
    def source(self) -> AnySource:
        """Where the source tables are read.

        Raises:
            EmbeddedServerError: The embedded server does not start.
        """
        return source_of(self._settings)

    @cached_property
    def engine(self) -> sa.Engine:
        """The connection pool of the database that holds the metrics.

        Raises:
            EmbeddedServerError: The embedded server does not start.
        """
        return create_engine(self.url)

    def close(self) -> None:
        """Close the pool; the next use opens another one."""
        if (engine := self.__dict__.pop("engine", None)) is not None:
            engine.dispose()
