"""What a PromQL query names. Syntax is promtool's affair."""

import re

# No series of the worker: Prometheus's own, kube-state-metrics', and NVIDIA's
# DCGM exporter's, where it runs.
FOREIGN = {
    "up", "kube_deployment_spec_replicas", "kube_job_failed",
    "kube_pod_container_status_restarts_total", "kube_pod_container_status_last_terminated_exitcode",
    "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED",
}
# Series that only a worker on a GPU exports, with label values as one has them:
# the worker that this is held against has none. check.py
# holds the names against src/serve/metrics/gpu.rs.
GPU_ONLY = {
    "imagegpt_gpu_memory_used_bytes": {"device": {"0"}},
    "imagegpt_gpu_memory_total_bytes": {"device": {"0"}},
    "imagegpt_gpu_utilization_ratio": {"device": {"0"}},
}
# Labels that Prometheus adds when it scrapes a pod.
TARGET_LABELS = {"namespace", "pod", "container", "job", "instance"}

WORDS = {"and", "or", "unless", "bool", "offset", "by", "on", "without", "ignoring", "group_left", "group_right"}
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
# A whole name: not the rest of one, nor of a number such as 1e-9.
SELECTOR = re.compile(rf"(?<![a-zA-Z0-9_:.])({NAME})(?![a-zA-Z0-9_:])\s*(\{{[^}}]*\}})?(?!\s*\()")
MATCHER = re.compile(rf"({NAME})\s*(=~|!~|!=|=)\s*(\"(?:[^\"\\]|\\.)*\"|'[^']*')")
GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def selectors(query):
    """Each metric in a query with its matchers, as (label, operator, value)."""
    bare = re.sub(r"\[[^\]]*\]", "", GROUPING.sub(" ", query))
    found = []
    for name, braces in SELECTOR.findall(bare):
        if name in WORDS:
            continue
        matchers = [(label, operator, text[1:-1]) for label, operator, text in MATCHER.findall(braces)]
        found.append((name, matchers))
    return found


def grouping_labels(query):
    return {label.strip() for labels in GROUPING.findall(query) for label in labels.split(",") if label.strip()}


def problems(query, exported, recorded):
    """What a query names that nobody exports."""
    known_labels = TARGET_LABELS | {"job_name"}
    for name, matchers in selectors(query):
        if name in recorded:
            continue
        if name in FOREIGN:
            continue
        if name not in exported:
            yield f"no worker exports {name}"
            continue
        labels = exported[name]
        known_labels |= set(labels)
        for label, operator, value in matchers:
            if label in TARGET_LABELS:
                continue
            if label not in labels:
                yield f"{name} has no label {label}"
                continue
            # Every alternative must be there, or a misspelled one would hide
            # behind the others.
            for wanted in value.split("|") if "~" in operator else [value]:
                if not any(re.fullmatch(wanted, have) for have in labels[label]):
                    yield f"{name} has no {label} {wanted!r}; it has {sorted(labels[label])}"
    for label in grouping_labels(query) - known_labels:
        yield f"nothing in the query has the label {label}"
