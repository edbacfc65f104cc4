"""Submit a job to a cluster, after a look at what would be uploaded.

    python jobs/submit.py -- jobs/extract_flow.py --videos s3://BUCKET/videos --output s3://BUCKET/shards
    python jobs/submit.py --address http://HEAD:8265 --no-wait -- jobs/train.py …

Does what `ray job submit --working-dir . -- python jobs/extract_flow.py …` does, and in addition refuses a working
directory that is too large before anything is sent, shows the job's own lines only, and exits with the job's status.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.command import run_command
from pipelines.errors import SubmitError
from pipelines.formatting import format_bytes, format_count

LARGEST = 3  # files that a refusal names


@dataclass(frozen=True, kw_only=True)
class Submit:
    """Submit the job that follows after --, follow its log, and exit with its status."""

    address: str | None = None
    """Job server of the cluster. None: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    working_dir: str = "."
    """Folder to upload, in which the job runs; .rayignore and .gitignore in it say what stays here."""
    no_wait: bool = False
    """Return as soon as the cluster has the job."""


def main() -> None:
    """Parse, submit, follow."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it once, when it is imported
    flags, words = split_at_dashes(sys.argv[1:])
    run_command(Submit, lambda config: run(config, words), __doc__, args=flags, stopped="nothing was submitted")


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what stands after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def run(config: Submit, words: list[str]) -> int:
    """Check, upload, submit and follow; the exit status."""
    if not words:
        raise SubmitError("no job is named: python jobs/submit.py -- jobs/extract_flow.py --videos …")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Ray's client tells of each ignore file, and that .git is left out
    try:
        return submit(config, words)
    finally:
        logging.disable(before)


def submit(config: Submit, words: list[str]) -> int:
    """The same, of a job that is named."""
    folder = Path(config.working_dir).absolute()
    check_upload(folder, list_upload(folder), words[0])
    client = open_client(config.address)
    # The cluster's shell splits the line again; `python` is the cluster's.
    job = client.submit_job(entrypoint=shlex.join(["python", *words]), runtime_env={"working_dir": str(folder)})
    commands = f"follow it by `ray job logs --follow {job}`, stop it by `ray job stop {job}`"
    print(f"submitted   {job}; {commands}", flush=True)
    if config.no_wait:
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on: {commands}", flush=True)
        return 130


def list_upload(folder: Path) -> dict[str, int]:
    """Bytes of each file that Ray would upload, by its path in the folder; Ray's own code chooses them."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    if not folder.is_dir():
        raise SubmitError(f"--working-dir {folder} is no folder: give the root of the project")
    sizes = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size

    excludes = [packaging._get_excludes(folder, get_runtime_env_default_excludes())]
    heed_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    packaging._dir_travel(folder, excludes, note, include_gitignore=heed_gitignore)
    return sizes


def measure_archive(files: dict[str, int]) -> int:
    """Bytes of the zip file that Ray makes of them, which compresses nothing."""
    # A zip file ends in 22 bytes, and has a header of 30 and an entry of 46 for each file, both with its name.
    return 22 + sum(size + 76 + 2 * len(name.encode()) for name, size in files.items())


def check_upload(folder: Path, files: dict[str, int], job: str) -> None:
    """SubmitError where the upload is more than the job server takes, or lacks the job's file."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE as MOST

    if job not in files:
        raise SubmitError(
            f"{job} is not among the {format_count(len(files), 'file')} of {folder} that are uploaded: name a job"
        )
    if (total := measure_archive(files)) > MOST:
        largest = sorted(files, key=lambda name: -files[name])[:LARGEST]
        named = ", ".join(f"{name} ({format_bytes(files[name])})" for name in largest)
        raise SubmitError(
            f"{folder} would upload {format_bytes(total)} in {format_count(len(files), 'file')}, "
            f"and a job server takes "
            f"{format_bytes(MOST)}: name what the job does not need in .rayignore; the largest are {named}"
        )


def open_client(address: str | None) -> Any:
    """A client of the job server. Raises SubmitError where there is none, or where it refuses the token."""
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to the address that it is given
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        reason = error.message.split("\n")[0].split(". ")[0]
        raise SubmitError(
            f"{address} wants a token: {reason}. Put the cluster's token into ~/.ray/auth_token (cluster.yaml says how)"
        ) from error
    except ConnectionError as error:
        raise SubmitError(f"no job server at {address}: run `ray dashboard cluster.yaml`, or give --address") from error


def follow(client: Any, job: str) -> int:
    """Print the job's log until it ends; its exit status, 130 where it was stopped.

    Raises SubmitError where the connection breaks before that.
    """
    import aiohttp

    async def copy_log() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    try:
        asyncio.run(copy_log())
        info = client.get_job_info(job)
    except (RuntimeError, aiohttp.ClientError) as error:
        raise SubmitError(f"lost the job server ({error}); the job goes on: `ray job logs --follow {job}`") from error
    print(f"\njob         {job}: {info.status.lower()}", flush=True)
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return 130
    if info.driver_exit_code is None:  # it never began, so the log does not say why
        print(info.message, flush=True)
    return int(info.driver_exit_code or 1)


if __name__ == "__main__":
    main()
