"""A page on this machine on which to try networks on videos, and the same as JSON.

    python jobs/serve.py --rgb RUN --flow RUN                              then open http://127.0.0.1:8000
    curl --data-binary @VIDEO http://127.0.0.1:8000/api/predict            the same without a browser

It listens on 127.0.0.1 only, reads no file but the videos that it is sent, and keeps none.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from jobs.command import run_command
from jobs.predict import Precision, find_device, load_networks, name_classes
from pipelines import storage
from pipelines.errors import InputError, SettingsError, VideoError
from pipelines.evaluation.over_time import Reader
from pipelines.pages.live import describe_preview, describe_reading, make_live_page
from pipelines.tvl1.params import FlowPreset

HOST = "127.0.0.1"
MOST_WAITING = 4  # videos that wait for the one that is read
UPLOAD_S = 300.0  # that sending a video may take
MB = 1_000_000
HOSTS = web.AppKey("hosts", set[str])  # by which names the server may be asked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Show in a browser what networks see in videos."""

    rgb: str | None = None
    """Network of the RGB stream: a run, a checkpoint, a TensorFlow checkpoint or a PyTorch file."""
    flow: str | None = None
    """Network of the flow stream, in the same forms."""
    classes: str | None = None
    """Text file with one class name per line. None: the names in the checkpoint, or numbers if there are none."""
    port: int = 8000
    """Port of 127.0.0.1 to listen on. 0: any that is free."""
    max_seconds: float = 20.0
    """Seconds of a video that are read, from its beginning."""
    max_upload: int = 200
    """Largest video that is taken, in MB."""
    top: int = 5
    """How many of the most probable classes to show."""
    flow_preset: FlowPreset = "faithful"
    """TV-L1 preset. Use the one that the flow network was trained with."""
    precision: Precision = "fp32"
    """Precision of the network. bf16 is faster where supported, its logits off by half a percent; fp16 needs a GPU."""

    def __post_init__(self) -> None:
        if self.rgb is None and self.flow is None:
            raise SettingsError("no network is given: name one by --rgb, by --flow, or one by each")
        if not 0 <= self.port < 1 << 16:
            raise SettingsError(f"--port is {self.port}: give 0 to 65535")
        if not 0 < self.max_seconds <= 600:
            raise SettingsError(f"--max-seconds is {self.max_seconds:g}: give seconds above 0, at most 600")
        for flag, value in (("--max-upload", self.max_upload), ("--top", self.top)):
            if value < 1:
                raise SettingsError(f"{flag} is {value}: give at least 1")
        for uri in (self.rgb, self.flow, self.classes):
            if uri is not None:
                storage.absolute(uri)


def main() -> None:
    """Parse, load, listen."""
    run_command(Serve, run, __doc__, stopped="no video was kept")


def run(config: Serve) -> None:
    """Listen until somebody stops it; prints the address."""
    asyncio.run(listen(make_app(config), config.port))


async def listen(app: web.Application, port: int, *, on_up: Callable[[str], None] = print) -> None:
    """Serve on 127.0.0.1 until cancelled; `on_up` is told the line with the address."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, HOST, port)
        try:
            await site.start()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else error
            raise SettingsError(f"--port is {port}: {reason}. Give another, or 0 for any that is free") from error
        (address, *_) = runner.addresses
        app[HOSTS].update(name_hosts(address[1]))
        on_up(f"open        http://{HOST}:{address[1]}")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def name_hosts(port: int) -> set[str]:
    """What a browser calls this server, which leaves out the port that is HTTP's own."""
    names = {HOST, "localhost"}
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


