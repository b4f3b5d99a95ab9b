"""A headless Chromium that a test drives over the DevTools protocol."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_TIMEOUT_S = 180.0


def find_chromium() -> str:
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    assert found is not None, "no Chromium on the PATH: apt-get install chromium"
    return found


@contextlib.contextmanager
def chromium(url: str, profile: Path) -> Iterator[None]:
    command = [find_chromium(), *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


class Page:
    """The page that Chromium shows."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._sent = 0
        self.logged: list[str] = []
        self.requests: list[str] = []  # their URLs

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result; errors of the page are collected meanwhile."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(_TIMEOUT_S))
            if message.get("id") == self._sent:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.logged.append(json.dumps(message["params"]))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression once it is true."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not (value := self.run(script)):
            assert time.monotonic() < deadline_s, (
                f"never true: {script}; the page shows {self.run('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def fill(self, field: str, value: str) -> None:
        """Change a field as a user does."""
        self.run(
            f"(field => {{ field.value = {json.dumps(value)}; field.dispatchEvent(new Event('change')); }})"
            f"(document.getElementById({json.dumps(field)}))"
        )

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def show(self, width_px: int, height_px: int, *, dark: bool = False) -> None:
        """Set the size of the window and the color scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width_px,
            height=height_px,
            deviceScaleFactor=1,
            mobile=width_px < 600,
        )
        self.send("Emulation.setScrollbarsHidden", hidden=True)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        taken = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")


@contextlib.contextmanager
def open_page(url: str, profile: Path) -> Iterator[Page]:
    """Chromium at a URL."""
    with chromium("about:blank", profile):
        port_file = profile / "DevToolsActivePort"
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not (port_file.exists() and (lines := port_file.read_text().splitlines())):
            assert time.monotonic() < deadline_s, "Chromium did not start"
            time.sleep(0.05)
        targets = httpx.get(f"http://127.0.0.1:{lines[0]}/json/list", timeout=60).json()
        target = next(each for each in targets if each["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:
            page = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.send(f"{domain}.enable")
            page.open(url)
            yield page
