#!/usr/bin/env python3
"""What the autoscalers would do: a real Prometheus scrapes real workers as the
PodMonitor says, with the rules of deploy/components/monitoring, under loads of
known size. KEDA's queries and the HPA's series, read from what kustomize builds,
are evaluated by its API, and the HPA's arithmetic makes pods of them."""

import argparse
import asyncio
import contextlib
import json
import math
import pathlib
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import yaml

from pods import Manifest, Pool, build, seconds

FOLDER = pathlib.Path("target/deploy-pool/prometheus")
ADDRESS = "127.0.0.1:9290"
# Every image takes as long, whatever its batch: so the number of engines that a
# load needs is the load times this.
COST_SECONDS = 0.05
COST = "0ms+50ms"
# The HPA leaves a pool alone whose wish is so close (Kubernetes' default).
TOLERANCE = 0.1
# Rates are over a minute; one more scrape, and one evaluation.
SETTLE_SECONDS = 85


def configure(monitor, rules, pods):
    endpoint = monitor["spec"]["podMetricsEndpoints"][0]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "rules.yaml").write_text(yaml.safe_dump({"groups": rules["spec"]["groups"]}))
    # The labels that the operator gives a pod's series.
    targets = [{"targets": [f"{pod.address}:9090"], "labels": {
        "namespace": "imagegpt", "pod": f"imagegpt-worker-{pod.number}", "container": "imagegpt"}} for pod in pods]
    (FOLDER / "targets.json").write_text(json.dumps(targets))
    (FOLDER / "prometheus.yaml").write_text(yaml.safe_dump({
        "global": {"scrape_interval": endpoint["interval"], "evaluation_interval": endpoint["interval"]},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "imagegpt/imagegpt-worker", "metrics_path": endpoint["path"],
                            "scrape_timeout": endpoint["scrapeTimeout"],
                            "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "5s"}]}]}))


@contextlib.contextmanager
def prometheus():
    subprocess.run(["rm", "-rf", str(FOLDER / "data")], check=True)
    with open(FOLDER / "log", "w") as log:
        process = subprocess.Popen(["prometheus", "--config.file", str(FOLDER / "prometheus.yaml"),
                                    "--storage.tsdb.path", str(FOLDER / "data"), "--web.listen-address", ADDRESS],
                                   stderr=log, stdout=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def query(text):
    url = f"http://{ADDRESS}/api/v1/query?" + urllib.parse.urlencode({"query": text})
    with urllib.request.urlopen(url, timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    if len(result) != 1:
        raise RuntimeError(f"{len(result)} results, where a scaler takes one: {text}")
    return float(result[0]["value"][1])


def wish(metrics, current, bounds):
    """Kubernetes' arithmetic for AverageValue: each metric's pods, then the most."""
    wishes = []
    for value, target in metrics:
        near = abs(value / (target * current) - 1) <= TOLERANCE
        wishes.append(current if near else math.ceil(value / target))
    return min(max(max(wishes), bounds[0]), bounds[1])


def first_minute(current, wanted, behavior):
    """What scaleUp lets through at once."""
    allowed = [policy["value"] if policy["type"] == "Pods" else math.ceil(current * policy["value"] / 100)
               for policy in behavior["scaleUp"]["policies"]]
    return min(wanted, current + max(allowed))


@contextlib.contextmanager
def load(worker, pods, images_per_second):
    """Calls that come at random (Poisson), whoever is slow."""
    process = subprocess.Popen([worker, "bench", "load", "--rate", str(images_per_second), "--connections", "2",
                                "--endpoint", ",".join(f"http://{pod.address}:50051" for pod in pods),
                                "--warm-up", "0s", "--duration", "10m", "--timeout", "10m"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def look(args, manifest, n_pods, images_per_second, expected):
    keda = manifest.only("ScaledObject")["spec"]
    behavior = keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    bounds = keda["minReplicaCount"], keda["maxReplicaCount"]
    with Pool(manifest, args.worker, COST) as pool:
        await pool.scale(n_pods)
        configure(manifest.only("PodMonitor"), manifest.only("PrometheusRule"), pool.pods)
        with prometheus(), load(args.worker, pool.pods, images_per_second):
            await asyncio.sleep(SETTLE_SECONDS)
            metrics = [(query(trigger["metadata"]["query"]), float(trigger["metadata"]["threshold"]))
                       for trigger in keda["triggers"]]
            # What the adapter would serve to the HPA.
            adapter = yaml.safe_load(pathlib.Path("deploy/components/hpa/adapter.yaml").read_text())
            recorded = [query(f'max({rule["seriesQuery"]}{{namespace="imagegpt"}})') for rule in adapter["externalRules"]]
    wanted = wish(metrics, n_pods, bounds)
    by_hpa = wish([(value, target) for value, (_, target) in zip(recorded, metrics)], n_pods, bounds)
    names = [trigger["name"] for trigger in keda["triggers"]]
    needed = images_per_second * COST_SECONDS
    said = ", ".join(f"{name} {value:.3g} / {target:g}" for name, (value, target) in zip(names, metrics))
    fine = expected(wanted) and expected(by_hpa)
    print(f"autoscale: {n_pods} workers, {images_per_second} images/s (work for {needed:g} engines): {said}: "
          f"KEDA {wanted}, HPA {by_hpa}, in the first minute {first_minute(n_pods, wanted, behavior)}"
          f"{'' if fine else '  UNEXPECTED'}", flush=True)
    return fine


async def run(args):
    manifest = Manifest(build(args.kubectl, "deploy/overlays/keda"))
    interval = seconds(manifest.only("PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"])
    threshold = float(manifest.only("ScaledObject")["spec"]["triggers"][0]["metadata"]["threshold"])
    print(f"autoscale: {SETTLE_SECONDS} s a load, scraped every {interval:g} s; an image takes {1000 * COST_SECONDS:g} ms")
    fine = True
    # Hardly any: the fewest.
    fine &= await look(args, manifest, 2, 8, lambda wish: wish == 2)
    # What two workers should carry: they stay.
    fine &= await look(args, manifest, 2, 26, lambda wish: wish == 2)
    # Half as much again as two can do: more than the load needs, since there is
    # a queue to work off.
    needed = math.ceil(60 * COST_SECONDS / threshold)
    fine &= await look(args, manifest, 2, 60, lambda wish: wish >= needed)
    # The same load on the pool that it needs: that stays, neither more nor less.
    fine &= await look(args, manifest, needed, 60, lambda wish: wish == needed)
    # Too many for what is left of it: fewer.
    fine &= await look(args, manifest, needed, 26, lambda wish: wish == 2)
    print(f"autoscale: {'as expected' if fine else 'NOT as expected'}")
    return fine


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kubectl", required=True)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--stubs")
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
