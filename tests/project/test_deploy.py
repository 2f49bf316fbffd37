"""What deploy/ has for systemd, Kubernetes, Prometheus and Grafana fits the product.

Their own tools are asked: systemd-analyze, promtool, Kubernetes' schema, and kubectl where it is installed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from relay.command import commands
from relay.config.loader import load
from relay.config.options import BY_KEY, OPTIONS
from relay.config.types import listen_addresses
from support import documents
from support.documents import ROOT
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
VARIABLES = {name for option in OPTIONS for name in option.variables}


def tool(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a program; fails unless it is content, skips the test where there is none. Return what it wrote."""
    if shutil.which(str(words[0])) is None:
        pytest.skip(f"{words[0]} is not installed")
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


# systemd


def unit(path: Path) -> dict[str, list[str]]:
    """Return the settings of a unit."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_units_start_and_stop_us_as_we_want(path: Path) -> None:
    """The command exists, a stop drains for longer than the supervisor needs, a wrong setting is not tried again."""
    settings = unit(path)
    (line,) = settings["ExecStart"]
    commands.parse(shlex.split(line)[1:])
    assert settings["Type"] == ["notify"]
    assert settings["KillMode"] == ["mixed"]
    assert settings["TimeoutStopSec"] == ["16min"]  # the supervisor's drain_seconds is 15
    assert settings["RestartPreventExitStatus"] == ["2"]
    assert settings["StateDirectory"] == ["smtp-dup"]
    assert {value.partition("=")[0] for value in settings.get("Environment", [])} <= VARIABLES


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_systemd_takes_the_units(path: Path, tmp_path: Path) -> None:
    """`systemd-analyze verify` says nothing, also with the pages' drop-ins, and `security` rates them under 2.5."""
    program = tmp_path / "smtp-dup"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / path.name
    copy.write_text(path.read_text(encoding="utf-8").replace("/opt/smtp-dup/bin/smtp-dup", str(program)))
    assert not tool("systemd-analyze", "verify", "--man=no", copy)
    tool("systemd-analyze", "security", "--offline=true", "--threshold=25", copy)
    check_drop_ins(copy, required=path.name == "smtp-dup.service")


def check_drop_ins(copy: Path, *, required: bool = True) -> None:
    """Let systemd look at a unit with each of the pages' drop-ins for it."""
    drop_ins = [block for block in documents.of("unit") if block.words[1] == copy.name]
    assert drop_ins or not required
    for block in drop_ins:
        folder = copy.parent / f"{copy.name}.d"
        folder.mkdir(exist_ok=True)
        (folder / "override.conf").write_text(block.text)
        assert not tool("systemd-analyze", "verify", "--man=no", copy), block


def test_systemd_takes_the_socket(tmp_path: Path) -> None:
    """It binds the addresses that its own words and installation.md give for smtp.listen; systemd has no objection."""
    path = DEPLOY / "systemd" / "smtp-dup.socket"
    streams = unit(path)["ListenStream"]
    assert streams == ["25", "127.0.0.1:2525"]
    (block,) = (b for b in documents.blocks() if b.page == "installation.md" and "listen = " in b.text)
    own_words = "".join(re.findall(r"(?m)^#     (.*)$", path.read_text(encoding="utf-8")))
    for text in (block.text, own_words.replace("]", "]\n")):
        listen = tomllib.loads(text)["smtp"]["listen"]
        assert listen_addresses(listen) == tuple(listen_addresses(s if ":" in s else f":{s}")[0] for s in streams)
    for found in [*UNITS, path]:
        text = found.read_text(encoding="utf-8").replace("/opt/smtp-dup/bin/smtp-dup", shutil.which("true") or "")
        (tmp_path / found.name).write_text(text)
    assert not tool("systemd-analyze", "verify", "--man=no", tmp_path / path.name)
    check_drop_ins(tmp_path / path.name)


