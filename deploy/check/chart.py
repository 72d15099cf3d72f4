"""The Helm chart, held against Kustomize's objects and against odd values."""

import copy
import importlib.util
import os
import pathlib
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import yaml

CHART = pathlib.Path("deploy/chart")
OVERLAYS = pathlib.Path("deploy/overlays")
README = pathlib.Path("deploy/README.md")
# What Helm's conventions add to each object, and Kustomize's objects do not have.
LABELS = {"helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/instance"}
ADDED = LABELS | {"helm.sh/resource-policy"}
# Lists whose order means nothing: a merged patch goes before or after.
UNORDERED = {"volumes", "volumeMounts", "env"}
# The values that are each of Kustomize's components.
COMPONENTS = {
    "cpu": {},
    "gpu": {"gpu": {"enabled": True}},
    "hpa": {"autoscaling": {"enabled": True, "provider": "hpa"}},
    "keda": {"autoscaling": {"enabled": True, "provider": "keda"}},
    "model-from-hub": {"model": {"source": "hub"}},
    "model-from-pvc": {"model": {"source": "volume"}},
    "monitoring": {"monitoring": {"enabled": True}},
    "mtls": {"tls": {"enabled": True}},
}
EVERYTHING = {
    "gpu": {"enabled": True, "count": 2, "runtimeClassName": ""}, "model": {"source": "volume"},
    "tls": {"enabled": True}, "auth": {"enabled": True},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True, "provider": "keda", "minReplicas": 1, "maxReplicas": 3},
}
LONG = "a-release-whose-name-has-as-many-as-50-characters."[:49] + "x"
# Values that a platform engineer may write: release, namespace, values.
ODD = {
    "five replicas": ("imagegpt", "imagegpt", {
        "replicaCount": 5, "autoscaling": {"enabled": False}, "podDisruptionBudget": {"maxUnavailable": "25%"},
        "updateStrategy": {"type": "Recreate"}}),
    "few objects": ("imagegpt", "imagegpt", {
        "podDisruptionBudget": {"enabled": False}, "networkPolicy": {"enabled": False},
        "serviceAccount": {"create": False}, "monitoring": {"enabled": True, "rules": False, "dashboard": False}}),
    "a long release name": (LONG, "other", EVERYTHING),
    "another name": ("blue", "other", {"nameOverride": "pictures", "autoscaling": {"enabled": True},
                                       "monitoring": {"enabled": True}}),
    "arguments and numbers": ("imagegpt", "imagegpt", {
        "extraArgs": ["--head=two words=/heads/a b.safetensors", "--grpc-web", "{{ .Values.x }}: '\"", "true"],
        "settings": {"IMAGEGPT_IMAGE_PIXELS_MAX": 12000000, "IMAGEGPT_GRPC_WEB": True,
                     "IMAGEGPT_INTRA_OP_THREADS": "1", "IMAGEGPT_SHUTDOWN_DELAY": "1m"},
        "extraEnv": [{"name": "RUST_BACKTRACE", "value": "1"}],
        "extraEnvFrom": [{"secretRef": {"name": "more", "optional": True}}],
        "extraVolumes": [{"name": "heads", "configMap": {"name": "heads"}}],
        "extraVolumeMounts": [{"name": "heads", "mountPath": "/heads", "readOnly": True}]}),
    "a hub, TLS without clients' certificates, and tokens": ("imagegpt", "imagegpt", {
        "model": {"source": "hub", "hub": {"repository": "openai/imagegpt-medium", "cacheLimit": "20Gi"}},
        "tls": {"enabled": True, "clientAuth": False, "secretName": "certificate"}, "auth": {"enabled": True},
        "startupSeconds": 1801}),
    "tokens, and a place for pods": ("imagegpt", "imagegpt", {
        "auth": {"enabled": True, "key": "workers.txt"},
        "model": {"source": "volume", "volume": {"existingClaim": "models", "path": "/models/v2"}},
        "image": {"repository": "registry.example:5000/a/worker", "digest": "sha256:" + 64 * "a",
                  "pullPolicy": "IfNotPresent"},
        "imagePullSecrets": [{"name": "registry"}],
        "resources": {"requests": {"cpu": "500m", "memory": "4Gi"}, "limits": {"cpu": 2, "memory": "4Gi"}},
        "nodeSelector": {"disk": "fast"}, "tolerations": [{"operator": "Exists"}], "priorityClassName": "high",
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 1, "preference": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}}]}},
        "topologySpreadConstraints": [{"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}],
        "commonLabels": {"team": "vision", "app.kubernetes.io/part-of": "search"},
        "commonAnnotations": {"owner": "a: b"}, "podLabels": {"tier": "1"}, "podAnnotations": {"note": "yes"},
        "deploymentAnnotations": {"note": "no"}, "service": {"type": "LoadBalancer", "port": 443},
        "serviceAccount": {"name": "own", "annotations": {"role": "reader"}},
        "networkPolicy": {"clientLabels": {"role": "caller"}, "metricsNamespace": "observability",
                          "extraEgress": [{"ports": [{"port": 4317}]}]}}),
}
# Values that must be refused, and a word of the reason.
REFUSED = {
    "an unknown value": ({"replicas": 3}, "replicas"),
    "a word for a number": ({"replicaCount": "two"}, "replicaCount"),
    "an unknown source": ({"model": {"source": "s3"}}, "source"),
    "a digest without sha256": ({"image": {"digest": "abc"}}, "digest"),
    "bounds in the wrong order": ({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}},
                                  "autoscaling.maxReplicas"),
    "a drain that cannot be added up": ({"settings": {"IMAGEGPT_SHUTDOWN_DELAY": "1m 30s"}},
                                        "terminationGracePeriodSeconds"),
    "a model outside of its volume": ({"model": {"source": "volume", "volume": {"path": "/data/model"}}}, "path"),
}


