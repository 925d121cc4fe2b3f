"""Behind a real nginx: under a prefix that is stripped or kept, with the Host passed on or not.

A crawler follows every link of every page as a browser would, and none may lead out of the prefix.
"""

import contextlib
import html.parser
import os
import re
import shutil
import tempfile
import unittest
import urllib.parse

import beside
import support
from support import HOST, PlainAgent, eventually, get, requires, start_master

load_tests = beside.load_tests  # in a process of its own: it mostly waits

NAME = "portal.example"  # under which browsers know the proxy
NODES = (
    "c1",
    "..",
    ".",
    "a/b c",
    "//evil.example",
    "<b>",
    "학습",
    "100%",
    "a?b#c",
    "x\\y",
)
TOKEN = "s3cret/with+signs="
# location -> how nginx passes a request on; {page} is the master's port
LOCATIONS = {
    "/stripped/": "proxy_pass http://127.0.0.1:{page}/;",
    "/kept/for/c1/8080/": "proxy_pass http://127.0.0.1:{page};",
    "/node/c1/8080/": "proxy_pass http://127.0.0.1:{page};",
    "/rnode/c1/8080/": "proxy_pass http://127.0.0.1:{page}/; proxy_set_header Host $host;",
    "/user/ann/proxy/absolute/8080/": (
        "proxy_pass http://127.0.0.1:{page}; proxy_set_header Host $host;"
    ),
}
CONFIGURATION = """\
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    {locations}
  }}
}}
"""


class Links(html.parser.HTMLParser):
    """The base of a page, and every address in it that a browser would ask for."""

    def __init__(self, text):
        super().__init__()
        self.base = ""
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if tag == "base" and key == "href":
                self.base = value
            elif key in ("href", "src", "action") and value != "data:,":
                self.found.append(value)


def resolve(base, link):
    """Where a link leads, with escaped dots taken for dots as browsers do (WHATWG URL)."""
    path, mark, query = link.partition("?")
    path = re.sub("%2e", ".", path, flags=re.IGNORECASE)
    return urllib.parse.urljoin(base, path + mark + query)


def start_nginx(page):
    """An nginx before a master's page, with LOCATIONS; .port is its port."""
    folder = tempfile.mkdtemp(prefix="nginx-")
    os.chmod(folder, 0o755)  # its workers are somebody else
    port = support.closed_port()
    locations = [
        "location %s { %s }" % (prefix, how.format(page=page))
        for prefix, how in LOCATIONS.items()
    ]
    path = os.path.join(folder, "nginx.conf")
    with open(path, "w") as file:
        file.write(
            CONFIGURATION.format(
                folder=folder, port=port, locations="\n    ".join(locations)
            )
        )
    command = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    nginx = support.Tool([command, "-c", path, "-p", folder], dict(os.environ))
    nginx.folder, nginx.port = folder, port
    eventually(lambda: get(port, "/").status == 404)
    return nginx


class Behind(unittest.TestCase):
    """A master with nodes of all names, and an nginx before it."""

    flags = ("--allow-host", NAME)

    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        try:
            cls.start()
        except BaseException:
            cls.stack.close()
            raise

    @classmethod
    def start(cls):
        home = tempfile.mkdtemp()  # whose records are none
        cls.stack.callback(shutil.rmtree, home)
        cls.master = cls.stack.enter_context(
            start_master(*cls.flags, env={"HOME": home})
        )
        cls.nginx = cls.stack.enter_context(start_nginx(cls.master.page))
        cls.stack.callback(shutil.rmtree, cls.nginx.folder)
        cls.agents = [
            cls.stack.enter_context(PlainAgent(cls.master.port)) for _ in NODES
        ]
        for agent, name in zip(cls.agents, NODES):
            agent.send(
                {"cpu": 10.0, "ram": 40.0, "node": name, "job": "42", "interval": 60}
            )

        bearer = {"Authorization": "Bearer " + TOKEN}
        eventually(
            lambda: (
                "\nsentinel_nodes{} %d\n" % len(NODES)
                in get(cls.master.page, "/metrics", headers=bearer).text
            )
        )

    @classmethod
    def tearDownClass(cls):
        cls.stack.close()

    def ask(self, path, accept="text/html", **more):
        """What a browser gets that knows the proxy by its name."""
        headers = dict({"Host": NAME, "Accept": accept}, **more)
        return get(self.nginx.port, path, headers=headers)

    def crawl(self, prefix, **more):
        """Follow every link from a prefix on: {path: answer}."""
        answers = {}
        waiting = [prefix]
        while waiting:
            path = waiting.pop()
            if path in answers:
                continue
            self.assertTrue(path.startswith(prefix), path)
            answer = self.ask(path, **more)
            self.assertEqual(answer.status, 200, path)
            answers[path] = answer
            if not answer.headers["Content-Type"].startswith("text/html"):
                continue
            links = Links(answer.text)
            base = resolve(path, links.base)
            if links.base:  # reports have none: they are files as well
                self.assertEqual(base, prefix)
            waiting += [resolve(base, link) for link in links.found]
        return answers