def test_the_installation_with_systemd(tmp_path: Path) -> None:
    """The commands of installation.md, in a folder in place of /: user, folders and units are where they belong."""
    block = next(b for b in documents.blocks() if b.page == "installation.md" and "systemd-sysusers" in b.text)
    (tmp_path / "etc").mkdir()
    for line in block.text.splitlines():
        if line.startswith(("python3 ", "/opt/", "ln ", "systemctl ")):
            continue  # the environment is made by the CI script; there is no running systemd here
        words = [re.sub(r"^/(etc|usr)/", f"{tmp_path}/\\1/", word) for word in shlex.split(line)]
        if words[0].startswith("systemd-"):
            tool(words[0], f"--root={tmp_path}", *words[1:])
            continue
        if words[-1].endswith("/system/"):
            Path(words[-1]).mkdir(parents=True)
        if "-g" in words:  # the group is one of that folder's
            at = words.index("-g")
            assert words[at + 1] == "smtp-dup"
            del words[at : at + 2]
        done = subprocess.run(["bash", "-c", " ".join(words)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^smtp-dup:", (tmp_path / "etc/passwd").read_text())
    assert load({"config": str(tmp_path / "etc/smtp-dup/settings.toml")}, {}, require_primary=False)
    assert (tmp_path / "etc/smtp-dup").stat().st_mode & 0o777 == 0o750
    assert {path.name for path in (tmp_path / "etc/systemd/system").iterdir()} == {path.name for path in UNITS}


def test_systemd_is_told_when_mail_is_taken(
    product: Callable[..., Product], primary: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY=1 comes when a client is greeted, STOPPING=1 when the drain begins."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        instance = product(primary=primary.address, start=False)
        instance.start(wait=False)
        assert channel.recv(100) == b"READY=1"
        assert instance.send("a@example.net", "b@example.com").startswith("250")
        assert instance.process is not None
        instance.process.send_signal(signal.SIGTERM)
        assert channel.recv(100) == b"STOPPING=1"
        assert instance.wait() == 0


# Kubernetes


def manifests(folder: str) -> list[dict[str, Any]]:
    """Return the objects of a folder's files, but for the kustomization."""
    paths = sorted((DEPLOY / folder).glob("*.yaml"))
    files = [path for path in paths if path.name != "kustomization.yaml"]
    return [found for path in files for found in yaml.safe_load_all(path.read_text("utf-8"))]


OBJECTS = manifests("kubernetes")
WORKLOADS = [found for found in OBJECTS if found["kind"] in {"StatefulSet", "Deployment"}]


def test_manifests_are_complete() -> None:
    """Each object has what its kind needs, and every file is in its kustomization."""
    for found in [*OBJECTS, *manifests("kubernetes/monitoring")]:
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(found), found
        assert found["metadata"]["name"].startswith("smtp-dup"), found
    for folder in ("kubernetes", "kubernetes/monitoring"):
        listed = yaml.safe_load((DEPLOY / folder / "kustomization.yaml").read_text("utf-8"))["resources"]
        there = {path.name for path in (DEPLOY / folder).glob("*.yaml")} - {"kustomization.yaml"}
        assert set(listed) == there
    kinds = sorted(found["kind"] for found in OBJECTS)
    assert (kinds.count("StatefulSet"), kinds.count("PodDisruptionBudget")) == (3, 2)
    assert kinds.count("NetworkPolicy") == 3


def check_schema(manifest: dict[str, Any]) -> None:
    """Fail unless Kubernetes' own schema takes it, without a field that it does not know."""
    for version in ("1.29", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda m: f"{m['kind']} {m['metadata']['name']}")
def test_kubernetes_knows_every_field(manifest: dict[str, Any]) -> None:
    """The manifests are what an API server takes, of an old and of the latest version."""
    check_schema(manifest)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w["metadata"]["name"])
def test_pods_are_confined_and_probed(workload: dict[str, Any]) -> None:
    """No rights, a read-only root, probes on ports that exist, volumes that are mounted, variables that are options."""
    spec = workload["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    volumes = {v["name"] for v in pod.get("volumes", [])}
    volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    ports = {port["name"] for port in container["ports"]}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container[name]
        used = probe.get("httpGet") or probe.get("tcpSocket") or {}
        assert not used or used["port"] in ports
        assert used.get("path", "/healthz") in {"/healthz", "/readyz"}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    ours = {v["name"] for v in container["env"] if v["name"].startswith("SMTP_DUP_")}
    assert ours <= VARIABLES
    if container["image"] == "smtp-dup":
        commands.parse(container["args"])
        assert pod["terminationGracePeriodSeconds"] > 900  # the supervisor's drain_seconds


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w["metadata"]["name"])
def test_what_is_kept_on_disk_outlives_its_pod(workload: dict[str, Any]) -> None:
    """Spool, moved bodies and Redis are on claims of a StatefulSet, which also keeps names; no other disk is used."""
    assert workload["kind"] == "StatefulSet"
    assert workload["spec"]["serviceName"] in {o["metadata"]["name"] for o in OBJECTS if o["kind"] == "Service"}
    claims = {claim["metadata"]["name"] for claim in workload["spec"]["volumeClaimTemplates"]}
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    kept = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in claims}
    assert kept == {"/data" if container["image"] != "smtp-dup" else "/var/lib/smtp-dup"}
    for volume in pod.get("volumes", []):
        assert volume.get("emptyDir", {"medium": "Memory"}).get("medium") == "Memory", volume


def test_services_policies_and_budgets_find_their_pods() -> None:
    """Every selector has a pod, every port of a service a port of that pod."""
    pods = [
        (w["spec"]["template"]["metadata"]["labels"], w["spec"]["template"]["spec"]["containers"][0]) for w in WORKLOADS
    ]
    for found in OBJECTS:
        spec = found["spec"]
        selector = {
            "Service": lambda spec: spec["selector"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
        }.get(found["kind"], lambda spec: {})(spec)
        if selector:
            (container,) = (c for labels, c in pods if selector.items() <= labels.items())
            ports = {port["name"] for port in container["ports"]}
            wanted = {port.get("targetPort", port["port"]) for port in spec.get("ports", [])}
            wanted |= {port["port"] for rule in spec.get("ingress", []) for port in rule["ports"]}
            assert wanted <= ports, found["metadata"]["name"]


def test_the_redis_of_the_cluster_keeps_its_word() -> None:
    """It is started with what `smtp-dup check` wants."""
    (redis,) = (w for w in WORKLOADS if w["metadata"]["name"] == "smtp-dup-redis")
    words = redis["spec"]["template"]["spec"]["containers"][0]["args"]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given["--appendonly"] == "yes"
    assert given["--appendfsync"] == "always"
    assert given["--no-appendfsync-on-rewrite"] == "no"
    assert given["--maxmemory-policy"] == "noeviction"


def test_kustomize_builds(tmp_path: Path) -> None:
    """The settings of the base can be used; kubectl builds it, the monitoring, and the overlay of the page."""
    settings = DEPLOY / "kubernetes" / "settings.toml"
    assert load({"config": str(settings)}, {}).backups
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "base")
    (block,) = documents.of("kustomize")
    (tmp_path / "kustomization.yaml").write_text(block.text)
    (page,) = (b for b in documents.blocks() if b.page == "kubernetes.md" and b.language == "toml")
    (tmp_path / "settings.toml").write_text(page.text)
    built = [
        list(yaml.safe_load_all(tool("kubectl", "kustomize", tmp_path / f))) for f in ("base", "base/monitoring", ".")
    ]
    assert [len(found) for found in built] == [len(OBJECTS) + 1, 2, len(OBJECTS) + 1]
    for found in built[2]:
        check_schema(found)
    (config,) = (found for found in built[2] if found["kind"] == "ConfigMap")
    assert tomllib.loads(config["data"]["settings.toml"]) == tomllib.loads(page.text)
    relay = next(w for w in built[2] if w["kind"] == "StatefulSet" and "relay" in w["metadata"]["name"])
    assert relay["spec"]["template"]["spec"]["containers"][0]["image"] == "images.example.com/smtp-dup:0.1.0"


def test_kustomize_adds_the_page(tmp_path: Path) -> None:
    """With the component the relays read the users of a Secret, and a Service and a policy lead to them."""
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "base")
    (tmp_path / "kustomization.yaml").write_text("resources: [base]\ncomponents: [base/page]\n")
    built = list(yaml.safe_load_all(tool("kubectl", "kustomize", tmp_path)))
    for found in built:
        check_schema(found)
    assert [f["kind"] for f in built if f["metadata"]["name"] == "smtp-dup-page"] == ["Service", "NetworkPolicy"]
    relay = next(w for w in built if w["kind"] == "StatefulSet" and "relay" in w["metadata"]["name"])
    container = relay["spec"]["template"]["spec"]["containers"][0]
    (path,) = (v["value"] for v in container["env"] if v["name"] == "SMTP_DUP_STATUS_USERS_FILE")
    (mount,) = (m for m in container["volumeMounts"] if path.startswith(m["mountPath"] + "/"))
    (volume,) = (v for v in relay["spec"]["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert volume["secret"]["secretName"] == "smtp-dup-page"


def test_kustomize_takes_a_redis_of_yours(tmp_path: Path) -> None:
    """With the page's patch, and without redis.yaml, relay and workers go to that Redis with the secret's password."""
    shutil.copytree(DEPLOY / "kubernetes", tmp_path / "base")
    base = tmp_path / "base" / "kustomization.yaml"
    base.write_text(base.read_text("utf-8").replace("  - redis.yaml\n", ""))
    (overlay,), (patch,) = documents.of("kustomize"), documents.of("kustomize-redis")
    (tmp_path / "kustomization.yaml").write_text(overlay.text + patch.text)
    (tmp_path / "settings.toml").write_text("")
    built = list(yaml.safe_load_all(tool("kubectl", "kustomize", tmp_path)))
    workloads = [found for found in built if found["kind"] in {"StatefulSet", "Deployment"}]
    assert len(workloads) == 2
    for found in workloads:
        check_schema(found)
        (container,) = found["spec"]["template"]["spec"]["containers"]
        password, url = container["env"][:2]
        assert password["name"] == "REDIS_PASSWORD"
        assert url["value"] == "rediss://smtp-dup:$(REDIS_PASSWORD)@redis.example.com:6380/0"
        assert [v["name"] for v in container["env"]].count("SMTP_DUP_REDIS_URL") == 1


# Metrics


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The metrics of a running product that has delivered: name -> labels; a histogram under its own name."""
    primary, backup = ScriptedServer().start(), ScriptedServer().start()
    other = ScriptedServer({".": "550 5.7.1 never"}).start()
    gone = free_port()
    routes = f"""
    [[server]]
    name = "gone"
    url = "127.0.0.1:{gone}"
    [[route]]
    name = "redundant"
    match = {{ recipients = "@redundant.example" }}
    primary = ["gone", "first"]
    [[server]]
    name = "other"
    url = "{other.address}"
    [[route]]
    name = "forked"
    match = {{ recipients = "@forked.example" }}
    primary = "other"
    split = "fork"
    """
    instance = Product(
        tmp_path_factory.mktemp("metrics"),
        primary=f"first={primary.address}",
        backups=[backup.address],
        files={"settings.toml": routes},
    )
    try:
        instance.start()
        with instance.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<a@example.net>", 250)
            client.say("RCPT TO:<b@example.com>", 250)
            client.say("RCPT TO:<b@redundant.example>", 452)
            client.say("RSET", 250)
            client.mail("a@example.net", "b@redundant.example")
            client.mail("a@example.net", "b@redundant.example", "b@forked.example")
            primary.replies["."] = "550 5.7.1 not this one"
            client.say("MAIL FROM:<a@example.net>", 250)
            client.say("RCPT TO:<b@redundant.example>", 250)
            client.say("DATA", 354)
            client.say("Subject: x\r\n\r\nx\r\n.", 550)
            del primary.replies["."]
        primary.down()
        with instance.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<a@example.net>", 250)
            client.say("RCPT TO:<b@example.com>", 451)
        primary.listen()
        instance.send("a@example.net", "b@example.com")
        wait_until(lambda: instance.summary(backup.address)["delivered"] == 1)
        wait_until(lambda: "smtpdup_deliveries_total{" in instance.get("/metrics")[1])
        text = instance.get("/metrics")[1]
    finally:
        instance.clean_up()
        for server in (primary, backup, other):
            server.stop()
    found: dict[str, set[str]] = {name: set() for name in re.findall(r"# TYPE (smtpdup_\w+)", text)}
    for sample, labels in re.findall(r"^(smtpdup_\w+?)(?:_bucket|_sum|_count)?\{(.*)\}", text, re.MULTILINE):
        found[sample] |= set(re.findall(r"(\w+)=", labels)) - {"le"}
    return found


def check_expression(expression: str, metrics: dict[str, set[str]]) -> None:
    """Fail unless every metric and every label of it in an expression exists."""
    for name, selector in re.findall(r"(smtpdup_\w+)(?:\{(.*?)\})?", expression):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert base in metrics, f"{name} in {expression}"
        assert (name == base) or f"{base}_total" not in metrics, name
        labels = set(re.findall(r"(\w+)\s*[=!]~?", selector)) - {"job", "instance"}
        assert labels <= metrics[base], f"{labels} of {name}"
    known = set().union(*metrics.values()) | {"job", "instance", "le"}
    for group in re.findall(r"by \((.*?)\)", expression):
        assert set(re.split(r",\s*", group)) <= known, expression


RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))


def test_alerts(metrics: dict[str, set[str]]) -> None:
    """Every metric in a rule exists, every rule says what to do, and the page lists exactly these."""
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    for rule in rules:
        check_expression(rule["expr"], metrics)
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        # Commands that a description names are ours; {{ ... }} is a destination's name.
        text = re.sub(r"\{\{.*?\}\}", "new", rule["annotations"]["description"])
        for code in re.findall(r"`(smtp-dup .*?)`", text, re.DOTALL):
            for words in documents.commands(" ".join(code.split())):
                commands.parse([*words, *(["--all"] if words[-1] == "retry" else [])])
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| (SmtpDup\w+) \|", page) == [rule["alert"] for rule in rules]


def test_the_operator_has_the_same_alerts() -> None:
    """PrometheusRule repeats alerts.yml, since kustomize reads no file from elsewhere."""
    path = DEPLOY / "kubernetes" / "monitoring" / "prometheusrule.yaml"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["spec"] == RULES


def test_promtool_takes_rules_and_configuration(tmp_path: Path) -> None:
    """The rules, and the part of prometheus.yml in operations.md."""
    (block,) = (b for b in documents.blocks() if b.language == "yaml" and "scrape_configs" in b.text)
    content = yaml.safe_load(block.text)
    assert [job["job_name"] for job in content["scrape_configs"]] == ["smtp-dup"]  # as the alerts have it
    (tmp_path / "prometheus.yml").write_text(block.text)
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    tool("promtool", "check", "rules", tmp_path / "alerts.yml")
    tool("promtool", "check", "config", tmp_path / "prometheus.yml")


def test_dashboard(metrics: dict[str, set[str]]) -> None:
    """Every metric in a panel exists; panels have ids of their own and do not overlap."""
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
        for target in panel.get("targets", []):
            check_expression(target["expr"].replace("$__rate_interval", "5m"), metrics)
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            check_expression(variable["query"]["query"], metrics)


def test_the_page_lists_every_metric(metrics: dict[str, set[str]]) -> None:
    """And names none that is not there, on this page or another."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(metrics) == set(re.findall(r"`(smtpdup_\w+)`", page))
    for name, code in documents.inline():
        for metric in re.findall(r"\bsmtpdup_\w+", code):
            assert re.sub(r"_(bucket|sum|count)$", "", metric) in metrics, f"{name}: {metric}"


def test_options_in_alerts_exist() -> None:
    """An option that a description names is one."""
    sections = "|".join({key.partition(".")[0] for key in BY_KEY if "." in key})
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(rf"\b(?:{sections})\.[a-z_]+\b", text)) <= set(BY_KEY)
