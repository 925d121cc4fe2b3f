"""Pages: what a snapshot looks like as HTML, text, CSV, JSON and Prometheus; pure, no process."""

import array
import base64
import csv
import functools
import hashlib
import html
import html.parser
import io
import json
import math
import re
import sys
import types
import unittest
import unittest.mock

import support  # noqa: F401  (puts the tools on the path)

import master_server as master

NOW = 1700000000.0
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onfocus='x",
    "a&amp;b",
    "{0} {} {x} %s %(x)s",
    "../..",
    "a/b?c#d e%2f",
    "=cmd|'/C calc'!A0",
    '\\" } 1\n',
    "\u202eevil",
    "\uff1dSUM(1)",
    "학습",
    "x" * 64,
]


def node(slot, **known):
    """A row of a snapshot: what is not given is unknown."""
    row = dict.fromkeys(metric.key for metric in master.METRICS)
    row.update(
        slot=slot,
        address="('10.0.0.%d', 40%03d)" % (slot % 250, slot),
        cpu=10.0,
        ram=20.0,
        age=0.5,
        since=NOW - 60,
        alerts=None,
    )
    row.update(known)
    return row


def event(kind, name, ago=1.0, text="", job=None):
    """An entry of a snapshot's events."""
    return {
        "time": NOW - ago,
        "kind": kind,
        "node": name,
        "job": job,
        "user": None,
        "address": "('10.0.0.9', 40009)",
        "cpu": 50.0,
        "ram": 60.0,
        "text": text,
    }


def fields(row):
    """A row of a snapshot as the table holds it: text is bytes, unknown numbers are NaN."""
    for key in master.NODE_KEYS:
        text = key in master.TEXTS or key in ("address", "alerts")
        yield (
            (row[key] or "").encode()
            if text
            else math.nan
            if row[key] is None
            else row[key]
        )


def job(number, **known):
    """What Slurm says of a job, as a snapshot has it: what is not given is unknown."""
    facts = dict.fromkeys(master.JOB_KEYS)
    facts.update(job=str(number), raw=str(number), state="RUNNING")
    facts.update(known)
    return facts


def view(
    nodes=(),
    events=(),
    beat=0.2,
    jobs=(),
    turned_away=0,
    why="",
    verdicts=None,
    missed=-math.inf,
):
    nodes, events = list(nodes), list(events)
    return types.SimpleNamespace(
        time=NOW,
        capacity=1024,
        beat=beat,
        nodes=nodes,
        events=events,
        left=events,
        missed=missed,
        samples=1234,
        jobs=list(jobs),
        jobs_left_out=0,
        parts_left_out=0,
        turned_away=turned_away,
        turned_away_lately=turned_away,
        turned_away_why=why,
        made={},
        verdicts=verdicts or {},
        parts=lambda slot: master.Parts({}, [], [], []),
        rows=lambda: map(tuple, map(fields, nodes)),
    )


def site(**options):
    """What pages know beside the snapshot; without a history."""
    known = {"host": "127.0.0.1", "port": 13579, "secret_file": None}
    known.update({"my_jobs": None, "ssh": None}, **options)
    return types.SimpleNamespace(
        options=types.SimpleNamespace(**known),
        cost={"text": "takes 1 %", "seconds": 1.5, "memory": 50000000},
        series=lambda row, metric, points, step: [math.nan] * points,
    )


def render(path, snapshot, **query):
    return master.ROUTES[path][1](snapshot, query, site())


