"""Real workers run as the kubelet and the Deployment's controller would run them:
environment, probes, grace and rollout are read from what kustomize builds, never
copied. What is not real: addresses (127.0.1.N instead of a pod's), the engine
(fake), and one machine for all.
"""

import asyncio
import os
import re
import signal
import subprocess
import time

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

# From a pod's change until DNS tells of it: the kubelet's report, the endpoint
# controller, and the name server's watch. A second is usual; two are harder.
PROPAGATION_SECONDS = 2
MODEL = "models/untrained"


def build(kubectl, overlay):
    text = subprocess.run([kubectl, "kustomize", overlay], check=True, capture_output=True, text=True).stdout
    return [resource for resource in yaml.safe_load_all(text) if resource]


class Manifest:
    """What the overlay says of its workers."""

    def __init__(self, resources):
        self.resources = resources
        deployment = self.only("Deployment")
        self.deployment = deployment["spec"]
        self.pod = self.deployment["template"]["spec"]
        self.container = self.pod["containers"][0]
        config = next(r for r in resources if r["kind"] == "ConfigMap" and r["metadata"]["name"]
                      == self.container["envFrom"][0]["configMapRef"]["name"])
        self.environment = dict(config["data"])
        for variable in self.container["env"]:
            limits, resource = variable["valueFrom"]["resourceFieldRef"]["resource"].split(".")
            self.environment[variable["name"]] = self.container["resources"][limits][resource]

    def only(self, kind):
        return next(resource for resource in self.resources if resource["kind"] == kind)


class Pod:
    def __init__(self, manifest, binary, number, cost):
        self.manifest, self.number = manifest, number
        self.address = f"127.0.1.{number}"
        self.ready = self.terminating = False
        self.ready_since = None
        self.ended = None
        environment = {**{k: v for k, v in os.environ.items() if not k.startswith("IMAGEGPT_")},
                       **manifest.environment,
                       "IMAGEGPT_LISTEN": manifest.environment["IMAGEGPT_LISTEN"].replace("0.0.0.0", self.address),
                       "IMAGEGPT_METRICS_LISTEN":
                           manifest.environment["IMAGEGPT_METRICS_LISTEN"].replace("0.0.0.0", self.address),
                       "IMAGEGPT_MODEL": MODEL, "IMAGEGPT_FAKE_ENGINE": cost}
        self.log = open(f"target/deploy-pool/pod-{number}.log", "w")
        self.command, self.environment = [binary, *manifest.container["args"]], environment
        self.restarts = []
        # Else a pod that its liveness probe would restart is an error.
        self.may_restart = False
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, env=self.environment, stderr=self.log)
        self.task = asyncio.ensure_future(self.run_probes())

    def restart(self):
        """The container again, in the same pod: at once, as the kubelet does the
        first time."""
        self.ready = False
        self.restarts.append(time.monotonic())
        self.kill()
        self.start()

    async def probe(self, probe):
        check = probe["grpc"]
        async with grpc.aio.insecure_channel(f"{self.address}:{check['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=check["service"])
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
            except grpc.aio.AioRpcError:
                return False
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def run_probes(self):
        """Startup, then readiness and liveness, each in its period."""
        container = self.manifest.container
        startup = container["startupProbe"]
        for _ in range(startup["failureThreshold"]):
            if await self.probe(startup):
                break
            await asyncio.sleep(startup["periodSeconds"])
        else:
            raise RuntimeError(f"pod {self.number} did not start in time")
        await asyncio.gather(self.follow(container["readinessProbe"], self.set_ready),
                             self.follow(container["livenessProbe"], self.set_live))

    async def follow(self, probe, tell):
        failures = 0
        while not self.terminating:
            due = time.monotonic() + probe["periodSeconds"]
            failures = 0 if await self.probe(probe) else failures + 1
            if failures == 0:
                tell(True)
            elif failures >= probe["failureThreshold"]:
                tell(False)
            await asyncio.sleep(max(0, due - time.monotonic()))

    def set_ready(self, ready):
        if ready and not self.ready:
            self.ready_since = time.monotonic()
        self.ready = ready

    def set_live(self, live):
        if live:
            return
        if self.may_restart:
            asyncio.get_running_loop().call_soon(self.restart)
        else:
            raise RuntimeError(f"pod {self.number} would be restarted by its liveness probe")

    def available(self):
        """Ready for as long as the rollout asks."""
        return self.ready and time.monotonic() - self.ready_since >= self.manifest.deployment["minReadySeconds"]

    async def terminate(self):
        """What the kubelet does: preStop, SIGTERM, and SIGKILL when grace is over."""
        self.terminating, self.ready = True, False
        self.task.cancel()
        started = time.monotonic()
        grace = self.manifest.pod["terminationGracePeriodSeconds"]
        pre_stop = self.manifest.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        await asyncio.sleep(pre_stop)
        self.process.send_signal(signal.SIGTERM)
        while self.process.poll() is None:
            if time.monotonic() - started > grace:
                self.process.kill()
            await asyncio.sleep(0.05)
        self.ended = self.process.returncode, time.monotonic() - started
        self.log.close()

    def kill(self):
        self.task.cancel()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Pool:
    """The Deployment's controller, and the endpoints of its Services."""

    def __init__(self, manifest, binary, cost, names=None):
        self.manifest, self.binary, self.cost, self.names = manifest, binary, cost, names
        self.pods, self.number = [], 0
        self.publisher = asyncio.ensure_future(self.publish()) if names else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.publisher:
            self.publisher.cancel()
        for pod in self.pods:
            pod.kill()

    def add(self):
        self.number += 1
        pod = Pod(self.manifest, self.binary, self.number, self.cost)
        self.pods.append(pod)
        return pod

    async def until(self, condition, patience=120):
        started = time.monotonic()
        while not condition():
            for pod in self.pods:
                if pod.task.done() and not pod.terminating and pod.task.exception():
                    raise pod.task.exception()
                if pod.process.poll() is not None and not pod.terminating:
                    raise RuntimeError(f"pod {pod.number} ended with {pod.process.returncode}")
            if time.monotonic() - started > patience:
                raise RuntimeError("the pool is never as it should be")
            await asyncio.sleep(0.1)

    async def scale(self, n_pods):
        while len(self.pods) < n_pods:
            self.add()
        await self.until(lambda: all(pod.ready for pod in self.pods))

    async def publish(self):
        """Endpoints reach DNS some time after they change."""
        while True:
            ready = [pod.address for pod in self.pods if pod.ready and not pod.terminating]
            asyncio.get_running_loop().call_later(PROPAGATION_SECONDS, self.set_names, ready)
            await asyncio.sleep(0.1)

    def set_names(self, addresses):
        self.names.addresses = addresses

    async def roll_out(self):
        """A rolling update with maxSurge 1 and maxUnavailable 0, as the manifest has
        it: a pod goes when a new one is available."""
        strategy = self.manifest.deployment["strategy"]["rollingUpdate"]
        assert strategy == {"maxSurge": 1, "maxUnavailable": 0}, strategy
        farewells = []
        for old in list(self.pods):
            new = self.add()
            await self.until(new.available)
            farewells.append(asyncio.ensure_future(old.terminate()))
        await asyncio.gather(*farewells)
        gone = [pod for pod in self.pods if pod.ended]
        self.pods = [pod for pod in self.pods if not pod.ended]
        return gone


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", text).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]
