"""A PostgreSQL server of the tests' own, which can be restarted under whoever uses it."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import uuid
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest


def need(there, what):
    """Where a part is missing: skip, and pytest tells why; in CI, fail."""
    if not there and os.environ.get("CI"):
        pytest.fail(f"CI needs {what}")
    if not there:
        pytest.skip(f"needs {what}")


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Server:
    """url: with the password, and no database of ours yet."""

    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.password = secrets.token_urlsafe(12)
        (folder / "password").write_text(self.password)
        (port,) = free_ports(1)
        self.url = f"postgresql://peftlab:{self.password}@127.0.0.1:{port}"
        self.user = []
        if os.geteuid() == 0:  # which PostgreSQL refuses
            self.user = ["runuser", "-u", "postgres", "--"]
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres")
        words = "--username=peftlab --auth=scram-sha-256 --no-sync --pwfile=password"
        self._run("initdb", *words.split())
        listen = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self.options = f"{listen} -c fsync=off"

    def start(self):
        log = self.folder / "log"
        self._run(*"pg_ctl start --wait --silent".split(), "--log", log, "--options", self.options)

    def stop(self, mode="immediate"):
        self._run("pg_ctl", "stop", f"--mode={mode}", "--silent")

    def database(self):
        """Make a new, empty database; return its URL."""
        import psycopg

        name = f"db{uuid.uuid4().hex}"
        with psycopg.connect(f"{self.url}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"{self.url}/{name}"

    def _run(self, program, *words):
        command = [*self.user, self.programs / program, "--pgdata", self.folder / "data", *words]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


@contextmanager
def running():
    """Yield a server that runs until the block ends."""
    need(find_spec("psycopg"), "peftlab's extra postgresql")
    found = [shutil.which("initdb"), *Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    initdb = next((Path(path) for path in found if path), None)
    need(initdb is not None, "PostgreSQL (Debian's package postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    server = Server(initdb.resolve().parent, folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
