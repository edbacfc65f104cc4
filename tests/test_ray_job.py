"""A job submitted to a running head, as on a cluster: token authentication on, all sockets on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a head's job server, and the environment that its clients need."""
    home = tmp_path_factory.mktemp("home")
    temporary = Path("/tmp") / f"ray-{os.getpid()}"
    environment = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds to 127.0.0.1 only
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard, agent = free_port(), free_port(), free_port()
    flags = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
    flags.append(f"--dashboard-agent-listen-port={agent}")
    command = [RAY, "start", "--head", "--block", "--include-dashboard=true", f"--temp-dir={temporary}", *flags]
    log = (home / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for server in (dashboard, agent):  # the agent takes the jobs that the dashboard is handed
            wait_until_up(server, process, home / "head.log")
        yield address, environment
    finally:
        process.send_signal(signal.SIGTERM)  # with --block this ends all processes of the head, and no others
        process.wait(timeout=60)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)


def submit(head: tuple[str, dict[str, str]], *words: str) -> subprocess.CompletedProcess[str]:
    """Submit from the project's root and wait for the job's end."""
    address, environment = head
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", "python", *words]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=240, cwd=ROOT)


@pytest.mark.slow
def test_the_debug_run_works_as_a_submitted_job(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = submit(head, "jobs/extract_flow.py", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a cluster of 1 nodes" in done.stdout
    assert "18 of 18 videos" in done.stdout
    assert (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.slow
def test_a_job_that_fails_says_so(head: tuple[str, dict[str, str]]) -> None:
    done = submit(head, "jobs/extract_flow.py", "--videos", "nowhere", "--output", "out")
    assert done.returncode != 0
    assert "error: no videos folder" in done.stdout + done.stderr