@requires("nginx")
class Prefix(Behind):
    def test_a_crawler_reaches_every_page_and_never_leaves_the_prefix(self):
        for prefix in LOCATIONS:
            with self.subTest(prefix):
                answers = self.crawl(prefix)
                pages = [
                    re.search("<h1>(.*)</h1>", answer.text).group(1)
                    for path, answer in answers.items()
                    if path.startswith(prefix + "node/")
                ]
                self.assertEqual(
                    sorted(pages), sorted(html.escape(name) for name in NODES)
                )
                for name in ("nodes.txt", "nodes.csv", "api/nodes", "metrics"):
                    self.assertIn(prefix + name, answers)
                self.assertIn(prefix + "?sort=cpu", answers)
                self.assertIn(prefix + "?job=42", answers)

    def test_the_same_address_shows_what_has_changed_since(self):
        for number, prefix in enumerate(LOCATIONS, 1):
            for path in (prefix, prefix + "node/c1"):
                cpu = 10.5 + number
                self.agents[0].send({"cpu": cpu, "ram": 40.0, "node": "c1"})
                eventually(
                    lambda path=path, cpu=cpu: "%.1f %%" % cpu in self.ask(path).text
                )

    def test_programs_are_answered_as_without_a_proxy(self):
        for prefix in LOCATIONS:
            with self.subTest(prefix):
                self.assertIn("Node", self.ask(prefix, accept="*/*").text)
                self.assertEqual(self.ask(prefix + "healthz").text, "ok\n")
                self.assertEqual(self.ask(prefix + "nobody").status, 404)
                self.assertEqual(self.ask(prefix + "node/nobody").status, 404)

    def test_a_proxy_whose_name_is_not_allowed_is_told_the_flag(self):
        for prefix, status in (("/rnode/c1/8080/", 421), ("/stripped/", 200)):
            headers = {"Host": "other.example"}
            answer = get(self.nginx.port, prefix, headers=headers)
            self.assertEqual(answer.status, status, prefix)
            self.assertEqual("--allow-host" in answer.text, status == 421, prefix)


@requires("nginx")
class WithToken(Behind):
    flags = ("--allow-host", "other.example,%s" % NAME, "--dashboard-token", TOKEN)
    query = "?" + urllib.parse.urlencode({"token": TOKEN})

    def test_the_token_opens_every_page_of_the_prefix_and_nothing_beside_it(self):
        for prefix in LOCATIONS if support.LONG else list(LOCATIONS)[:2]:
            with self.subTest(prefix):
                self.assertEqual(self.ask(prefix).status, 401)
                cookie, folder = self.cookie_of(prefix + self.query)
                self.assertEqual(folder, prefix)
                answers = self.crawl(prefix, Cookie=cookie)
                self.assertGreater(len(answers), len(NODES))
                for path, answer in answers.items():
                    self.assertNotIn(TOKEN, path + answer.text)

    def test_a_node_page_with_the_token_leads_to_the_overview_of_the_same_prefix(self):
        for prefix in LOCATIONS:
            with self.subTest(prefix):
                answer = self.ask(prefix + "node/c1" + self.query)
                self.assertEqual(answer.status, 303)
                location = urllib.parse.urljoin(
                    prefix + "node/c1", answer.headers["Location"]
                )
                self.assertEqual(location, prefix + self.query)

    def cookie_of(self, path):
        """(NAME=VALUE, the folder that a browser keeps it for: RFC 6265, 5.1.4)."""
        answer = self.ask(path)
        self.assertEqual(answer.status, 200, path)
        cookie = answer.headers["Set-Cookie"]
        self.assertNotRegex(cookie, "(?i)path")
        folder = path.partition("?")[0].rpartition("/")[0] + "/"
        return cookie.partition(";")[0], folder