class Refused(Exception):
    """Helm's own error."""


class Helm:
    """`helm` without a cluster and without a home."""

    def __init__(self, tools):
        self.program = tools / "layer/helm/helm"

    def run(self, *arguments, values=None):
        with tempfile.TemporaryDirectory() as home:
            environment = os.environ | {name: home for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")}
            # No file of kubectl's may have a say.
            environment["KUBECONFIG"] = str(pathlib.Path(home) / "none")
            if values is not None:
                own = pathlib.Path(home) / "values.yaml"
                own.write_text(yaml.safe_dump(values))
                arguments = (*arguments, "--values", own)
            done = subprocess.run([self.program, *arguments], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise Refused(done.stderr.strip())
        return done.stdout

    def template(self, values, release="imagegpt", namespace="imagegpt", files=()):
        """The objects of a release, and the namespace that Kustomize makes too."""
        flags = [flag for file in files for flag in ("--values", file)]
        text = self.run("template", release, CHART, "--namespace", namespace, *flags,
                        "--set", "namespace.create=true", values=values)
        return [resource for resource in yaml.safe_load_all(text) if resource]


def merged(fragments):
    """Values of several components, which share no value."""
    found = {}
    for fragment in fragments:
        for name, value in fragment.items():
            found[name] = found.get(name, {}) | value
    return found


def documented():
    """The values that deploy/README.md shows."""
    blocks = re.findall(r"^```yaml\n(# my-values.*?)^```", README.read_text(), re.M | re.S)
    return yaml.safe_load(blocks[0].replace("sha256:…", "sha256:" + 64 * "0"))


def renders(tools, combinations):
    """The chart's objects: of the overlays, of the combinations of components,
    which are named as in check.py, and of odd values."""
    helm = Helm(tools)
    wanted = {f"overlays/{file.stem}": ({}, "imagegpt", "imagegpt", [file])
              for file in sorted(CHART.glob("values/*.yaml"))}
    for name in combinations:
        parts = name.removeprefix("combination ").split("+")
        wanted[name] = (merged(COMPONENTS[part] for part in parts), "imagegpt", "imagegpt", [])
    wanted["defaults"] = ({}, "imagegpt", "imagegpt", [])
    for name, (release, namespace, values) in ODD.items():
        wanted[f"odd {name}"] = (values, release, namespace, [])
    wanted["odd deploy/README.md's values"] = (documented(), "imagegpt", "imagegpt", [])
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(lambda what: helm.template(*what), wanted.values())))


