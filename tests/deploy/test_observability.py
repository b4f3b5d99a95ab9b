"""Rules, scrape configuration and dashboard: accepted by promtool, and every name in them is one that exists."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.service.telemetry.test_metrics import render_all

ROOT = Path(__file__).resolve().parent.parent.parent
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
RULES: dict[str, Any] = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "giantleap.json").read_text())


def promtool(*arguments: str) -> str:
    """What promtool prints; it must be there and be content."""
    found = shutil.which("promtool")
    assert found is not None, "promtool is missing: apt-get install prometheus"
    ended = subprocess.run(
        [found, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def series() -> dict[str, set[str]]:
    """Name of each series that a query may name, with its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(render_all()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def recorded() -> set[str]:
    return {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}


def selectors(node: Any) -> list[Any]:
    """Every vector selector of a parsed query, wherever it stands."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    parts: list[Any] = []
    for name in ("vector_selector", "expr", "lhs", "rhs", "param"):
        part = getattr(node, name, None)
        parts += [] if part is None else selectors(part)
    for part in getattr(node, "args", None) or ():
        parts += selectors(part)
    return parts


def rule_queries() -> list[str]:
    return [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]


def panel_queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def check_query(query: str) -> None:
    """Every metric and every label that the query selects by exists."""
    concrete = query.replace("$__rate_interval", "5m").replace("$bundle", "b")
    found = selectors(promql_parser.parse(concrete))
    assert found, query
    for selector in found:
        assert selector.name in set(series()) | recorded(), f"{selector.name} does not exist: {query}"
        labels = {matcher.name for matcher in selector.matchers.matchers}
        if selector.name in series():
            assert labels <= series()[selector.name], query
    assert len(found) == len(re.findall(r"giantleap[_:]", concrete)), f"a part of it was not read: {query}"


@pytest.mark.deploy
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", "rules.yml")


@pytest.mark.deploy
def test_the_rules_pass_their_unit_tests() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_a_test_that_fires_it_and_one_that_does_not() -> None:
    alerts = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    covered_by_queries = {
        match[1] for test in tests for case in test.get("promql_expr_test", ())
        if (match := re.search(r'alertname="(\w+)"', case["expr"]))
    }  # fmt: skip
    assert {case["alertname"] for case in cases if case["exp_alerts"]} | covered_by_queries == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_every_alert_says_what_to_do_and_how_bad_it_is() -> None:
    for rule in (rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule):
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]


@pytest.mark.parametrize("query", rule_queries())
def test_every_rule_names_metrics_that_exist(query: str) -> None:
    check_query(query)


@pytest.mark.parametrize("query", panel_queries())
def test_every_panel_names_metrics_that_exist(query: str) -> None:
    check_query(query)


def test_a_query_of_a_metric_that_does_not_exist_is_seen() -> None:
    with pytest.raises(AssertionError, match="does not exist"):
        check_query("sum(rate(giantleap_jobs_total[5m])) / sum(rate(giantleap_job_total[5m]))")
    with pytest.raises(AssertionError):
        check_query('giantleap_queue_depth{lane="x"}')


def test_the_dashboard_has_its_rows_and_no_panel_overlaps_another() -> None:
    panels = DASHBOARD["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Traffic", "Queue", "Stages", "Batches and workers", "Devices", "Errors"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    for panel in (panel for panel in panels if panel["type"] != "row"):
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["targets"]
