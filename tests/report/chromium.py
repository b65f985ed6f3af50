"""A real Chromium without a window, driven over a pair of pipes: no port, no driver, no package.

It speaks the DevTools protocol: JSON messages, each ended by a zero byte, on the file descriptors
3 (to the browser) and 4 (from it).
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

BINARY = next((path for n in ("chromium", "chromium-browser") if (path := shutil.which(n))), None)
PATIENCE_S = 60


class Chromium:
    """One browser with one page. Use as a context manager.

    console: what the page wrote there, and exceptions that it did not catch.
    requests: the addresses that it asked for.
    """

    def __init__(self, width=1280, height=900, dark=False):
        assert BINARY is not None
        self.size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.dark = dark
        self.console, self.requests = [], []
        self.n_sent, self.buffer = 0, b""

    def __enter__(self):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        (to_read, self.to), (self.source, from_write) = os.pipe(), os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
        flags += " --disable-dev-shm-usage --disable-background-networking"
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}', BINARY, *flags.split()]
            + [f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            self.attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def attach(self):
        """Take hold of the browser's one page."""
        self.session = None
        targets = self.send("Target.getTargets")["targetInfos"]
        (page,) = (t["targetId"] for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(**self.size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        os.close(self.to)
        os.close(self.source)
        shutil.rmtree(self.profile, ignore_errors=True)

    def resize(self, width, height, deviceScaleFactor=1):  # noqa: N803 - the protocol's name
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=deviceScaleFactor,
            mobile=width < 600,
        )

    def send(self, method, **parameters):
        """Send a command; return its result, keeping the events that come before it."""
        self.n_sent += 1
        message = {"id": self.n_sent, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        while True:
            answer = self.receive()
            if answer.get("id") == self.n_sent:
                assert "error" not in answer, answer
                return answer["result"]
            self.event(answer)

    def receive(self):
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.source], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self.source, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def event(self, message):
        name, told = message["method"], message.get("params", {})
        if name == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(a.get("value", a)) for a in told["args"]))
        elif name == "Runtime.exceptionThrown":
            self.console.append(told["exceptionDetails"].get("exception", {}).get("description"))
        elif name == "Log.entryAdded":
            self.console.append(told["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    def open(self, url):
        """Load an address and wait for its scripts."""
        self.send("Page.navigate", url="about:blank")  # another hash alone would not load it
        self.send("Page.navigate", url=url)
        self.wait(
            f"location.href.startsWith({url.partition('#')[0]!r}) && "
            "document.readyState === 'complete'"
        )

    def evaluate(self, script):
        """Return the value of an expression on the page, awaited."""
        told = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, condition):
        """Wait until an expression on the page is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def key(self, key, code=None, text=""):
        """Press a key and let go of it."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40, "ArrowRight": 39}
        named = {"key": key, "code": code or key, "windowsVirtualKeyCode": codes[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def mouse(self, x, y, *, click=False):
        """Move the mouse to a point of the window, and click."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path, *, whole=True):
        """Write a PNG of the page."""
        if whole:
            height = self.evaluate("document.documentElement.scrollHeight")
            self.resize(self.size["width"], min(height, 12000))
            time.sleep(0.5)
        shot = self.send("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(shot["data"]))
