"""The Helm chart: what it renders is valid and keeps the promises; what it can't keep it refuses."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate.utils  # type: ignore[import-untyped]
import pytest
import yaml

from gateway.client.egress import NAMED_ONLY
from gateway.commands import COMMANDS
from gateway.log.base import TopicSpec
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.required_topics import event_topics
from gateway.rules.load import check_rules, load_rules
from gateway.run import STOP_TIMEOUT
from gateway.settings import EmbeddedTarget, KafkaTarget, Role, from_sources
from gateway.spool.spool import MIN_FREE_BYTES_CAP, MIN_FREE_RATIO
from tests.deploy.chart import CHART, ROOT, Chart, Manifest, environment_of, of_kind, pods_of
from tests.deploy.test_prometheus import own_jobs

pytestmark = pytest.mark.timeout(900)  # Where CI has to build Helm first.

CUSTOM = json.loads(Path(__file__).with_name("crds.json").read_text())
NEWEST = "1.34"
SECRETS = "/run/secrets/gateway"
USER = 10001
RESTORE = yaml.safe_load((CHART.parent / "restore.yaml").read_text())
KAFKA = {"kafka": {"servers": ["kafka:9092"]}}
EXAMPLES = ("small", "production", "embedded")
# It would read the definitions of all kinds for each manifest: 20 ms, eight hundred times.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)
every_example = pytest.mark.parametrize("example", EXAMPLES)


# ---- What Kubernetes takes ----


@every_example
def test_helm_finds_nothing_to_warn_of(chart: Chart, example: str) -> None:
    assert "WARNING" not in chart.lint(example)


@every_example
@pytest.mark.parametrize("version", ["1.30", NEWEST])
def test_every_manifest_is_valid(chart: Chart, example: str, version: str) -> None:
    for manifest in chart.render(example):
        _validate(manifest, version)


def test_a_misspelt_field_is_found(chart: Chart) -> None:
    """What the test above stands on."""
    [deployment, *_] = of_kind(chart.render("small"), "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError, match="minReadySecond'"):
        _validate({**deployment, "spec": {**deployment["spec"], "minReadySecond": 1}}, NEWEST)
    [scaled] = of_kind(chart.render("production"), "ScaledObject")
    with pytest.raises(jsonschema.ValidationError, match="maxReplica'"):
        _validate({**scaled, "spec": {**scaled["spec"], "maxReplica": 1}}, NEWEST)


@every_example
def test_no_two_manifests_have_one_name(chart: Chart, example: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in chart.render(example)]
    assert len(set(names)) == len(names)


def test_custom_resources_are_off_by_default(chart: Chart) -> None:
    assert not of_kind(chart.render("small"), *CUSTOM)
    assert {each["kind"] for each in chart.render("production")} >= CUSTOM.keys() - {"$comment"}


# ---- What refers to what ----


@every_example
def test_selectors_match_pods(chart: Chart, example: str) -> None:
    manifests = chart.render(example)
    pods = [pod["metadata"]["labels"] for pod in pods_of(manifests).values()]
    for each in of_kind(manifests, "Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor"):
        assert _matching(each["spec"]["selector"]["matchLabels"], pods), each["metadata"]["name"]
    for each in of_kind(manifests, "NetworkPolicy"):
        [_] = _matching(each["spec"]["podSelector"]["matchLabels"], pods)
    for each in of_kind(manifests, "Service"):
        [_] = _matching(each["spec"]["selector"], pods)


@every_example
def test_each_port_that_is_named_is_there(chart: Chart, example: str) -> None:
    manifests = chart.render(example)
    pods = list(pods_of(manifests).values())

    def ports(selector: Mapping[str, str]) -> set[str]:
        [pod] = [pod for pod in pods if selector.items() <= pod["metadata"]["labels"].items()]
        return {port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", ())}

    for service in of_kind(manifests, "Service"):
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports(service["spec"]["selector"])
    for policy in of_kind(manifests, "NetworkPolicy"):
        named = {port["port"] for rule in policy["spec"].get("ingress", ()) for port in rule["ports"]}
        assert named <= ports(policy["spec"]["podSelector"]["matchLabels"])
    for pod in pods:
        for container in pod["spec"]["containers"]:
            own = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
            probes = [
                container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe") if name in container
            ]
            assert all(probe["httpGet"]["port"] in own for probe in probes)


@every_example
def test_autoscalers_target_deployments_that_set_no_replicas(chart: Chart, example: str) -> None:
    manifests = chart.render(example)
    deployments = {each["metadata"]["name"]: each for each in of_kind(manifests, "Deployment")}
    scaled = [
        each["spec"]["scaleTargetRef"]["name"] for each in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    ]
    assert len(set(scaled)) == len(scaled)
    for name, deployment in deployments.items():
        # An upgrade would set the number back.
        assert ("replicas" in deployment["spec"]) == (name not in scaled)
    assert set(scaled) <= deployments.keys()


def test_routers_are_scaled_by_processor_time_where_there_is_no_keda(chart: Chart) -> None:
    manifests = chart.render("small", {"router": {"autoscaling": {"kind": "cpu"}}})
    [scaler] = of_kind(manifests, "HorizontalPodAutoscaler")
    _validate(scaler, NEWEST)
    assert scaler["spec"]["scaleTargetRef"]["name"] == "gateway-router"


# ---- What the gateway takes ----


@every_example
def test_the_gateway_accepts_its_command_line(chart: Chart, example: str) -> None:
    """Its command lines and variables, by its own parsers."""
    roles = set()
    for name, pod in pods_of(chart.render(example)).items():
        [container] = pod["spec"]["containers"]
        words = container["args"]
        command = COMMANDS.get(" ".join(words[:2])) or COMMANDS[words[0]]
        command.parser().parse_intermixed_args(words[len(command.name.split()) :])
        settings = from_sources({}, environment_of(container))
        assert isinstance(settings.log, EmbeddedTarget if example == "embedded" else KafkaTarget)
        if settings.kafka.password_file is not None:
            assert str(settings.kafka.password_file.parent) == SECRETS
        assert settings.rules.parent == Path(_mount(container, "rules")["mountPath"])
        if command.name == "run":
            roles.add(settings.role)
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert settings.admin.port == ports["admin"]
            assert settings.admin.host == "0.0.0.0"
            assert ("http" in ports) == settings.role.receives
            assert ports.get("http", settings.listen.port) == settings.listen.port
            assert not settings.dev
        assert name == "Job/gateway-topics" or command.name == "run"
    console = {Role.CONSOLE} if example == "production" else set()
    assert roles == ({Role.ALL} if example == "embedded" else {Role.INGRESS, Role.ROUTER} | console)


@every_example
def test_the_rules_of_an_example_are_fine_and_their_secrets_mounted(chart: Chart, example: str, tmp_path: Path) -> None:
    for config in of_kind(chart.render(example), "ConfigMap"):
        if "routes.yaml" not in config["data"]:
            continue
        folder = tmp_path / config["metadata"]["name"]
        folder.mkdir()
        for name, text in config["data"].items():
            (folder / name).write_text(text)
        _, problems = check_rules(folder / "routes.yaml", resolve=False)
        assert not [problem for problem in problems if problem.severity == "error"]
        files = re.findall(r"\$\{file:([^}]+)\}", "".join(config["data"].values()))
        assert files
        assert {str(Path(file).parent) for file in files} == {SECRETS}
    for pod in pods_of(chart.render(example)).values():
        [container] = pod["spec"]["containers"]
        assert _mount(container, "secrets")["mountPath"] == SECRETS


@every_example
def test_a_change_of_rules_and_secrets_arrives_in_the_pods(chart: Chart, example: str) -> None:
    """As folders of ConfigMap and Secret, which the kubelet brings up to date; not of subPath, which it never does."""
    manifests = chart.render(example)
    maps = {each["metadata"]["name"] for each in of_kind(manifests, "ConfigMap")}
    for pod in pods_of(manifests).values():
        [container] = pod["spec"]["containers"]
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        for name in ("rules", "secrets"):
            assert not {"subPath", "subPathExpr"} & _mount(container, name).keys()
        assert volumes["rules"]["configMap"]["name"] in maps
        # Restarted by Helm, a bad file would end pods that go on with the rules before it.
        assert "annotations" not in pod["metadata"]


def test_the_lag_is_that_of_the_topics_which_the_rules_name(chart: Chart, tmp_path: Path) -> None:
    manifests = chart.render("production")
    [config] = [each for each in of_kind(manifests, "ConfigMap") if each["metadata"]["name"] == "gateway-rules"]
    for name, text in config["data"].items():
        (tmp_path / name).write_text(text.replace(SECRETS, str(tmp_path)))
    for secret in ("github", "stripe", "stripe-old", "ledger-signing"):
        (tmp_path / secret).write_text("whsec_Z2F0ZXdheS10ZXN0LXNpZ25pbmctc2VjcmV0")
    topics = Topics("gateway.")
    wanted = event_topics(load_rules(tmp_path / "routes.yaml"), topics)
    [scaled] = of_kind(manifests, "ScaledObject")
    triggers = [trigger["metadata"] for trigger in scaled["spec"]["triggers"]]
    assert {trigger["topic"] for trigger in triggers} == wanted
    assert {trigger["consumerGroup"] for trigger in triggers} == {topics.group(ROUTER_GROUP)}
    [partitions] = {spec.partitions for spec in topics.specs(wanted) if spec.name in wanted}
    assert scaled["spec"]["maxReplicaCount"] <= partitions


def test_topics_are_created_before_their_users(chart: Chart) -> None:
    manifests = chart.render("small")
    [job] = of_kind(manifests, "Job")
    [rules] = [each for each in of_kind(manifests, "ConfigMap") if each["metadata"]["name"] == "gateway-topics"]
    [policy] = [
        each for each in of_kind(manifests, "NetworkPolicy") if each["metadata"]["name"] == job["metadata"]["name"]
    ]
    hooks = [each["metadata"]["annotations"] for each in (policy, rules, job)]
    assert {hook["helm.sh/hook"] for hook in hooks} == {"pre-install,pre-upgrade"}
    weights = [int(hook["helm.sh/hook-weight"]) for hook in hooks]
    assert weights == sorted(set(weights))
    # What lets the Job out has to be there for as long as the Job.
    assert "hook-succeeded" not in hooks[0]["helm.sh/hook-delete-policy"]
    # Before an installation there is no account of the chart's own yet.
    assert "serviceAccountName" not in job["spec"]["template"]["spec"]
    assert not of_kind(chart.render("small", {"log": {"kafka": {"createTopics": False}}}), "Job")


# ---- How it is kept up: word for word, since each of these values is a decision ----


KEPT = {"whenDeleted": "Retain", "whenScaled": "Retain"}
ONE_MORE_FIRST = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
PROBES = {
    "startupProbe": {
        "httpGet": {"path": "/livez", "port": "admin"},
        "periodSeconds": 1,
        "timeoutSeconds": 3,
        "failureThreshold": 60,
    },
    "livenessProbe": {
        "httpGet": {"path": "/livez", "port": "admin"},
        "periodSeconds": 10,
        "timeoutSeconds": 5,
        "failureThreshold": 6,
    },
    "readinessProbe": {
        "httpGet": {"path": "/readyz", "port": "admin"},
        "periodSeconds": 5,
        "timeoutSeconds": 3,
        "failureThreshold": 2,
    },
}
HALVES: dict[str, Any] = {
    "Deployment/gateway-ingress": {"strategy": ONE_MORE_FIRST},
    "Deployment/gateway-router": {"strategy": ONE_MORE_FIRST, "minReadySeconds": 10},
}
ROLLOUTS: dict[str, dict[str, Any]] = {
    "small": HALVES,
    "production": {**HALVES, "Deployment/gateway-console": {"strategy": {"type": "Recreate"}}},
    "embedded": {
        "StatefulSet/gateway": {"podManagementPolicy": "Parallel", "persistentVolumeClaimRetentionPolicy": KEPT}
    },
}
SPOOLING_INGRESS = {
    "updateStrategy": {"type": "RollingUpdate"},
    "minReadySeconds": 10,
    "podManagementPolicy": "Parallel",
    "persistentVolumeClaimRetentionPolicy": KEPT,
}
IMAGE = "registry.example.com/webhook-gateway"
VERSION = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
TESTED = f"{IMAGE}@sha256:{'0' * 64}"


@every_example
def test_a_pod_is_restarted_if_it_does_not_live_and_left_alone_if_it_is_not_ready(chart: Chart, example: str) -> None:
    """Restarts help nobody whose log is away."""
    for name, pod in pods_of(chart.render(example)).items():
        [container] = pod["spec"]["containers"]
        probes = {key: value for key, value in container.items() if key.endswith("Probe")}
        assert probes == ({} if name.startswith("Job/") else PROBES), name


@every_example
def test_an_update_never_leaves_fewer_pods_than_before(chart: Chart, example: str) -> None:
    """Except where two at once can't be: of a log, a spool or an index there is one process."""
    assert _rollouts(chart.render(example)) == ROLLOUTS[example]
    if example != "embedded":
        spooling = _rollouts(chart.render(example, {"ingress": {"spool": {"enabled": True}}}))
        assert spooling.pop("StatefulSet/gateway-ingress") == SPOOLING_INGRESS
        assert spooling.items() < ROLLOUTS[example].items()


