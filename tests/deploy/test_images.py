"""Dockerfile and compose files: what no Docker engine is needed for to say that they are right."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GPU: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("api", "worker")


def stages() -> dict[str, tuple[str, str]]:
    """Name of each stage of the Dockerfile, with what it is built from and its text."""
    parts = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    heads = [re.match(r"(\S+) AS (\S+)\n", part) for part in parts]
    return {head[2]: (head[1], part) for head, part in zip(heads, parts, strict=True) if head}


@pytest.mark.deploy
def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    ended = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_both_images_are_the_runtime_and_one_virtual_environment() -> None:
    found = stages()
    assert set(found) == {"builder", "builder-cpu", "builder-gpu", "runtime", "cpu", "gpu"}
    for name in ("cpu", "gpu"):
        base, text = found[name]
        assert base == "runtime" and f"COPY --from=builder-{name} /opt/giantleap /opt/giantleap" in text
        assert (
            found[f"builder-{name}"][0] == "builder"
            and f'pip install ".[{name},otel,provenance]"' in found[f"builder-{name}"][1]
        )
        assert not re.search(r"^(RUN|USER|COPY (?!--from))", text, re.MULTILINE)
    for name in ("builder", "runtime"):
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", found[name][0]), "pinned to a patch version"
    assert found["builder"][0] == found["runtime"][0], "the environment is built for the Python that runs it"


def test_the_image_runs_a_command_of_ours_without_root() -> None:
    runtime = stages()["runtime"][1]
    instructions = re.findall(r"^(USER|ENTRYPOINT|CMD|HEALTHCHECK) (.*)", runtime, re.MULTILINE)
    values = dict(instructions)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", values["USER"]), (
        "numeric, so that Kubernetes can tell that it is not root"
    )
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert yaml.safe_load(values["ENTRYPOINT"])[0] in scripts
    assert yaml.safe_load(values["CMD"]) == ["serve"] and "HEALTHCHECK" in values
    assert not re.search(r"^(USER|RUN)", runtime[runtime.index("USER") + 4 :], re.MULTILINE), "nothing is root after it"


def test_what_is_copied_exists_is_not_ignored_and_is_all_that_is_packaged() -> None:
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignore, "everything is out that is not named"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in ignore, source
    assert "COPY clients/python/giantleap_client giantleap_client\n" in DOCKERFILE, "the package, not the link to it"
    packaged = {path.resolve().name for path in (ROOT / "giantleap").iterdir() if path.is_symlink()} | {"giantleap"}
    assert packaged <= sources


def validate(text: str) -> PyCompose:
    """The file as a parser of the Compose specification reads it; merge keys are YAML's and resolved before."""
    document = {name: part for name, part in yaml.safe_load(text).items() if not name.startswith("x-")}
    return PyCompose.from_yaml(yaml.safe_dump(document))


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/compose.gpu.yml"])
def test_compose_files_are_what_the_specification_allows(name: str) -> None:
    assert set(OURS) <= set(validate((ROOT / name).read_text()).service_names())


def test_wrong_compose_files_fail_validation() -> None:
    for wrong in (
        "services: {a: {image: b, portz: ['1:1']}}",
        "services: {a: {image: b, restart: sometimes}}",
        "services: {a: {image: b, stop_grace_period: soon}}",
    ):
        with pytest.raises(ValueError, match=r".+"):
            validate(wrong)


def test_every_container_is_confined() -> None:
    assert set(SERVICES) == {"redis", "api", "worker", "prometheus", "grafana"}
    for name, service in SERVICES.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits), name
        assert "stop_grace_period" in service and service["restart"] == "unless-stopped", name
        assert "healthcheck" in service or name == "api", f"{name}: only the API has the image's own check"
        if name not in OURS:
            assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+(-\w+)?", service["image"]), (
                f"{name} is pinned to a patch version"
            )
            assert not str(service["user"]).startswith(("0", "root")), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nothing is open to the network before somebody decides that"
    assert COMPOSE["networks"]["backend"] == {"internal": True} and SERVICES["redis"]["networks"] == ["backend"]