def odd(rendered):
    """The objects that Kustomize has no equal of, for the checks of check.py."""
    return {f"chart, {name.removeprefix('odd ')}": resources
            for name, resources in rendered.items() if name.startswith("odd ")}


# Against Kustomize.

def plain(value, key=""):
    """A value without what Helm adds, and in an order that means something."""
    if isinstance(value, dict):
        kept = {name: plain(part, name) for name, part in value.items() if name not in ADDED}
        return {name: part for name, part in kept.items() if name != "annotations" or part}
    if isinstance(value, list):
        parts = [plain(part) for part in value]
        if key in UNORDERED:
            parts.sort(key=lambda part: (part["name"], part.get("mountPath", "")))
        return parts
    return value


def differences(ours, charts, path=""):
    """Each field in which Kustomize's object and the chart's differ."""
    if isinstance(ours, dict) and isinstance(charts, dict):
        for name in sorted(ours.keys() | charts.keys()):
            where = f"{path}.{name}" if path else name
            if name not in charts:
                yield f"{where}: only Kustomize has it: {ours[name]!r:.200}"
            elif name not in ours:
                yield f"{where}: only the chart has it: {charts[name]!r:.200}"
            else:
                yield from differences(ours[name], charts[name], where)
    elif isinstance(ours, list) and isinstance(charts, list) and len(ours) == len(charts):
        for idx, (one, other) in enumerate(zip(ours, charts)):
            yield from differences(one, other, f"{path}[{idx}]")
    elif ours != charts or type(ours) is not type(charts):
        yield f"{path}: Kustomize has {ours!r:.200}, the chart {charts!r:.200}"


def by_name(resources):
    """Objects by kind and name, the latter without the hash of a ConfigMap's
    contents, so that a setting that differs is named."""
    return {(r["kind"], re.sub(r"(-worker)-[a-z0-9]{10}$", r"\1", r["metadata"]["name"])): r for r in resources}


def unlike(ours, charts):
    """The differences between two sets of objects."""
    ours, charts = by_name(ours), by_name(charts)
    for kind, name in sorted(ours.keys() ^ charts.keys()):
        yield f"only {'Kustomize' if (kind, name) in ours else 'the chart'} has {kind} {name}"
    for key in sorted(ours.keys() & charts.keys()):
        for difference in differences(plain(ours[key]), plain(charts[key])):
            yield f"{key[0]} {key[1]}: {difference}"


def drift_problems(built, rendered):
    """Where the chart's objects are not Kustomize's."""
    for name, resources in built.items():
        if name.startswith("overlays/") and name not in rendered:
            yield f"{name}: there is no {CHART}/values/{name.removeprefix('overlays/')}.yaml"
        elif name in rendered:
            yield from (f"{name}: {problem}" for problem in unlike(resources, rendered[name]))
    yield from (f"the chart's defaults: {problem}"
                for problem in unlike(built["overlays/cpu"], rendered["defaults"]))
    for name in rendered:
        if name.startswith("overlays/") and name not in built:
            yield f"{CHART}/values/{name.removeprefix('overlays/')}.yaml belongs to no overlay"