@every_example
def test_a_drained_node_takes_one_pod_of_each_half_at_a_time(chart: Chart, example: str) -> None:
    budgets = of_kind(chart.render(example), "PodDisruptionBudget")
    assert {each["metadata"]["name"]: each["spec"] for each in budgets} == {
        f"gateway-{role}": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {
                "matchLabels": {
                    "app.kubernetes.io/name": "webhook-gateway",
                    "app.kubernetes.io/instance": "gateway",
                    "app.kubernetes.io/component": role,
                }
            },
        }
        for role in (() if example == "embedded" else ("ingress", "router"))
    }


@pytest.mark.parametrize(
    ("example", "named", "image"),
    [
        ("small", {}, f"{IMAGE}:{VERSION}"),
        ("embedded", {}, f"{IMAGE}:{VERSION}"),
        ("production", {}, TESTED),
        ("production", {"tag": "1.2.3"}, TESTED),
        ("small", {"tag": "1.2.3"}, f"{IMAGE}:1.2.3"),
    ],
)
def test_every_container_is_of_the_image_that_is_named(
    chart: Chart, example: str, named: dict[str, str], image: str
) -> None:
    """By its digest, if there is one: a tag can be moved to what nobody has tested."""
    changes: dict[str, Any] = {"image": named}
    if example != "embedded":
        changes["ingress"] = {"spool": {"move": [7]}}
    pods = pods_of(chart.render(example, changes))
    assert {container["image"] for pod in pods.values() for container in pod["spec"]["containers"]} == {image}


