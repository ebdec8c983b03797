"""Drives Debian's Chromium by its debugging protocol, over a pipe: no port, no further package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PATIENCE_S = 240.0
MEASURES = """({
  title: document.title,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  scripts: document.scripts.length,
  loaded: performance.getEntriesByType("resource").length,
  shown: [...document.querySelectorAll("figure svg")].filter((svg) => svg.getBoundingClientRect().width > 0).length,
  smallest: Math.min(...[...document.querySelectorAll("figure svg text")]
    .map((text) => text.getBoundingClientRect().height).filter((height) => height)),
})"""


class Browser:
    """One page in a headless Chromium.

    Args:
        home: an empty directory for its profile.
        width: of the window, pixels.
        height: of it.
    """

    def __init__(self, home: Path, width: int = 1280, height: int = 900) -> None:
        assert CHROMIUM is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={home}",
            f"--window-size={width},{height}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the protocol's places are 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._read, self._count = ours_in, ours_out, b"", 0
        self._session = ""
        self.errors: list[str] = []
        """What the page's console was told as an error, and exceptions of its scripts."""
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = str(self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """One call of the protocol, and what it returns."""
        self._count += 1
        message: dict[str, object] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            heard = self._next(deadline)
            if "id" not in heard:
                self._note(heard)
            elif heard["id"] == self._count:
                assert "error" not in heard, heard
                result: dict[str, Any] = heard["result"]
                return result

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            assert ready, "Chromium does not reply"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium ended"
            self._read += part
        line, _, self._read = self._read.partition(b"\0")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def _note(self, heard: dict[str, Any]) -> None:
        if heard["method"] == "Runtime.exceptionThrown":
            self.errors.append(str(heard["params"]["exceptionDetails"]))
        elif heard["method"] == "Runtime.consoleAPICalled" and heard["params"]["type"] in ("error", "warning", "assert"):
            self.errors.append(str(heard["params"]["args"]))
        elif heard["method"] == "Log.entryAdded" and heard["params"]["entry"]["level"] == "error":
            self.errors.append(str(heard["params"]["entry"]["text"]))

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"]["value"] if "value" in found["result"] else None

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """A key, as from a keyboard."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")

    def click(self, selector: str) -> None:
        """The middle of an element, as with a mouse."""
        box = self.evaluate(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def become(self, dark: bool, width: int, height: int) -> None:
        """A machine of this theme and screen; below 600 pixels a phone."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def look(self, path: Path, dark: bool, width: int, height: int) -> None:
        """A picture of what is seen, as a PNG file."""
        self.become(dark, width, height)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def measure(self, place: Path, page: str, width: int) -> dict[str, str | float]:
        """What a page is like on a screen of this width.

        Args:
            place: file to write it to.
            page: HTML.
            width: of the screen, pixels.

        Returns:
            ``MEASURES``, and how often the browser had to complain (``console``).
        """
        place.write_text(page, "utf-8")
        self.errors.clear()
        self.become(dark=False, width=width, height=1200)
        self.open(place.as_uri())
        seen: dict[str, str | float] = self.evaluate(MEASURES)
        return seen | {"console": len(self.errors)}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)
