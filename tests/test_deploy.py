"""The container, the compose file and the dashboard: what they name exists, and what they promise is said in them."""

import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from docker.utils import exclude_paths
from prometheus_client.metrics import MetricWrapperBase

from mvmr.serve.cli import serve
from mvmr.serve.http.metrics import Metrics
from mvmr.serve.http.settings import Settings

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "mvmr.json"
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"
# What Prometheus itself adds to a series.
ADDED = {"le", "instance", "job"}


def dockerfile() -> list[list[str]]:
    """The instructions as [word, text], comments left out and continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [line.split(maxsplit=1) for line in lines.replace("\\\n", "").splitlines() if line.strip()]


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    return content


def variables() -> set[str]:
    """The environment variables that `mvmr serve` reads."""
    names = {
        f"MVMR_{parameter.name}".upper()
        for parameter in serve.params
        if isinstance(parameter, click.Option) and parameter.name
    }
    return names | {"MVMR_BUNDLE", "MVMR_CACHE"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return content


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def series() -> dict[str, set[str]]:
    """Name of a series -> its labels, as the service has them."""
    labels: dict[str, set[str]] = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            labels |= {family.name + ending: set(metric._labelnames) for ending in endings}
    return labels


def test_the_wheel_gets_its_sources_and_they_exist() -> None:
    copied = [part for word, text in dockerfile() if word == "COPY" and "--from" not in text for part in text.split()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    files = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    assert folders | files <= set(copied)
    for part in copied:
        assert part == "./" or (ROOT / part).exists(), part


def test_nothing_but_sources_reaches_the_build(tmp_path: Path) -> None:
    wanted = {"mvmr/cli/main.py", "mvmr/recipes/a.toml", "distill/page.html", "serve/engine.py", "export/export.py"}
    wanted |= {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    kept_out = {
        ".git/config",
        ".venv/bin/python",
        "runs/photos/bundle.json",
        "tests/cli/test_main.py",
        "data/cat.jpg",
        ".env",
    }
    kept_out |= {"mvmr/__pycache__/cli.pyc", "serve/.env", "build/lib/x.py", "keys.txt", "compose.yaml", "docs/a.md"}
    for name in wanted | kept_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    paths = exclude_paths(tmp_path, [line for line in patterns if line and not line.startswith("#")])
    assert {name for name in paths if (tmp_path / name).is_file()} == wanted


def test_a_plain_build_gives_the_cpu_target_for_a_user_without_rights() -> None:
    instructions = dockerfile()
    assert instructions[0] == ["ARG", "BASE=python:3.11-slim-bookworm"]
    stages = [text.split(" AS ") for word, text in instructions if word == "FROM"]
    names = [name for _, name in stages]
    assert names[-1] == "cpu"
    assert "gpu" in names
    assert {base for base, _ in stages} <= {"${BASE}", *names}
    (user,) = (text for word, text in instructions if word == "USER")
    number, _, group = user.partition(":")
    assert int(number) >= 1000  # a number, as Kubernetes' runAsNonRoot asks for
    assert int(group) >= 1000
    assert [word for word, _ in instructions[-3:]] == ["FROM", "COPY", "COPY"]  # only what is made elsewhere


def test_containers_set_what_the_service_reads() -> None:
    set_here = {pair.partition("=")[0] for word, text in dockerfile() if word == "ENV" for pair in shlex.split(text)}
    ours = {name for name in set_here if name.startswith("MVMR_")}
    assert {"MVMR_HOST", "MVMR_PORT", "MVMR_BUNDLE", "MVMR_CACHE"} <= ours <= variables()


class Answer(BaseHTTPRequestHandler):
    """Answers /healthz alone, by the status that the class has."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def health_check(port: int, **environment: str) -> int:
    (check,) = (text for word, text in dockerfile() if word == "HEALTHCHECK")
    python, *arguments = json.loads(check.partition("CMD ")[2])
    assert python == "python"
    environment |= {"MVMR_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}  # a proxy has no part in it
    return subprocess.run([sys.executable, *arguments], timeout=30, capture_output=True, env=environment).returncode


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), type("Fresh", (Answer,), {})) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_the_health_check_tells_a_living_service_from_one_that_fails(server: HTTPServer) -> None:
    assert health_check(server.server_port) == 0
    server.RequestHandlerClass.status = 503
    assert health_check(server.server_port) == 1


