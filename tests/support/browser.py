"""A headless Chromium for the tests of the report, driven over the WebDriver protocol (W3C), which is JSON over HTTP."""

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

INSTALLED = bool(shutil.which("chromium") and shutil.which("chromedriver"))
# CI sets HEADSINK_BROWSER=required: there, tests of pages fail without a browser.
needs_browser = pytest.mark.skipif(
    not INSTALLED and os.environ.get("HEADSINK_BROWSER") != "required", reason="no chromium and chromedriver here"
)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "tab": "\ue004", "enter": "\ue007"}
PATIENCE = 30.0  # seconds that a page may take before a test gives up


class Browser:
    def __init__(self, session: str):
        self.session = session

    def run(self, script: str, *arguments):
        """Run the body of a JavaScript function and return its result; waits for a promise."""
        return _call("POST", f"{self.session}/execute/sync", script=script, args=list(arguments))

    def open(self, url: str) -> float:
        """Open a page, wait until it is ready, and return the milliseconds since the start of the navigation."""
        self.load(url)
        self.wait("return document.documentElement.dataset.complete !== undefined")
        return float(self.run("return document.documentElement.dataset.ready"))

    def load(self, url: str) -> None:
        """Open a page without waiting for its scripts."""
        _call("POST", f"{self.session}/url", url="about:blank")
        _call("POST", f"{self.session}/url", url=url)

    def resize(self, width: int, height: int) -> None:
        _call("POST", f"{self.session}/window/rect", width=width, height=height)

    def wait(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def click(self, x: float, y: float) -> None:
        """Press the mouse at a point of the viewport."""
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y)}, *press]
        _call("POST", f"{self.session}/actions", actions=[{"type": "pointer", "id": "mouse", "actions": moves}])

    def press(self, *keys: str) -> None:
        """Press keys, named as in KEYS, on the focused element."""
        actions = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        _call("POST", f"{self.session}/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def pinch(self, *fingers: tuple[tuple[float, float], tuple[float, float]]) -> None:
        """Touch the viewport with fingers, each from a point to another, at the same time."""
        actions = []
        for n, (start, end) in enumerate(fingers):
            (x, y), (to_x, to_y) = (tuple(map(round, point)) for point in (start, end))
            steps = [{"type": "pointerMove", "x": x, "y": y}, {"type": "pointerDown", "button": 0}]
            steps += [
                {"type": "pointerMove", "duration": 100, "x": to_x, "y": to_y},
                {"type": "pointerUp", "button": 0},
            ]
            kind = {"type": "pointer", "parameters": {"pointerType": "touch"}}
            actions.append(kind | {"id": f"finger{n}", "actions": steps})
        _call("POST", f"{self.session}/actions", actions=actions)

    def save_to(self, folder) -> None:
        """Save what a page offers to save, without asking, in a folder."""
        allow = {"behavior": "allow", "downloadPath": str(folder)}
        _call("POST", f"{self.session}/goog/cdp/execute", cmd="Browser.setDownloadBehavior", params=allow)

    def console(self) -> list[str]:
        """Return errors and warnings of the page since the last call."""
        return [
            f"{entry['level']}: {entry['message']}" for entry in _call("POST", f"{self.session}/se/log", type="browser")
        ]

    def dialog(self) -> bool:
        """Whether an alert is open."""
        try:
            _call("GET", f"{self.session}/alert/text")
        except urllib.error.HTTPError as error:
            return error.code != 404
        return True

    def picture(self) -> bytes:
        return base64.b64decode(_call("GET", f"{self.session}/screenshot"))


@contextmanager
def browser(profile, width: int = 1400, height: int = 1100):
    """Start a browser with a temporary profile folder."""
    command = [shutil.which("chromedriver"), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        try:
            port = next(
                line.split("port ")[1].strip(" .\n") for line in driver.stdout if "started successfully" in line
            )
            options = {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            root = f"http://127.0.0.1:{port}/session"
            session = f"{root}/{_call('POST', root, capabilities={'alwaysMatch': wanted})['sessionId']}"
            try:
                yield Browser(session)
            finally:
                _call("DELETE", session)
        finally:
            driver.terminate()


def _call(method: str, address: str, **body):
    data = json.dumps(body).encode() if method == "POST" else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignore the machine's proxy
    with direct.open(request, timeout=PATIENCE) as answer:
        return json.load(answer)["value"]