@support.slow("a browser")
@requires("nginx", "chromium", "chromedriver")
class InBrowser(Behind):
    """The script under a prefix: live update, sort, filter, node page, back."""

    prefix = "/rnode/c1/8080/"
    flags = ("--allow-host", "localhost")

    @classmethod
    def start(cls):
        from browser import Browser

        super().start()
        cls.browser = cls.stack.enter_context(Browser())

    def path_is(self, path):
        eventually(lambda: self.browser.path == self.prefix + path, what=path)

    def test_all_of_the_page_works_under_the_prefix(self):
        self.browser.open("http://%s:%d%s" % (HOST, self.nginx.port, self.prefix))
        self.browser.run("window.mark = 7")
        self.agents[0].send({"cpu": 77.5, "ram": 40.0, "node": "c1"})
        eventually(lambda: "77.5 %" in self.browser.text("#nodes"), what="live")
        self.browser.find("#nodes thead th:nth-child(2) a").click()
        self.path_is("?sort=cpu")
        self.browser.find("input[type=search]").type("c1")
        self.path_is("?q=c1&sort=cpu")
        eventually(lambda: self.browser.count("#nodes th[scope=row]") == 1)
        self.assertEqual(self.browser.run("return window.mark"), 7)
        self.browser.find("#nodes th[scope=row] a").click()
        self.path_is("node/c1")
        self.assertEqual(self.browser.text("h1"), "c1")
        self.browser.find("main nav a").click()
        self.path_is("")
        for name in ("..", ".", "a/b c"):
            self.browser.open("http://%s:%d%s" % (HOST, self.nginx.port, self.prefix))
            links = self.browser.run(
                "return [...document.querySelectorAll('#nodes th[scope=row] a')]"
                ".filter(a => a.textContent === arguments[0]).map(a => a.href)",
                name,
            )
            self.browser.open(links[0])
            self.assertEqual(self.browser.text("h1"), name)
        self.assertEqual(self.browser.messages(), [])


@support.slow("a browser")
@requires("nginx", "chromium", "chromedriver")
class InBrowserWithToken(InBrowser):
    """The cookie under a prefix, as a real browser keeps it."""

    flags = ("--allow-host", "localhost", "--dashboard-token", TOKEN)

    def test_all_of_the_page_works_under_the_prefix(self):
        home = "http://%s:%d%s" % (HOST, self.nginx.port, self.prefix)
        query = "?" + urllib.parse.urlencode({"token": TOKEN})
        self.browser.open(home + "node/c1" + query)  # leads to the overview
        self.path_is("")
        self.agents[0].send({"cpu": 77.5, "ram": 40.0, "node": "c1"})
        eventually(lambda: "77.5 %" in self.browser.text("#nodes"), what="live")
        self.browser.open(home + "node/c1")
        self.assertEqual(self.browser.text("h1"), "c1")
        (cookie,) = self.browser.command("GET", "/cookie")
        self.assertEqual(cookie["path"] + "/", self.prefix)
        self.browser.open("http://%s:%d/stripped/" % (HOST, self.nginx.port))
        self.assertIn("a token is needed", self.browser.text())


if __name__ == "__main__":
    unittest.main()