def component_problems():
    """Components that the chart has no values for."""
    folders = {folder.name for folder in pathlib.Path("deploy/components").iterdir() if folder.is_dir()}
    for name in sorted(folders ^ set(COMPONENTS)):
        yield f"deploy/components/{name} and COMPONENTS in deploy/check/chart.py do not match"


def drift_self_problems(built, rendered):
    """The comparison finds what it looks for."""
    def kind(resources, wanted):
        return next(r for r in resources if r["kind"] == wanted)

    def edited(edit):
        resources = copy.deepcopy(rendered["defaults"])
        deployment = kind(resources, "Deployment")
        edit(resources, deployment, deployment["spec"]["template"]["spec"]["containers"][0])
        return list(unlike(built["overlays/cpu"], resources))

    for edit, wanted in [
            (lambda _r, d, _c: d["spec"].update(minReadySeconds=77), "spec.minReadySeconds"),
            (lambda r, _d, _c: kind(r, "ConfigMap")["data"].update(IMAGEGPT_LISTEN="-"), "data.IMAGEGPT_LISTEN"),
            (lambda r, _d, _c: kind(r, "ConfigMap")["metadata"].update(name="imagegpt-worker-aaaaaaaaaa"),
             "ConfigMap imagegpt-worker: metadata.name"),
            (lambda _r, d, _c: d["spec"].update(replicas="2"), "spec.replicas"),
            (lambda _r, _d, c: c["resources"]["limits"].pop("memory"), "resources.limits.memory"),
            (lambda _r, _d, c: c["env"].pop(), "spec.template.spec.containers[0].env"),
            (lambda r, d, _c: r.remove(d), "only Kustomize has Deployment")]:
        found = edited(edit)
        if not any(wanted in problem for problem in found):
            yield f"a difference in {wanted} was reported as {found}"
    lacking = {name: resources for name, resources in rendered.items() if name != "overlays/gpu"}
    if not any("values/gpu.yaml" in problem for problem in drift_problems(built, lacking)):
        yield "an overlay without values was not reported"


# Against its own promises.

def label_problems(rendered):
    """Objects that do not say who made them, and selectors that would also select
    another release's pods."""
    def selectors(value):
        if isinstance(value, dict):
            if value.get("app.kubernetes.io/component") == "worker":
                yield value
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from selectors(part)

    for name, resources in rendered.items():
        for resource in resources:
            where = f"{name}: {resource['kind']} {resource['metadata']['name']}"
            for label in sorted(LABELS - set(resource["metadata"]["labels"])):
                yield f"{where} has no label {label}"
            for labels in selectors(resource):
                if "app.kubernetes.io/instance" not in labels:
                    yield f"{where} names pods without their release: {labels}"


def name_problems(rendered):
    """Names that the API server would refuse, in the length or the letters."""
    for name, resources in rendered.items():
        for resource in resources:
            own = resource["metadata"]["name"]
            if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", own) and resource["kind"] == "Service":
                yield f"{name}: Service {own} is no DNS label"
            if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,251}[a-z0-9])?", own):
                yield f"{name}: {resource['kind']} {own} is no name"
            for label, value in resource["metadata"]["labels"].items():
                if not re.fullmatch(r"([A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?)?", value):
                    yield f"{name}: {resource['kind']} {own} has the label {label}: {value}"