class Outline(html.parser.HTMLParser):
    """Checks that elements nest, and collects what there is."""

    VOID = {"base", "meta", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def words(page):
    """What a reader sees, with single blanks."""
    return re.sub(r"\s+", " ", " ".join(Outline(page).text))


def names(page):
    """The nodes of the table of nodes, in their order."""
    table = re.search(r'<section id="nodes"(.*?)</section>', page, re.S).group(1)
    return [
        html.unescape(name)
        for name in re.findall(r'<th scope="row".*?<a [^>]*>(.*?)</a>', table)
    ]


class Readings(unittest.TestCase):
    def test_a_reading_has_fixed_digits_and_a_unit(self):
        for key, value, text in (
            ("cpu", 0, "0.0 %"),
            ("cpu", 100.0, "100.0 %"),
            ("cpu", 12.345, "12.3 %"),
            ("mem_used", 0, "0.0 B"),
            ("mem_used", 1023, "1023.0 B"),
            ("mem_used", 1024, "1.0 KB"),
            ("mem_used", 11.24 * 2**30, "11.2 GB"),
            ("mem_used", 3 * 2**50, "3072.0 TB"),
            ("net_rx", 2.5e6, "2.4 MB/s"),
            ("age", 0.44, "0.4 s"),
            ("job_time_left", 59.9, "59.9 s"),
            ("job_time_left", 600, "10.0 min"),
            ("job_time_left", 11345, "3.2 h"),
            ("uptime", 86400 * 12.3, "12.3 d"),
            ("load1", 2, "2.0"),
            ("load1", 31.96, "32.0"),
            ("procs", 412.0, "412"),
            ("cpus", 8.0, "8"),
            ("node", "c1", "c1"),
            ("gpu", None, "-"),
            ("node", None, "-"),
            ("job", "", "-"),
        ):
            with self.subTest(key, value=value):
                self.assertEqual(master.render_value(key, value), text)

    def test_a_number_that_no_machine_has_stays_short(self):
        for key in master.NUMBERS:
            for value in (1e308, -1e308, 1e15, -5.0, 1e-300):
                with self.subTest(key, value=value):
                    self.assertLess(len(master.render_value(key, value)), 16)

    def test_c2_sorts_before_c10_and_a_number_as_a_number(self):
        values = ["c10", "c2", "C1", "c2a", "n", "c1x20", "c1x3"]
        self.assertEqual(
            sorted(values, key=master.natural),
            ["C1", "c1x3", "c1x20", "c2", "c2a", "c10", "n"],
        )
        self.assertEqual(sorted([3.5, 20, 1], key=master.natural), [1, 3.5, 20])


class Selection(unittest.TestCase):
    rows = [
        node(1, node="c10", job="7", user="ann", cpu=5.0, gpu=1.0),
        node(2, node="c2", job="7", user="bob", job_name="Train net", cpu=80.0),
        node(3, cpu=30.0, gpu=9.0),
    ]

    def slots(self, **query):
        return [row["slot"] for row in master.select(view(self.rows), query)]

    def test_text_job_and_user_filter(self):
        for query, slots in (
            ({}, [2, 1, 3]),
            ({"q": "TRAIN"}, [2]),
            ({"q": "train bob"}, [2]),
            ({"q": "train ann"}, []),
            ({"q": "10.0.0.3"}, [3]),
            ({"job": "7"}, [2, 1]),
            ({"job": "7", "user": "ann"}, [1]),
            ({"job": "8"}, []),
            ({"q": ""}, [2, 1, 3]),
            ({"job": "", "user": ""}, [2, 1, 3]),
            ({"q": "none"}, []),
        ):
            with self.subTest(query):
                self.assertEqual(self.slots(**query), slots)

    def test_every_column_sorts_both_ways_and_what_is_unknown_comes_last(self):
        for sort, slots in (
            ("cpu", [1, 3, 2]),
            ("-cpu", [2, 3, 1]),
            ("node", [2, 1, 3]),
            ("-node", [1, 2, 3]),
            ("gpu", [1, 3, 2]),
            ("-gpu", [3, 1, 2]),
            ("slot", [1, 2, 3]),
            ("-address", [3, 2, 1]),
            ("-nonsense", [1, 2, 3]),
        ):
            with self.subTest(sort):
                self.assertEqual(self.slots(sort=sort), slots)
        for column in master.COLUMNS:
            self.assertEqual(len(self.slots(sort="-" + column.key)), 3)

    def marks(self, *rows):
        return [
            row["slot"]
            for row in master.select(view(rows), {})
            if "idle" in row["marks"]
        ]

    def test_a_node_that_idles_while_the_rest_of_its_job_works_is_marked(self):
        busy = [node(n, job="7", cpu=90.0) for n in (1, 2)]
        self.assertEqual(self.marks(*busy, node(3, job="7", cpu=2.0)), [3])
        self.assertEqual(
            self.marks(*busy, node(3, job="7", cpu=90.0, job_cpu=2.0)), [3]
        )
        self.assertEqual(self.marks(*busy, node(3, job="7", cpu=2.0, job_cpu=99.0)), [])

    def test_no_node_is_marked_that_is_alone_or_elsewhere_or_rests_with_the_others(
        self,
    ):
        self.assertEqual(self.marks(node(1, job="7", cpu=1.0)), [])
        self.assertEqual(self.marks(node(1, cpu=1.0), node(2, cpu=90.0)), [])
        self.assertEqual(
            self.marks(node(1, job="7", cpu=1.0), node(2, job="8", cpu=90.0)), []
        )
        self.assertEqual(
            self.marks(*[node(n, job="7", cpu=1.0) for n in (1, 2, 3)]), []
        )

    def test_rules_that_fire_are_marks(self):
        (row,) = master.select(view([node(1, alerts="cpu>90 job_ram>95_for_30")]), {})
        self.assertEqual(row["marks"], ["cpu>90", "job_ram>95 for 30"])


class Gone(unittest.TestCase):
    def test_who_left_is_listed_for_ten_minutes_unless_it_is_back(self):
        events = [
            event("lost", "old", 601),
            event("lost", "back", 50),
            event("lost", "twice", 40),
            event("finished", "done", 30),
            event("lost", "twice", 20),
            event("alert", "x", 5),
        ]
        snapshot = view([node(1, node="back")], events)
        self.assertEqual(
            [(row["node"], row["time"]) for row in master.gone(snapshot, "lost")],
            [("twice", NOW - 20)],
        )
        self.assertEqual(
            [row["node"] for row in master.gone(snapshot, "finished")], ["done"]
        )

    def test_the_same_node_in_another_job_is_another_one(self):
        events = [event("lost", "c1", 5, job="1")]
        self.assertEqual(
            len(master.gone(view([node(1, node="c1", job="2")], events), "lost")), 1
        )
        self.assertEqual(
            len(master.gone(view([node(1, node="c1", job="1")], events), "lost")), 0
        )

    def test_the_page_lists_the_lost_with_their_last_values_out_of_the_live_table(self):
        page = render(
            "/",
            view(
                [node(1, node="c1")],
                [
                    event("lost", "c9", 65, "no sample for 5 s"),
                    event("finished", "c8", 5, "peak 11.2 GiB"),
                ],
            ),
        )
        self.assertEqual(names(page), ["c1"])
        text = words(page)
        self.assertRegex(
            text,
            r"Recently gone .*c9 - 50\.0 % 60\.0 % \d\d:\d\d:\d\d no sample for 5 s",
        )
        self.assertRegex(text, r"Recently finished .*c8 .* peak 11\.2 GiB .*Events")

    def test_a_finished_node_is_calmer_than_a_lost_one(self):
        page = render("/", view([], [event("lost", "c9"), event("finished", "c8")]))
        self.assertIn('<td class="lost">lost</td>', page)
        self.assertIn('<td class="finished">finished</td>', page)
        self.assertRegex(master.STYLE, r"\.finished\s*[,{][^}]*color:\s*var\(--dim\)")
        self.assertRegex(master.STYLE, r"\.lost\s*[,{][^}]*font-weight:\s*700")


class Sentence(unittest.TestCase):
    def title(self, snapshot):
        return master.figures(snapshot, master.select(snapshot, {}))[0]

    def test_the_first_words_say_whether_all_is_well(self):
        self.assertEqual(self.title(view([node(1)])), "All is well")
        self.assertEqual(self.title(view()), "No nodes")

    def test_an_empty_page_says_what_to_do_by_what_was_started(self):
        dialled = master.ROUTES["/"][1](view(), {}, site())
        self.assertIn("python3 agent.py --host 127.0.0.1 --port 13579", dialled)
        for options in ({"my_jobs": []}, {"ssh": "login"}):
            watched = master.ROUTES["/"][1](view(), {}, site(**options))
            self.assertIn("None of your jobs is here yet", watched)
            self.assertNotIn("sbatch", watched)

    def test_alerts_and_losses_are_in_the_first_words(self):
        self.assertEqual(
            self.title(view([node(1, alerts="cpu>90")], [event("lost", "c9")])),
            "\u26a0 alerts on 1 node, 1 node lost",
        )

    def test_what_the_ring_had_no_room_for_is_at_least_said(self):
        """128 events are kept: of more nodes that are lost at once the number is not known."""
        events = [event("lost", "c%d" % number) for number in range(128)]
        known = view([], events, missed=NOW - 30)
        self.assertEqual(self.title(known), "\u26a0 at least 128 nodes lost")
        of_old = view([], events, missed=NOW - master.GONE_SECONDS - 1)
        self.assertEqual(self.title(of_old), "\u26a0 128 nodes lost")

    def test_a_collector_that_stopped_is_said_instead_of_showing_old_numbers_as_live(
        self,
    ):
        snapshot = view([node(1)], beat=12.0)
        self.assertIn("silent for 12 s: what you see is old", self.title(snapshot))
        self.assertIn("silent for 12 s", words(render("/", snapshot)))
        self.assertIn("silent for 12 s", render("/nodes.txt", snapshot))
        self.assertNotIn("sentinel_node_cpu_percent{", render("/metrics", snapshot))

    def test_mean_worst_jobs_and_the_newest_sample_are_in_the_summary(self):
        snapshot = view(
            [node(1, node="a", cpu=10.0, job="1"), node(2, node="b", cpu=90.0, age=3.0)]
        )
        text = words(render("/", snapshot))
        self.assertIn("Nodes 2 jobs: 1 CPU 50.0 % 10 % a to 90 % b RAM 20.0 %", text)
        self.assertRegex(text, r"Newest sample \d\d:\d\d:\d\d 0\.5 s ago")


class Html(unittest.TestCase):
    @classmethod
    @functools.lru_cache()
    def outlines(cls):
        """Those of the pages: each is made and read once for all tests."""
        return [Outline(page) for page in cls.pages()]

    @staticmethod
    def pages():
        rows = [
            node(
                n,
                node=name,
                job=name,
                job_name=name,
                user=name,
                version=name,
                alerts="cpu>90",
            )
            for n, name in enumerate(HOSTILE, 1)
        ]
        events = [
            event(kind, name, n + k / 4, name, name)
            for n, name in enumerate(HOSTILE)
            for k, kind in enumerate(("lost", "finished", "alert"))
        ]
        many = [dict(row, slot=row["slot"] + 20 * n) for row in rows for n in range(20)]
        for snapshot in (view(rows, events), view([], events), view(many, events)):
            for query in (
                {},
                {"group": "no"},
                {"q": HOSTILE[0]},
                {"job": HOSTILE[1], "sort": "-cpu"},
                {
                    "sort": HOSTILE[1],
                    "user": HOSTILE[2],
                    "page": "\u0662",
                    "map": HOSTILE[1],
                },
            ):
                yield render("/", snapshot, **query)
            for name in HOSTILE:
                yield render("/node/", snapshot, node=name)

    def test_no_text_of_a_peer_becomes_markup_on_any_page(self):
        for outline in self.outlines():
            self.assertEqual(len(outline.all("script")), 1)
            self.assertFalse(
                {"img", "iframe", "object"} & {tag for tag, _ in outline.elements}
            )
            for tag, attributes in outline.elements:
                for name in attributes:
                    self.assertFalse(
                        name.startswith("on") or name == "style", (tag, attributes)
                    )

    def test_fill_escapes_whatever_is_no_markup_yet(self):
        made = master.fill(
            "<b>{}</b>{}{}{}", "<i>", ["&", master.Html("<hr>"), 5, None], None, '"'
        )
        self.assertEqual(made, "<b>&lt;i&gt;</b>&amp;<hr>5&quot;")
        self.assertEqual(master.fill("{}", made), made)

    def test_every_table_scrolls_by_itself_can_be_focused_and_has_a_name(self):
        page = render(
            "/", view([node(1)], [event("lost", "c9"), event("finished", "c8")])
        )
        sections = Outline(page).all("section")
        self.assertEqual(
            [section["aria-label"] for section in sections],
            ["Nodes", "Recently gone", "Recently finished", "Events"],
        )
        for section in sections:
            self.assertIn("scroll", section["class"].split())
            self.assertEqual(section["tabindex"], "0")
        self.assertEqual(page.count("<caption>"), 4)

    def test_links_lead_nowhere_else_whatever_a_node_is_called(self):
        for outline in self.outlines():
            for tag, attributes in outline.elements:
                for name in ("href", "src", "action"):
                    if name in attributes:
                        self.assertRegex(
                            attributes[name],
                            r"^(\.\.?/(?!/)|data:,$)",
                            (tag, attributes),
                        )

    def test_ids_are_unique_on_a_page(self):
        for outline in self.outlines():
            ids = [
                attributes["id"]
                for _, attributes in outline.elements
                if "id" in attributes
            ]
            self.assertEqual(
                len(ids), len(set(ids)), [i for i in ids if ids.count(i) > 1][:4]
            )

    def test_the_policy_allows_the_pages_own_style_and_script_and_nothing_else(self):
        policy = master.HEADERS["Content-Security-Policy"]
        page = render("/", view([node(1)]))
        for tag in ("style", "script"):
            text = re.search("<%s>(.*?)</%s>" % (tag, tag), page, re.S).group(1)
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            self.assertIn("%s-src 'sha256-%s'" % (tag, digest), policy)
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)

    def test_the_empty_page_is_small_and_says_what_to_run(self):
        page = master.ROUTES["/"][1](
            view(), {}, site(host="0.0.0.0", port=4711, secret_file="key")
        )
        self.assertLess(len(page), 40 * 1024)
        self.assertIn(
            "python3 agent.py --host %s --port 4711 --secret-file key"
            % master.socket.gethostname(),
            words(page),
        )
        self.assertIn(
            "python3 agent.py --host 127.0.0.1 --port 13579", words(render("/", view()))
        )
        self.assertNotIn("Nodes", words(page))

    def test_the_script_is_short(self):
        self.assertLess(len(master.SCRIPT), 8192)

    def test_a_filter_that_finds_nothing_keeps_its_form(self):
        page = render("/", view([node(1, node="c1")]), q="nothing")
        self.assertIn('name="q" value="nothing"', page)
        self.assertNotIn("agent.py", words(page))

    def test_nodes_are_grouped_by_job_with_its_id_name_and_user(self):
        rows = [
            node(1, node="c1", job="42", job_name="train", user="ann", cpu=40.0),
            node(2, node="c2", job="42", job_name="train", user="ann", cpu=50.0),
            node(3, node="c3"),
        ]
        self.assertIn(
            "Job 42 train \u00b7 ann \u00b7 nodes: 2 \u00b7 CPU: 45.0 %",
            words(render("/", view(rows))),
        )
        self.assertIn("No job", words(render("/", view(rows))))
        flat = words(render("/", view(rows), group="no"))
        self.assertNotIn("No job", flat)
        self.assertIn("Job name", flat)

    def test_groups_follow_the_order_of_their_first_node(self):
        rows = [
            node(1, node="a", job="1", cpu=10.0),
            node(2, node="b", job="2", cpu=90.0),
            node(3, node="c", job="1", cpu=50.0),
        ]
        self.assertEqual(names(render("/", view(rows), sort="-cpu")), ["b", "c", "a"])

    def test_a_map_leads_above_sixty_nodes_and_the_table_has_pages_above_a_hundred(
        self,
    ):
        def many(count):
            return view(
                node(n, node="c%d" % n, cpu=float(n % 101)) for n in range(1, count + 1)
            )

        for count, tiles, rows in (
            (60, 0, 60),
            (61, 61, 61),
            (100, 100, 100),
            (101, 101, 100),
        ):
            page = render("/", many(count))
            self.assertEqual(len(re.findall(r'<a id="t\d+"', page)), tiles)
            self.assertEqual(len(names(page)), rows)
        self.assertEqual(
            names(render("/", many(250), page="3")),
            ["c%d" % n for n in range(201, 251)],
        )
        for page in ("0", "-1", "x", "4", "9" * 4000):
            self.assertTrue(names(render("/", many(250), page=page)), page)
        tile = re.search(
            r'<a id="t95" class="(\S+)" href="\./node/c95" aria-label="([^"]*)"',
            render("/", many(250)),
        )
        self.assertEqual(tile.groups(), ("v19", "c95, job -, CPU 95.0 %, RAM 20.0 % "))
        self.assertIn('class="v4"', render("/", many(250), map="ram"))
        for count, offered in ((60, False), (61, True)):
            page = render("/", many(count))
            self.assertEqual('class="map"' in page, offered)
            self.assertEqual('<select name="map"' in page, offered)

    def test_the_state_of_the_page_stays_in_its_links(self):
        page = render(
            "/",
            view(node(n, node="c%d" % n, user="ann") for n in range(1, 150)),
            q="c",
            user="ann",
            sort="-cpu",
            page="2",
            token="secret",
        )
        links = [
            html.unescape(attributes["href"]) for attributes in Outline(page).all("a")
        ]
        self.assertIn(
            "./?q=c&user=ann&sort=cpu", links
        )  # turned around, from the first page
        self.assertIn("./?q=c&user=ann&sort=-cpu&page=1", links)
        self.assertNotIn("secret", page)

    def test_a_percentage_has_a_bar_and_never_one_that_is_too_long(self):
        page = render(
            "/", view([node(1, cpu=37.5, gpu=250.0, gpu_mem=-3.0, job_ram=12.0)])
        )
        self.assertIn('class="bar cpu"', page)
        self.assertEqual(
            re.findall(r'<rect width="([^"]*)"', page), ["37.5", "20.0", "12.0", "100"]
        )