def test_helm_hears_of_topics_that_cannot_be_created(chart: Chart) -> None:
    """Rather than to wait in vain: by default it gives up after 300 s."""
    [job] = of_kind(chart.render("small"), "Job")
    limits = {key: value for key, value in job["spec"].items() if key != "template"}
    assert limits == {"backoffLimit": 3, "activeDeadlineSeconds": 240}


# ---- How it ends, and what it may do ----


@every_example
@pytest.mark.parametrize("seconds", [0, 10, 60])
def test_a_pod_has_the_time_to_be_forgotten_and_to_drain(chart: Chart, example: str, seconds: int) -> None:
    for name, pod in pods_of(chart.render(example, {"preStopSeconds": seconds})).items():
        if name.startswith("Job/"):
            continue
        [container] = pod["spec"]["containers"]
        slept = container["lifecycle"]["preStop"]["sleep"]["seconds"] if seconds else 0
        assert slept == seconds
        assert pod["spec"]["terminationGracePeriodSeconds"] >= slept + STOP_TIMEOUT


@every_example
def test_pods_are_as_restricted_as_kubernetes_knows(chart: Chart, example: str) -> None:
    """The Pod Security Standard "restricted", and beyond it a root that can't be written, and no token."""
    for pod in pods_of(chart.render(example)).values():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == USER
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert all({"configMap", "secret"} & volume.keys() for volume in spec["volumes"] if volume["name"] != "index")
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= container["resources"].keys()
            assert "cpu" not in container["resources"]["limits"]  # throttled, its loop would stand still
            # Whatever is mounted is read-only, but for the embedded log and the index.
            written = {mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert written <= {"log", "index"}
    for account in of_kind(chart.render(example), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@every_example
def test_nobody_reaches_the_metrics_from_outside(chart: Chart, example: str) -> None:
    manifests = chart.render(example)
    for service in of_kind(manifests, "Service"):
        assert [port["targetPort"] for port in service["spec"]["ports"]] == ["http"]
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            if any(port["port"] == "admin" for port in rule["ports"]):
                assert rule["from"]
                assert all("ipBlock" not in peer for peer in rule["from"])


def test_metrics_are_reachable_only_by_named_peers(chart: Chart) -> None:
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for example, allowed in itertools.product(("small", "embedded"), ([], peers)):
        policies = of_kind(chart.render(example, {"networkPolicy": {"monitoring": allowed}}), "NetworkPolicy")
        rules = [rule for policy in policies for rule in policy["spec"].get("ingress", ())]
        sources = [rule["from"] for rule in rules if "admin" in _ports(rule)]
        assert sources == ([peers] * (1 if example == "embedded" else 2) if allowed else [])
        assert all("Ingress" in policy["spec"]["policyTypes"] for policy in policies)
        assert any("http" in _ports(rule) for rule in rules)


def test_metrics_that_nobody_could_reach_are_not_monitored(chart: Chart) -> None:
    monitored: dict[str, Any] = {"monitoring": {"podMonitor": {"enabled": True}}}
    with pytest.raises(AssertionError, match=r"networkPolicy\.monitoring: expected your Prometheus"):
        chart.render("small", monitored)
    chart.render("small", monitored | {"networkPolicy": {"enabled": False}})


@every_example
def test_credential_endpoints_are_unreachable_as_in_the_program(chart: Chart, example: str) -> None:
    blocks = [
        peer["ipBlock"]
        for policy in of_kind(chart.render(example), "NetworkPolicy")
        for rule in policy["spec"]["egress"]
        for peer in rule.get("to", ())
        if "ipBlock" in peer
    ]
    assert blocks
    for block in blocks:
        whole = ip_network(block["cidr"])
        refused = {network for _, networks in NAMED_ONLY for network in networks if _holds(whole, network)}
        left_out = {ip_network(text) for text in block.get("except", ())}
        assert {network for network in refused if not any(_holds(each, network) for each in left_out)} == set()
        if example != "production":  # which leaves out more
            assert left_out == refused


def _holds(whole: IPv4Network | IPv6Network, part: IPv4Network | IPv6Network) -> bool:
    return whole.version == part.version and whole.supernet_of(part)  # type: ignore[arg-type] # of one version, by then


def test_an_ingress_reaches_no_destination(chart: Chart) -> None:
    policies = {
        each["metadata"]["name"]: each["spec"]["egress"] for each in of_kind(chart.render("small"), "NetworkPolicy")
    }
    ports = [{port["port"] for port in rule.get("ports", ())} for rule in policies["gateway-ingress"]]
    assert ports == [{53, 5353}, {9092}]
    assert any("ports" not in rule for rule in policies["gateway-router"])


def test_names_are_looked_up_wherever_a_cluster_has_its_name_servers(chart: Chart) -> None:
    """Pods of any label, or a cache on the node, on either port; unless somebody says where they are."""
    for example, peers in (("small", None), ("production", "kube-system")):
        for policy in of_kind(chart.render(example), "NetworkPolicy"):
            [rule] = [rule for rule in policy["spec"]["egress"] if {53, 5353} <= _ports(rule)]
            assert {(port["protocol"], port["port"]) for port in rule["ports"]} == set(
                itertools.product(("UDP", "TCP"), (53, 5353))
            )
            assert ("to" in rule) == (peers is not None)
            assert peers is None or peers in json.dumps(rule["to"])


@pytest.mark.parametrize("example", ["small", "embedded"])
def test_destinations_in_the_cluster_are_reached_as_pods(chart: Chart, example: str) -> None:
    """Where the network knows pods by what they are (Cilium), a block of addresses has none of them."""
    policies = {
        each["metadata"]["name"]: each["spec"]["egress"] for each in of_kind(chart.render(example), "NetworkPolicy")
    }
    egress = policies["gateway-all" if example == "embedded" else "gateway-router"]
    [peers] = [rule["to"] for rule in egress if "ports" not in rule]
    assert {"namespaceSelector": {}} in peers
    assert [peer["ipBlock"]["cidr"] for peer in peers if "ipBlock" in peer] == ["0.0.0.0/0", "::/0"]


def test_the_embedded_log_outlives_its_pod_and_has_one_process(chart: Chart) -> None:
    [workload] = of_kind(chart.render("embedded"), "Deployment", "StatefulSet")
    assert workload["kind"] == "StatefulSet"
    assert workload["spec"]["replicas"] == 1
    # A restore begins with no replicas: the log has to be there afterwards.
    assert workload["spec"]["persistentVolumeClaimRetentionPolicy"] == KEPT
    [claim] = workload["spec"]["volumeClaimTemplates"]
    [container] = workload["spec"]["template"]["spec"]["containers"]
    target = from_sources({}, environment_of(container)).log
    assert isinstance(target, EmbeddedTarget)
    assert str(target.path.parent) == _mount(container, claim["metadata"]["name"])["mountPath"]
    # Or an update that never gets ready could not be rolled back:
    # https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback
    assert workload["spec"]["podManagementPolicy"] == "Parallel"


# ---- The spool ----


SPOOL = "/var/lib/gateway-spool"
kafka_example = pytest.mark.parametrize("example", ["small", "production"])


def _spooling(chart: Chart, example: str, *, ingress: Any = None, **spool: Any) -> tuple[list[Manifest], Manifest]:
    """Return the manifests with a spool, and what makes the ingress's pods."""
    manifests = chart.render(example, {"ingress": {"spool": {"enabled": True, **spool}, **(ingress or {})}})
    for manifest in manifests:
        _validate(manifest, NEWEST)
    [workload] = [each for each in of_kind(manifests, "StatefulSet", "Deployment") if _is_ingress(each)]
    return manifests, workload


def _is_ingress(manifest: Manifest) -> bool:
    return bool(manifest["metadata"]["name"] == "gateway-ingress")


def test_no_spool_is_there_unless_somebody_wants_one(chart: Chart) -> None:
    for example in EXAMPLES:
        assert "spool" not in json.dumps(pods_of(chart.render(example)))
    [ingress] = [each for each in of_kind(chart.render("small"), "Deployment", "StatefulSet") if _is_ingress(each)]
    assert ingress["kind"] == "Deployment"


@kafka_example
@pytest.mark.parametrize("version", ["1.30", NEWEST])
def test_with_a_spool_every_manifest_is_valid(chart: Chart, example: str, version: str) -> None:
    for manifest in _spooling(chart, example)[0]:
        _validate(manifest, version)


@kafka_example
def test_each_ingress_has_a_spool_on_a_claim_of_its_own(chart: Chart, example: str) -> None:
    manifests, workload = _spooling(chart, example, days=0.5, bytes="20GiB", size="50Gi", storageClass="fast")
    assert workload["kind"] == "StatefulSet"
    [container] = workload["spec"]["template"]["spec"]["containers"]
    spool = from_sources({}, environment_of(container)).spool
    assert (spool.days, spool.bytes) == (0.5, 20 << 30)
    assert spool.file is not None
    [claim] = workload["spec"]["volumeClaimTemplates"]
    assert str(spool.file.parent) == _mount(container, claim["metadata"]["name"])["mountPath"] == SPOOL
    assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    # Two processes never have a file at once.
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    having = [name for name, pod in pods_of(manifests).items() if SPOOL in json.dumps(pod)]
    assert having == ["StatefulSet/gateway-ingress"]


@kafka_example
def test_nothing_deletes_acknowledged_events(chart: Chart, example: str) -> None:
    """Neither an upgrade, nor a replica less, nor the end of the release."""
    _, workload = _spooling(chart, example)
    assert workload["spec"]["persistentVolumeClaimRetentionPolicy"] == KEPT
    assert "emptyDir" not in json.dumps(workload)


@kafka_example
def test_an_upgrade_of_spools_is_graceful_and_can_be_rolled_back(chart: Chart, example: str) -> None:
    _, workload = _spooling(chart, example)
    spec = workload["spec"]
    assert spec["updateStrategy"] == {"type": "RollingUpdate"}
    assert spec["minReadySeconds"] > 0
    assert spec["podManagementPolicy"] == "Parallel"  # as for the embedded log
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + STOP_TIMEOUT
    # Pods of a Deployment alone have the other label.
    assert {str(each["matchLabelKeys"]) for each in pod["topologySpreadConstraints"]} == {
        "['controller-revision-hash']"
    }


def test_what_scales_ingresses_scales_those_with_a_spool(chart: Chart) -> None:
    manifests, workload = _spooling(chart, "production")
    [scaler] = of_kind(manifests, "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": workload["apiVersion"],
        "kind": workload["kind"],
        "name": workload["metadata"]["name"],
    }
    assert "replicas" not in workload["spec"]
    assert _spooling(chart, "small")[1]["spec"]["replicas"] == 2


def test_the_volume_has_room_for_all_that_the_spool_takes(chart: Chart) -> None:
    """Twice the bytes, if every event is just too large for a page to have two, and the share that stays free."""
    _, workload = _spooling(chart, "small")
    [claim] = workload["spec"]["volumeClaimTemplates"]
    [container] = workload["spec"]["template"]["spec"]["containers"]
    room = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) << 30
    needed = min(MIN_FREE_BYTES_CAP, MIN_FREE_RATIO * room)
    assert room - needed > 2 * from_sources({}, environment_of(container)).spool.bytes


def _moving(chart: Chart, example: str, *numbers: int, **spool: Any) -> tuple[list[Manifest], list[Manifest]]:
    """Return the manifests with Jobs that move spools, and these Jobs."""
    manifests = chart.render(example, {"ingress": {"spool": {"move": list(numbers), **spool}}})
    for manifest in manifests:
        _validate(manifest, NEWEST)
    jobs = [each for each in of_kind(manifests, "Job") if "move-spool" in each["metadata"]["name"]]
    return manifests, jobs


@kafka_example
@pytest.mark.parametrize("enabled", [True, False])
def test_the_spool_of_a_replica_that_is_gone_is_moved_by_a_job(chart: Chart, example: str, *, enabled: bool) -> None:
    """As long as its claim is there, and also once the ingress has no spool any more."""
    _, jobs = _moving(chart, example, 3, 12, enabled=enabled)
    assert [job["metadata"]["name"] for job in jobs] == ["gateway-move-spool-3", "gateway-move-spool-12"]
    _, workload = _spooling(chart, example)
    [template], [ingress] = workload["spec"]["volumeClaimTemplates"], workload["spec"]["template"]["spec"]["containers"]
    for number, job in zip((3, 12), jobs, strict=True):
        pod = job["spec"]["template"]["spec"]
        claims = [each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if each["name"] == "spool"]
        assert claims == [f"{template['metadata']['name']}-{workload['metadata']['name']}-{number}"]
        [container] = pod["containers"]
        words = container["args"]
        command = COMMANDS[" ".join(words[:2])]
        command.parser().parse_args(words[2:])
        assert command.name == "spool move"
        ours, theirs = from_sources({}, environment_of(container)), from_sources({}, environment_of(ingress))
        assert (ours.spool.file, ours.log, ours.kafka) == (theirs.spool.file, theirs.log, theirs.kafka)
        assert _mount(container, "spool") == _mount(ingress, "spool")
        assert pod["securityContext"] == workload["spec"]["template"]["spec"]["securityContext"]
        assert container["securityContext"] == ingress["securityContext"]
        assert pod["restartPolicy"] == "Never"
        assert pod["automountServiceAccountToken"] is False


def test_a_job_that_moves_a_spool_has_kafkas_secrets_and_reaches_kafka_alone(chart: Chart) -> None:
    manifests, [job] = _moving(chart, "production", 12)
    [secret] = [each["secret"] for each in job["spec"]["template"]["spec"]["volumes"] if "secret" in each]
    assert [item["key"] for item in secret["items"]] == ["kafka-password", "kafka-ca"]
    labels = [job["spec"]["template"]["metadata"]["labels"]]
    policies = [
        each
        for each in of_kind(manifests, "NetworkPolicy")
        if _matching(each["spec"]["podSelector"]["matchLabels"], labels)
    ]
    [policy] = policies
    assert [_ports(rule) for rule in policy["spec"]["egress"]] == [{53, 5353}, {9093}]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for service in of_kind(manifests, "Service"):
        assert not _matching(service["spec"]["selector"], labels), "senders would get no response"
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert not _matching(budget["spec"]["selector"]["matchLabels"], labels)
    _, [job] = _moving(chart, "small", 2)
    assert not [each for each in job["spec"]["template"]["spec"]["volumes"] if "secret" in each]


def test_what_the_page_says_of_moving_a_spool_is_what_there_is(chart: Chart) -> None:
    page = (ROOT / "docs" / "spool.md").read_text()
    manifests, [job] = _moving(chart, "small", 2)
    named = {
        f"{each['kind'].lower()}/{each['metadata']['name']}"
        for each in manifests
        if "move-spool" in each["metadata"]["name"]
    }
    assert f"kubectl -n hooks delete --ignore-not-found {' '.join(sorted(named))}\n" in page
    assert f"job/{job['metadata']['name']} " in page
    assert "--set 'ingress.spool.move={2}' --show-only templates/move-spool.yaml" in page
    assert (CHART / "templates" / "move-spool.yaml").exists()


# ---- The index ----


INDEX = "/var/lib/gateway-index"


def _console(chart: Chart, example: str, **changes: Any) -> tuple[list[Manifest], Manifest, dict[str, Any]]:
    """Return the manifests with a console, what makes the pods that keep the index, and their only container."""
    manifests = chart.render(example, {"console": {"enabled": True, **changes}})
    for manifest in manifests:
        _validate(manifest, NEWEST)
    name = "gateway" if example == "embedded" else "gateway-console"
    [workload] = [each for each in of_kind(manifests, "Deployment", "StatefulSet") if each["metadata"]["name"] == name]
    [container] = workload["spec"]["template"]["spec"]["containers"]
    return manifests, workload, container


def test_no_index_is_kept_unless_somebody_wants_one(chart: Chart) -> None:
    for example in ("small", "embedded"):
        assert "index" not in json.dumps([pods_of(chart.render(example))])
        assert not of_kind(chart.render(example), "PersistentVolumeClaim")


@every_example
def test_one_process_keeps_the_index_in_a_volume_of_its_own(chart: Chart, example: str) -> None:
    manifests, workload, container = _console(chart, example, days=30, bytes="20GiB", volume={"size": "50Gi"})
    settings = from_sources({}, environment_of(container))
    assert settings.role is (Role.ALL if example == "embedded" else Role.CONSOLE)
    assert settings.keeps_index
    assert (settings.index.days, settings.index.bytes) == (30, 20 << 30)
    assert str(settings.index.file.parent) == _mount(container, "index")["mountPath"] == INDEX
    [volume] = [each for each in workload["spec"]["template"]["spec"]["volumes"] if each["name"] == "index"]
    [claim] = of_kind(manifests, "PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
    # Two pods never have it at once: neither during an update, nor by a second workload.
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert workload["spec"]["replicas"] == 1
    assert workload["kind"] == "StatefulSet" or workload["spec"]["strategy"] == {"type": "Recreate"}
    keeping = [name for name, pod in pods_of(manifests).items() if INDEX in json.dumps(pod)]
    assert keeping == [f"{workload['kind']}/{workload['metadata']['name']}"]


def test_the_claim_of_a_statefulset_that_runs_is_left_alone(chart: Chart) -> None:
    """Kubernetes refuses an upgrade that changes its templates of claims."""
    [before] = of_kind(chart.render("embedded"), "StatefulSet")
    _, after, _ = _console(chart, "embedded")
    assert after["spec"]["volumeClaimTemplates"] == before["spec"]["volumeClaimTemplates"]


@every_example
def test_an_index_without_a_claim_is_in_a_folder_that_is_bounded(chart: Chart, example: str) -> None:
    manifests, workload, _ = _console(chart, example, volume={"persistent": False, "size": "20Gi"})
    assert not of_kind(manifests, "PersistentVolumeClaim")
    [volume] = [each for each in workload["spec"]["template"]["spec"]["volumes"] if each["name"] == "index"]
    assert volume["emptyDir"] == {"sizeLimit": "20Gi"}


def test_the_volume_has_room_for_a_second_file_after_damage(chart: Chart) -> None:
    manifests, _, container = _console(chart, "small")
    [claim] = of_kind(manifests, "PersistentVolumeClaim")
    room = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) << 30
    assert room > 2 * from_sources({}, environment_of(container)).index.bytes + (1 << 30)


def test_a_console_reaches_the_log_and_nothing_else_and_only_prometheus_reaches_it(chart: Chart) -> None:
    manifests, _, container = _console(chart, "production")
    assert [port["name"] for port in container["ports"]] == ["admin"]
    [policy] = [each for each in of_kind(manifests, "NetworkPolicy") if each["metadata"]["name"] == "gateway-console"]
    assert [_ports(rule) for rule in policy["spec"]["egress"]] == [{53, 5353}, {9093}]
    assert [_ports(rule) for rule in policy["spec"]["ingress"]] == [{"admin"}]
    manifests, _, _ = _console(chart, "small")
    [policy] = [each for each in of_kind(manifests, "NetworkPolicy") if each["metadata"]["name"] == "gateway-console"]
    assert "ingress" not in policy["spec"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_a_console_has_no_secret_of_the_rules(chart: Chart) -> None:
    _, _, container = _console(chart, "small")
    assert [each["name"] for each in container["volumeMounts"]] == ["rules", "index"]
    _, workload, container = _console(chart, "production")
    [secret] = [each["secret"] for each in workload["spec"]["template"]["spec"]["volumes"] if "secret" in each]
    assert [item["key"] for item in secret["items"]] == ["kafka-password", "kafka-ca"]
    kafka = from_sources({}, environment_of(container)).kafka
    assert kafka.password_file == Path(_mount(container, "secrets")["mountPath"], secret["items"][0]["path"])
    _, workload, _ = _console(chart, "embedded")
    [secret] = [each["secret"] for each in workload["spec"]["template"]["spec"]["volumes"] if "secret" in each]
    assert "items" not in secret, "it verifies and delivers as well"


@every_example
@pytest.mark.parametrize("kind", ["secret", "configMap"])
def test_the_console_has_an_access_file_and_a_service_for_the_proxy_before_it(
    chart: Chart, example: str, kind: str
) -> None:
    proxy = [{"podSelector": {"matchLabels": {"app": "oauth2-proxy"}}}]
    changes = {
        "console": {"enabled": True, "access": {kind: "gateway-access", "service": {"port": 80}}},
        "networkPolicy": {"console": proxy},
    }
    manifests = chart.render(example, changes)
    for manifest in manifests:
        _validate(manifest, NEWEST)
    reading = []
    for name, pod in pods_of(manifests).items():
        [container] = pod["spec"]["containers"]
        settings = from_sources({}, environment_of(container)) if "run" in container["args"] else None
        if settings is None or settings.access.file is None:
            assert "gateway-access" not in json.dumps(pod)
            continue
        reading.append(name)
        mount = _mount(container, "access")
        # A folder, in which a change arrives, and the files that the access file names are beside it.
        assert (mount["mountPath"], mount["readOnly"]) == (str(settings.access.file.parent), True)
        assert settings.access.file.name == "access.conf"
        [volume] = [each for each in pod["spec"]["volumes"] if each["name"] == "access"]
        given = {"secretName": "gateway-access"} if kind == "secret" else {"name": "gateway-access"}
        assert volume[kind] == {**given, "defaultMode": 0o440}
    assert reading == ["StatefulSet/gateway" if example == "embedded" else "Deployment/gateway-console"]
    [service] = [each for each in of_kind(manifests, "Service") if each["metadata"]["name"] == "gateway-console"]
    assert service["spec"]["ports"] == [{"name": "admin", "port": 80, "targetPort": "admin"}]
    assert service["spec"]["selector"]["app.kubernetes.io/component"] == ("all" if example == "embedded" else "console")
    letting = [each for each in of_kind(manifests, "NetworkPolicy") if "oauth2-proxy" in json.dumps(each["spec"])]
    [policy] = letting
    assert policy["metadata"]["name"] == ("gateway-all" if example == "embedded" else "gateway-console")
    [rule] = [each for each in policy["spec"]["ingress"] if each.get("from") == proxy]
    assert _ports(rule) == {"admin"}


def test_without_an_access_file_a_console_has_no_service(chart: Chart) -> None:
    manifests, _, container = _console(chart, "small")
    assert not [each for each in of_kind(manifests, "Service") if each["metadata"]["name"] == "gateway-console"]
    assert from_sources({}, environment_of(container)).access.file is None


def test_nothing_keeps_a_node_from_being_drained_of_its_console(chart: Chart) -> None:
    manifests, workload, _ = _console(chart, "small")
    labels = [workload["spec"]["template"]["metadata"]["labels"]]
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert not _matching(budget["spec"]["selector"]["matchLabels"], labels)


# ---- A copy of the embedded log ----


def test_a_backup_of_the_embedded_log_has_its_own_volume(chart: Chart) -> None:
    manifests = chart.render("embedded", {"log": {"embedded": {"backupClaim": "gateway-backup"}}})
    [workload] = of_kind(manifests, "StatefulSet")
    _validate(workload, NEWEST)
    spec = workload["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert _mount(container, "backup") == {"name": "backup", "mountPath": "/backup"}
    [claim] = [each["persistentVolumeClaim"] for each in spec["volumes"] if each["name"] == "backup"]
    assert claim == {"claimName": "gateway-backup"}


def test_a_restore_has_the_gateways_volumes_and_rights(chart: Chart) -> None:
    _validate(RESTORE, NEWEST)
    [workload] = of_kind(
        chart.render("embedded", {"log": {"embedded": {"backupClaim": "gateway-backup"}}}), "StatefulSet"
    )
    theirs, ours = workload["spec"]["template"]["spec"], RESTORE["spec"]
    [claim] = workload["spec"]["volumeClaimTemplates"]
    claims = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in ours["volumes"]}
    assert claims == {
        "log": f"{claim['metadata']['name']}-{workload['metadata']['name']}-0",
        "backup": "gateway-backup",
    }
    assert ours["securityContext"] == theirs["securityContext"]
    [container], [gateway] = ours["containers"], theirs["containers"]
    assert container["securityContext"] == gateway["securityContext"]
    for name in claims:
        assert _mount(container, name)["mountPath"] == _mount(gateway, name)["mountPath"]


def test_a_restore_replaces_the_log(tmp_path: Path) -> None:
    """What else it does is held by `tests/log/test_embedded.py`."""
    log, backup = tmp_path / "log", tmp_path / "backup"
    for folder in (log, backup):
        folder.mkdir()
    asyncio.run(_make_log(log / "gateway.db", "old"))
    old = (log / "gateway.db").read_bytes()
    assert _restore(log, backup) != 0  # no copy, and nothing is touched
    assert (log / "gateway.db").read_bytes() == old
    asyncio.run(_make_log(backup / "gateway.db", "copied"))
    assert _restore(log, backup) == 0
    [before] = log.glob("gateway.db.before-*")
    assert before.read_bytes() == old
    assert (log / "gateway.db").read_bytes() == (backup / "gateway.db").read_bytes()


async def _make_log(path: Path, topic: str) -> None:
    made = await EmbeddedLog.open(path, owner=True)
    await made.create([TopicSpec(name=topic, partitions=1, retention=None)])
    await made.close()


def _restore(log: Path, backup: Path) -> int:
    [container] = RESTORE["spec"]["containers"]
    words = container["args"]
    for mount, folder in (("log", log), ("backup", backup)):
        words = [word.replace(_mount(container, mount)["mountPath"], str(folder)) for word in words]
    return subprocess.run([sys.executable, "-m", "gateway", *words], check=False, capture_output=True).returncode


# ---- What it takes ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"router": {"replica": 3}}, r"/router.*additional propert.*'replica'"),
        # An empty variable is one that isn't set: the pods would take the default.
        ({"log": {"topicPrefix": ""}}, "/log/topicPrefix.*minLength"),
        ({"log": {"kind": "redis"}}, r"/log/kind.*'kafka', 'embedded'"),
        ({"log": {"kafka": {"servers": ["kafka://broker:9092"]}}}, r"/log/kafka/servers/0.*does not match pattern"),
        ({"log": {"kafka": {"servers": []}}}, r"log\.kafka\.servers: expected at least one host:port, got none"),
        ({"rules": {"existingConfigMap": "mine"}}, "rules: expected files or existingConfigMap, got both"),
        ({"preStopSeconds": "10s"}, r"/preStopSeconds.*want integer"),
        ({"env": [{"name": "GATEWAY_ADMIN", "value": "127.0.0.1:9090"}]}, "/env/0/name"),
        ({"ingress": {"http": {"enabled": True}}}, r"/ingress/http/host.*minLength"),
        (
            {"ingress": {"tls": {"secrets": ["a"]}, "http": {"enabled": True, "host": "a.example"}}},
            "ingress: expected http",
        ),
        ({"ingress": {"proxyProtocol": ["lb"]}}, r"/ingress/proxyProtocol/0.*does not match pattern"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"console": {"bytes": "8G"}}, "/console/bytes.*does not match pattern"),
        ({"ingress": {"spool": {"enabled": True, "bytes": "8G"}}}, "/ingress/spool/bytes.*does not match pattern"),
        ({"ingress": {"spool": {"move": ["spool-gateway-ingress-2"]}}}, r"/ingress/spool/move/0.*want integer"),
        (
            {"ingress": {"spool": {"enabled": True, "move": [1]}}},
            r"ingress\.spool\.move: expected numbers of replicas that are gone, from 2 on, got 1",
        ),
        ({"log": {"kind": "embedded"}, "ingress": {"spool": {"enabled": True}}}, r"ingress\.spool: expected log\.kind"),
        (
            {"log": {"kafka": {"servers": ["kafka:9092", "kafka:99999"]}}},
            r"log\.kafka\.servers: expected a port from 1 to 65535, got kafka:99999",
        ),
        (
            {"ingress": {"autoscaling": {"minReplicas": 11}}},
            r"ingress\.autoscaling: expected minReplicas of at most maxReplicas \(10\), got 11",
        ),
        (
            {"router": {"autoscaling": {"minReplicas": 7}}},
            r"router\.autoscaling: expected minReplicas of at most maxReplicas \(6\), got 7",
        ),
        ({"nameOverride": "a" * 41}, "/nameOverride.*does not match pattern"),
        ({"env": [{"name": "GATEWAY_SPOOL", "value": "sqlite:////tmp/spool.db"}]}, "/env/0/name"),
        (
            {"console": {"enabled": True, "access": {"secret": "a", "configMap": "b"}}},
            "console.access: expected secret or configMap, got both",
        ),
        ({"console": {"access": {"secret": "a"}}}, r"console\.access: expected console\.enabled, got false"),
        (
            {
                "console": {"enabled": True, "access": {"secret": "a"}},
                "env": [{"name": "GATEWAY_ACCESS", "value": "/run/secrets/gateway/access.conf"}],
            },
            r"console\.access: expected it or the variable GATEWAY_ACCESS, got both",
        ),
        (
            {"console": {"enabled": True}, "networkPolicy": {"console": [{"podSelector": {}}]}},
            r"networkPolicy\.console: expected console\.access, got none",
        ),
        ({"console": {"replicas": 2}}, r"/console.*additional propert.*'replicas'"),
        ({"env": [{"name": "GATEWAY_INDEX", "value": "/tmp/index.db"}]}, "/env/0/name"),
        ({"monitoring": {"podMonitor": {"interval": "often"}}}, "/monitoring/podMonitor/interval"),
        ({"monitoring": {"runbooks": "https://docs.example.com/a\\b"}}, "/monitoring/runbooks.*does not match pattern"),
    ],
)
def test_values_that_make_no_sense_are_refused(chart: Chart, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        chart.render("small", changes)


def test_a_large_number_stays_one(chart: Chart) -> None:
    autoscaling = {"kind": "lag", "lag": {"threshold": 1_000_000, "topics": ["gateway.events.github"]}}
    [scaled] = of_kind(chart.render("small", {"log": KAFKA, "router": {"autoscaling": autoscaling}}), "ScaledObject")
    [trigger] = scaled["spec"]["triggers"]
    assert trigger["metadata"]["lagThreshold"] == "1000000"


@every_example
def test_a_long_name_leaves_room_for_what_kubernetes_appends(chart: Chart, example: str) -> None:
    for manifest in chart.render(
        example, {"nameOverride": "a" * 40, "ingress": {"spool": {"enabled": example != "embedded"}}}
    ):
        name = manifest["metadata"]["name"]
        if manifest["kind"] in ("StatefulSet", "Deployment", "Job"):
            assert len(f"{name}-0123456789") <= 63, name


@every_example
def test_tls_ends_in_the_pods_that_senders_reach(chart: Chart, example: str) -> None:
    ingress = {"http": {"enabled": False}, "tls": {"secrets": ["hooks-tls", "b"]}, "proxyProtocol": ["10.0.0.0/8"]}
    manifests = chart.render(example, {"ingress": ingress})
    for manifest in manifests:
        _validate(manifest, NEWEST)
    having = set()
    for name, pod in pods_of(manifests).items():
        [container] = pod["spec"]["containers"]
        wire = from_sources({}, environment_of(container)).connections
        if not wire.certificates:
            assert "tls-" not in json.dumps(pod)
            assert wire.proxies == ()
            continue
        having.add(name)
        assert wire.proxies == (ip_network("10.0.0.0/8"),)
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
        for secret, files in zip(("hooks-tls", "b"), wire.certificates, strict=True):
            assert [file.name for file in files] == ["tls.crt", "tls.key"]
            mount = mounts[str(files[0].parent)]
            assert mount["readOnly"]
            assert "subPath" not in mount, "a renewed one wouldn't arrive"
            assert volumes[mount["name"]]["secret"]["secretName"] == secret
    assert having == ({"StatefulSet/gateway"} if example == "embedded" else {"Deployment/gateway-ingress"})


def test_rules_have_to_come_from_somewhere(chart: Chart) -> None:
    with pytest.raises(AssertionError, match=r"rules: expected files with a routes\.yaml, or existingConfigMap"):
        chart.render(None, {"log": KAFKA, "rules": {"files": {"other.yaml": "version: 1"}}})


def test_the_topics_of_rules_that_it_has_not_got_have_to_be_named(chart: Chart) -> None:
    values: dict[str, Any] = {"log": KAFKA, "rules": {"existingConfigMap": "mine"}}
    with pytest.raises(AssertionError, match=r"router\.autoscaling\.lag\.topics: expected the topics of events"):
        chart.render(None, {**values, "router": {"autoscaling": {"kind": "lag"}}})
    lag = {"topics": ["gateway.events.github"], "authentication": "kafka", "metadata": {"tls": "enable"}}
    manifests = chart.render(None, {**values, "router": {"autoscaling": {"kind": "lag", "lag": lag}}})
    for manifest in manifests:
        _validate(manifest, NEWEST)
    [scaled] = of_kind(manifests, "ScaledObject")
    [trigger] = scaled["spec"]["triggers"]
    assert trigger["metadata"]["topic"] == "gateway.events.github"
    assert trigger["metadata"]["tls"] == "enable"
    assert trigger["authenticationRef"] == {"name": "kafka"}


def test_the_users_own_rules_are_mounted_instead(chart: Chart) -> None:
    manifests = chart.render(None, {"log": KAFKA, "rules": {"existingConfigMap": "mine"}})
    assert not of_kind(manifests, "ConfigMap")
    for pod in pods_of(manifests).values():
        assert [volume["configMap"]["name"] for volume in pod["spec"]["volumes"]] == ["mine"]


def test_every_value_has_a_default_and_a_schema() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert _paths_of(schema) - {"global"} == _paths(defaults, schema)


def test_it_is_of_the_gateways_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]


