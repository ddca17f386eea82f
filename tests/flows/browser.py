"""A headless Chromium, driven by the DevTools protocol over a web socket."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """A tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.numbers = socket, itertools.count()
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result; events are kept."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def requests(self) -> list[str]:
        """Addresses that were requested since ``Network.enable``, and not blocked."""
        blocked = {
            event["params"]["requestId"]
            for event in self.events
            if event.get("method") == "Network.loadingFailed"
            and event["params"].get("blockedReason")
        }
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
            and event["params"]["requestId"] not in blocked
        ]

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded."""
        result = self.call("Page.navigate", url=url)
        assert "errorText" not in result, result
        self.wait("document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is awaited."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"not within {seconds} s: {script}"
            time.sleep(0.2)
        return value

    def click(self, text: str, tag: str = "button, a, [role=menuitem], [role=tab]") -> None:
        """Click the first visible element with this text."""
        element = (
            f"[...document.querySelectorAll({json.dumps(tag)})]"
            f".filter(e => e.innerText.trim() == {json.dumps(text)} && e.offsetParent)[0]"
        )
        show = "e.scrollIntoView({block: 'center'}), e.getBoundingClientRect().toJSON()"
        box = self.wait(f"(e => e && ({show}))({element})")
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def type(self, text: str) -> None:
        """Type a text into the focused field, as a paste does."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path, *flags: str) -> Iterator[Page]:
    """Start Chromium with an empty profile and yield its tab; skip the test where it is absent."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    if binary is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    command = [binary, *FLAGS, *flags, "--window-size=1300,900", f"--user-data-dir={profile}"]
    process = subprocess.Popen([*command, "about:blank"], stderr=subprocess.DEVNULL)
    try:
        note, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (note.exists() and note.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        address = f"http://127.0.0.1:{note.read_text().split()[0]}/json"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        (tab,) = [t for t in json.load(direct.open(address)) if t["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(20)