class NodePage(unittest.TestCase):
    def test_it_shows_every_reading_and_the_nodes_own_events(self):
        row = node(
            1,
            node="c1",
            job="42",
            job_name="train",
            user="ann",
            version="1.0",
            **dict.fromkeys(list(master.NUMBERS)[2:], 1.0),
        )
        text = words(
            render(
                "/node/",
                view(
                    [row, node(2, node="c2")],
                    [
                        event("connected", "c1", 9, "from here"),
                        event("alert", "c2", 5, "not this"),
                    ],
                ),
                node="c1",
            )
        )
        for metric in master.METRICS:
            self.assertIn(metric.label, text)
            self.assertIn(metric.help, text)
        self.assertIn("from here", text)
        self.assertNotIn("not this", text)

    def test_a_requeued_job_has_two_rows_of_one_name(self):
        rows = [node(n, node="c1", job="42") for n in (1, 2)]
        page = render("/node/", view(rows), node="c1")
        self.assertEqual(len(names(page)), 2)
        self.assertEqual(page.count("<caption>Readings"), 2)

    def test_a_node_without_a_name_is_known_by_its_address(self):
        self.assertIn(
            "10.0.0.7:40007", render("/node/", view([node(7)]), node="10.0.0.7:40007")
        )
        self.assertIn('href="./node/10.0.0.7%3A40007"', render("/", view([node(7)])))

    def test_one_that_is_gone_shows_how_it_ended_and_a_stranger_is_none(self):
        text = words(
            render(
                "/node/",
                view([], [event("lost", "c1", 5, "no sample for 5 s")]),
                node="c1",
            )
        )
        self.assertIn("no sample for 5 s", text)
        self.assertEqual(render("/node/", view([node(1, node="c1")]), node="c2"), "")

    def test_graphs_are_drawn_with_gaps_where_nothing_is_known(self):
        values = {
            "cpu": [math.nan, 0.0, 100.0, math.nan, 50.0],
            "net_rx": [0.0, 4096.0],
        }
        about = site()
        about.series = lambda row, metric, points, step: values.get(metric, [])
        page = master.ROUTES["/node/"][1](
            view([node(1, node="c1", net_rx=4096.0)]), {"node": "c1"}, about
        )
        self.assertIn('<path class="cpu" d="M0 100h0L1 0M3 50h0"/>', page)
        self.assertIn('<path class="net_rx" d="M0 100h0L1 0"/>', page)
        times = " ".join(master.render_value("time", NOW - ago) for ago in (10, 5, 0))
        self.assertIn("Received 4.0 KB/s 4.0 KB/s 2.0 KB/s 0 " + times, words(page))
        self.assertIn('data-values="0 100  50"', page)
        self.assertEqual(page.count("<figure "), 2)

    def test_the_nodes_of_a_job_have_one_scale_and_what_matters_comes_first(self):
        rows = [node(number, node="c%d" % number, job="7") for number in (1, 2)]
        most = {"c1": 1024.0, "c2": 4096.0}
        about = site()
        about.series = lambda row, metric, points, step: (
            {"net_rx": [0.0, most[row["node"]]]}.get(metric) or [50.0, 60.0]
        )
        page = master.ROUTES["/node/"][1](view(rows), {"node": "c1"}, about)
        self.assertIn('d="M0 100h0L1 75"', page)
        large, small = page.split('<div class="graphs large">')[1].split(
            '<div class="graphs ">'
        )
        shown = re.compile(r'id="graph-(\w+)-1"')
        self.assertEqual(shown.findall(large), [*master.LARGE_GRAPHS])
        self.assertEqual(shown.findall(small)[-2:], ["agent_cpu", "agent_rss"])

    def test_a_young_node_has_a_curve_from_its_second_sample_on(self):
        about = site()
        about.series = lambda row, metric, points, step: (
            [math.nan] * (points - 2) + [10.0, 20.0] if step == 1 else [math.nan] * 30
        )
        page = master.ROUTES["/"][1](view([node(1)]), {}, about)
        self.assertIn('viewBox="0 0 1 100"', page)
        self.assertIn('d="M0 90h0L1 80"', page)