@pytest.mark.parametrize(("copy", "original"), [("rules", "prometheus/rules"), ("dashboards", "grafana/dashboards")])
def test_its_rules_and_dashboards_are_those_of_deploy(copy: str, original: str) -> None:
    """A chart can't reach out of its folder, so it has copies."""
    texts = {file.name: file.read_text() for file in (ROOT / "deploy" / original).glob("*.*")}
    copies = {file.name: file.read_text() for file in (CHART / "files" / copy).glob("*.*")}
    assert copies == texts, "`make chart` brings them up to date"


def test_the_alerts_know_each_pod_by_its_job(chart: Chart) -> None:
    [monitor] = of_kind(chart.render("production"), "PodMonitor")
    [relabelings] = [each["relabelings"] for each in monitor["spec"]["podMetricsEndpoints"]]
    [job] = [each["replacement"] for each in relabelings if each["targetLabel"] == "job"]
    [components] = [each["values"] for each in monitor["spec"]["selector"]["matchExpressions"]]
    known = own_jobs("GatewayProcessDown")
    assert set(components) == set(Role)
    assert all(known.fullmatch(job.replace("$1", component)) for component in components)
    # By it one gateway is told from another; the operator adds it.
    assert "namespace" not in [each["targetLabel"] for each in relabelings]


