#!/usr/bin/env python3
"""Holds deploy/ against Kubernetes' and the operators' schemas, against itself,
and against a live worker.

Run by scripts/deploy-check.sh, which brings the tools.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import grpc
import kubernetes_validate
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import chart
import kserve
import queries
from worker import Worker

KUBERNETES = "1.34"
DEPLOY = pathlib.Path("deploy")
MONITORING = DEPLOY / "components/monitoring"
CUSTOM = {"monitoring.coreos.com/v1", "keda.sh/v1alpha1"}
# Each combination of one of each must build and validate.
AXES = [["cpu", "gpu"], [[], ["monitoring", "hpa"], ["monitoring", "keda"]],
        [[], "model-from-hub", "model-from-pvc"], [[], "mtls"]]
# From docs/benchmarks.md: MiB that a worker of imagegpt-small has mapped and has of
# its own beside keys and values (`make bench-memory`).
WORKER_MIB = 330 + 369
# Left for the process to exit and the kubelet to see it.
EXIT_SECONDS = 5

passed, failed = 0, 0


def check(name, problems):
    """Counts one check and prints what is wrong."""
    global passed, failed
    problems = list(problems)
    if problems:
        failed += 1
        print(f"FAILED {name}")
        for problem in problems:
            print(f"    {problem}")
    else:
        passed += 1
        print(f"ok     {name}")


# What is built.

def flat(names):
    for name in names:
        yield from [name] if isinstance(name, str) else name


def kustomize(kubectl, folder):
    built = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{folder}: {built.stderr.strip()}")
    return [resource for resource in yaml.safe_load_all(built.stdout) if resource]


def combinations(scratch):
    """A folder for each combination of components."""
    for idx, choice in enumerate(itertools.product(*AXES)):
        components = list(flat(choice))
        folder = scratch / str(idx)
        folder.mkdir()
        up = pathlib.Path("../../../../") / DEPLOY
        folder.joinpath("kustomization.yaml").write_text(yaml.safe_dump({
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
            "resources": [str(up / "base")],
            "components": [str(up / "components" / component) for component in components]}))
        yield "+".join(components), folder


def documented(scratch):
    """The overlay that deploy/README.md shows."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DEPLOY / "README.md").read_text(), re.M | re.S)
    text = next(block for block in blocks if "kind: Kustomization" in block)
    folder = scratch / "documented"
    folder.mkdir()
    text = text.replace("imagegpt-worker/deploy/", "../../../../deploy/").replace("sha256:…", "sha256:" + 64 * "0")
    (folder / "kustomization.yaml").write_text(text)
    return folder


def build(tools):
    """Everything that can be applied: name -> resources."""
    kubectl = tools / "layer/kubectl/kubectl"
    folders = {str(path.parent.relative_to(DEPLOY)): path.parent
               for group in ("overlays", "jobs") for path in sorted(DEPLOY.glob(f"{group}/*/kustomization.yaml"))}
    with tempfile.TemporaryDirectory(dir=tools) as scratch:
        folders |= {f"combination {name}": folder for name, folder in combinations(pathlib.Path(scratch))}
        folders["deploy/README.md's overlay"] = documented(pathlib.Path(scratch))
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(folders, pool.map(lambda folder: kustomize(kubectl, folder), folders.values())))


# Schemas.