class Past(unittest.TestCase):
    """The history that the graphs are drawn from."""

    def fill(self, ticks, **known):
        history = master.History()
        for tick in ticks:
            history.add(
                view(
                    [
                        node(
                            1,
                            node="c1",
                            cpu=float(tick % 100),
                            net_rx=float(tick),
                            **known,
                        )
                    ]
                ),
                tick,
            )
        return history

    def test_cpu_is_kept_every_tick_and_the_others_every_fifth(self):
        history, row = self.fill(range(1000, 1322)), node(1, node="c1")
        self.assertEqual(history.series(row, "cpu", 3, 1), [19.0, 20.0, 21.0])
        self.assertEqual(history.series(row, "cpu", 300, 1)[0], 1022 % 100)
        self.assertEqual(
            history.series(row, "net_rx", 60, 1),
            [float(n) for n in range(1025, 1321, 5)],
        )
        self.assertEqual(
            history.series(row, "cpu", 2, 3), [17.0, 20.0]
        )  # ticks that 3 divides

    def test_a_graph_does_not_jitter_as_time_goes_on(self):
        shots = [
            self.fill(range(end)).series(node(1, node="c1"), "cpu", 20, 3)
            for end in (99, 100, 101)
        ]
        self.assertEqual(shots[1], shots[2])
        self.assertEqual(shots[0][1:], shots[1][:-1])

    def test_a_short_gap_is_bridged_and_a_long_one_is_one(self):
        row = node(1, node="c1")
        self.assertEqual(
            self.fill([10, 15]).series(row, "cpu", 6, 1), [10.0] + [15.0] * 5
        )
        values = self.fill([10, 17]).series(row, "cpu", 8, 1)
        self.assertEqual((values[0], values[-1]), (10.0, 17.0))
        self.assertTrue(all(map(math.isnan, values[1:-1])))

    def test_a_node_that_left_stays_ten_minutes_and_a_silent_collector_adds_nothing(
        self,
    ):
        history = self.fill(range(5))
        history.add(view([node(1, node="c1", cpu=99.0)], beat=9.0), 5)
        self.assertTrue(math.isnan(history.series(node(1, node="c1"), "cpu", 1, 1)[0]))
        self.assertEqual(history.series(node(1, node="c1"), "cpu", 2, 1)[0], 4.0)
        history.add(view(), 299)
        self.assertIn(("c1", None), history.rings)
        history.add(view(), 304)
        self.assertEqual(history.rings, {})

    def test_what_was_ten_minutes_ago_does_not_come_back_when_a_node_falls_silent(self):
        history, row = self.fill(range(400)), node(1, node="c1")
        history.add(view(), 410)
        self.assertTrue(all(map(math.isnan, history.series(row, "cpu", 11, 1))))
        self.assertTrue(all(map(math.isnan, history.series(row, "net_rx", 2, 1))))
        self.assertEqual(history.series(row, "cpu", 12, 1)[0], 99.0)

    def test_a_flood_of_nodes_that_come_and_go_is_bounded(self):
        history = master.History()
        for tick in range(60):
            nodes = [node(n, node="n%d-%d" % (tick, n)) for n in range(1, 101)]
            snapshot = view(nodes)
            snapshot.capacity = 100
            history.add(snapshot, tick)
            self.assertLessEqual(len(history.rings), 300)

    def test_a_node_takes_at_most_ten_kib_and_less_when_it_sends_little(self):
        def size_of(ring):
            self.assertIsInstance(ring.percents, array.array)
            self.assertIsInstance(ring.numbers, array.array)
            return sys.getsizeof(ring.percents) + sys.getsizeof(ring.numbers)

        little = node(1, node="c1")
        sent = [key for key in master.GRAPHS[2:] if little[key] is not None]
        history = self.fill(range(20))
        (ring,) = history.rings.values()
        self.assertLess(size_of(ring), 2 * 600 + 240 * (len(sent) + 1) + 200)
        others = [key for key in master.GRAPHS[2:] if key != "net_rx"]
        history = self.fill(range(20), **dict.fromkeys(others, 1.0))
        (ring,) = history.rings.values()
        self.assertLess(size_of(ring) + 600, 8 * 1024)

    def test_percentages_are_kept_to_a_hundredth_unless_there_may_be_many(self):
        history, row = master.History(), node(1, node="c1")
        sent = [0.0, 0.004, 0.006, 33.333, 99.995, 100.0, 655.34, 1e9, -1.0, math.nan]
        metrics = ("cpu", "ram", "swap", "psi_io", "job_cpu")
        for tick, percent in enumerate(sent):
            known = dict.fromkeys(metrics, percent)
            history.add(view([node(1, node="c1", **known)]), 5 * tick)
        kept = [0.0, 0.0, 0.01, 33.33, 100.0, 100.0, 655.34, 655.34, 0.0]
        for metric in metrics[:-1]:
            step = 5 if metric in ("cpu", "ram") else 1
            series = history.series(row, metric, 10, step)
            self.assertEqual(series[:9], kept, metric)
            self.assertTrue(math.isnan(series[9]), metric)
        self.assertEqual(history.series(row, "job_cpu", 3, 1)[0], 1e9)

    def test_a_metric_that_comes_later_has_a_curve_from_then_on(self):
        history = master.History()
        for tick in range(0, 100):
            known = {"gpu": float(tick)} if tick > 61 else {}
            known["job_mem"] = 7.0  # what was there before stays in its place
            history.add(view([node(1, node="c1", **known)]), tick)
        row = node(1, node="c1")
        gpu = history.series(row, "gpu", 20, 1)
        self.assertTrue(all(map(math.isnan, gpu[:13])), gpu)
        self.assertEqual(gpu[13:], [65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0])
        self.assertEqual(history.series(row, "job_mem", 20, 1), [7.0] * 20)
        self.assertTrue(all(map(math.isnan, history.series(row, "swap", 3, 1))))

    def test_nodes_that_send_the_same_share_what_is_known_of_it(self):
        history = master.History()
        for tick in range(0, 30):
            nodes = [node(n, node="c%d" % n, gpu=1.0) for n in range(1, 9)]
            history.add(view(nodes), tick)
        self.assertEqual(len({id(ring.held) for ring in history.rings.values()}), 1)
        self.assertLessEqual(len(history.helds), len(history.rings))

    def test_readings_beyond_a_float_are_gaps(self):
        history = self.fill(range(0, 11), disk_read=1e308)
        page = master.ROUTES["/node/"][1](
            view([node(1, node="c1", disk_read=1e308)]),
            {"node": "c1"},
            types.SimpleNamespace(options=None, cost={}, series=history.series),
        )
        self.assertNotIn("inf", page)