@pytest.mark.parametrize("runbooks", ["docs/runbooks.md", "https://docs.example.com/gateway"])
def test_its_alerts_and_dashboards_arrive_with_links_to_where_the_runbooks_are(chart: Chart, runbooks: str) -> None:
    manifests = chart.render("production", {"monitoring": {"runbooks": runbooks}})

    def text(file: Path) -> str:
        assert "docs/runbooks.md" in file.read_text()
        return file.read_text().replace("docs/runbooks.md", runbooks)

    groups = [each["spec"] for each in of_kind(manifests, "PrometheusRule")]
    assert groups == [yaml.safe_load(text(file)) for file in sorted((CHART / "files" / "rules").glob("*.yml"))]
    boards = [each["data"] for each in of_kind(manifests, "ConfigMap") if "dashboard" in each["metadata"]["name"]]
    for file in (CHART / "files" / "dashboards").glob("*.json"):
        [board] = [data for data in boards if file.name in data]
        assert json.loads(board[file.name]) == json.loads(text(file))


# ---- Helpers ----


def _validate(manifest: Manifest, version: str) -> None:
    if schema := CUSTOM.get(manifest["kind"]):
        jsonschema.Draft202012Validator(schema).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def _rollouts(manifests: list[Manifest]) -> dict[str, Any]:
    """Return how the pods of what runs are replaced: all that is said of it, but for how many and which they are."""
    others = {"replicas", "selector", "template", "serviceName", "volumeClaimTemplates"}
    return {
        f"{each['kind']}/{each['metadata']['name']}": {
            key: value for key, value in each["spec"].items() if key not in others
        }
        for each in of_kind(manifests, "Deployment", "StatefulSet")
    }


def _ports(rule: Mapping[str, Any]) -> set[int | str]:
    return {port["port"] for port in rule.get("ports", ())}


def _matching(selector: Mapping[str, str], pods: list[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [labels for labels in pods if selector.items() <= labels.items()]


def _mount(container: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    [mount] = [mount for mount in container["volumeMounts"] if mount["name"] == name]
    return dict(mount)


def _paths_of(schema: Mapping[str, Any]) -> set[str]:
    """Return the paths of the values that a schema names, without those that others define."""
    paths = set()
    for name, below in schema.get("properties", {}).items():
        inner = _paths_of(below) if below.get("additionalProperties") is False else set()
        paths |= {f"{name}.{path}" for path in inner} or {name}
    return paths


def _paths(values: Mapping[str, Any], schema: Mapping[str, Any]) -> set[str]:
    paths = set()
    for name, value in values.items():
        below = schema["properties"].get(name, {})
        inner = _paths(value, below) if below.get("additionalProperties") is False else set()
        paths |= {f"{name}.{path}" for path in inner} or {name}
    return paths
