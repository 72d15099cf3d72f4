#!/usr/bin/env python3
"""Writes the chart's files/ from Kustomize's sources.

A chart cannot read outside of its directory, and links out of it are lost by
tools that copy a directory (Flux leaves them out, Git on Windows writes text
files). So these are copies; `make deploy-check` compares them. Needs PyYAML.
"""

import pathlib

import yaml

CHART = pathlib.Path(__file__).parent
DEPLOY = CHART.parent
COMPONENTS = DEPLOY / "components"
HEAD = "# Written by deploy/chart/make_files.py from {}; change that.\n"
# The components whose settings the templates choose from.
WITH_SETTINGS = ("cpu", "gpu", "model-from-hub", "model-from-pvc", "mtls")


def variables(lines):
    """The variables of lines NAME=VALUE."""
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def settings():
    """The worker's variables: those of the base and of each component."""
    found = {"base": variables((DEPLOY / "base/worker.env").read_text().splitlines())}
    for component in WITH_SETTINGS:
        kustomization = yaml.safe_load((COMPONENTS / component / "kustomization.yaml").read_text())
        found[component] = variables(kustomization["configMapGenerator"][0]["literals"])
    return found


def specification(source):
    """The `spec` of a manifest."""
    return yaml.safe_load((DEPLOY / source).read_text())["spec"]


class Dumper(yaml.SafeDumper):
    """Writes strings of several lines as they are."""


Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None))


def dumped(source, content):
    # The width keeps each string of one line on its line.
    text = yaml.dump(content, Dumper=Dumper, sort_keys=False, width=10**6)
    if yaml.safe_load(text) != content:
        raise RuntimeError(f"{source} cannot be copied exactly")
    return HEAD.format(source) + text


def files():
    """The text of each file, by its name."""
    made = {"settings.yaml": dumped("deploy/base and deploy/components", settings())}
    for name, source in (("rules.yaml", "components/monitoring/rules.yaml"),
                         ("hpa.yaml", "components/hpa/hpa.yaml"),
                         ("scaledobject.yaml", "components/keda/scaledobject.yaml"),
                         ("hub-networkpolicy.yaml", "components/model-from-hub/networkpolicy.yaml")):
        made[name] = dumped(f"deploy/{source}", specification(source))
    made["dashboard.json"] = (COMPONENTS / "monitoring/dashboard.json").read_text()
    return made


def problems():
    """The files that are not what this program writes."""
    made = files()
    lying = {path.name for path in (CHART / "files").iterdir()}
    for name in sorted(lying ^ set(made)):
        yield f"deploy/chart/files/{name} is {'left over' if name in lying else 'missing'}; run deploy/chart/make_files.py"
    for name in sorted(lying & set(made)):
        if (CHART / "files" / name).read_text() != made[name]:
            yield f"deploy/chart/files/{name} differs from its source; run deploy/chart/make_files.py"


if __name__ == "__main__":
    for name, text in files().items():
        (CHART / "files" / name).write_text(text)