def make_app(config: Serve) -> web.Application:
    """The page, its JSON, and nothing else."""
    given = {"rgb": config.rgb, "flow": config.flow}
    networks = load_networks(given)  # type: ignore[arg-type]
    reader = Reader(
        networks,
        seconds=config.max_seconds,
        flow_preset=config.flow_preset,
        precision=config.precision,
        device=find_device(config.precision),
    )
    titles = [f"{stream}: {given[stream]}" for stream in networks]
    page = make_live_page(networks=titles, seconds=config.max_seconds, megabytes=config.max_upload)
    desk = Desk(reader, name_classes(networks, config.classes), top=config.top, most_bytes=config.max_upload * MB)
    app = web.Application(middlewares=[guard])
    app[HOSTS] = set()
    app.add_routes([web.get("/", lambda request: answer_page(page)), web.post("/api/predict", desk.predict)])
    return app


async def answer_page(page: str) -> web.Response:
    return web.Response(text=page, content_type="text/html")


@web.middleware
async def guard(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Let no other site's page in, which a browser here may have open, under its own name or under a false one."""
    hosts = request.app[HOSTS]
    origin = request.headers.get("Origin")
    if request.host not in hosts or (origin is not None and origin.removeprefix("http://") not in hosts):
        return refuse(403, "this server answers to pages of its own only")
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = refuse(error.status, error.reason)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response


def refuse(status: int, reason: str) -> web.Response:
    """One clear sentence as JSON."""
    return web.json_response({"error": reason}, status=status)


class Desk:
    """Takes videos, has them read one at a time, and answers with what was seen."""

    def __init__(self, reader: Reader, classes: Sequence[str], *, top: int, most_bytes: int) -> None:
        self.reader, self.classes, self.top, self.most_bytes = reader, classes, top, most_bytes
        self.thread = ThreadPoolExecutor(1)
        self.waiting = 0

    async def predict(self, request: web.Request) -> web.Response:
        """POST of a video file's bytes; with ?preview=1 the answer holds the video beside its flow as well."""
        if self.waiting > MOST_WAITING:
            return refuse(503, f"{self.waiting} videos are being read: try again in a moment")
        self.waiting += 1
        try:
            async with self._receive(request) as path:
                work = asyncio.get_running_loop().run_in_executor(
                    self.thread, self._read, path, request.query.get("preview") == "1"
                )
                return web.json_response(await work)
        except UploadError as error:
            return refuse(413, str(error))
        except TimeoutError:
            return refuse(408, f"the video took more than {UPLOAD_S:g} s to arrive")
        except (InputError, VideoError) as error:
            return refuse(422, str(error))
        except OSError as error:  # its text may name a path of this machine
            logger.warning("%s", error)
            return refuse(500, "the video could not be stored or read here")
        finally:
            self.waiting -= 1

    @asynccontextmanager
    async def _receive(self, request: web.Request) -> AsyncIterator[str]:
        """The path of a file with what was sent, which is gone afterwards; its name says nothing of the sender's."""
        too_large = UploadError(f"the video is larger than {self.most_bytes // MB} MB")
        if (request.content_length or 0) > self.most_bytes:
            raise too_large
        with tempfile.TemporaryDirectory(prefix="video-") as folder:
            path = Path(folder) / "video"
            size = 0
            with path.open("wb") as file:
                async with _within(UPLOAD_S):
                    async for piece in request.content.iter_chunked(1 << 20):
                        size += len(piece)
                        if size > self.most_bytes:  # who sends in chunks need not say how many
                            raise too_large
                        file.write(piece)
            if not size:
                raise InputError("no video was sent: the body of the request is to be the file's bytes")
            yield str(path)

    def _read(self, path: str, preview: bool) -> dict[str, Any]:
        reading = self.reader.read(path)
        described = describe_reading(reading, self.classes, top=self.top)
        return {**described, "preview": describe_preview(reading)} if preview else described


class UploadError(Exception):
    """More was sent than is taken."""


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """TimeoutError where the block takes longer."""
    task = asyncio.current_task()
    assert task is not None, "a request is a task"
    late = False

    def stop() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, stop)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()


if __name__ == "__main__":
    main()