class JobsFirst(unittest.TestCase):
    """The overview leads with jobs, and of these with those that need their user."""

    def judged(self, severity, what):
        return [{"severity": severity, "what": what, "proof": "p", "cure": "c"}]

    def setUp(self):
        jobs = [
            job(1, job_name="calm", start=NOW - 8000, limit=43200.0),
            job(2, state="PENDING", reason="Priority"),
            job(3, job_name="sick", start=NOW - 60, limit=600.0),
            job(4, state="OUT_OF_MEMORY", exit="0:125", end=NOW - 25, start=NOW - 70),
            job(5, state="COMPLETED", exit="0:0", end=NOW - 5, start=NOW - 50),
            job(6, job="6_1", array="6", start=NOW - 5),
            job(7, job="6_2", array="6", state="COMPLETED", end=NOW, start=NOW - 5),
        ]
        verdicts = {
            "1": self.judged("fine", "nothing is wrong"),
            "3": self.judged("problem", "3 of 4 CPUs of c1 idle"),
        }
        nodes = [
            dict(node(1, job="1"), job_cpu=77.0, job_ram=66.0, job_mem_limit=2.0**37),
            dict(node(2, job="1"), job_cpu=79.0, job_ram=30.0, gpu=94.0),
            node(3, job="3"),
        ]
        self.view = view(nodes, jobs=jobs, verdicts=verdicts)

    def test_what_needs_its_user_comes_first_and_what_ended_well_has_a_table_below(
        self,
    ):
        rows = master.job_rows(self.view)
        order = [row["job"] for row in rows]
        self.assertEqual(order, ["4", "3", "1", "6", "2", "5"])
        text = render("/", self.view)
        self.assertLess(text.index('id="jobs_3"'), text.index('id="nodes"'))
        self.assertLess(text.index('id="nodes"'), text.index('id="ended_5"'))
        self.assertNotIn('id="ended_4"', text)

    def test_a_row_says_what_is_used_of_what_was_asked_for(self):
        row = {row["job"]: row for row in master.job_rows(self.view)}["1"]
        self.assertEqual(row["clock"], "2:13 of 12:00 h")
        self.assertAlmostEqual(row["clock_share"], 18.5, places=1)
        self.assertEqual((row["cpu"], row["gpu"]), (78.0, "94"))
        self.assertEqual(row["memory"], "66 % of 128 GB")

    def test_the_headline_counts_those_that_died_and_those_with_a_problem(self):
        title = master.figures(self.view, master.select(self.view, {}))[0]
        self.assertEqual(title, "\u26a0 6 jobs: 1 died, 1 with a problem")

    def test_a_filter_is_for_jobs_too_and_the_headline_is_of_all(self):
        title = words(render("/", self.view)).partition(" - ")[0]
        for query, shown in (
            ({"q": "calm"}, "1"),
            ({"q": "memory 4"}, "4"),
            ({"job": "3"}, "3"),
            ({"q": "40001"}, "1"),  # the address of its node
            ({"q": "6"}, "6"),
        ):
            page = render("/", self.view, **query)
            found = set(re.findall(r'id="(?:jobs|ended)_(\w+)"', page))
            self.assertIn(shown, found, query)
            self.assertNotIn("5", found, query)
            self.assertEqual(words(page).partition(" - ")[0], title)
        self.assertIn("No node matches", words(render("/", self.view, q="nothing")))
        self.assertNotIn("No node matches", words(render("/", self.view)))

    def test_of_those_that_ended_the_newest_is_first(self):
        ends = {8: 300.0, 9: 20.0, 10: 100.0}
        jobs = [
            job(number, state="TIMEOUT", start=NOW - 900, end=NOW - ago)
            for number, ago in ends.items()
        ]
        rows = master.job_rows(view(jobs=jobs))
        self.assertEqual([row["job"] for row in rows], ["9", "10", "8"])

    def test_the_name_leads_where_the_id_does_and_a_title_has_the_sign(self):
        page = render("/", self.view)
        self.assertEqual(page.count('href="./job/3"'), 2)
        page = render("/job/", self.view, job="3")
        self.assertIn("<title>\u26a0 Job 3 sick - ", page)
        self.assertIn("<title>Job 1 calm - ", render("/job/", self.view, job="1"))

    def test_tasks_that_waited_lead_to_their_array_once_they_do_not(self):
        page = render("/job/", self.view, job="6_[2-9]")
        self.assertIn("6_1", words(page))
        self.assertFalse(master.is_past(self.view, "6_[2-9]"))
        self.assertEqual(render("/job/", self.view, job="77_[2-9]"), "")

    def test_the_page_of_a_node_says_what_is_wrong_with_its_job(self):
        self.view.nodes[2]["node"] = "c3"
        text = words(render("/node/", self.view, node="c3"))
        self.assertIn("Verdicts on its job", text)
        self.assertIn("3 of 4 CPUs of c1 idle", text)
        self.view.nodes[0]["node"] = "c1"
        self.assertNotIn("Verdicts", words(render("/node/", self.view, node="c1")))

    def test_page_text_and_json_have_the_same_words(self):
        for path in ("/", "/nodes.txt", "/api/jobs"):
            text = html.unescape(render(path, self.view))
            for said in (
                "3 of 4 CPUs of c1 idle",
                "out of memory, says Slurm; the kernel's count was not seen",
            ):
                self.assertIn(said, text)
        self.assertIn("--mem=", words(render("/job/", self.view, job="4")))

    def test_the_tasks_of_an_array_are_one_row(self):
        row = {row["job"]: row for row in master.job_rows(self.view)}["6"]
        self.assertEqual(row["state"], "1 running, 1 done")
        self.assertEqual(row["phase"], "running")

    def test_the_tasks_that_squeue_folds_into_one_line_are_counted(self):
        for name, count, is_whole in (
            ("4711", 1, True),
            ("4711_3", 1, True),
            ("4711_[6-40]", 35, True),
            ("4711_[6-40%4]", 35, True),
            ("4711_[0-20:5]", 5, True),
            ("4711_[1,3,7-9]", 5, True),
            ("4711_[1,3,5,7,...]", 4, False),
            ("4711_[1000-1200,1400-1", 201, False),  # the table has 24 bytes for an id
            ("4711_[1000-", 1, False),
            ("4711_[9-1]", 1, True),
            ("4711_[0-9999999999999999999]", 10**19, True),
            ("4711_[1-9:0]", 9, True),
        ):
            with self.subTest(name):
                self.assertEqual(master.tasks_in(name), (count, is_whole))
        tasks = [
            job(1, job="1_[6-40]", state="PENDING"),
            job(2, job="1_2", state="OUT_OF_MEMORY"),
            job(3, job="1_3"),
            job(4, job="1_[1,2,...]", state="PENDING"),
        ]
        told = "1 running, 37+ pending, 1 out of memory"
        self.assertEqual(master.count_tasks(tasks), told)

    def test_the_page_of_an_array_has_its_tasks_and_their_nodes_as_long_as_any_is_known(
        self,
    ):
        nodes = [node(1, node="c1", job="6_1"), node(2, node="c2", job="7_1")]
        verdicts = {"6": self.judged("problem", "one busy thread")}
        tasks = [row for row in self.view.jobs if row["array"]]
        snapshot = view(nodes, jobs=tasks, verdicts=verdicts)
        page = render("/job/", snapshot, job="6")
        self.assertIn("Job 6", words(page))
        self.assertEqual(names(page), ["c1"])
        for text in ("6_1", "6_2", "1 running, 1 done", "one busy thread"):
            self.assertIn(text, words(page))
        for task in tasks:
            task["state"] = "COMPLETED"
        self.assertFalse(master.is_past(snapshot, "6"))
        self.assertTrue(master.is_past(snapshot, "6_1"))
        self.assertTrue(master.is_past(snapshot, "8"))
        self.assertEqual(render("/job/", snapshot, job="8"), "")

    def test_an_idle_node_and_an_alert_are_told_and_leave_the_verdict_as_it_is(self):
        busy = [dict(node(number, job="1"), cpu=90.0) for number in (1, 2)]
        idle = dict(node(3, node="c3", job="1"), cpu=1.0)
        alert = dict(node(4, node="c4", job="1"), cpu=90.0, alerts="cpu>80_for_9 ram>9")
        fine = {"1": self.judged("fine", "nothing is wrong")}
        for more, hint, what in (
            ([], None, None),
            ([idle], "advice", "c3 idle"),
            ([idle, dict(idle, slot=5)], "advice", "2 nodes idle"),
            ([dict(idle, slot=slot) for slot in (3, 5, 6)], None, None),  # most do
            (
                [idle, alert],
                "problem",
                "c4: CPU 90 % (alert above 80 % for 9 s), RAM 20 % (alert above 9 %)",
            ),
            ([alert, dict(alert, slot=6)], "problem", "alerts on 2 nodes"),
        ):
            for verdicts, severity in ((fine, "fine"), ({}, hint)):
                snapshot = view(busy + more, jobs=[job(1)], verdicts=verdicts)
                (row,) = master.job_rows(snapshot)
                self.assertEqual((row["severity"], row["text"]), (severity, what))
        died = {"1": self.judged("died", "out of memory")}
        (row,) = master.job_rows(view(busy + [idle], jobs=[job(1)], verdicts=died))
        self.assertEqual(row["text"], "out of memory")

    def test_a_gpu_that_idles_while_another_works_is_marked(self):
        blank = dict.fromkeys(("uuid", "index", "name"))
        for busy, marked in (
            ([95.0, 0.0, None], [False, True, False]),
            ([30.0, 0.0], [False, False]),
            ([0.0, 0.0], [False, False]),
        ):
            gpus = [dict(blank, index=i, gpu=value) for i, value in enumerate(busy)]
            snapshot = view([node(1, job="1")])
            snapshot.parts = lambda slot, gpus=gpus: master.Parts({}, [], [], gpus)
            found = master.gpus_of_job(snapshot, snapshot.nodes)
            self.assertEqual([gpu.get("marks") == ["idle"] for gpu in found], marked)

    def test_what_the_nodes_of_a_job_did_at_once_is_one_event(self):
        told = [event("connected", "c%d" % n, 20 - n, job="1") for n in range(12)]
        told.append(event("lost", "c1", 1.0, "silent", job="1"))
        told.append(event("lost", "c2", 1.0, "silent", job="1"))
        told.append(event("connected", "d1", 0.5, "from d1", job="2"))
        folded = master.fold_events(told[::-1])
        self.assertEqual(
            [(row["kind"], row["node"]) for row in folded],
            [
                ("connected", "d1"),
                ("lost", "c2"),
                ("lost", "c1"),
                ("connected", "c11"),
                ("connected", "c1"),
            ],
        )
        self.assertEqual(
            folded[3]["text"],
            "and 9 more nodes: c2, c3, c4, c5, c6, c7, c8, c9, ...",
        )
        self.assertEqual(folded[4]["text"], "and 1 more node: c0")
        self.assertEqual(told[0]["text"], "")

    def test_gpus_are_told_one_by_one_and_many_by_those_that_idle(self):
        for busy, told in (
            ([95.0, 93.0, 94.0, 0.0], "95 93 94 0"),
            ([90.0] * 11 + [0.0] * 5, "mean 62, 5 of 16 idle"),
            ([80.0, 90.0] * 8, "mean 85, 80 to 90 (16)"),
        ):
            gpus = [{"gpu": value} for value in busy]
            snapshot = view([node(1, job="1")])
            snapshot.parts = lambda slot, gpus=gpus: master.Parts({}, [], [], gpus)
            self.assertEqual(master.render_gpus(snapshot, snapshot.nodes), told)

    def test_on_a_phone_a_cell_says_what_it_is_as_there_are_no_headings(self):
        page = render("/", self.view)
        self.assertIn('<td data-what="Time" class="n">2:13 of 12:00 h', page)
        self.assertIn('<td data-what="CPU" class="n">78.0 %', page)
        self.assertNotIn('data-what="Job name"', page)
        nodes = page[page.index('<section id="nodes"') :]
        self.assertNotIn("data-what", nodes[: nodes.index("</section>")])

    def test_the_page_says_of_when_it_is_and_whether_that_is_now(self):
        told = master.render_value("time", NOW)
        self.assertIn(told + ", live", words(render("/", self.view)))
        self.assertIn(told + ", old", words(render("/", view(beat=60.0))))

    def test_the_headline_counts_the_jobs_also_when_all_is_well(self):
        for nodes, jobs, title in (
            ([], [], "No nodes"),
            ([node(1)], [], "All is well"),
            ([node(1)], [job(1)], "All is well: 1 job"),
            ([], [job(1, state="PENDING"), job(2)], "All is well: 2 jobs"),
        ):
            snapshot = view(nodes, jobs=jobs)
            rows = master.select(snapshot, {})
            self.assertEqual(master.headline(snapshot, rows), title)

    def test_a_job_that_only_agents_tell_of_is_one_as_well(self):
        snapshot = view([node(1, job="9"), node(2, job="9"), node(3)])
        (row,) = master.job_rows(snapshot)
        self.assertEqual((row["job"], row["nodes"], row["severity"]), ("9", 2, None))


