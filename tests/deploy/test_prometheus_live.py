"""A real Prometheus scrapes the running API with the rules of deploy/: the queue is seen, and no worker is an alert."""

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from giantleap.service.api.app import create_app
from giantleap.service.settings import read_settings
from giantleap.service.supervisor.embedded_redis import free_port
from tests.service.fake_producer import FakeProducer
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT_S = 120.0


def query(url: str, text: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": text}, timeout=30)
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return result


def wait_for(url: str, text: str) -> dict[str, Any]:
    """The first series of a query, once there is one."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            if found := query(url, text):
                return found[0]
        except httpx.TransportError:
            pass  # it is still starting
        time.sleep(0.5)
    raise AssertionError(f"{text} stayed empty")


@pytest.mark.deploy
def test_prometheus_scrapes_the_api_and_evaluates_the_rules(tmp_path: Path) -> None:
    binary = shutil.which("prometheus")
    assert binary is not None, "prometheus is missing: apt-get install prometheus"
    producer = FakeProducer()
    producer.live_workers = 0
    app = create_app(read_settings(bundle=(write_paper_bundle(tmp_path / "paper"),)), producer)  # type: ignore[arg-type]
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    shutil.copy(ROOT / "deploy" / "prometheus" / "rules.yml", tmp_path)
    port = free_port()
    with live_server(app) as url:
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"] = [
            {"job_name": "giantleap-api", "static_configs": [{"targets": [url.removeprefix("http://")]}]}
        ]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        argv = [
            binary, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ]  # fmt: skip
        server = subprocess.Popen(argv)
        try:
            prometheus = f"http://127.0.0.1:{port}"
            assert wait_for(prometheus, 'up{job="giantleap-api"} == 1')
            assert wait_for(prometheus, "giantleap:blob_fill:ratio")["value"][1] == "0"
            assert wait_for(prometheus, 'ALERTS{alertname="GiantleapNoWorker"}')["metric"]["alertstate"] == "pending"
            assert not query(prometheus, 'ALERTS{alertname="GiantleapRedisDown"}')
            rules = httpx.get(f"{prometheus}/api/v1/rules", timeout=30).json()["data"]["groups"]
            assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
        finally:
            server.terminate()
            server.wait(60)