def test_every_named_volume_and_file_exists() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            found = (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
            assert found, f"{name}: {volume}"


def test_passwords_come_from_the_environment_file_and_are_in_no_command_line() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    named = set(re.findall(r"\$\{(\w+)", text))
    example = dict(line.split("=", 1) for line in (ROOT / ".env.example").read_text().split("\n") if "=" in line)
    assert {"REDIS_PASSWORD", "GRAFANA_PASSWORD"} == named == set(example)
    assert not any(example.values()), "the example holds no password that somebody could keep"
    assert not re.search(r"\$\{\w+\}|\$\{\w+:?-", text), "without a password nothing starts"
    assert ".env" in (ROOT / ".gitignore").read_text().split()
    redis = SERVICES["redis"]
    assert "--requirepass" not in redis["command"] and "--appendonly" in redis["command"]
    for name in OURS:
        assert SERVICES[name]["environment"]["GIANTLEAP_REDIS_URL"].startswith("redis://:${REDIS_PASSWORD:?")


@pytest.mark.deploy
def test_redis_starts_with_the_password_of_its_file_and_hides_it(tmp_path: Path) -> None:
    """The container's own command line, with the paths of a test: the server asks for the password."""
    from giantleap.service.settings import read_settings
    from giantleap.service.supervisor.embedded_redis import free_port
    from tests.redis_fixtures import server_binary

    redis, port = SERVICES["redis"], free_port()
    shell, flag, script, name = redis["entrypoint"]
    script = script.replace("$$", "$").replace("/run/redis", str(tmp_path))
    script = script.replace("exec redis-server", f"exec {server_binary('system')}")
    command = [part.replace("/data", str(tmp_path)) for part in redis["command"]]
    argv = [shell, flag, script, name, *command, "--port", str(port)]
    environment = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": "0123abcd"}
    server = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE)
    try:
        import redis as client_library

        client = client_library.Redis(port=port, password="0123abcd", socket_timeout=10)
        for line in iter(server.stdout.readline, b"") if server.stdout else ():
            if b"Ready to accept connections" in line:
                break
        assert client.ping() and client.config_get("appendfsync") == {"appendfsync": "always"}
        assert client.config_get("save") == {"save": ""}
        max_bytes = int(client.config_get("maxmemory")["maxmemory"] or 0)
        container_bytes = int(redis["deploy"]["resources"]["limits"]["memory"].removesuffix("g")) << 30
        assert read_settings().blob_budget_bytes < max_bytes < container_bytes, "full, it refuses before it is killed"
        with pytest.raises(client_library.AuthenticationError):
            client_library.Redis(port=port, socket_timeout=10).ping()
        assert "0123abcd" not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_an_engine_may_be_loaded_from_the_temporary_directory() -> None:
    """A tmpfs of a container is mounted noexec unless it says otherwise, and no library is loaded from such a one."""
    for name in OURS:
        path, options = SERVICES[name]["tmpfs"][0].split(":")
        assert path == "/tmp" and "exec" in options.split(",")


def test_our_containers_run_commands_that_exist_with_settings_that_exist() -> None:
    from giantleap.service.settings import Settings

    answer = subprocess.run(
        [sys.executable, "-m", "giantleap", "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for name in OURS:
        service = SERVICES[name]
        assert service["command"] == [name] and re.search(rf"\b{name}\b", answer.stdout)
        for variable in service["environment"]:
            assert variable.removeprefix("GIANTLEAP_").lower() in Settings.model_fields, variable
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > Settings.model_fields["drain_grace_s"].default + 5, (
            "the supervisor waits 5 s more than the grace"
        )


def test_the_gpu_overlay_changes_only_what_is_there() -> None:
    assert set(GPU["services"]) == set(OURS)
    for service in GPU["services"].values():
        assert service["build"]["target"] == "gpu" and service["image"] == "giantleap:gpu"
    device = GPU["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["driver"] == "nvidia" and "gpu" in device["capabilities"]


def test_grafana_finds_its_data_source_and_its_dashboard() -> None:
    source = yaml.safe_load(
        (ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load(
        (ROOT / "deploy" / "grafana" / "provisioning" / "dashboards" / "giantleap.yml").read_text()
    )["providers"][0]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    mounts = [volume.split(":") for volume in compose["services"]["grafana"]["volumes"]]
    assert any(
        target == provider["options"]["path"] and (ROOT / here / "giantleap.json").exists()
        for here, target, *_ in (mount for mount in mounts if mount[0].startswith("."))
    )
