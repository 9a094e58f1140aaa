"""A ledger of each kind: a SQLite file, one in memory, and a PostgreSQL server started for the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from scheduler.store.store import Store

OpenStore = Callable[[], Store]


def _account() -> dict[str, object]:
    """Return the arguments that run a server as somebody else than root, which it demands."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Yield the URL of an empty PostgreSQL cluster on a socket in a folder of its own."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if not initdb or not server:
        pytest.skip("initdb and postgres are not on the PATH")
    pytest.importorskip("psycopg")
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="tessera-pg-"))
    if account:
        os.chown(folder, account["user"], account["group"])
    cluster = folder / "data"
    made = subprocess.run(
        [initdb, "-D", cluster, "-U", "tessera", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        **account,
    )
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"initdb refused: {made.stderr.strip()[-200:]}")
    command = [server, "-D", cluster, "-k", folder, "-h", "", "-p", "5432"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, **account) as process:
        assert process.stderr is not None
        for said in process.stderr:
            if "ready to accept connections" in said:
                break
        yield f"postgresql://tessera@/%s?host={folder}"
        process.terminate()
        process.stderr.read()
    shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL of a fresh database on that server."""
    name = f"t{abs(hash(request.node.nodeid)):x}"
    server = (postgres % "postgres").replace("postgresql", "postgresql+psycopg")
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield postgres % name
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.dispose()


@pytest.fixture(params=["file", "memory", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return where a new ledger of each kind may be made."""
    if request.param == "postgres":
        found: str = request.getfixturevalue("postgres_url")
        return found
    return f"sqlite:///{tmp_path}/ledger.db" if request.param == "file" else "sqlite://"


@pytest.fixture
def opened(url: str) -> Iterator[OpenStore]:
    """Yield a call that opens the ledger; whatever it opened is closed in the end."""
    with ExitStack() as closing:

        def open_store() -> Store:
            store = Store.open(url)
            closing.callback(store.close)
            return store

        yield open_store


@pytest.fixture
def store(opened: OpenStore) -> Store:
    """Return an open, empty ledger."""
    return opened()
