"""Growing out of one machine: a real Prometheus scrapes a real master and raises its alerts."""

import json
import os
import subprocess
import tempfile
import textwrap
import unittest
import urllib.parse

import support
from support import (
    HOST,
    PlainAgent,
    closed_port,
    eventually,
    get,
    requires,
    start_master,
)

HERE = os.path.dirname(os.path.abspath(__file__))
TOKEN = "scrape-me"


def text_of(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        return file.read()


class Prometheus:
    """A Prometheus of our own that does what prometheus.yml says, but every second."""

    def __init__(self, page, folder):
        config = (
            text_of("prometheus.yml")
            .replace("15s", "1s")
            .replace(":8080", ":%d" % page)
        )
        for name, text in (
            ("prometheus.yml", config),
            ("alerts.yml", text_of("alerts.yml")),
            ("token", TOKEN),
        ):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(text)
        self.port = closed_port()
        self.log = open(os.path.join(folder, "log"), "wb")
        self.process = subprocess.Popen(
            [
                "prometheus",
                "--config.file=" + os.path.join(folder, "prometheus.yml"),
                "--storage.tsdb.path=" + os.path.join(folder, "data"),
                "--web.listen-address=%s:%d" % (HOST, self.port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )

    def ask(self, path, **query):
        answer = get(self.port, "/api/v1/%s?%s" % (path, urllib.parse.urlencode(query)))
        return json.loads(answer.text)["data"]

    def query(self, expression):
        """{labels that we gave, as a sorted tuple: value} of an instant query."""
        keep = ("node", "job", "user", "rule", "cluster", "slot")
        return {
            tuple(
                sorted(
                    (key, value) for key, value in row["metric"].items() if key in keep
                )
            ): float(row["value"][1])
            for row in self.ask("query", query=expression)["result"]
        }

    def alerts(self):
        return {
            (alert["labels"]["alertname"], alert["labels"].get("node"))
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


@requires("prometheus", "promtool")
class Scraped(unittest.TestCase):
    @support.slow("scrapes and an alert")
    def test_every_node_its_alerts_and_its_loss_arrive_in_a_real_prometheus(self):
        with start_master(
            "--dashboard-token", TOKEN
        ) as master, tempfile.TemporaryDirectory() as folder, Prometheus(
            master.page, folder
        ) as server:
            good, bad = PlainAgent(master.port), PlainAgent(master.port)
            busy = PlainAgent(master.port)
            known = {"job": "42", "user": "ann", "version": "1.0", "interval": 60}
            good.send(dict(known, node='c"1\\', cpu=12.5, ram=40.0, gpu=7.0))
            bad.send(
                dict(
                    known,
                    node="c2",
                    cpu=99.0,
                    ram=50.0,
                    job_ram=95.0,
                    job_time_left=60.0,
                    job_time_limit=3600.0,
                )
            )
            busy.send({"node": "c3", "cpu": 99.0, "ram": 1.0, "interval": 60})
            self.addCleanup(busy.close)
            self.addCleanup(good.close)
            names = {
                name: (
                    ("cluster", "main"),
                    ("job", "42"),
                    ("node", name),
                    ("user", "ann"),
                )
                for name in ('c"1\\', "c2")
            }
            values = eventually(
                lambda: (
                    len(server.query("sentinel_node_cpu_percent")) == 3
                    and server.query("sentinel_node_cpu_percent")
                ),
                40,
            )
            outside = (("cluster", "main"), ("node", "c3"))
            self.assertEqual(
                values, {names['c"1\\']: 12.5, names["c2"]: 99.0, outside: 99.0}
            )
            self.assertEqual(
                server.query("sentinel_node_gpu_percent"), {names['c"1\\']: 7.0}
            )
            self.assertEqual(
                server.query("sum(sentinel_node_alert) by (node)"),
                {(("node", "c2"),): 2.0, (("node", "c3"),): 1.0},
            )
            self.assertEqual(list(server.query("sentinel_nodes").values()), [3.0])
            self.assertGreater(
                server.query("sentinel_master_memory_bytes").popitem()[1], 1e7
            )
            eventually(
                lambda: (
                    {
                        ("NodeBusy", "c3"),
                        ("JobMemoryNearItsLimit", "c2"),
                        ("JobTimeNearItsLimit", "c2"),
                    }
                    <= server.alerts()
                ),
                20,
            )
            bad.close()  # an agent that says no goodbye is lost
            eventually(
                lambda: server.query("sentinel_node_lost") == {names["c2"]: 1.0}, 20
            )
            eventually(lambda: ("NodeLost", "c2") in server.alerts(), 20)
            eventually(
                lambda: ("JobMemoryNearItsLimit", "c2") not in server.alerts(), 20
            )

    def test_promtool_finds_no_lint_in_the_metrics(self):
        with start_master() as master, PlainAgent(master.port) as agent, PlainAgent(
            master.port
        ) as twin:
            import master_server

            sample = dict.fromkeys(master_server.NUMBERS, 5.0)
            for each in (agent, twin):
                each.send(
                    dict(
                        sample, cpu=95.0, node="c1", job="42", user="ann", interval=60.0
                    )
                )
            eventually(lambda: len(support.nodes(master.page)) == 2)
            text = get(master.page, "/metrics").text
            self.assertEqual(text.count("sentinel_node_cpu_percent{"), 2)
            done = subprocess.run(
                ["promtool", "check", "metrics"],
                input=text.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=30,
            )
            self.assertEqual((done.returncode, done.stdout), (0, b""))

    def test_promtool_finds_the_configuration_and_the_rules_good(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (
                ("prometheus.yml", text_of("prometheus.yml")),
                ("token", TOKEN),
                ("alerts.yml", text_of("alerts.yml")),
            ):
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    file.write(text)
            done = subprocess.run(
                ["promtool", "check", "config", "prometheus.yml"],
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=30,
            )
            self.assertEqual(done.returncode, 0, done.stdout.decode())
            self.assertIn(b"6 rules found", done.stdout)


class Quoted(unittest.TestCase):
    def test_what_the_readme_quotes_is_what_was_tested(self):
        with open(
            os.path.join(support.ROOT, "tests", "README.md"), encoding="utf-8"
        ) as file:
            readme = file.read()
        for name in ("prometheus.yml", "alerts.yml"):
            self.assertIn(textwrap.indent(text_of(name), "    "), readme)


if __name__ == "__main__":
    unittest.main()