def odd_problems(rendered):
    """Values that did not arrive where they belong."""
    def container(name):
        deployment = next(r for r in rendered[f"odd {name}"] if r["kind"] == "Deployment")
        return deployment, deployment["spec"]["template"]["spec"]["containers"][0]

    _, _, values = ODD["arguments and numbers"]
    deployment, worker = container("arguments and numbers")
    if worker["args"] != ["serve", *values["extraArgs"]]:
        yield f"extraArgs arrive as {worker['args']}"
    settings = next(r for r in rendered["odd arguments and numbers"] if r["kind"] == "ConfigMap")["data"]
    if (settings["IMAGEGPT_IMAGE_PIXELS_MAX"], settings["IMAGEGPT_GRPC_WEB"]) != ("12000000", "true"):
        yield "settings lose digits"
    if deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] != 60 + 30 + 5:
        yield "the drain is not added up"
    if any(variable["name"] == "IMAGEGPT_INTRA_OP_THREADS" for variable in worker["env"]):
        yield "IMAGEGPT_INTRA_OP_THREADS of settings is overridden"
    scaled = next(r for r in rendered["odd a long release name"] if r["kind"] == "ScaledObject")["spec"]
    for trigger in scaled["triggers"]:
        query = trigger["metadata"]["query"]
        if 'namespace="other"' not in query or 'namespace="imagegpt"' in query:
            yield f"KEDA asks for another namespace: {query}"
    if (scaled["minReplicaCount"], scaled["maxReplicaCount"], scaled["fallback"]["replicas"]) != (1, 3, 3):
        yield "KEDA has other bounds than the values"
    rules = next(r for r in rendered["odd another name"] if r["kind"] == "PrometheusRule")["spec"]["groups"]
    queries = "\n".join(rule["expr"] for group in rules for rule in group["rules"])
    if 'deployment="blue-pictures-worker"' not in queries or 'deployment="imagegpt-worker"' in queries:
        yield "the rules ask for another Deployment"
    _, worker = container("tokens, and a place for pods")
    if worker["image"] != "registry.example:5000/a/worker@sha256:" + 64 * "a":
        yield f"the image is {worker['image']}"
    if container("five replicas")[0]["spec"]["replicas"] != 5:
        yield "replicaCount has no effect"


def refused_problems(tools):
    """Wrong values that are accepted, or refused without their name."""
    helm = Helm(tools)
    for name, (values, word) in REFUSED.items():
        try:
            helm.template(values)
            yield f"{name} is accepted"
        except Refused as error:
            if word not in str(error):
                yield f"{name} is refused without {word}: {error}"


def lint_problems(tools):
    """What `helm lint` says of each values file; --strict makes warnings errors."""
    helm = Helm(tools)
    for file in sorted(CHART.glob("values/*.yaml")):
        try:
            helm.run("lint", "--strict", "--quiet", CHART, "--values", file)
        except Refused as error:
            yield f"{file}: {error}"


def file_problems(tools):
    """Copies that are not their sources, and a package that lacks them."""
    spec = importlib.util.spec_from_file_location("make_files", CHART / "make_files.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    yield from maker.problems()
    with tempfile.TemporaryDirectory() as scratch:
        Helm(tools).run("package", CHART, "--destination", scratch)
        package = next(pathlib.Path(scratch).glob("*.tgz"))
        packed = Helm(tools).run("template", "imagegpt", package, "--namespace", "imagegpt",
                                 "--values", CHART / "values/production.yaml")
        direct = Helm(tools).run("template", "imagegpt", CHART, "--namespace", "imagegpt",
                                 "--values", CHART / "values/production.yaml")
        if packed != direct:
            yield "`helm package` makes another chart"


def checked(tools, check, built):
    """Runs all checks of the chart alone, by check.py's `check`; returns the odd
    objects for its other checks."""
    check("the chart's files are what make_files.py writes, and are packaged", file_problems(tools))
    check("the chart has values for each component", component_problems())
    rendered = renders(tools, [name for name in built if name.startswith("combination ")])
    compared = sum(name in built for name in rendered)
    check(f"helm template is kubectl kustomize, of {compared} overlays and combinations",
          drift_problems(built, rendered))
    check("the comparison finds differences", drift_self_problems(built, rendered))
    check("helm lint", lint_problems(tools))
    check("the chart's labels", label_problems(rendered))
    check("the chart's names", name_problems(rendered))
    check(f"{len(odd(rendered))} sets of odd values arrive", odd_problems(rendered))
    check(f"{len(REFUSED)} wrong values are refused", refused_problems(tools))
    return odd(rendered)
