"""The page in a real Chromium: what people see, click, type and hear read out to them."""

import contextlib
import os
import signal
import tempfile
import threading
import time
import unittest

import support
from support import PlainAgent, eventually, requires, start_master

from browser import AXE, HTML_VALIDATE, Browser, axe_on, html_validate

SIZES = ((320, 640), (1280, 800), (3840, 2160))
TAB, ENTER = "\ue004", "\ue007"
JOBS = (
    ("4711", "train_resnet50", "alice", 16),
    ("4712", "md_npt_310K", "bjorn", 12),
    (
        "4713",
        "a_very_long_job_name_that_somebody_really_gave_to_a_job_of_his",
        "chloe",
        12,
    ),
)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a/b?c#d e%2f",
    "학습",
    "a-name-of-sixty-four-letters-that-does-not-fit-anywhere-at-all-x",
)


def fleet(count):
    """What so many nodes are called: some jobs, or jobs of 37."""
    if count == 1:
        return [{"node": "laptop"}]
    if count <= 40:
        return [
            {"node": "c%02d" % n, "job": job, "job_name": name, "user": user}
            for n, (job, name, user) in enumerate(
                (job[:3] for job in JOBS for _ in range(job[3])), 1
            )
        ][:count]
    return [
        {"node": "c%04d" % n, "job": str(5000 + n // 37), "user": "alice"}
        for n in range(1, count + 1)
    ]


class Load:
    """Plain agents that send once a second; cpu is what `values` says, or the second."""

    def __init__(self, port, known, values=None):
        self.port, self.known, self.values = port, list(known), values or {}
        self.stack, self.over, self.agents = (
            contextlib.ExitStack(),
            threading.Event(),
            {},
        )
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        second = 0
        while not self.over.is_set():
            for number, known in enumerate(self.known):
                try:
                    if number not in self.agents:
                        self.agents[number] = self.stack.enter_context(
                            PlainAgent(self.port)
                        )
                    cpu = self.values.get(
                        known.get("node"), (number * 7 + second) % 60 + 25
                    )
                    self.agents[number].send(
                        dict(
                            known,
                            cpu=float(cpu),
                            ram=40.0,
                            interval=2.0,
                            version="1.0",
                            load1=cpu / 10,
                            net_rx=1e6 * cpu,
                            job_time_left=3600.0,
                        )
                    )
                except OSError:  # the master is down: come back
                    self.agents.pop(number, None)
            second += 1
            self.over.wait(1)

    def leave(self, number, farewell=None):
        """Let one node go, with a goodbye if one is given."""
        agent = self.agents.pop(number)
        self.known[number] = {}
        if farewell:
            agent.send({"bye": farewell})
        agent.close()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.stack.close()


@support.slow("a browser")
@requires("chromium", "chromedriver")
class InBrowser(unittest.TestCase):
    """One master with so many nodes and one browser for all tests of a class."""

    count = 40
    script = True
    flags = ("--alert", "cpu>95", "--alert", "ram>99")
    values = {}

    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        try:
            cls.master = cls.stack.enter_context(
                start_master("--max-agents", "2048", *cls.flags)
            )
            cls.load = cls.stack.enter_context(
                Load(cls.master.port, cls.known(), cls.values)
            )
            cls.browser = cls.stack.enter_context(Browser(script=cls.script))
            eventually(lambda: len(support.nodes(cls.master.page)) >= cls.count, 60)
        except BaseException:
            cls.stack.close()
            raise

    @classmethod
    def known(cls):
        return fleet(cls.count)

    @classmethod
    def tearDownClass(cls):
        cls.stack.close()

    def setUp(self):
        self.browser.show_as(1280, 800)
        self.open()

    def open(self, path="/"):
        self.browser.open("http://localhost:%d%s" % (self.master.page, path))

    def names(self):
        """The nodes in the table, from top to bottom."""
        return self.browser.run(
            "return [...document.querySelectorAll('#nodes th[scope=row] a')]"
            ".map(link => link.textContent)"
        )

    def value(self, node, column=1):
        """What a cell of a node's row shows."""
        return self.browser.run(
            "return [...document.querySelectorAll('#nodes tbody tr')].find(row => row.querySelector"
            "('a').textContent === arguments[0]).children[arguments[1]].textContent",
            node,
            column,
        )

    def stamp(self):
        """Mark the document: a page that was loaded anew has no mark."""
        self.browser.run("window.mark = 7")

    def assertSamePage(self):
        self.assertEqual(
            self.browser.run("return window.mark"), 7, "the page was loaded anew"
        )

    def after_update(self, check, seconds=12):
        eventually(check, seconds)

    def assertNoComplaint(self):
        self.assertEqual(self.browser.messages(), [])


class FortyNodes(InBrowser):
    def test_the_first_paint_shows_every_node_by_job(self):
        self.assertEqual(len(self.names()), 40)
        self.assertIn(
            "Job 4711 train_resnet50 \u00b7 alice \u00b7 nodes: 16",
            self.browser.text("#nodes"),
        )
        self.assertEqual(self.browser.count(".map a"), 0)
        self.assertEqual(self.browser.title, "All is well: 3 jobs - Cluster Sentinel")
        self.assertNoComplaint()

    def test_a_click_on_a_column_sorts_and_back_undoes_it(self):
        self.stamp()
        self.browser.find("#nodes thead th:nth-child(2) a").click()
        eventually(lambda: self.browser.path == "/?sort=cpu")
        eventually(lambda: self.browser.count("th[aria-sort=ascending]") == 1)
        self.browser.find("#nodes thead th:nth-child(2) a").click()
        eventually(lambda: self.browser.path == "/?sort=-cpu")
        eventually(lambda: self.browser.count("th[aria-sort=descending]") == 1)
        first = [float(self.value(name).split()[0]) for name in self.names()[:3]]
        self.assertEqual(first, sorted(first, reverse=True))
        self.browser.back()
        eventually(lambda: self.browser.count("th[aria-sort=ascending]") == 1)
        self.browser.back()
        eventually(lambda: self.browser.path == "/" and self.names()[0] == "c01")
        self.assertSamePage()

    def test_typing_filters_at_once_and_the_address_can_be_shared(self):
        self.stamp()
        self.browser.find("input[type=search]").type("md_npt")
        eventually(lambda: len(self.names()) == 12)
        self.assertEqual(self.browser.path, "/?q=md_npt")
        self.assertEqual(self.browser.run("return document.activeElement.name"), "q")
        self.assertSamePage()
        self.open(self.browser.path)
        self.assertEqual(len(self.names()), 12)
        self.assertEqual(
            self.browser.run("return document.querySelector('input').value"), "md_npt"
        )

    def test_a_job_and_a_user_can_be_chosen(self):
        for name, value, count in (("job", "4711", 16), ("user", "chloe", 12)):
            self.open()
            self.browser.find("select[name=%s]" % name).type(value)
            eventually(lambda count=count: len(self.names()) == count, what=name)
            self.assertEqual(self.browser.path, "/?%s=%s" % (name, value))

    def test_groups_can_be_left_out(self):
        self.browser.find("select[name=group]").type("no")
        eventually(lambda: self.browser.count(".job") == 0)
        self.assertIn("Job name", self.browser.text("#nodes thead"))

    def test_a_node_opens_its_page_with_graphs_and_back_returns(self):
        eventually(lambda: self.browser.count("#nodes tr:nth-child(2) path[d^=M]"))
        self.browser.find("#nodes th[scope=row] a").click()
        eventually(lambda: self.browser.path == "/node/c01")
        self.assertEqual(self.browser.text("h1"), "c01")
        for label in ("CPU", "RAM", "Load", "Received"):
            eventually(
                lambda label=label: label in self.browser.text("main"), 15, label
            )
        self.assertTrue(self.browser.count("figure path[d*=L]"))
        self.check_values_of_a_graph()
        self.assertIn("Memory that is not available", self.browser.text("body"))
        self.assertIn("connected", self.browser.text("#events"))
        self.browser.back()
        eventually(lambda: self.browser.path == "/" and len(self.names()) == 40)

    def check_values_of_a_graph(self):
        """A value is told by the arrow keys and under the pointer, with its time and unit."""
        figure = "figure[id^=graph-cpu]"
        eventually(
            lambda: self.browser.run(
                "const f = document.querySelector(arguments[0]);"
                "return f.dataset.values.split(' ').length > 1",
                figure,
            )
        )
        self.browser.run("document.querySelector(arguments[0]).focus()", figure)
        self.browser.press("\ue012")  # left
        known = r"\A\d\d:\d\d:\d\d (\d+\.\d %|unknown)\Z"
        self.assertRegex(self.browser.text(figure + " output"), known)
        shown, axis = self.browser.run(
            "const figure = document.querySelector(arguments[0]);"
            "const line = figure.querySelector('.line');"
            "const clientX = line.getBoundingClientRect().left;"
            "line.dispatchEvent("
            "  new PointerEvent('pointermove', {bubbles: true, clientX}));"
            "return [figure.querySelector('output').textContent,"
            "  figure.querySelector('.axis.x span').textContent];",
            figure,
        )
        self.assertRegex(shown, known)
        self.assertEqual(shown.split()[0], axis)

    def test_numbers_change_without_a_reload(self):
        self.stamp()
        before = self.value("c05")
        eventually(lambda: self.value("c05") != before, 8)
        self.assertSamePage()

    def test_an_update_keeps_focus_scroll_and_selection(self):
        self.open("/?sort=-cpu")  # rows change places
        self.stamp()
        self.browser.run(
            "const find = name => [...document.querySelectorAll('#nodes th a')].find("
            "link => link.textContent === name); find('c07').focus(); scrollTo(0, 300);"
            "getSelection().setBaseAndExtent(find('c11').firstChild, 1, find('c11').firstChild, 3);"
        )
        count = "return performance.getEntriesByType('resource').length"
        updates, order = self.browser.run(count), self.names()
        eventually(lambda: self.names() != order, 20)
        eventually(lambda: self.browser.run(count) > updates + 2, 20)
        self.assertEqual(
            self.browser.run("return document.activeElement.textContent"), "c07"
        )
        self.assertEqual(self.browser.run("return Math.round(scrollY)"), 300)
        self.assertEqual(self.browser.run("return getSelection().toString()"), "11")
        self.assertSamePage()

    def test_what_is_in_sight_stays_in_its_place_when_what_is_above_it_changes(self):
        self.open()
        self.browser.run(
            "document.querySelector('header').style.paddingBottom = '150px';"
            "document.getElementById('nodes').scrollIntoView()"
        )
        find = "return Math.round(document.getElementById('nodes').getBoundingClientRect().top)"
        before = self.browser.run(find)
        padded = "return document.querySelector('header').style.length"
        eventually(lambda: not self.browser.run(padded), 20)
        self.assertLess(abs(self.browser.run(find) - before), 3)

    def test_nothing_is_asked_while_the_tab_is_hidden(self):
        count = "return performance.getEntriesByType('resource').length"
        self.browser.run(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
        )
        time.sleep(2.5)  # whatever was under way
        before = self.browser.run(count)
        support.stays(lambda: self.browser.run(count) == before, 4)
        self.browser.run(
            "Object.defineProperty(document, 'hidden', {value: false});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        eventually(lambda: self.browser.run(count) > before, 1.5)

    def test_dark_and_light_differ_and_text_stands_out(self):
        shades = []
        for dark in (False, True):
            self.browser.show_as(1280, 800, dark=dark)
            shades.append(
                self.browser.run(
                    "return [getComputedStyle(document.body).backgroundColor, getComputedStyle("
                    "document.body).color]"
                )
            )
        self.assertEqual(shades[0][0], "rgb(255, 255, 255)")
        self.assertEqual(shades[1][0], "rgb(15, 19, 24)")

    def test_nothing_moves_for_who_wants_less_motion(self):
        moves = "return getComputedStyle(document.querySelector('.bar rect')).transitionProperty"
        self.assertEqual(self.browser.run(moves), "width")
        self.browser.show_as(1280, 800, prefers_reduced_motion="reduce")
        self.assertEqual(self.browser.run(moves), "all")

    def test_every_size_shows_it_without_scrolling_sideways(self):
        for width, height in SIZES:
            for path in ("/", "/?group=no&sort=-cpu", "/node/c01", "/?q=nobody"):
                self.browser.show_as(width, height)
                self.open(path)
                self.assertLessEqual(
                    self.browser.run("return document.documentElement.scrollWidth"),
                    width,
                    path,
                )
                self.assertTrue(
                    self.browser.run(
                        "return document.querySelector('h1').getBoundingClientRect().width > 100"
                    )
                )

    def test_on_a_phone_the_headings_of_jobs_are_in_sight(self):
        self.open()
        for width in (320, 400):
            self.browser.show_as(width, 700)
            right = self.browser.run(
                "return Math.max(...[...document.querySelectorAll('.job div')].map("
                "each => each.getBoundingClientRect().right))"
            )
            self.assertLessEqual(right, width)
        self.browser.show_as(1280, 800)

    def test_at_320_points_name_cpu_and_ram_are_in_sight(self):
        self.browser.show_as(320, 640)
        self.open()
        self.assertLess(
            self.browser.run(
                "return document.querySelector('#nodes tbody tr:nth-child(2) td:nth-child(3)')"
                ".getBoundingClientRect().right"
            ),
            320,
        )


class OneNode(InBrowser):
    count = 1

    def test_the_first_paint_shows_it(self):
        self.assertEqual(self.names(), ["laptop"])
        self.assertNotIn("No job", self.browser.text("main"))
        self.assertNoComplaint()


class ThousandNodes(InBrowser):
    count = 1000
    values = {"c0500": 99.0}

    def test_the_first_paint_shows_a_map_and_a_page_of_the_table(self):
        self.assertEqual(self.browser.count(".map a"), 1000)
        self.assertEqual(len(self.names()), 100)
        title = "\u26a0 28 jobs: 1 with a problem; alerts on 1 node - Cluster Sentinel"
        self.assertEqual(self.browser.title, title)
        paint = self.browser.run(
            "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
        self.assertLess(paint, 2500)
        self.assertNoComplaint()

    def test_a_tile_names_its_node_when_pointed_at_or_focused_and_opens_it(self):
        named = "return getComputedStyle(document.activeElement, '::after').content"
        self.browser.run("document.querySelector('.map a').focus()")
        self.assertRegex(
            self.browser.run(named), r"c0001, job 5000, CPU [\d.]+ %, RAM 40.0 %"
        )
        self.browser.press(TAB)
        self.assertRegex(self.browser.run(named), "c0002")
        self.browser.press(ENTER)
        eventually(lambda: self.browser.path == "/node/c0002")

    def test_an_alert_is_marked_on_its_tile_by_more_than_colour(self):
        tile = self.browser.run(
            "return [...document.querySelectorAll('.map .al')].map(tile => ["
            "tile.pathname, getComputedStyle(tile, '::before').content])"
        )
        self.assertEqual(tile, [["/node/c0500", '"!"']])

    def test_the_map_can_show_ram(self):
        self.browser.find("select[name=map]").type("ram")
        eventually(lambda: self.browser.count(".map .v8") == 1000)

    def test_the_table_has_pages(self):
        self.browser.find("nav a:nth-child(10)").click()
        eventually(lambda: self.names()[:1] == ["c0901"])
        self.assertEqual(self.browser.path, "/?page=10")

    def test_tiles_fit_every_size(self):
        for width, height in SIZES:
            self.browser.show_as(width, height)
            self.open()
            self.assertLessEqual(
                self.browser.run("return document.documentElement.scrollWidth"), width
            )


class NoScript(InBrowser):
    script = False

    def test_the_page_is_complete_and_renews_itself(self):
        self.assertNotIn("disabled", self.browser.text("body"))
        self.assertIn("Show", self.browser.text("form"))
        before = self.browser.text("#nodes")
        self.assertEqual(before.count("alice"), 1)
        self.assertEqual(self.browser.count("#nodes th[scope=row]"), 40)
        eventually(lambda: self.browser.text("#nodes") != before, 8)

    def test_sort_filter_group_and_node_work_by_links_and_a_button(self):
        self.browser.find("#nodes thead th:nth-child(2) a").click()
        eventually(lambda: self.browser.path == "/?sort=cpu")
        self.open("/?q=c01&group=no")
        self.assertEqual(self.browser.count("#nodes th[scope=row]"), 1)
        self.open("/node/c07")
        self.assertEqual(self.browser.text("h1"), "c07")


class Hostile(InBrowser):
    @classmethod
    def known(cls):
        return [
            {"node": name, "job": name, "job_name": name, "user": name}
            for name in HOSTILE
        ] + fleet(35)

    def test_names_stay_text_on_every_page(self):
        self.assertLessEqual(set(HOSTILE), set(self.names()))
        for name in HOSTILE:
            self.open()
            link = [
                link
                for link in self.browser.run(
                    "return [...document.querySelectorAll('#nodes th[scope=row] a')].map("
                    "a => [a.textContent, a.href])"
                )
                if link[0] == name
            ][0][1]
            self.browser.open(link)
            self.assertEqual(self.browser.text("h1"), name)
            time.sleep(2.2)  # an update in place, too
            self.assertEqual(self.browser.text("h1"), name)
            self.assertEqual(self.browser.count("img, main script"), 0)
        self.assertNoComplaint()

    def test_long_names_break_the_layout_of_no_size(self):
        for width, height in SIZES:
            self.browser.show_as(width, height)
            for path in ("/", "/?group=no", "/node/" + HOSTILE[-1]):
                self.open(path)
                self.assertLessEqual(
                    self.browser.run("return document.documentElement.scrollWidth"),
                    width,
                    path,
                )


class ComingAndGoing(InBrowser):
    count = 6

    def test_1_a_node_that_is_lost_leaves_the_table_and_one_that_finishes_is_calmer(
        self,
    ):
        self.load.leave(0)
        eventually(lambda: "c01" in self.browser.text("#lost"))
        self.assertNotIn("c01", self.names())
        self.load.leave(1, "finished; peak 11.2 GiB")
        eventually(lambda: "peak 11.2 GiB" in self.browser.text("#finished"))
        colours = self.browser.run(
            "return ['.lost', '.finished'].map(kind => { const style = getComputedStyle(document"
            ".querySelector('#events ' + kind)); return [style.color, style.fontWeight]; })"
        )
        self.assertEqual(colours[0], ["rgb(26, 31, 38)", "700"])
        self.assertEqual(colours[1], ["rgb(88, 99, 113)", "400"])
        self.assertIn("1 node lost", self.browser.title)

    def test_2_a_stopped_collector_is_said(self):
        for pid in support.descendants(self.master.pid):
            with open("/proc/%d/cmdline" % pid) as file:
                file.read()
        collector = int(self.master.logged(r"collector started, pid (\d+)").group(1))
        os.kill(collector, signal.SIGSTOP)
        try:
            eventually(lambda: "has been silent" in self.browser.text("h1"), 12)
        finally:
            os.kill(collector, signal.SIGCONT)
        eventually(lambda: "silent" not in self.browser.text("h1"), 20)

    def test_3_a_master_that_is_gone_is_noticed_and_its_return_too(self):
        self.stamp()
        self.assertEqual(self.browser.text("#notice"), "")
        self.master.stop()
        eventually(lambda: "No answer since" in self.browser.text("#notice"), 10)
        self.assertRegex(self.browser.text("#notice"), r"since \d\d:\d\d:\d\d")
        self.assertIn(
            "stale", self.browser.run("return document.querySelector('main').className")
        )
        with start_master(
            "--port", str(self.master.port), "--dashboard-port", str(self.master.page)
        ):
            eventually(lambda: self.browser.text("#notice") == "" and self.names(), 20)
            self.assertSamePage()
            self.assertEqual(
                self.browser.run("return document.querySelector('main').className"), ""
            )


@support.slow("two browsers")
@requires("chromium", "chromedriver")
class Empty(unittest.TestCase):
    def test_the_empty_page_says_what_to_run_and_the_first_agent_appears_by_itself(
        self,
    ):
        with start_master() as master, Browser() as browser:
            browser.open("http://localhost:%d/" % master.page)
            self.assertIn(
                "python3 agent.py --host 127.0.0.1 --port %d" % master.port,
                browser.text("main"),
            )
            self.assertEqual(browser.messages(), [])
            with Load(master.port, fleet(1)):
                eventually(lambda: "laptop" in browser.text("#nodes"))

    def test_the_tokens_cookie_opens_the_page_and_the_address_forgets_it(self):
        with start_master("--dashboard-token", "auto") as master, Browser() as browser:
            address = master.logged(r"open (http://\S+)").group(1)
            browser.open("http://localhost:%d/" % master.page)
            self.assertIn("a token is needed", browser.text())
            browser.open(address)
            self.assertIn("No agents yet", browser.text("main"))
            self.assertEqual(browser.path, "/")
            time.sleep(2.5)
            self.assertEqual(browser.text("#notice"), "")
            browser.open("http://localhost:%d/?q=x" % master.page)
            self.assertIn("No agents yet", browser.text("main"))


class Rules(InBrowser):
    """axe-core's and html-validate's rules, on every kind of page of nodes."""

    values = {"c03": 99.0, "c20": 1.0}
    paths = (
        "/",
        "/?page=2",
        "/?sort=-cpu&q=c0&group=no",
        "/node/c03",
        "/?q=nobody",
        "/node/c40",
        "/job/4711",
    )

    @classmethod
    def known(cls):
        return fleet(40) + [{"node": "extra%d" % n} for n in range(65)]

    def setUp(self):
        super().setUp()
        if 39 in self.load.agents:
            self.load.leave(39)
            self.load.leave(38, "finished")
            eventually(lambda: "Recently finished" in self.browser.text("main"))

    @requires(AXE)
    def test_axe_finds_no_violation_on_any_page_in_either_theme(self):
        for dark, (width, height) in zip((False, True), SIZES):
            self.browser.show_as(width, height, dark=dark)
            for path in self.paths:
                self.open(path)
                self.assertEqual(axe_on(self.browser), [], (path, dark, width))

    @requires("node", HTML_VALIDATE)
    def test_html_validate_finds_no_error_on_any_page(self):
        pages = [support.get(self.master.page, path).text for path in self.paths]
        # the plan asks for the refresh, within noscript
        self.assertEqual(html_validate(pages, {"meta-refresh": "off"}), (0, ""))


# The demonstration's jobs, each of which ends and begins again within seconds
SHORT_JOBS = """
master_server.DEMO_INTERVAL = 0.5
master_server.DEMO_LOOK = 2
master_server.DEMO_PAUSE = 60.0
master_server.DEMO_SILENCE = (0.0, 0.0)
master_server.DEMO_JOBS = tuple(
    job._replace(seconds=8.0 if "OUT" in job.ending or job.array else 3000.0, age=0.0, again=0.0)
    for job in master_server.DEMO_JOBS
)
"""


@support.slow("a browser")
@requires("chromium", "chromedriver")
class RulesOfJobs(unittest.TestCase):
    """The same on the pages of jobs, live and past, and on a report, which is a file."""

    paths = (
        "/",
        "/job/48211",
        "/job/48217",
        "/job/48300",
        "/record/48211",
        "/jobs",
        "/jobs?q=nobody",
        "/compare?a=48211&b=48217",
        "/runs?name=assemble_genome",
        "/runs?array=48300",
    )

    @classmethod
    def setUpClass(cls):
        cls.stack = contextlib.ExitStack()
        try:
            cls.folder = cls.stack.enter_context(tempfile.TemporaryDirectory())
            flags = ("--demo", "--record", cls.folder)
            cls.master = cls.stack.enter_context(start_master(*flags, patch=SHORT_JOBS))
            cls.browser = cls.stack.enter_context(Browser())
            cls.report = os.path.join(cls.folder, "48217.html")
            eventually(lambda: os.path.exists(cls.report), 90)
        except BaseException:
            cls.stack.close()
            raise

    @classmethod
    def tearDownClass(cls):
        cls.stack.close()

    def addresses(self):
        """Every page, and the report."""
        for path in self.paths:
            yield "http://localhost:%d%s" % (self.master.page, path)
        yield "file://" + self.report

    @requires(AXE)
    def test_axe_finds_no_violation_on_any_page_in_either_theme(self):
        for dark, (width, height) in zip((False, True), SIZES):
            self.browser.show_as(width, height, dark=dark)
            for address in self.addresses():
                self.browser.open(address)
                self.assertEqual(axe_on(self.browser), [], (address, dark, width))

    @requires("node", HTML_VALIDATE)
    def test_html_validate_finds_no_error_on_any_page(self):
        pages = [support.get(self.master.page, path).text for path in self.paths]
        with open(self.report, encoding="utf-8") as file:
            pages.append(file.read())
        # the plan asks for the refresh, within noscript
        self.assertEqual(html_validate(pages, {"meta-refresh": "off"}), (0, ""))

    def test_no_page_scrolls_sideways_nor_complains_on_a_phone_or_a_laptop(self):
        for width, height in SIZES[:2]:
            self.browser.show_as(width, height)
            for address in self.addresses():
                self.browser.open(address)
                shown = self.browser.run("return document.documentElement.scrollWidth")
                self.assertLessEqual(shown, width, address)
        self.assertEqual(self.browser.messages(), [])

    def test_what_is_said_of_a_job_is_in_sight_at_every_width(self):
        for width in (320, 500, 800, 1000, 1160, 1300, 1920):
            self.browser.show_as(width, 900)
            self.browser.open("http://localhost:%d/" % self.master.page)
            right = self.browser.run(
                "return Math.max(...[...document.querySelectorAll('#jobs td.w:not(.u)')]"
                ".map(cell => cell.getBoundingClientRect().right))"
            )
            self.assertGreater(right, 0)
            self.assertLessEqual(right, width, width)


if __name__ == "__main__":
    unittest.main()
