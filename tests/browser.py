"""A real Chromium, driven through chromedriver's WebDriver (W3C) by the standard library alone.

with Browser() as browser:
    browser.open("http://127.0.0.1:8080/")
    browser.run("return document.title")
    browser.find("#nodes a").click()
"""

import base64
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import tempfile
import urllib.parse

import support

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
    --disable-background-networking --disable-component-update --disable-sync
    --disable-dev-shm-usage""".split()
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # W3C WebDriver, section 12
LIMIT = 30  # seconds for one command
RENEWALS = 3  # of a page while it is read
# where npm put them; a path in any case, which support.requires takes for one
NODE_PATH = "/" + os.environ.get("NODE_PATH", "").lstrip("/")
AXE = os.path.join(NODE_PATH, "axe-core", "axe.min.js")
HTML_VALIDATE = os.path.join(NODE_PATH, "html-validate", "bin", "html-validate.mjs")
TASTE = ("void-style", "long-title", "no-trailing-whitespace")  # and bytes: no errors


class BrowserError(ValueError):
    """What WebDriver answered: its error's name and message."""


class StaleElement(BrowserError):
    """The page has been renewed since the element was found."""


class Element:
    """An element of the page that the browser shows."""

    def __init__(self, browser, key):
        self.browser, self.key = browser, key

    def click(self):
        self.browser.command("POST", "/element/%s/click" % self.key, {})

    def type(self, text):
        self.browser.command("POST", "/element/%s/value" % self.key, {"text": text})

    @property
    def text(self):
        return self.browser.command("GET", "/element/%s/text" % self.key)


class Browser:
    """One session of a browser of its own, with an empty profile."""

    def __init__(self, script=True, width=1280, height=800):
        self.folder = tempfile.mkdtemp(prefix="browser-")
        self.port = support.closed_port()
        self.driver = subprocess.Popen(
            [shutil.which("chromedriver"), "--port=%d" % self.port],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.session = ""
        try:
            support.eventually(lambda: self.command("GET", "/status")["ready"])
            options = {
                "args": [
                    *FLAGS,
                    "--user-data-dir=" + self.folder,
                    "--window-size=%d,%d" % (width, height),
                ]
            }
            if not script:
                options["prefs"] = {
                    "webkit.webprefs.javascript_enabled": False,
                    "profile.managed_default_content_settings.javascript": 2,
                }
            self.session = (
                "/session/"
                + self.command(
                    "POST",
                    "/session",
                    {
                        "capabilities": {
                            "alwaysMatch": {
                                "goog:chromeOptions": options,
                                "goog:loggingPrefs": {"browser": "ALL"},
                            }
                        }
                    },
                )["sessionId"]
            )
        except BaseException:
            self.close()
            raise

    def command(self, method, path, values=None):
        """One WebDriver command: its value, or BrowserError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        with contextlib.closing(connection):
            connection.request(
                method,
                self.session + path,
                None if values is None else json.dumps(values),
            )
            response = connection.getresponse()
            value = json.loads(response.read().decode("utf-8"))["value"]
        if response.status != 200:
            is_stale = value["error"] == "stale element reference"
            kind = StaleElement if is_stale else BrowserError
            raise kind("%s: %s" % (value["error"], value["message"].split("\n")[0]))
        return value

    def cdp(self, command, **params):
        """One command of Chromium's own protocol."""
        return self.command(
            "POST", "/goog/cdp/execute", {"cmd": command, "params": params}
        )

    def open(self, url):
        """Go to an address and wait until it has loaded."""
        self.command("POST", "/url", {"url": url})

    def back(self):
        self.command("POST", "/back", {})

    @property
    def path(self):
        """Path and query of the address that the browser shows."""
        url = urllib.parse.urlsplit(self.command("GET", "/url"))
        return url.path + ("?" + url.query if url.query else "")

    @property
    def title(self):
        return self.command("GET", "/title")

    def run(self, script, *arguments):
        """Run JavaScript in the page; what it returns."""
        return self.command(
            "POST", "/execute/sync", {"script": script, "args": list(arguments)}
        )

    def wait(self, script, *arguments):
        """Run JavaScript whose last argument is to be called with the result."""
        return self.command(
            "POST", "/execute/async", {"script": script, "args": list(arguments)}
        )

    def find(self, selector):
        """The first element of a CSS selector; BrowserError without one."""
        found = self.command(
            "POST", "/element", {"using": "css selector", "value": selector}
        )
        return Element(self, found[ELEMENT])

    def count(self, selector):
        return len(
            self.command(
                "POST", "/elements", {"using": "css selector", "value": selector}
            )
        )

    def text(self, selector="body"):
        """What a reader sees of an element.

        A page may renew itself between the question for the element and that for its text.
        """
        for _ in range(RENEWALS):
            with contextlib.suppress(StaleElement):
                return self.find(selector).text
        return self.find(selector).text

    def press(self, *keys):
        """Press and let go of keys, one after another; U+E004 is Tab, U+E007 Enter."""
        actions = [
            {"type": kind, "value": key}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        self.command(
            "POST",
            "/actions",
            {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]},
        )

    def show_as(self, width, height, dark=False, scale=1, **features):
        """Be a screen of that size; prefers-reduced-motion and the like by their names with _."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        media = dict(features, prefers_color_scheme="dark" if dark else "light")
        self.cdp(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": name.replace("_", "-"), "value": value}
                for name, value in media.items()
            ],
        )

    def go_offline(self):
        """Have no network any more."""
        self.cdp("Network.enable")
        nothing = dict.fromkeys(
            ("latency", "downloadThroughput", "uploadThroughput"), 0
        )
        self.cdp("Network.emulateNetworkConditions", offline=True, **nothing)

    def messages(self):
        """What the browser has to complain about since the last time: console, CSP, network."""
        return [
            entry["message"]
            for entry in self.command("POST", "/se/log", {"type": "browser"})
        ]

    def screenshot(self, path, whole=False):
        """Write a PNG of what is visible, or of the whole page."""
        data = self.cdp("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))

    def close(self):
        """End the browser and its driver, and remove the profile."""
        with contextlib.suppress(OSError, BrowserError, http.client.HTTPException):
            if self.session:
                self.command("DELETE", "")
        self.driver.terminate()
        try:
            self.driver.wait(10)
        except subprocess.TimeoutExpired:
            self.driver.kill()
            self.driver.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def axe_on(browser):
    """The violations of axe-core's rules on the page that the browser shows."""
    with open(AXE, encoding="utf-8") as file:
        browser.run(file.read())
    return browser.wait(
        "const done = arguments[0]; axe.run(document, {runOnly: ['wcag2a', 'wcag2aa',"
        "'wcag21a', 'wcag21aa', 'best-practice']}).then(result => done(result.violations"
        ".map(v => [v.id, v.help, v.nodes.slice(0, 3).map(node => node.html)])))"
    )


def html_validate(texts, rules=None):
    """(exit code, what html-validate says) of pages; rules: other than the recommended ones."""
    wanted = dict(dict.fromkeys(TASTE, "off"), **(rules or {}))
    config = {"root": True, "extends": ["html-validate:recommended"], "rules": wanted}
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            name = os.path.join(folder, "%d.html" % number)
            with open(name, "w", encoding="utf-8") as file:
                file.write(text)
        with open(os.path.join(folder, ".htmlvalidate.json"), "w") as file:
            json.dump(config, file)
        done = subprocess.run(
            ["node", HTML_VALIDATE, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
    return done.returncode, done.stdout.decode()[:3000]