class TurnedAway(unittest.TestCase):
    """Agents that found no room are told wherever somebody looks."""

    def test_the_headline_the_text_healthz_and_the_metrics_say_how_many_and_why(self):
        full = view([node(1)], turned_away=40, why="no room: raise TasksMax")
        words = "40 agents turned away in the last minute: no room: raise TasksMax"
        for path in ("/", "/nodes.txt"):
            with self.subTest(path):
                self.assertIn(words, render(path, full))
                self.assertNotIn("All is well", render(path, full))
        self.assertEqual(render("/healthz", full), "ok, but %s\n" % words)
        self.assertIn("\nsentinel_turned_away_total{} 40\n", render("/metrics", full))

    def test_without_any_nothing_is_said_of_it(self):
        for path in ("/", "/nodes.txt", "/healthz"):
            self.assertNotIn("turned away", render(path, view([node(1)])))

    def test_they_are_told_beside_other_trouble_and_their_reason_stays_text(self):
        rows = [node(1, alerts="cpu>90")]
        full = view(rows, turned_away=1, why="<no threads>")
        title = master.figures(full, master.select(full, {}))[0]
        self.assertEqual(
            title,
            "\u26a0 alerts on 1 node; 1 agent turned away in the last minute: <no threads>",
        )
        self.assertIn(title, words(render("/", full)))
        self.assertNotIn("<no threads>", render("/", full))

    def test_a_gauge_falls_to_zero_while_the_counter_stays(self):
        full = view([node(1)], turned_away=40)
        after = view([node(1)], turned_away=40)
        after.turned_away_lately = 0
        for snapshot, lately in ((full, 40), (after, 0)):
            text = render("/metrics", snapshot)
            self.assertIn("# TYPE sentinel_turned_away_total counter\n", text)
            self.assertIn("\nsentinel_turned_away_total{} 40\n", text)
            self.assertIn("# TYPE sentinel_turned_away_lately gauge\n", text)
            self.assertIn("\nsentinel_turned_away_lately{} %d\n" % lately, text)


