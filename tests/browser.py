"""Headless Chromium, driven by its DevTools protocol over a websocket: no package beside those of JupyterLab is needed."""
import base64
import json
import shutil
import subprocess
import threading
import time
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Enter": 13, " ": 32, "Tab": 9}


def find_chromium() -> str | None:
    "The command of an installed Chromium, or None."
    return next((path for path in map(shutil.which, NAMES) if path), None)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder: Path) -> tuple[ThreadingHTTPServer, str]:
    "A server of a folder's files on this machine, and its address."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


class Page:
    "One tab of a headless Chromium that can reach this machine only."

    def __init__(self, command: str, folder: Path):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
                   "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
                   "--remote-allow-origins=*", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, until = folder / "DevToolsActivePort", time.monotonic() + 30
        while not (port.exists() and port.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command} did not start")
            time.sleep(0.05)
        address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json"
        targets = json.load(urllib.request.urlopen(address, timeout=10))
        target = next(one for one in targets if one["type"] == "page")
        self.socket = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=30)
        self.count, self.events, self.requests, self.errors = 0, [], [], []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.resize(1280)

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=20)

    def _note(self, event: dict) -> None:
        method, params = event["method"], event["params"]
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error" \
                and not params["entry"].get("url", "").endswith("/favicon.ico"):  # asked for by the browser alone
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))

    def call(self, method: str, **params) -> dict:
        "The result of a command; raises `RuntimeError` when the browser refuses it."
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            if "method" in message:
                self._note(message)

    def js(self, expression: str):
        "The value of an expression, awaited; raises `RuntimeError` when it throws."
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", expression))
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 10):
        "Waits until an expression is true and returns its value."
        end = time.monotonic() + seconds
        while not (value := self.js(f"(() => {{ const found = {expression}; return found instanceof Node || found; }})()")):
            assert time.monotonic() < end, f"still not true after {seconds} s: {expression}"
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int = 900, *, mobile: bool = False, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def open(self, url: str) -> None:
        "Goes to a page and waits until it is loaded; what was noted before is forgotten."
        self.call("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank' && document.readyState === 'complete'")
        self.requests, self.errors = [], []
        self.call("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'", 30)

    def place(self, element: str, share: float = 0.5) -> tuple[float, float]:
        "Where an element is, after scrolling to it; `share` of its width from the left."
        where = f"(() => {{ const {{ x, y, width, height }} = ({element}).getBoundingClientRect(); return [x, y, width, height]; }})()"
        still = 0
        for _ in range(40):  # a page may still be scrolling, or make room for what is drawn above
            self.js(f"({element}).scrollIntoView({{ block: 'center', behavior: 'instant' }})")
            box = self.js(where)
            time.sleep(0.1)
            still = still + 1 if self.js(where) == box else 0
            if still == 3:
                break
        return box[0] + share * box[2], box[1] + box[3] / 2

    def click(self, element: str, share: float = 0.5) -> None:
        x, y = self.place(element, share)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, element: str, share: float = 0.5) -> None:
        x, y = self.place(element, share)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, element: str, key: str) -> None:
        "One key on an element that has the focus."
        self.js(f"{element}.focus()")
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code="Space" if key == " " else key,
                      windowsVirtualKeyCode=KEYS[key], **(text if kind == "keyDown" else {}))

    def give_file(self, selector: str, path: Path) -> None:
        "Chooses a file in a file input."
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])
