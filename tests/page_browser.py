"""A headless Chromium driven over the DevTools protocol on a pipe: no driver, no web socket, nothing to install."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Backspace": 8}


def find_chromium() -> str | None:
    """The path of a Chromium on this machine: OPENEMBED_CHROMIUM, or one of the usual names; None without."""
    return os.environ.get("OPENEMBED_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One Chromium process with a profile of its own; ``close`` ends it and deletes the profile."""

    def __init__(self, path: str):
        self._profile = tempfile.mkdtemp(prefix="openembed-chromium-")
        low_end, self._out = os.pipe()
        self._in, other_low_end = os.pipe()
        # Chromium speaks on file descriptors 3 and 4; a shell puts the pipes there, from numbers that cannot be those.
        child_reads, child_writes = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (low_end, other_low_end))
        command = [path, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{child_reads} 4>&{child_writes}', "bash", *command],
            pass_fds=(child_reads, child_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (low_end, other_low_end, child_reads, child_writes):
            os.close(end)
        self._number = 0
        self._answers: queue.Queue[dict] = queue.Queue()
        self.events: list[dict] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        rest = b""
        while chunk := os.read(self._in, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                (self._answers.put if "id" in message else self.events.append)(message)

    def send(self, method: str, params: dict | None = None, session: str | None = None) -> dict:
        """Returns the result of one protocol call; raises ``RuntimeError`` with the protocol's own error."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params or {}, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answer = self._answers.get(timeout=60)
        assert answer["id"] == self._number
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def page(self) -> Page:
        """A new tab in a context of its own: no storage, no cookies, no cache shared with another."""
        return Page(self)

    def close(self) -> None:
        """Ends the process and deletes its profile."""
        with contextlib.suppress(RuntimeError, queue.Empty, OSError):
            self.send("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._profile, ignore_errors=True)


class Page:
    """One tab: go somewhere, type, press, ask for values; what it logged and requested is kept by the browser."""

    def __init__(self, browser: Browser):
        self.browser = browser
        self._context = browser.send("Target.createBrowserContext")["browserContextId"]
        wanted = {"url": "about:blank", "browserContextId": self._context}
        self._target = browser.send("Target.createTarget", wanted)["targetId"]
        self.session = browser.send("Target.attachToTarget", {"targetId": self._target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.viewport(1280, 900)

    def send(self, method: str, params: dict | None = None) -> dict:
        """Returns the result of a protocol call to this tab."""
        return self.browser.send(method, params, self.session)

    def close(self) -> None:
        """Closes the tab with its context."""
        self.browser.send("Target.disposeBrowserContext", {"browserContextId": self._context})

    def events(self, method: str) -> list[dict]:
        """The parameters of the events of one kind that this tab has sent."""
        return [e["params"] for e in list(self.browser.events) if e.get("sessionId") == self.session and e["method"] == method]

    def goto(self, url: str) -> None:
        """Opens ``url`` and waits for its load event."""
        before = len(self.events("Page.loadEventFired"))
        self.send("Page.navigate", {"url": url})
        wait(lambda: len(self.events("Page.loadEventFired")) > before, f"{url} to load")

    def value(self, expression: str):
        """The value of a JavaScript expression, promises awaited; a thrown error is raised."""
        wanted = {"expression": expression, "returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", wanted)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def wait(self, expression: str, timeout: float = 20) -> None:
        """Waits until the expression is true."""
        wait(lambda: self.value(f"Boolean({expression})"), expression, timeout)

    def type(self, text: str) -> None:
        """Inserts text where the focus is, as an input method does."""
        self.send("Input.insertText", {"text": text})

    def press(self, *keys: str) -> None:
        """Presses keys one after the other: names as ``KeyboardEvent.key`` has them; ``Shift+Tab`` for a modifier."""
        for name in keys:
            *modifiers, key = name.split("+") if len(name) > 1 else [name]
            event = {"key": key, "code": key, "modifiers": 8 * ("Shift" in modifiers) + 2 * ("Control" in modifiers)}
            event["windowsVirtualKeyCode"] = KEYS.get(key, 0)
            if len(key) == 1 or key == "Enter":
                event["text"] = "\r" if key == "Enter" else key
            self.send("Input.dispatchKeyEvent", {"type": "keyDown", **event})
            self.send("Input.dispatchKeyEvent", {"type": "keyUp", **event})

    def click(self, selector: str) -> None:
        """Scrolls the element into view and clicks its middle with the mouse."""
        place = f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "center"}});
            const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        x, y = self.value(place)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1})

    def viewport(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Sets the size of the window in CSS pixels; ``mobile`` makes it a phone with a touch screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", size)
        self.send("Emulation.setTouchEmulationEnabled", {"enabled": mobile})

    def media(self, **features: str) -> None:
        """Sets media features, such as ``prefers_color_scheme="dark"``; ``type="print"`` the medium."""
        kind = features.pop("type", "")
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", {"media": kind, "features": listed})

    def screenshot(self, path: str | Path, *, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", {"captureBeyondViewport": whole})["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Everything the console was told by the browser or as an error by the page, and uncaught errors."""
        logged = [e["entry"]["text"] for e in self.events("Log.entryAdded") if e["entry"]["level"] in ("error", "warning")]
        printed = [str(e["args"]) for e in self.events("Runtime.consoleAPICalled") if e["type"] in ("error", "warning")]
        thrown = [e["exceptionDetails"]["text"] for e in self.events("Runtime.exceptionThrown")]
        return [*logged, *printed, *thrown]

    def requests(self) -> list[str]:
        """The URL of every request that left the tab."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]


def wait(condition, what: str, timeout: float = 20) -> None:
    """Waits until ``condition()`` is true; raises ``TimeoutError`` that names what was waited for."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} s for {what}")
        time.sleep(0.04)
