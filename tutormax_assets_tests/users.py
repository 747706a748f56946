"""Users of a database who have the rights of ``tutormax db roles`` and no other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

import psycopg
import sqlalchemy as sa
from psycopg import sql

from tutormax_assets.database.connection import conninfo, create_engine
from tutormax_assets.schema.roles import grants
from tutormax_assets.schema.status import upgrade
from tutormax_assets_tests.conftest import new_database


@dataclass(frozen=True)
class Users:
    """Where a database is for its owner, and for a user of the reader, of the writer, of both."""

    owner: sa.URL
    reader: sa.URL
    writer: sa.URL
    both: sa.URL

    def execute(self, statement: str) -> None:
        """Execute as the owner; ``{reader}`` and ``{writer}`` stand for the roles."""
        names = {name: sql.Identifier(role) for name, role in self.roles.items()}
        with psycopg.connect(conninfo(self.owner)) as connection:
            connection.execute(sql.SQL(statement).format(**names))

    def grant(self) -> None:
        """Give the rights, again or for the first time."""
        with psycopg.connect(conninfo(self.owner), autocommit=True) as connection:
            connection.execute(
                grants(
                    reader=self.roles["reader"], writer=self.roles["writer"], schema="public"
                ).encode()
            )

    @property
    def roles(self) -> dict[str, str]:
        """The names of both roles."""
        return {name: f'{name}$$ of "{self.owner.database}"' for name in ("reader", "writer")}


@contextmanager
def open_users(server_url: sa.URL, *, template: str) -> Iterator[Users]:
    """A database that gives nothing to everybody, and users who have their rights in it."""
    with new_database(server_url, template=template) as owner:
        logins = {name: f"{name}_{uuid4().hex}" for name in ("reader", "writer", "both")}
        users = Users(owner, **{name: owner.set(username=login) for name, login in logins.items()})
        database = sql.Identifier(str(owner.database))
        roles = {name: sql.Identifier(role) for name, role in users.roles.items()}
        members = {
            "reader": roles["reader"],
            "writer": roles["writer"],
            "both": sql.SQL(", ").join(roles.values()),
        }
        engine = create_engine(owner)
        upgrade(engine, timezone="UTC")
        engine.dispose()
        with psycopg.connect(conninfo(owner), autocommit=True) as connection:
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
            connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
            users.grant()
            for name, login in logins.items():
                create = sql.SQL("CREATE ROLE {} LOGIN IN ROLE {}")
                connection.execute(create.format(sql.Identifier(login), members[name]))
        yield users
    # Roles are of the whole server, and these have rights until the database is gone.
    names = sql.SQL(", ").join(map(sql.Identifier, (*logins.values(), *users.roles.values())))
    admin = conninfo(server_url.set(database="postgres"))
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP ROLE {}").format(names))