def schema_problems(resources):
    for resource in resources:
        if resource["apiVersion"] in CUSTOM:
            continue
        try:
            kubernetes_validate.validate(resource, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            yield f"{resource['kind']} {resource['metadata']['name']}: {path}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield error.message


def custom_problems(tools, resources):
    custom = [resource for resource in resources if resource["apiVersion"] in CUSTOM]
    run = subprocess.run(["node", DEPLOY / "check/custom-resources.mjs", tools], input=json.dumps(custom),
                         capture_output=True, text=True)
    if run.returncode:
        yield from run.stderr.strip().splitlines() or ["node failed"]


def schema_self_problems(tools, built):
    """The schemas find mistakes."""
    deployment = copy.deepcopy(kinds(built["overlays/cpu"], "Deployment")[0])
    deployment["spec"]["replica"] = 2
    if not list(schema_problems([deployment])):
        yield "a Deployment may have an unknown field"
    for overlay, kind, path, value in [("keda", "ScaledObject", ("spec", "triggers"), "none"),
                                       ("keda", "PodMonitor", ("spec", "podMetricsEndpoints"), [{"interval": 15}]),
                                       ("keda", "PrometheusRule", ("spec", "groups"), [{"rules": []}])]:
        resource = copy.deepcopy(kinds(built[f"overlays/{overlay}"], kind)[0])
        resource[path[0]][path[1]] = value
        if not list(custom_problems(tools, [resource])):
            yield f"nothing was found wrong with {kind} {path[1]} {value}"


# Against itself.

def kinds(resources, kind):
    return [resource for resource in resources if resource["kind"] == kind]


def pod_specs(resources):
    for resource in resources:
        if "template" in resource.get("spec", {}):
            yield resource, resource["spec"]["template"]["spec"]


def restricted_problems(resources):
    """The restricted profile of Pod Security, and what it does not ask for: a
    read-only root and no token."""
    for resource, pod in pod_specs(resources):
        name = f"{resource['kind']} {resource['metadata']['name']}"
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{name} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name} has no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{name} mounts a token"
        allowed = {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        for volume in pod.get("volumes", []):
            if not set(volume) - {"name"} <= allowed:
                yield f"{name} has a volume of another kind: {volume}"
        for container in pod["containers"] + pod.get("initContainers", []):
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name} keeps privileges"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name} can write to its root"
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            if limits["memory"] != requests["memory"]:
                yield f"{name} may be killed for memory that it was not promised"


def labels_match(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def reference_problems(resources):
    """Selectors that select pods, ports that exist, names that are there."""
    pods = [(resource, resource["spec"]["template"]) for resource, _ in pod_specs(resources)]
    for resource in resources:
        kind, spec, name = resource["kind"], resource.get("spec", {}), resource["metadata"]["name"]
        selector = {"Service": spec.get("selector"),
                    "PodDisruptionBudget": spec.get("selector", {}).get("matchLabels"),
                    "PodMonitor": spec.get("selector", {}).get("matchLabels"),
                    "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels")}.get(kind)
        if selector is not None:
            chosen = [template for _, template in pods if labels_match(selector, template["metadata"]["labels"])]
            if not chosen:
                yield f"{kind} {name} selects no pod"
            ports = {port["name"] for template in chosen for container in template["spec"]["containers"]
                     for port in container.get("ports", [])}
            named = [port.get("targetPort") for port in spec.get("ports", [])]
            named += [endpoint.get("port") for endpoint in spec.get("podMetricsEndpoints", [])]
            named += [port.get("port") for rule in spec.get("ingress") or [] for port in rule.get("ports", [])]
            for port in named:
                if isinstance(port, str) and port not in ports:
                    yield f"{kind} {name} names the port {port}, which its pods do not have"
        target = spec.get("scaleTargetRef")
        if target:
            deployments = [d for d in kinds(resources, target["kind"]) if d["metadata"]["name"] == target["name"]]
            if not deployments:
                yield f"{kind} {name} scales {target['name']}, which is not there"
            elif "replicas" in deployments[0]["spec"]:
                yield f"{kind} {name} and the Deployment both say how many"
    names = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    for resource, pod in pod_specs(resources):
        for container in pod["containers"]:
            for source in container.get("envFrom", []):
                if "configMapRef" in source and ("ConfigMap", source["configMapRef"]["name"]) not in names:
                    yield f"{resource['metadata']['name']} reads settings that are not there"
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{resource['metadata']['name']} mounts {mount['name']}, which is not there"


def place_problems(resources):
    """Objects that would be made in whatever namespace kubectl happens to be in,
    or that the pool's label does not find."""
    places = {resource["metadata"]["namespace"] for resource in kinds(resources, "Deployment") + kinds(resources, "Job")}
    for resource in resources:
        metadata, name = resource["metadata"], f"{resource['kind']} {resource['metadata']['name']}"
        place = metadata["name"] if resource["kind"] == "Namespace" else metadata.get("namespace")
        if {place} != places:
            yield f"{name} is in the namespace {place}, and the pods are in {', '.join(sorted(places))}"
        if "app.kubernetes.io/part-of" not in metadata.get("labels", {}):
            yield f"{name} has no label app.kubernetes.io/part-of"


