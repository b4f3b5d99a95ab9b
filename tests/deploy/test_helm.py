"""The Helm chart, rendered by Helm's own code: valid for Kubernetes, confined, and true to the service's names."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue.client import read_address
from giantleap.service.jobqueue.keys import Keys, lane, queues_of
from giantleap.service.jobs.job import Priority
from giantleap.service.settings import Settings
from tests.deploy.chart_helm import HelmMissing, HelmProgram, HelmRefused, find_helm

pytestmark = pytest.mark.deploy
ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "giantleap"
GPU: dict[str, Any] = yaml.safe_load((CHART / "values-gpu.yaml").read_text())
EVERYTHING: dict[str, Any] = GPU | {
    "imagePullSecrets": [{"name": "registry"}],
    "settings": {"GIANTLEAP_QUEUE_LIMIT": 512, "GIANTLEAP_LOG_LEVEL": "warning", "GIANTLEAP_MEASURE_PROTOCOL": False},
    "otlp": {"endpoint": "http://collector:4318", "headersSecret": {"name": "otlp"}},
    "ingress": {"enabled": True, "className": "nginx", "host": "giantleap.test", "tlsSecret": "tls",
                "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "64m"}},
    "signedUrls": {"secretName": "urls"},
    "c2pa": {"secretName": "c2pa"},
    "loraVolume": {"persistentVolumeClaim": {"claimName": "loras", "readOnly": True}},
    "resultStore": {"url": "s3://results/giantleap", "presigned": True, "credentialsSecret": "s3",
                    "environment": {"AWS_REGION": "eu-central-1"}},
    "api": {"rootPath": "/giantleap", "forwardedAllowIps": ["10.0.0.0/8", "fd00::1"]},
    "networkPolicy": {
        "apiFrom": [{"podSelector": {"matchLabels": {"app": "gateway"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "redisTo": [{"podSelector": {"matchLabels": {"app": "redis"}}}],
        "extraEgress": [{"ports": [{"protocol": "TCP", "port": 4318}]}],
    },
}  # fmt: skip
SENTINEL = {
    "redis": {"mode": "sentinel", "addresses": ["s1:26379", "s2:26379"], "sentinelMaster": "main", "tls": True,
              "passwordSecret": {"name": "r"}},
    "pools": [{"name": "a", "resources": {}, "autoscaling": {"enabled": True}}],
}  # fmt: skip
CLUSTER = {
    "redis": {"mode": "cluster", "addresses": ["n1:7000", "n2:7001"]},
    "pools": [{"name": "a", "resources": {}, "autoscaling": {"enabled": True, "jobsPerWorker": 2}}],
}
SPLIT: dict[str, Any] = yaml.safe_load((CHART / "values-split.yaml").read_text())
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {}, "gpu": GPU, "everything": EVERYTHING, "sentinel": SENTINEL, "cluster": CLUSTER, "split": SPLIT
}  # fmt: skip
OLDEST, NEWEST = "1.25", "1.34"
Manifest = dict[str, Any]

# The kinds of KEDA and of the Prometheus operator have no schema in kubernetes-validate: their fields as documented.
FIELDS = {
    "ScaledObject": {
        "scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod", "advanced",
        "triggers",
    },
    "TriggerAuthentication": {"secretTargetRef"},
    "ServiceMonitor": {"selector", "endpoints"},
    "PodMonitor": {"selector", "podMetricsEndpoints"},
    "PrometheusRule": {"groups"},
}  # fmt: skip


def render(values: dict[str, Any]) -> list[Manifest]:
    """The objects that `helm install prod deploy/helm/giantleap` would make."""
    return find_helm().render(CHART, copy.deepcopy(values))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pod_of(deployment: Manifest) -> Manifest:
    pod: Manifest = deployment["spec"]["template"]["spec"]
    return pod


def env_of(deployment: Manifest) -> dict[str, Any]:
    (container,) = pod_of(deployment)["containers"]
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names)), "a variable is set twice"
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@pytest.fixture(params=VALUES)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(VALUES[request.param])


PROGRAM = """#!/bin/sh
echo "$@" > "$(dirname "$0")/arguments"
cp "$(eval echo \\${$#})" "$(dirname "$0")/values"
[ -e "$(dirname "$0")/wrong" ] && { echo "Error: replicas is not allowed" >&2; exit 1; }
printf -- '---\\nkind: A\\n---\\n# nothing\\n---\\nkind: B\\n'
"""


def test_without_its_own_package_the_program_helm_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "helm"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    helm = find_helm("no_such_package")
    assert isinstance(helm, HelmProgram)
    assert helm.render(CHART, {"replicas": 2}) == [{"kind": "A"}, {"kind": "B"}]
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith(f"template prod {CHART} --namespace images --values ")
    assert json.loads((tmp_path / "values").read_text()) == {"replicas": 2}
    helm.lint(CHART, {})
    assert (tmp_path / "arguments").read_text().startswith(f"lint {CHART} --strict --values ")
    (tmp_path / "wrong").touch()
    with pytest.raises(HelmRefused, match="replicas is not allowed"):
        helm.render(CHART, {})


def test_without_any_helm_the_tests_fail_and_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HelmMissing, match=r"put Helm .* on PATH"):
        find_helm("no_such_package")


@pytest.mark.parametrize("values", VALUES.values(), ids=list(VALUES))
def test_helm_lint_finds_nothing_wrong(values: dict[str, Any]) -> None:
    find_helm().lint(CHART, copy.deepcopy(values))


def test_helm_lint_finds_a_template_that_is_wrong(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / CHART.name)
    (chart / "templates" / "wrong.yaml").write_text("{{ .Values.nothing.at.all }}\n")
    with pytest.raises(HelmRefused):
        find_helm().lint(chart, {})


def test_every_object_is_valid_for_kubernetes(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] in FIELDS:
            assert set(manifest["spec"]) <= FIELDS[manifest["kind"]], manifest["kind"]
            assert re.fullmatch(r"[\w.]+/v1(alpha1)?", manifest["apiVersion"])
        else:
            for version in (OLDEST, NEWEST):
                kubernetes_validate.validate(manifest, version, strict=True)
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", manifest["metadata"]["name"])


def test_an_unknown_field_fails_validation() -> None:
    deployment = of_kind(render({}), "Deployment")[0]
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


def test_no_object_stands_twice_and_all_carry_the_labels(manifests: list[Manifest]) -> None:
    named = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(named) == len(set(named))
    for manifest in manifests:
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == "prod"


def test_results_go_to_the_bucket_of_the_values_from_api_and_workers() -> None:
    manifests = render(EVERYTHING)
    for deployment in of_kind(manifests, "Deployment"):
        env = env_of(deployment)
        settings = {name.removeprefix("GIANTLEAP_").lower(): value for name, value in env.items() if "_RESULT_" in name}
        assert Settings(**settings).result_store == "s3://results/giantleap" and settings["result_urls"] == "presigned"
        assert env["AWS_REGION"] == "eu-central-1"
        assert env["AWS_SECRET_ACCESS_KEY"] == {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"}}
    for policy in of_kind(manifests, "NetworkPolicy"):
        assert {"ports": [{"protocol": "TCP", "port": 443}]} in policy["spec"]["egress"]
    assert "GIANTLEAP_RESULT_STORE" not in env_of(of_kind(render({}), "Deployment")[0])
    for wrong in ({"url": "file:///results"}, {"url": "s3://a", "environment": {"PATH": "x"}}):
        with pytest.raises(HelmRefused):
            render({"resultStore": wrong})


def test_selectors_find_the_pods_they_mean(manifests: list[Manifest]) -> None:
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in of_kind(manifests, "Deployment")]
    selecting = [each["spec"]["selector"] for each in of_kind(manifests, "Deployment")]
    selecting += [each["spec"]["selector"] for each in of_kind(manifests, "PodDisruptionBudget")]
    selecting += [each["spec"]["podSelector"] for each in of_kind(manifests, "NetworkPolicy")]
    selecting += [each["spec"]["selector"] for each in of_kind(manifests, "PodMonitor")]
    found = [{"matchLabels": each["spec"]["selector"]} for each in of_kind(manifests, "Service")]
    for selector in (*selecting, *found):
        matched = [labels for labels in pods if selector["matchLabels"].items() <= labels.items()]
        assert matched and len({labels["app.kubernetes.io/component"] for labels in matched}) == 1, selector
    for monitor in of_kind(manifests, "ServiceMonitor"):
        labels = of_kind(manifests, "Service")[0]["metadata"]["labels"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_every_pod_is_confined(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        pod = pod_of(deployment)
        assert pod["automountServiceAccountToken"] is False
        assert (
            pod["securityContext"]["runAsNonRoot"]
            and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        )
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert written == {"/tmp", "/data"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (account,) = of_kind(manifests, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert all(
        pod_of(each)["serviceAccountName"] == account["metadata"]["name"] for each in of_kind(manifests, "Deployment")
    )
    user = re.search(r"^USER (\d+):(\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert all(
        pod_of(each)["securityContext"]["runAsUser"] == int(user[1]) for each in of_kind(manifests, "Deployment")
    )


def test_pods_live_longer_than_their_drain(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        pod = pod_of(deployment)
        before_s = int(
            pod["containers"][0].get("lifecycle", {"preStop": {"exec": {"command": ["", "0"]}}})["preStop"]["exec"][
                "command"
            ][1]
        )
        grace_s = float(env_of(deployment)["GIANTLEAP_DRAIN_GRACE_S"])
        assert pod["terminationGracePeriodSeconds"] > before_s + grace_s + 5, (
            "the supervisor waits 5 s more than the grace"
        )
        assert deployment["metadata"]["name"].endswith("-api") == (before_s > 0)


def test_probes_ask_what_is_there(manifests: list[Manifest]) -> None:
    from giantleap.service.auth import OPEN_PATHS

    for deployment in of_kind(manifests, "Deployment"):
        (container,) = pod_of(deployment)["containers"]
        ports = {port["name"] for port in container["ports"]}
        probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
        assert {"startupProbe", "livenessProbe"} <= set(probes) and {each["port"] for each in probes.values()} <= ports
        paths = {name: each["path"] for name, each in probes.items()}
        if container["args"] == ["api"]:
            assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
            assert set(paths.values()) <= OPEN_PATHS, "a probe has no key"
        else:
            assert set(paths.values()) == {"/metrics"}


def test_every_setting_exists_and_is_valid(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        given: dict[str, Any] = {
            name.removeprefix("GIANTLEAP_").lower(): str(value).replace("$(REDIS_PASSWORD)", "secret")
            for name, value in env_of(deployment).items() if name.startswith("GIANTLEAP_")
        }  # fmt: skip
        assert set(given) <= set(Settings.model_fields)
        settings = Settings(**given)
        assert settings.redis_url is not None
        read_address(settings.redis_url)


def test_secrets_are_named_and_never_written(manifests: list[Manifest]) -> None:
    assert not of_kind(manifests, "Secret")
    for deployment in of_kind(manifests, "Deployment"):
        names = list(env_of(deployment))
        if "REDIS_PASSWORD" in names:
            assert names.index("REDIS_PASSWORD") < names.index("GIANTLEAP_REDIS_URL"), (
                "expanded only if it stands before"
            )
            assert ":$(REDIS_PASSWORD)@" in env_of(deployment)["GIANTLEAP_REDIS_URL"]


def test_the_api_knows_its_path_its_proxies_and_the_secret_of_its_urls() -> None:
    manifests = render(EVERYTHING)
    api, *workers = (env_of(each) for each in of_kind(manifests, "Deployment"))
    assert api["GIANTLEAP_URL_SECRET"] == {"secretKeyRef": {"name": "urls", "key": "secret"}}
    assert api["GIANTLEAP_FORWARDED_ALLOW_IPS"] == "10.0.0.0/8,fd00::1"
    (ingress,) = of_kind(manifests, "Ingress")
    (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
    assert api["GIANTLEAP_ROOT_PATH"] == path["path"] == "/giantleap"
    assert not any({"GIANTLEAP_URL_SECRET", "GIANTLEAP_ROOT_PATH"} & set(worker) for worker in workers)


def test_redis_urls_of_every_mode() -> None:
    urls = {
        name: env_of(of_kind(render(values), "Deployment")[0])["GIANTLEAP_REDIS_URL"] for name, values in VALUES.items()
    }
    assert urls["defaults"] == "redis://redis:6379/0"
    assert urls["gpu"] == "redis://:$(REDIS_PASSWORD)@redis-master:6379/0"
    assert urls["sentinel"] == "rediss+sentinel://:$(REDIS_PASSWORD)@s1:26379,s2:26379/main/0"
    assert urls["cluster"] == "redis+cluster://n1:7000,n2:7001"


@pytest.mark.parametrize("mode", [{}, SENTINEL["redis"], CLUSTER["redis"]], ids=["server", "sentinel", "cluster"])
def test_a_redis_user_and_authority_reach_every_process_and_the_scaler(mode: dict[str, Any], tmp_path: Path) -> None:
    login = {"user": "giantleap", "passwordSecret": {"name": "r"}, "tls": True, "caSecret": {"name": "ca"}}
    pools = [{"name": "a", "resources": {}, "autoscaling": {"enabled": True}}]
    manifests = render({"redis": mode | login, "pools": pools})
    (tmp_path / "ca.crt").touch()
    for deployment in of_kind(manifests, "Deployment"):
        url = env_of(deployment)["GIANTLEAP_REDIS_URL"]
        assert "://giantleap:$(REDIS_PASSWORD)@" in url and url.endswith("?ssl_ca_certs=/etc/giantleap/redis/ca.crt")
        assert read_address(url.replace("/etc/giantleap/redis", str(tmp_path))).tls
        pod = pod_of(deployment)
        assert {"name": "redis-ca", "secret": {"secretName": "ca"}} in pod["volumes"]
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert mounts["redis-ca"] == "/etc/giantleap/redis"
    (scaled,) = of_kind(manifests, "ScaledObject")
    assert {trigger["metadata"]["usernameFromEnv"] for trigger in scaled["spec"]["triggers"]} == {"REDIS_USER"}
    (authentication,) = of_kind(manifests, "TriggerAuthentication")
    assert {each["parameter"] for each in authentication["spec"]["secretTargetRef"]} == {"password", "ca"}


@pytest.mark.parametrize(
    ("name", "kind", "bundles"),
    [("gpu", "redis-streams", ["sdxl"]), ("sentinel", "redis-sentinel-streams", ["pocket"]),
     ("cluster", "redis-cluster-streams", ["pocket"])],
)  # fmt: skip
def test_the_scaler_counts_the_streams_that_the_service_writes(name: str, kind: str, bundles: list[str]) -> None:
    manifests = render(VALUES[name])
    (scaled,) = of_kind(manifests, "ScaledObject")
    target = next(
        each
        for each in of_kind(manifests, "Deployment")
        if each["metadata"]["name"] == scaled["spec"]["scaleTargetRef"]["name"]
    )
    assert "replicas" not in target["spec"], "Helm and the scaler would pull against each other"
    triggers = scaled["spec"]["triggers"]
    assert {trigger["type"] for trigger in triggers} == {kind}
    streams = [trigger["metadata"]["stream"] for trigger in triggers]
    keys = Keys(Settings.model_fields["key_prefix"].default)
    assert streams == [keys.stream(lane(bundle, priority)) for bundle in bundles for priority in Priority]
    modifiers = scaled["spec"]["advanced"]["scalingModifiers"]
    assert modifiers["formula"].split(" + ") == [trigger["name"] for trigger in triggers]
    assert scaled["spec"]["minReplicaCount"] >= 1, "without a worker the API is not ready: nothing would wake one"
    secured = [trigger.get("authenticationRef") for trigger in triggers]
    authentications = {each["metadata"]["name"] for each in of_kind(manifests, "TriggerAuthentication")}
    assert all(ref is None if not authentications else ref["name"] in authentications for ref in secured)
    for trigger in triggers:
        assert all(isinstance(value, str) for value in trigger["metadata"].values()), "KEDA takes strings"


def test_split_pools_have_their_own_roles_and_are_scaled_by_their_own_queues() -> None:
    manifests = render(SPLIT)
    found = {each["metadata"]["name"]: env_of(each) for each in of_kind(manifests, "Deployment")}
    assert "GIANTLEAP_ROLE" not in found["prod-giantleap-api"]
    keys, (bundle,) = Keys(Settings.model_fields["key_prefix"].default), (each["name"] for each in SPLIT["bundles"])
    for pool, role in (("draw", WorkerRole.GENERATE), ("finish", WorkerRole.DECODE)):
        assert found[f"prod-giantleap-worker-{pool}"]["GIANTLEAP_ROLE"] == role
        (scaled,) = (
            each for each in of_kind(manifests, "ScaledObject") if each["metadata"]["name"].endswith(f"-{pool}")
        )
        streams = [trigger["metadata"]["stream"] for trigger in scaled["spec"]["triggers"]]
        (queue,) = queues_of(bundle, role)
        assert streams == [keys.stream(lane(queue, priority)) for priority in Priority]
    whole = render(SPLIT | {"pools": [SPLIT["pools"][0] | {"role": ""}]})
    assert "GIANTLEAP_ROLE" not in env_of(of_kind(whole, "Deployment")[1]), "a pool of role all needs no other"


def test_pools_serve_their_own_bundles_and_the_api_all() -> None:
    found = {each["metadata"]["name"]: each for each in of_kind(render(GPU), "Deployment")}
    image = "pocket"
    assert env_of(found["prod-giantleap-api"])["GIANTLEAP_BUNDLE"] == f"/bundles/sdxl,{image}"
    assert env_of(found["prod-giantleap-worker-gpu"])["GIANTLEAP_BUNDLE"] == "/bundles/sdxl"
    assert env_of(found["prod-giantleap-worker-cpu"])["GIANTLEAP_BUNDLE"] == image
    gpu = pod_of(found["prod-giantleap-worker-gpu"])
    assert (
        gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        and gpu["nodeSelector"]
        and gpu["tolerations"]
    )
    assert gpu["containers"][0]["image"].endswith(":gpu")
    assert "python:3.12" in (ROOT / "Dockerfile").read_text(), "the path of the image's own bundles"


def test_the_network_is_closed_but_for_what_is_named(manifests: list[Manifest]) -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(manifests, "NetworkPolicy")}
    assert set(policies) == {"prod-giantleap-api", "prod-giantleap-worker"}
    for policy in policies.values():
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert all(rule["ports"] for rule in (*policy["ingress"], *policy["egress"])), "no rule opens every port"


def test_metrics_are_scraped_where_they_are_served_and_rules_are_those_that_are_tested(tmp_path: Path) -> None:
    manifests = render(EVERYTHING)
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]))
    promtool = shutil.which("promtool")
    assert promtool is not None, "promtool is missing: apt-get install prometheus"
    subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True, timeout=60)
    (service,) = of_kind(manifests, "ServiceMonitor")
    assert service["spec"]["endpoints"][0]["port"] in [
        port["name"] for port in of_kind(manifests, "Service")[0]["spec"]["ports"]
    ]
    assert service["spec"]["endpoints"][0]["authorization"]["credentials"]["name"] == "giantleap-scrape-key"
    (pods,) = of_kind(manifests, "PodMonitor")
    assert pods["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    (dashboard,) = of_kind(manifests, "ConfigMap")
    assert (
        dashboard["data"]["giantleap.json"].strip()
        == (ROOT / "deploy" / "grafana" / "dashboards" / "giantleap.json").read_text().strip()
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"settings": {"GIANTLEAP_REDIS_URL": "redis://x"}}, "set by the chart"),
        ({"pools": [{"name": "a", "resources": {}, "bundles": ["other"]}]}, "no bundle is named other"),
        ({"redis": {"mode": "sentinel", "addresses": ["s:1"]}}, "sentinelMaster"),
        ({"redis": {"addresses": ["a:1", "b:2"]}}, "one address"),
        ({"redis": {"mode": "both"}}, "mode"),
        ({"redis": {"user": "a"}}, "needs redis.passwordSecret"),
        ({"redis": {"caSecret": {"name": "ca"}}}, "needs redis.tls"),
        ({"replicas": 3}, "replicas"),
        ({"ingress": {"enabled": True}}, "host"),
        ({"pools": [{"name": "a", "resources": {}, "autoscaling": {"minReplicas": 0}}]}, "minReplicas"),
        ({"pools": [{"name": "a", "resources": {}, "role": "draw"}]}, "role"),
        ({"pools": [{"name": "a", "resources": {}, "role": "generate"}]}, "none has role decode"),
        ({"pools": [{"name": "a", "resources": {}, "role": "decode"}]}, "none has role generate"),
        ({"settings": {"GIANTLEAP_ROLE": "generate"}}, "set by the chart"),
        ({"settings": {"GIANTLEAP_ROOT_PATH": "/a"}, "api": {"rootPath": "/b"}}, "is api.rootPath"),
        ({"api": {"rootPath": "giantleap"}}, "rootPath"),
        ({"api": {"forwardedAllowIps": ["proxy"]}}, "forwardedAllowIps"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmRefused, match=message):
        find_helm().render(CHART, wrong)