def test_the_health_check_notices_that_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    assert health_check(port) == 1


def test_the_health_check_speaks_https_where_the_service_does(server: HTTPServer, tmp_path: Path) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed here")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = f"{openssl} req -x509 -newkey rsa:2048 -nodes -subj /CN=elsewhere -days 1 -out {cert} -keyout {key}"
    subprocess.run(make.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    assert health_check(server.server_port, MVMR_TLS_CERT=str(cert)) == 0
    assert health_check(server.server_port) == 1


def test_hadolint_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed here")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_container_is_held_short() -> None:
    services = compose()["services"]
    assert set(services) == {"mvmr", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"]), name
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} would listen to the world"
        if "build" not in service:
            assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"]), "a tag that never moves"
    (bundle,) = services["mvmr"]["volumes"]
    assert (bundle["target"], bundle["read_only"]) == ("/bundle", True)
    assert any(mount.startswith("/tmp:") for mount in services["mvmr"]["tmpfs"])
    assert services["mvmr"]["build"]["target"] == "cpu"


def test_compose_lets_the_service_end_what_it_accepted() -> None:
    seconds = re.fullmatch(r"(\d+)s", compose()["services"]["mvmr"]["stop_grace_period"])
    assert seconds
    assert int(seconds[1]) > Settings().drain + Settings().grace


def test_what_compose_mounts_is_in_the_repository() -> None:
    for service in compose()["services"].values():
        for mount in service["volumes"]:
            if isinstance(mount, str) and mount.startswith("./"):
                source, target, mode = mount.split(":")
                assert (ROOT / source).exists(), source
                assert mode == "ro", target


def test_prometheus_asks_the_service_and_grafana_asks_prometheus(dashboard: dict[str, Any]) -> None:
    services = compose()["services"]
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    (service,) = job["dns_sd_configs"]
    assert service["names"] == ["mvmr"]
    assert f"127.0.0.1:8000:{service['port']}" in services["mvmr"]["ports"]
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    sources = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert sources == {source["uid"]}
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "mvmr.yml").read_text(encoding="utf-8"))["providers"]
    mounts = dict(mount.split(":")[1::-1] for mount in services["grafana"]["volumes"])
    assert (ROOT / mounts[provider["options"]["path"]]).samefile(DASHBOARD.parent)
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_nothing_reports_home() -> None:
    grafana = compose()["services"]["grafana"]["environment"]
    analytics = {name: value for name, value in grafana.items() if name.startswith("GF_ANALYTICS_")}
    assert len(analytics) == 4
    assert set(analytics.values()) == {"false"}
    assert grafana["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"  # else it fetches plugins at its start
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert (
        grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    )  # else there is an admin with a known password
    environment = [pair for word, text in dockerfile() if word == "ENV" for pair in shlex.split(text)]
    assert "ORT_DISABLE_TELEMETRY=1" in environment


def test_the_dashboard_shows_each_metric_of_the_service_and_no_other(dashboard: dict[str, Any]) -> None:
    names = series()
    queried = {name for query in queries(dashboard) for name in re.findall(r"\bmvmr_\w+", query)}
    assert queried <= set(names), "the service has no such series"
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in queried}


def test_the_dashboard_asks_for_labels_that_there_are(dashboard: dict[str, Any]) -> None:
    labels_by_series = series()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"]
            (labels,) = {frozenset(labels_by_series[name]) for name in re.findall(r"\bmvmr_\w+", query)}
            grouped = {label.strip() for inner in re.findall(r"by \((.*?)\)", query) for label in inner.split(",")}
            selected = {label for inner in re.findall(r"\{(.*?)\}", query) for label in re.findall(r"(\w+)[!=]", inner)}
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert grouped | selected | shown <= labels | ADDED, panel["title"]
            if grouped:
                assert shown <= grouped, f"{panel['title']}: its query leaves no such label"
            if "histogram_quantile" in query:
                assert "le" in grouped, panel["title"]


def test_the_panels_of_the_dashboard_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