def documented_problems(built):
    """The README's overlay changes what it says it changes."""
    resources = built["deploy/README.md's overlay"]
    _, container, environment = next(settings(resources))
    if environment["IMAGEGPT_MODEL"] != "/models/imagegpt-small-2":
        yield f"the model is {environment['IMAGEGPT_MODEL']}"
    if not container["image"].startswith("REGISTRY/imagegpt-worker@sha256:"):
        yield f"the image is {container['image']}"


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", text).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]


def mebibytes(text):
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi|MiB|GiB)", text).groups()
    return int(number) * {"M": 1, "G": 1024}[unit[0]]


def whole(quantity):
    """CPUs as the downward API gives them: rounded up."""
    text = str(quantity)
    return str(-(-int(text.removesuffix("m")) // 1000)) if text.endswith("m") else text


def settings(resources):
    """The worker's environment as Kubernetes would give it."""
    for deployment in kinds(resources, "Deployment"):
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        found = {}
        for source in container.get("envFrom", []):
            # The contents of secrets are not here.
            if "configMapRef" not in source:
                continue
            config = next(c for c in kinds(resources, "ConfigMap")
                          if c["metadata"]["name"] == source["configMapRef"]["name"])
            found |= config["data"]
        for variable in container.get("env", []):
            field = variable.get("valueFrom", {}).get("resourceFieldRef")
            if field:
                limits, resource = field["resource"].split(".")
                found[variable["name"]] = whole(container["resources"][limits][resource])
        yield deployment, container, found


def arithmetic_problems(resources):
    """Times and sizes that must fit into each other."""
    for deployment, container, environment in settings(resources):
        pod = deployment["spec"]["template"]["spec"]
        pre_stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        delay = seconds(environment["IMAGEGPT_SHUTDOWN_DELAY"])
        drain = seconds(environment["IMAGEGPT_SHUTDOWN_GRACE_PERIOD"])
        needed = pre_stop + delay + drain + EXIT_SECONDS
        if pod["terminationGracePeriodSeconds"] < needed:
            yield f"terminationGracePeriodSeconds is {pod['terminationGracePeriodSeconds']}, under {needed:g}"
        readiness = container["readinessProbe"]
        noticed = readiness["periodSeconds"] * readiness["failureThreshold"]
        if delay < noticed:
            yield f"the worker stops taking after {delay:g} s, before readiness has failed ({noticed} s)"
        startup = container["startupProbe"]
        longest = startup["periodSeconds"] * startup["failureThreshold"]
        if deployment["spec"]["progressDeadlineSeconds"] <= longest:
            yield f"a start may take {longest} s, longer than progressDeadlineSeconds"
        decoders = int(environment["IMAGEGPT_PREPROCESS_THREADS"])
        memory = (WORKER_MIB + mebibytes(environment["IMAGEGPT_BYTES_IN_FLIGHT_MAX"])
                  + decoders * mebibytes(environment["IMAGEGPT_DECODE_BYTES_MAX"]))
        if environment.get("IMAGEGPT_EXECUTION_PROVIDER") != "cuda":
            memory += mebibytes(environment["IMAGEGPT_GENERATE_CACHE_BYTES"])
        if mebibytes(container["resources"]["limits"]["memory"]) < memory:
            yield f"memory is {container['resources']['limits']['memory']}, under the {memory} MiB that flags allow"


def job_problems(built):
    """The dataset job's numbers and addresses, against each other and the pool."""
    embed = kinds(built["jobs/embed"], "Job")
    service = next(s for s in kinds(built["overlays/cpu"], "Service") if s["spec"].get("clusterIP") == "None")
    metadata, port = service["metadata"], service["spec"]["ports"][0]["port"]
    address = f"http://{metadata['name']}.{metadata['namespace']}.svc.cluster.local:{port}"
    indexed = next(job for job in embed if job["spec"].get("completionMode") == "Indexed")
    finish = next(job for job in embed if job is not indexed)
    if "backoffLimitPerIndex" not in indexed["spec"]:
        yield "the job has no backoffLimitPerIndex"
    args, finish_args = (job["spec"]["template"]["spec"]["containers"][0]["args"] for job in (indexed, finish))
    shards = args[args.index("--shards") + 1]
    if int(shards) != indexed["spec"]["completions"]:
        yield f"--shards {shards}, but {indexed['spec']['completions']} completions"
    if args[args.index("--endpoint") + 1] != address:
        yield f"the headless service is {address}"
    if args[args.index("--output") + 1] != finish_args[finish_args.index("--output") + 1]:
        yield "the finishing job finishes another output"
    if not finish["spec"]["suspend"] or "--finish" not in finish_args:
        yield "the finishing job does not wait, or does not finish"
    labels = indexed["spec"]["template"]["metadata"]["labels"]
    policy = next(p for p in kinds(built["overlays/cpu"], "NetworkPolicy"))
    if not any(labels_match(peer.get("podSelector", {}).get("matchLabels", {"": ""}), labels)
               for rule in policy["spec"]["ingress"] for peer in rule["from"]):
        yield "the pool's NetworkPolicy does not let the job in"


# Against the worker.

def environment_problems(binary, built):
    """Variables that no flag has."""
    manual = subprocess.run([binary, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"\[env:\s+([A-Z_]+)", manual))
    for name, resources in built.items():
        for _, _, environment in settings(resources):
            for variable in environment:
                if variable.startswith("IMAGEGPT_") and variable not in known:
                    yield f"{name}: no flag has {variable}"


def command_problems(binary, built):
    """Jobs whose commands the program does not know."""
    for name, resources in built.items():
        for job in kinds(resources, "Job"):
            container = job["spec"]["template"]["spec"]["containers"][0]
            command, *args = container["args"]
            manual = subprocess.run([binary, command, "--help"], capture_output=True, text=True)
            where = f"{name}: {job['metadata']['name']}"
            if manual.returncode:
                # A worker built before the command was there has nothing to compare.
                print(f"NOTE   {where}: this program has no `imagegpt {command}`; the job's flags were not compared")
                continue
            words = set(re.findall(r"(--[a-z-]+|\[env: [A-Z_]+)", re.sub(r"\s+", " ", manual.stdout)))
            wanted = [arg for arg in args if arg.startswith("--")]
            wanted += [f"[env: {variable['name']}" for variable in container.get("env", [])
                       if variable["name"].startswith("IMAGEGPT_")]
            for word in wanted:
                if word not in words:
                    yield f"{where}: `imagegpt {command}` knows no {word.removeprefix('[env: ')}"


def certificates(folder):
    """One that signs itself, for the worker and as the clients' authority."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=check", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", folder / "tls.key", "-out", folder / "tls.crt"], check=True, capture_output=True)
    (folder / "ca.crt").write_bytes((folder / "tls.crt").read_bytes())


def start_problems(binary, built):
    """Each set of settings starts a worker, and its probes are answered. The
    engine is fake, and addresses and paths are this machine's."""
    seen = set()
    for name, resources in built.items():
        for _, container, environment in settings(resources):
            probes = {kind: container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
            key = json.dumps([environment, probes], sort_keys=True)
            if key in seen:
                continue
            seen.add(key)
            with tempfile.TemporaryDirectory() as scratch:
                scratch = pathlib.Path(scratch)
                certificates(scratch)
                local = {variable: f"{scratch}/{file}" if folder in ("/tls", "/auth") else value
                         for variable, value in environment.items()
                         for folder, _, file in [value.rpartition("/")]}
                if "IMAGEGPT_AUTH_TOKENS_FILE" in local:
                    pathlib.Path(local["IMAGEGPT_AUTH_TOKENS_FILE"]).write_text("a-token-of-32-characters-or-more\n")
                try:
                    with Worker(binary, environment=local) as worker:
                        worker.until_ready()
                        for kind, probe in probes.items():
                            problem = probe_problem(worker, container, probe)
                            if problem:
                                yield f"{name}: {kind}: {problem}"
                except RuntimeError as error:
                    yield f"{name}: {error}"


def probe_problem(worker, container, probe):
    """What the kubelet would see of a worker that is ready."""
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    local = {50051: worker.grpc, 9090: worker.metrics}
    if "grpc" in probe:
        with grpc.insecure_channel(f"127.0.0.1:{local[probe['grpc']['port']]}") as channel:
            request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
            try:
                status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"]).status
            except grpc.RpcError as error:
                return f"{probe['grpc']['service']}: {error.code().name}"
            return None if status == health_pb2.HealthCheckResponse.SERVING else f"{probe['grpc']['service']}: {status}"
    if local[ports[probe["httpGet"]["port"]]] != worker.metrics:
        return "not the metrics port"
    status, text = worker.get(probe["httpGet"]["path"])
    return None if status == 200 else f"{probe['httpGet']['path']}: {status} {text}"


# Rules, dashboard, scalers.

def rule_groups():
    return yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]


def promtool(folder, *args):
    run = subprocess.run(["promtool", *args], cwd=folder, capture_output=True, text=True)
    return [] if run.returncode == 0 else (run.stdout + run.stderr).strip().splitlines()


def dashboard_queries(dashboard):
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$namespace", "imagegpt")


def scaler_queries(built):
    for scaled in kinds(built["overlays/keda"], "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            yield f"keda {trigger['name']}", trigger["metadata"]["query"]
    adapter = yaml.safe_load((DEPLOY / "components/hpa/adapter.yaml").read_text())
    for rule in adapter["externalRules"]:
        yield f"adapter {rule['name']['as']}", rule["seriesQuery"]


def scaler_problems(built):
    """HPA, adapter, recording rules and KEDA say the same thing."""
    adapter = yaml.safe_load((DEPLOY / "components/hpa/adapter.yaml").read_text())["externalRules"]
    recorded = {rule["record"]: rule["expr"] for group in rule_groups()["groups"] for rule in group["rules"]
                if "record" in rule}
    hpa = kinds(built["overlays/hpa"], "HorizontalPodAutoscaler")[0]["spec"]
    keda = kinds(built["overlays/keda"], "ScaledObject")[0]["spec"]
    if [m["external"]["metric"]["name"] for m in hpa["metrics"]] != [rule["name"]["as"] for rule in adapter]:
        yield "the HPA's metrics are not the adapter's"
    if hpa["behavior"] != keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]:
        yield "HPA and KEDA behave differently"
    if (hpa["minReplicas"], hpa["maxReplicas"]) != (keda["minReplicaCount"], keda["maxReplicaCount"]):
        yield "HPA and KEDA have different bounds"
    for metric, rule, trigger in zip(hpa["metrics"], adapter, keda["triggers"]):
        target = metric["external"]["target"]
        if target["type"] != "AverageValue" or trigger["metricType"] != "AverageValue":
            yield f"{trigger['name']} is not divided by the number of pods"
        if int(target["averageValue"].removesuffix("m")) / 1000 != float(trigger["metadata"]["threshold"]):
            yield f"{trigger['name']}: HPA and KEDA aim at different values"

        def bare(query):
            query = query.replace('namespace="imagegpt",', "").replace('{namespace="imagegpt"}', "")
            return re.sub(r"\s+", "", query.replace("sum by (namespace) ", "sum"))

        if bare(recorded[rule["seriesQuery"]]) != bare(trigger["metadata"]["query"]):
            yield f"{trigger['name']}: the recorded query is not KEDA's"


def alert_problems():
    """Each alert is tested, firing and not, and has its paragraph."""
    alerts = {rule["alert"]: rule for group in rule_groups()["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    fires, is_quiet = set(), set()
    for test in tests:
        for case in test.get("alert_rule_test", []):
            (fires if case.get("exp_alerts") else is_quiet).add(case["alertname"])
    runbook = (DEPLOY / "RUNBOOK.md").read_text()
    headings = set(re.findall(r"^#+ (ImageGpt\w+)$", runbook, re.M))
    for name, rule in alerts.items():
        if name not in fires:
            yield f"no test makes {name} fire"
        if name not in is_quiet:
            yield f"no test keeps {name} quiet"
        if rule["annotations"]["runbook_url"] != f"deploy/RUNBOOK.md#{name.lower()}" or name not in headings:
            yield f"{name} has no paragraph in deploy/RUNBOOK.md"
    for name in headings - set(alerts):
        yield f"deploy/RUNBOOK.md explains {name}, which is no alert"


def thresholds(runbook):
    """The rows of the runbook's tables of thresholds, as lists of cells."""
    section = runbook.split("\n## Thresholds\n", 1)[-1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return [row for row in rows if row[0] != "symptom"]


def threshold_problems(runbook, dashboard):
    """Each alert is a row with its own expression, under its severity and with its time; other rows have
    expressions of the dashboard."""
    alerts = {rule["alert"]: rule for group in rule_groups()["groups"] for rule in group["rules"] if "alert" in rule}
    shown = {target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])}
    found = set()
    for symptom, expression, warning, critical, reason, step in thresholds(runbook):
        expression = expression.strip("`")
        link = re.search(r"\(#(\w+)\)", symptom)
        if not (symptom and reason and step and (warning or critical)):
            yield f"the threshold of {symptom} lacks a value, a reason or a step"
        if not link:
            if expression not in shown:
                yield f"the dashboard has no {expression}"
            continue
        name = next((name for name in alerts if name.lower() == link[1]), None)
        if name is None:
            yield f"{link[1]} is no alert"
            continue
        found.add(name)
        rule = alerts[name]
        if expression != " ".join(rule["expr"].split()):
            yield f"the expression of {name} is not that of rules.yaml"
        values = {"warning": warning, "critical": critical}
        value = values.pop(rule["labels"]["severity"])
        if not value or any(values.values()):
            yield f"{name} is {rule['labels']['severity']} in rules.yaml"
        number, unit = re.fullmatch(r"(\d+)([mh])", rule.get("for", "0m")).groups()
        time = f"{number} {'min' if unit == 'm' else 'h'}"
        # Beside days the ten minutes only bridge a moment.
        if number != "0" and time not in value and "days" not in value:
            yield f"{name} waits for {time}"
    for name in sorted(set(alerts) - found):
        yield f"{name} has no row among the thresholds of deploy/RUNBOOK.md"


def metric_problems(exported, named):
    recorded = {rule["record"] for group in rule_groups()["groups"] for rule in group["rules"] if "record" in rule}
    for where, query in named:
        for problem in queries.problems(query, exported, recorded):
            yield f"{where}: {problem}"


def unseen_problems(exported, named):
    """Metrics that an operator would never see."""
    seen = {name for _, query in named for name, _ in queries.selectors(query)}
    for name in sorted(exported):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        if not seen & {base, f"{base}_bucket", f"{base}_sum", f"{base}_count"}:
            yield f"neither dashboard nor rules show {name}"


def gpu_only_problems(exported):
    """What is taken on trust of a worker on a GPU is in its source, all of it, and
    is not what every worker exports."""
    source = pathlib.Path("src/serve/metrics/gpu.rs").read_text()
    made = set(re.findall(r'device_gauge\(\s*"(imagegpt_\w+)"', source))
    for name in sorted(made ^ set(queries.GPU_ONLY)):
        yield f"{name} is not both in src/serve/metrics/gpu.rs and in queries.py"
    for name in sorted(set(exported) & set(queries.GPU_ONLY)):
        yield f"{name} is exported without a GPU"


def self_problems(exported):
    """The check finds what it looks for."""
    wrong = ["imagegpt_request_total", 'imagegpt_requests_total{code="EXHAUSTED"}', "sum by (clas) (imagegpt_ready)",
             'imagegpt_requests_total{code=~"OK|INTERNL"}', 'imagegpt_ready{method="Embed"}',
             "rate(imagegpt_queue_duration_seconds[1m])", "sum(nonsense)"]
    for query in wrong:
        if not list(queries.problems(query, exported, set())):
            yield f"nothing was found wrong with {query}"


def monitoring(binary, built):
    spec = importlib.util.spec_from_file_location("make_dashboard", MONITORING / "make_dashboard.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    check("the dashboard is what make_dashboard.py writes",
          [] if dashboard == maker.dashboard() else ["run deploy/components/monitoring/make_dashboard.py"])
    shown = list(dashboard_queries(dashboard))
    scaled = list(scaler_queries(built))
    rules = [(rule.get("alert") or rule["record"], rule["expr"])
             for group in rule_groups()["groups"] for rule in group["rules"]]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        (scratch / "rules.yaml").write_text(yaml.safe_dump(rule_groups()))
        check("promtool: rules", promtool(scratch, "check", "rules", "rules.yaml"))
        (scratch / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": [
            {"record": f"query:{idx}", "expr": query} for idx, (_, query) in enumerate(shown + scaled)]}]}))
        check("promtool: queries of dashboard and scalers", promtool(scratch, "check", "rules", "queries.yaml"))
        (scratch / "rules_test.yaml").write_text((MONITORING / "rules_test.yaml").read_text())
        check("promtool: unit tests of the rules", promtool(scratch, "test", "rules", "rules_test.yaml"))
    check("each alert has tests and a paragraph in the runbook", alert_problems())
    runbook = (DEPLOY / "RUNBOOK.md").read_text()
    check("the runbook's thresholds are those of the alerts and of the dashboard",
          threshold_problems(runbook, dashboard))
    planted = runbook.replace("> 0.05`", "> 0.5`").replace("2 digests or more for 1 h", "2 digests or more")
    planted = planted.replace("](#imagegptrunsfail)", "](#imagegptrunsfailed)")
    check("a wrong threshold is found", [] if len(list(threshold_problems(planted, dashboard))) >= 5 else ["none is"])
    check("HPA and KEDA scale alike", scaler_problems(built))
    with Worker(binary) as worker:
        worker.until_ready()
        # Some histograms have no series before their first value.
        subprocess.run([binary, "bench", "saturate", "--endpoint", f"http://127.0.0.1:{worker.grpc}", "--images",
                        "models/pictures/animals-nature", "--requests", "20", "--warm-up", "0s"],
                       check=True, capture_output=True)
        exported = worker.exported()
    check("metrics that only a worker on a GPU has are those of its source", gpu_only_problems(exported))
    exported |= queries.GPU_ONLY
    named = rules + shown + scaled
    check(f"what {len(named)} queries name is exported by a live worker", metric_problems(exported, named))
    check("every metric of the worker is on the dashboard or in a rule", unseen_problems(exported, named))
    check("the check of names finds mistakes", self_problems(exported))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=pathlib.Path, required=True)
    parser.add_argument("--worker", required=True)
    args = parser.parse_args()
    print(f"worker: {args.worker}")
    built = build(args.tools)
    built |= chart.checked(args.tools, check, built)
    built["deploy/kserve"] = kserve.as_deployment()
    check("KServe's runtime has the overlay cpu's settings", kserve.problems(built["overlays/cpu"]))
    for name, resources in built.items():
        if name.startswith("combination"):
            continue
        check(f"{name}: {len(resources)} resources, Kubernetes {KUBERNETES}", schema_problems(resources))
    combined = {name: resources for name, resources in built.items() if name.startswith("combination")}
    check(f"{len(combined)} combinations of components, Kubernetes {KUBERNETES}",
          (f"{name}: {problem}" for name, resources in combined.items() for problem in schema_problems(resources)))
    distinct = {json.dumps(r, sort_keys=True): r for resources in built.values() for r in resources}
    check("custom resources", custom_problems(args.tools, distinct.values()))
    check("schemas find mistakes", schema_self_problems(args.tools, built))
    for name, problems in [("pods are restricted", restricted_problems),
                           ("selectors, ports and names lead somewhere", reference_problems),
                           ("all objects are in the pool's namespace", place_problems),
                           ("times and memory add up", arithmetic_problems)]:
        check(name, (f"{where}: {problem}" for where, resources in built.items() for problem in problems(resources)))
    check("deploy/README.md's overlay does what it says", documented_problems(built))
    check("the dataset job fits itself and the pool", job_problems(built))
    check("each variable is a flag of the worker", environment_problems(args.worker, built))
    check("each job's command is one of the program's", command_problems(args.worker, built))
    check("the worker starts with each overlay's settings and answers its probes",
          start_problems(args.worker, built))
    monitoring(args.worker, built)
    print(f"\n{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