class Columns(unittest.TestCase):
    def test_a_column_more_in_the_list_is_on_the_page_and_in_the_text(self):
        rows = [node(1, swap=12.5), node(2)]
        for path in ("/", "/nodes.txt"):
            self.assertNotIn("Swap", render(path, view(rows)))
        more = (*master.COLUMNS, master.of_metric("swap"))
        with unittest.mock.patch.object(master, "COLUMNS", more):
            page = render("/", view(rows), sort="-swap")
            text = render("/nodes.txt", view(rows))
        self.assertRegex(
            page, r'aria-sort="descending"><a href="\./\?sort=swap">Swap</a>'
        )
        self.assertIn('<td class="n">12.5 %<svg class="bar swap"', page)
        self.assertRegex(text, r"(?m)^Node .* Swap$")
        self.assertRegex(text, r"(?m)^10\.0\.0\.1.* 12\.5 %$")

    def test_every_metric_can_be_a_column(self):
        for metric in master.METRICS:
            column = master.of_metric(metric.key)
            self.assertEqual(column.heading, metric.label)
            is_number = metric.key in master.NUMBERS
            self.assertEqual(column.align == master.RIGHT, is_number, metric.key)


class Text(unittest.TestCase):
    rows = [
        node(1, node="c1", job="42", user="ann", cpu=5.0),
        node(2, node="학습", job="7", cpu=100.0),
        node(3, node="c3", cpu=30.0),
    ]

    def test_columns_line_up_also_below_wide_letters(self):
        lines = render("/nodes.txt", view(self.rows)).splitlines()
        width = [
            sum(2 if ord(char) > 0x1100 else 1 for char in line[: line.index("%")])
            for line in lines[2:]
        ]
        self.assertEqual(len(set(width)), 1, lines)
        self.assertEqual(
            [line.split()[0] for line in lines[1:]], ["Node", "c1", "c3", "학습"]
        )
        self.assertEqual([line for line in lines if line != line.rstrip()], [])

    def test_it_sorts_filters_and_cuts(self):
        self.assertTrue(
            render("/nodes.txt", view(self.rows), sort="-cpu")
            .splitlines()[2]
            .startswith("학습")
        )
        self.assertEqual(
            len(render("/nodes.txt", view(self.rows), q="ann").splitlines()), 3
        )
        for line in render("/nodes.txt", view(self.rows), width="30").splitlines():
            self.assertLessEqual(len(line), 30)
        for width in ("", "x", "-1", "\u00b2"):
            self.assertIn(
                "('10.0.0.1', 40001)",
                render("/nodes.txt", view(self.rows), width=width),
            )

    def test_it_begins_with_what_matters(self):
        self.assertTrue(
            render("/nodes.txt", view(self.rows)).startswith(
                "All is well: 2 jobs | Nodes 3 jobs: 2 |"
            )
        )
        self.assertTrue(render("/nodes.txt", view()).startswith("No nodes\n"))

    def test_test_reader_can_do_with_a_snapshot_alone(self):
        self.assertIn("c1", master.render_nodes_text(view(self.rows), {}))
        self.assertEqual(
            len(json.loads(master.render_nodes_json(view(self.rows), {}))["nodes"]), 3
        )


