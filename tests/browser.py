"""Headless Chromium for the tests of pages, over Chrome's DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

from support import wait_until

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)
_SECONDS = 120.0
"""A busy machine takes long to draw MLflow's page."""


def chromium() -> str:
    """The program; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if found is None:
        pytest.skip("needs Chromium: `apt-get install chromium`, or any Chrome on the PATH")
    return found


class Browser:
    """One tab of a browser that has a profile of its own.

    Args:
        folder: for the profile.
    """

    def __init__(self, folder: Path) -> None:
        self._profile = folder / "chromium"
        self._loop = asyncio.new_event_loop()
        self._ids = count(1)
        command = [chromium(), *_ARGUMENTS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        try:
            port_file = self._profile / "DevToolsActivePort"
            wait_until(lambda: port_file.exists() and port_file.read_text().strip(), _SECONDS)
            self._loop.run_until_complete(self._connect(int(port_file.read_text().split()[0])))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(AttributeError):
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(30.0)

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            (tab,) = [target for target in await answer.json() if target["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """The result of a command of the protocol."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, params), _SECONDS))

    async def _call(self, method: str, params: dict[str, object]) -> dict[str, Any]:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = json.loads(await self._socket.receive_str())
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])

    def open(self, address: str) -> None:
        """Go to a page, from a blank one: a change of the fragment only would reload nothing."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window so large."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """What JavaScript gives in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, wanted: object) -> None:
        """Wait until JavaScript gives the wanted value in the page, or fail with what it gives."""
        end = time.monotonic() + _SECONDS
        while (found := self.evaluate(expression)) != wanted:
            assert time.monotonic() < end, f"{expression} is {found!r} instead of {wanted!r}"
            time.sleep(0.2)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))
