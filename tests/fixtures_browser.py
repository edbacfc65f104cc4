"""A headless Chromium behind chromedriver, spoken to in plain WebDriver, for tests of the pages."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PHONE, DESKTOP = (390, 844), (1200, 900)  # px
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync", "hide-scrollbars")
QUIET_FLAGS = ("disable-background-networking", "disable-component-update")


class Browser:
    """One window of a browser; `show` decides its size and colours."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address, self._session = address, ""
        options = {"args": [*FLAGS, *QUIET_FLAGS, f"user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self.ask("", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/{answer['sessionId']}"

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._address}/session{self._session}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str) -> Any:
        """What a JavaScript function body returns."""
        return self.ask("/execute/sync", {"script": script, "args": []})

    def press(self, key: str) -> None:
        """Press and let go a key; what has the focus gets it."""
        strokes = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def show(
        self, page: Path, *, size: tuple[int, int] = DESKTOP, dark: bool = False, reduced_motion: bool = False
    ) -> None:
        """Open a page at a size in px and wait for its pictures and videos."""
        self.change(size=size, dark=dark, reduced_motion=reduced_motion)
        self.ask("/url", {"url": page.as_uri()})
        wait_until(lambda: self.run("return [...document.querySelectorAll('video')].every((v) => v.readyState >= 2)"))
        wait_until(lambda: self.run("return [...document.images].every((image) => image.complete)"))

    def change(self, *, size: tuple[int, int], dark: bool = False, reduced_motion: bool = False) -> None:
        """Another size, other colours, of the page that is shown."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self._tell("Emulation.setDeviceMetricsOverride", metrics)
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if reduced_motion else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self._tell("Emulation.setEmulatedMedia", {"features": features})
        wanted = " and ".join(f"({name}: {value})" for name, value in {"width": f"{size[0]}px", **wishes}.items())
        wait_until(lambda: self.run(f"return matchMedia({wanted!r}).matches || location.protocol !== 'file:'"))

    def errors(self) -> list[Any]:
        """What the console has said since the last call."""
        return list(self.ask("/se/log", {"type": "browser"}))

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self._tell("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])

    def close(self) -> None:
        request = urllib.request.Request(f"{self._address}/session{self._session}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()

    def _tell(self, command: str, settings: dict[str, Any]) -> Any:
        return self.ask("/goog/cdp/execute", {"cmd": command, "params": settings})


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "waited two minutes in vain"
        time.sleep(0.1)


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser whose profile and log lie in `folder`; it ends with the block."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    log = folder / "driver.log"
    with log.open("w") as file:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=file, stderr=file)
    try:
        wait_until(lambda: "successfully" in log.read_text())
        browser = Browser(f"http://127.0.0.1:{port}", folder / "profile")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        driver.terminate()
        driver.wait()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not shutil.which("chromedriver") or not shutil.which("chromium"):
        pytest.skip("no chromium with chromedriver here (Debian: apt-get install chromium-driver)")
    with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