class Machines(unittest.TestCase):
    def test_json_has_null_for_unknown_and_letters_as_they_are(self):
        text = render("/api/nodes", view([node(1, node="학습")]))
        self.assertIn("학습", text)
        parsed = json.loads(text)
        self.assertEqual(parsed["capacity"], 1024)
        self.assertIsNone(parsed["nodes"][0]["gpu"])
        self.assertEqual(
            set(parsed["nodes"][0]),
            {"slot", "address", "age", "since", "alerts"}
            | {metric.key for metric in master.METRICS},
        )

    def test_csv_is_read_back_by_csv_and_no_cell_is_a_formula(self):
        rows = [
            node(n, node=name, job_name=name, cpu=1.5)
            for n, name in enumerate(HOSTILE, 1)
        ]
        table = list(
            csv.DictReader(io.StringIO(render("/nodes.csv", view(rows)), newline=""))
        )
        self.assertEqual(
            [row["node"].lstrip("'") for row in table],
            [name.lstrip("'") for name in HOSTILE],
        )
        for row in table:
            self.assertEqual((row["cpu"], row["gpu"]), ("1.5", ""))
            for cell in row.values():
                self.assertNotRegex(cell, "^[=+@\t\r\uff1d\uff0b\uff0d\uff20-]")

    def test_events_are_json_oldest_first(self):
        events = [event("connected", "c1", 9), event("lost", "c1", 1)]
        self.assertEqual(
            json.loads(render("/api/events", view([], events)))["events"], events
        )

    def test_labels_of_prometheus_are_escaped_and_no_series_comes_twice(self):
        rows = [
            node(n, node=name, job=name, user=name) for n, name in enumerate(HOSTILE, 1)
        ]
        text = render(
            "/metrics", view(rows + [node(50, node="twin"), node(51, node="twin")])
        )
        series = [
            line.rpartition(" ")[0] for line in text.splitlines() if line[:1] != "#"
        ]
        self.assertEqual(len(series), len(set(series)))
        label = r'[a-z]+="(?:[^"\\\n]|\\["\\n])*"'
        for line in text.splitlines():
            if not line.startswith("#"):
                self.assertRegex(
                    line,
                    r"^sentinel_[a-z0-9_]+\{(%s(,%s)*)?\} [-+.e0-9]+$" % (label, label),
                )
        self.assertIn(
            'sentinel_node_cpu_percent{node="twin",job="",user="",slot="51"} 10', text
        )

    def test_prometheus_gets_alerts_losses_and_the_masters_own_cost(self):
        text = render(
            "/metrics",
            view([node(1, node="c1", alerts="cpu>90 ram>5")], [event("lost", "c9", 5)]),
        )
        for line in (
            'sentinel_node_alert{node="c1",job="",user="",rule="cpu>90"} 1',
            'sentinel_node_alert{node="c1",job="",user="",rule="ram>5"} 1',
            'sentinel_node_lost{node="c9",job="",user=""} 1',
            "sentinel_samples_total{} 1234",
            "sentinel_master_cpu_seconds_total{} 1.5",
            "sentinel_nodes{} 1",
        ):
            self.assertIn(line + "\n", text)
        self.assertNotIn("None", text)

    def test_every_metric_with_a_prometheus_name_has_its_series(self):
        row = node(1, node="c1", **dict.fromkeys(list(master.NUMBERS)[2:], 7.0))
        text = render("/metrics", view([row]))
        for metric in master.METRICS:
            if metric.prometheus:
                self.assertIn('sentinel_node_%s{node="c1"' % metric.prometheus, text)

    def test_health_is_ok_and_tells_more_when_asked(self):
        self.assertEqual(render("/healthz", view()), "ok\n")
        self.assertEqual(render("/healthz", view(), verbose=""), "ok\ntakes 1 %\n")
        self.assertRegex(render("/", view()), "(?s)<footer>.*takes 1 %.*</footer>")


if __name__ == "__main__":
    unittest.main()
