#!/usr/bin/env python3
"""deploy/kserve, held against Kubernetes' schemas, against the base and, if their
files are given, against KServe's own definitions.

KServe's definitions are in its repository only (config/crd/full), so `make
deploy-check` does without them. With them:

    target/deploy-tools/venv/bin/python deploy/check/kserve.py \\
        serving.kserve.io_servingruntimes.yaml serving.kserve.io_inferenceservices.yaml
"""

import pathlib
import sys

import jsonschema
import yaml

FOLDER = pathlib.Path("deploy/kserve")
RUNTIME = FOLDER / "servingruntime.yaml"
SERVICE = FOLDER / "inferenceservice.yaml"
# Settings that are KServe's own; the reasons are in the manifest.
OWN = {"IMAGEGPT_MODEL", "IMAGEGPT_CACHE_DIR", "IMAGEGPT_SHUTDOWN_GRACE_PERIOD"}
# Fields of a container that KServe's manifest must have as the base has them.
SAME = ("image", "startupProbe", "readinessProbe", "livenessProbe", "resources", "terminationMessagePolicy")


def manifests():
    return yaml.safe_load(RUNTIME.read_text()), yaml.safe_load(SERVICE.read_text())


def as_deployment():
    """The runtime as a Deployment of Kubernetes, with the settings in a ConfigMap,
    for the checks of check.py: KServe makes the like of it."""
    runtime, service = manifests()
    container = dict(runtime["spec"]["containers"][0])
    place = {"namespace": "imagegpt", "labels": runtime["metadata"]["labels"]}
    values = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    container["env"] = [variable for variable in container["env"] if "value" not in variable]
    container["envFrom"] = [{"configMapRef": {"name": "settings"}}]
    pod = {"containers": [container], "volumes": runtime["spec"]["volumes"], "automountServiceAccountToken": False,
           "terminationGracePeriodSeconds": 30,
           "securityContext": service["spec"]["predictor"]["securityContext"] | {
               name: container["securityContext"][name] for name in ("runAsNonRoot", "runAsUser", "seccompProfile")}}
    labels = {"app": "predictor"}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"} | place, "data": values},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "predictor"} | place, "spec": {
            "selector": {"matchLabels": labels}, "progressDeadlineSeconds": 600,
            "template": {"metadata": {"labels": labels}, "spec": pod}}}]


def problems(resources):
    """Where the manifests differ from `resources`, the overlay cpu's, or from each
    other."""
    runtime, service = manifests()
    container = runtime["spec"]["containers"][0]
    config = next(r for r in resources if r["kind"] == "ConfigMap")["data"]
    theirs = next(r for r in resources if r["kind"] == "Deployment")["spec"]["template"]["spec"]["containers"][0]
    values = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    for name in sorted(values.keys() | config.keys()):
        if name not in OWN and values.get(name) != config.get(name):
            yield f"{name} is {values.get(name)}, and {config.get(name)} in the overlay cpu"
    for field in SAME:
        if container[field] != theirs[field]:
            yield f"{field} is {container[field]}, and {theirs[field]} in the overlay cpu"
    numbers = [port["containerPort"] for port in container["ports"]]
    if numbers != [port["containerPort"] for port in theirs["ports"]]:
        yield f"the ports are {numbers}"
    if runtime["spec"]["annotations"]["prometheus.kserve.io/port"] != str(numbers[1]):
        yield "Prometheus is sent to another port"
    model = service["spec"]["predictor"]["model"]
    formats = [(known["name"], known["version"]) for known in runtime["spec"]["supportedModelFormats"]]
    if model["runtime"] != runtime["metadata"]["name"]:
        yield f"the example's runtime is {model['runtime']}"
    if tuple(model["modelFormat"].values()) not in formats:
        yield f"the runtime has no model format {model['modelFormat']}"
    if model["protocolVersion"] not in runtime["spec"]["protocolVersions"]:
        yield f"the runtime has no protocol {model['protocolVersion']}"


def closed(schema):
    """A definition that takes no unknown fields."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema \
            and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    return schema


def definition_problems(definitions):
    """What KServe's own definitions say of the manifests."""
    schemas = {}
    for file in definitions:
        definition = yaml.load(pathlib.Path(file).read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            kind = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            schemas[kind] = version["schema"]["openAPIV3Schema"]
    for resource in manifests():
        kind = resource["apiVersion"], resource["kind"]
        if kind not in schemas:
            yield f"no definition of {' '.join(kind)} is given"
            continue
        schema = schemas[kind]
        # The API server itself checks metadata, and the definition has no fields of it.
        schema["properties"] = {name: closed(part) for name, part in schema["properties"].items()
                                if name != "metadata"} | {"metadata": {"type": "object"}}
        for error in jsonschema.Draft7Validator(schema | {"additionalProperties": False}).iter_errors(resource):
            field = ".".join(str(part) for part in error.absolute_path)
            yield f"{kind[1]}: {field}: {error.message:.300}"


if __name__ == "__main__":
    found = list(definition_problems(sys.argv[1:]))
    print("\n".join(found) or "ok     KServe's definitions")
    sys.exit(1 if found else 0)
