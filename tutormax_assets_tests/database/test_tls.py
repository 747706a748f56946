"""libpq's settings of TLS reach both drivers, and what they refuse is said once and for all."""

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
import trustme

from tutormax_assets.database import tables
from tutormax_assets.database.connection import create_engine, database_url, source_url
from tutormax_assets.database.faults import may_pass, reason
from tutormax_assets.settings import load_settings
from tutormax_assets.source.postgres import Source, unknown_tutors
from tutormax_assets.source.streams import SourceError
from tutormax_assets_tests.conftest import add
from tutormax_assets_tests.tls import tls_proxy

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Authority:
    """A certificate authority, whom clients know by a file."""

    ca: trustme.CA
    file: Path

    def server_context(self, *, name: str = HOST, asks_clients: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(name).configure_cert(context)
        if asks_clients:
            self.ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    @property
    def options(self) -> dict[str, str]:
        return {"sslmode": "verify-full", "sslrootcert": str(self.file)}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return _authority(tmp_path / "ours.pem")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return _authority(tmp_path / "theirs.pem")


def _authority(file: Path) -> Authority:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(file)
    return Authority(ca, file)


@pytest.fixture
def encrypted(engine: sa.Engine, authority: Authority) -> Iterator[sa.URL]:
    """The address of a database with one tutor, behind a certificate for its host."""
    add(engine, tables.tutors, {"tutor_id": "t"})
    with tls_proxy(engine.url, authority.server_context()) as url:
        yield url


def written_and_read(url: sa.URL) -> list[str]:
    """What both drivers find: the pool that writes, and the snapshot that reads."""
    engine = create_engine(url)
    with engine.begin() as connection:
        name = connection.scalar(sa.text("UPDATE tutors SET name = 'n' RETURNING tutor_id"))
    engine.dispose()
    return [str(name), *unknown_tutors(Source(url), ["t", "another"])]


def refusals(url: sa.URL) -> list[str]:
    """What both drivers say to a connection that no second try would bring about."""
    engine = create_engine(url)
    with pytest.raises(sa.exc.OperationalError) as writing:
        engine.connect()
    engine.dispose()
    with pytest.raises(SourceError) as reading:
        unknown_tutors(Source(url), ["t"])
    assert not may_pass(writing.value)
    assert not may_pass(reading.value)
    assert "\n" not in str(reading.value)
    return [reason(writing.value), str(reading.value)]


def assert_refused(url: sa.URL, because: str) -> None:
    for sentence in refusals(url):
        assert because in sentence


def test_a_server_with_the_right_certificate_is_written_and_read(
    encrypted: sa.URL, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = encrypted.update_query_dict(authority.options)
    for variable in ("TUTORMAX_DATABASE_URL", "TUTORMAX_SOURCE_URL"):
        monkeypatch.setenv(variable, url.render_as_string(hide_password=False))
    settings = load_settings()

    assert database_url(settings) == source_url(settings) == url
    assert written_and_read(database_url(settings)) == ["t", "another"]


def test_libpqs_own_variables_count_beside_the_five(
    encrypted: sa.URL, authority: Authority, stranger: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("HOST", encrypted.host),
        ("PORT", encrypted.port),
        ("USER", encrypted.username),
        ("PASSWORD", ""),
        ("DB", encrypted.database),
    ):
        monkeypatch.setenv(f"POSTGRES_{name}", str(value))
    url = database_url(load_settings())
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    monkeypatch.setenv("PGSSLROOTCERT", str(stranger.file))
    assert_refused(url, "certificate verify failed")

    monkeypatch.setenv("PGSSLROOTCERT", str(authority.file))
    assert written_and_read(url) == ["t", "another"]


def test_another_authority_is_refused(
    encrypted: sa.URL, stranger: Authority, tmp_path: Path
) -> None:
    assert_refused(encrypted.update_query_dict(stranger.options), "certificate verify failed")
    nothing = {**stranger.options, "sslrootcert": str(tmp_path / "none.pem")}
    assert_refused(
        encrypted.update_query_dict(nothing),
        f'root certificate file "{tmp_path}/none.pem" does not exist',
    )


def test_a_certificate_for_another_host_is_refused(engine: sa.Engine, authority: Authority) -> None:
    context = authority.server_context(name="elsewhere.example")
    with tls_proxy(engine.url, context) as url:
        assert_refused(
            url.update_query_dict(authority.options),
            f'certificate for "elsewhere.example" does not match host name "{HOST}"',
        )


def test_a_server_without_tls_is_refused(engine: sa.Engine) -> None:
    with tls_proxy(engine.url, None) as url:
        assert_refused(
            url.update_query_dict({"sslmode": "require"}),
            "server does not support SSL, but SSL was required",
        )


def test_a_client_shows_its_certificate(
    engine: sa.Engine, authority: Authority, tmp_path: Path
) -> None:
    add(engine, tables.tutors, {"tutor_id": "t"})
    issued = authority.ca.issue_cert("tutormax.example")
    files = {"sslcert": tmp_path / "client.pem", "sslkey": tmp_path / "client.key"}
    issued.cert_chain_pems[0].write_to_path(files["sslcert"])
    issued.private_key_pem.write_to_path(files["sslkey"])
    files["sslkey"].chmod(0o600)
    with tls_proxy(engine.url, authority.server_context(asks_clients=True)) as url:
        url = url.update_query_dict(authority.options)
        assert_refused(url, "certificate required")
        with_files = url.update_query_dict({name: str(file) for name, file in files.items()})
        assert written_and_read(with_files) == ["t", "another"]
        files["sslkey"].chmod(0o644)
        assert_refused(with_files, "has group or world access")


def test_the_other_options_reach_both_drivers(encrypted: sa.URL, authority: Authority) -> None:
    url = encrypted.update_query_dict(authority.options)

    assert_refused(
        url.update_query_dict({"channel_binding": "require"}), "channel binding required"
    )
    assert_refused(url.update_query_dict({"sslmode": "full"}), 'invalid sslmode value: "full"')
    primary = url.update_query_dict({"target_session_attrs": "read-write"})
    assert written_and_read(primary) == ["t", "another"]
    standby = url.update_query_dict({"target_session_attrs": "read-only"})
    with pytest.raises(SourceError, match="session is not read-only"):
        unknown_tutors(Source(standby), ["t"])
