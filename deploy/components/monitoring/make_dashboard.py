#!/usr/bin/env python3
"""Writes dashboard.json, which is too repetitive to be kept by hand.

`make deploy-check` fails when the file is not what this writes.
"""

import json
import pathlib

WORKER = 'namespace="$namespace"'
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def total(metric, by="", labels=""):
    """The rate of a counter over the pool."""
    by = f" by ({by})" if by else ""
    labels = f",{labels}" if labels else ""
    return f"sum{by} (rate({metric}{{{WORKER}{labels}}}[$__rate_interval]))"


def gauge(metric, by=""):
    by = f" by ({by})" if by else ""
    return f"sum{by} ({metric}{{{WORKER}}})"


def quantile(q, metric, by="", labels=""):
    """A quantile over the pool: of summed buckets, never a mean of quantiles."""
    by = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {total(metric + '_bucket', by, labels)})"


def quantiles(metric, name, labels=""):
    return [(quantile(q, metric, labels=labels), f"{name} p{q * 100:g}") for q in (0.5, 0.99)]


# Title, what it shows, unit, queries with their legends.
ROWS = {
    "Throughput": [
        ("Images answered", "By the code of each image's own outcome.", "ops",
         [(total("imagegpt_images_total", "code") + " > 0", "{{code}}")]),
        ("Calls", "By method.", "ops",
         [(total("imagegpt_requests_total", "method") + " > 0", "{{method}}")]),
        ("Images by worker", "Lines that lie apart show a pool out of balance.", "ops",
         [(total("imagegpt_images_total", "pod"), "{{pod}}")]),
        ("Calls that were not OK", "By code: RESOURCE_EXHAUSTED means a full pool, UNAVAILABLE a drain, "
         "DEADLINE_EXCEEDED a late answer.", "ops",
         [(total("imagegpt_requests_total", "code", 'code!="OK"') + " > 0", "{{code}}")]),
        ("Share of calls rejected", "RESOURCE_EXHAUSTED over all calls.", "percentunit",
         [(total("imagegpt_requests_total", labels='code="RESOURCE_EXHAUSTED"') + " / "
           + total("imagegpt_requests_total"), "rejected")]),
        ("Images dropped", "Images whose caller disconnected or whose deadline passed, by reason and stage.",
         "ops", [(total("imagegpt_images_dropped_total", "reason, stage"), "{{reason}} in {{stage}}")]),
    ],
    "Latency by stage": [
        ("Calls, from arrival to answer", "EmbedStream lasts as long as its client wants and is left out.",
         "s", quantiles("imagegpt_request_duration_seconds", "call", 'method=~"Embed|Classify|Tokenize|Score"')),
        ("Generate calls", "From arrival to the last image; 1,024 steps per image.", "s",
         quantiles("imagegpt_request_duration_seconds", "call", 'method="Generate"')),
        ("Decode", "One encoded image.", "s", quantiles("imagegpt_decode_duration_seconds", "decode")),
        ("Resize and quantize", "One image.", "s",
         quantiles("imagegpt_quantize_duration_seconds", "quantize")),
        ("Wait for an engine", "By class; bulk work may wait.", "s",
         quantiles("imagegpt_queue_duration_seconds", "interactive", 'class="interactive"')
         + quantiles("imagegpt_queue_duration_seconds", "bulk", 'class="bulk"')),
        ("Run of the model", "One batch, by graph.", "s",
         [(quantile(0.5, "imagegpt_inference_duration_seconds", "graph"), "{{graph}} p50"),
          (quantile(0.99, "imagegpt_inference_duration_seconds", "graph"), "{{graph}} p99")]),
    ],
    "Queue": [
        ("Images waiting for an engine", "By class.", "short",
         [(gauge("imagegpt_queue_depth", "class"), "{{class}}")]),
        ("Images in flight", "At the limit calls are rejected.", "short",
         [(gauge("imagegpt_images_in_flight"), "in flight"),
          (gauge("imagegpt_images_in_flight_max"), "limit")]),
        ("Bytes in flight", "Requests and answers.", "bytes",
         [(gauge("imagegpt_bytes_in_flight"), "in flight"),
          (gauge("imagegpt_bytes_in_flight_max"), "limit"),
          (gauge("imagegpt_cache_bytes"), "cached answers")]),
        ("Streams and connections", "", "short",
         [(gauge("imagegpt_streams"), "streams"),
          (gauge("imagegpt_connections_open"), "connections"),
          (total("imagegpt_connections_total", "outcome", 'outcome!="closed"') + " > 0", "{{outcome}} per second")]),
    ],
    "Batches": [
        ("Mean batch size", "Images per run.", "short",
         [(total("imagegpt_batch_size_sum", "graph") + " / " + total("imagegpt_batch_size_count", "graph"),
           "{{graph}}")]),
        ("Fill", "Images over the size of their run; the rest of a run is padding.", "percentunit",
         [(total("imagegpt_batch_fill_ratio_sum") + " / " + total("imagegpt_batch_fill_ratio_count"), "fill")]),
        ("Reasons to close a batch", "full: the fastest size was reached; turn: the engine was free; "
         "delay: the oldest image had waited --max-queue-delay.", "ops",
         [(total("imagegpt_batches_total", "close_reason"), "{{close_reason}}")]),
        ("Runs saved and padding", "", "ops",
         [(total("imagegpt_images_coalesced_total"), "images that shared a run"),
          (total("imagegpt_cache_lookups_total", labels='result="hit"'), "answers from the cache"),
          (total("imagegpt_runs_stopped_total"), "runs stopped"),
          (total("imagegpt_batch_padding_images_total"), "padding")]),
        ("Largest batch", "Falls when the engine's memory runs out.", "short",
         [(f"min by (pod) (imagegpt_batch_size_max{{{WORKER}}})", "{{pod}}")]),
    ],
    "Generation": [
        ("Images being generated", "At the limit further images wait for a slot.", "short",
         [(gauge("imagegpt_sequences"), "being generated"), (gauge("imagegpt_sequences_max"), "limit")]),
        ("Tokens", "Tokens of generation steps, and of primers.", "ops",
         [(total("imagegpt_tokens_total", "kind"), "{{kind}}")]),
        ("Key/value caches", "Memory of the caches when all slots are taken.", "bytes",
         [(gauge("imagegpt_sequence_cache_bytes_max", "pod"), "{{pod}}")]),
    ],
    "Engine": [
        ("Engines at work", "Seconds of inference per second; the autoscaler aims at 0.7 per worker.", "short",
         [(total("imagegpt_inference_duration_seconds_sum"), "busy"),
          (gauge("imagegpt_ready"), "ready workers"), (gauge("imagegpt_device_up"), "devices")]),
        ("Devices that wait for the worker", "Seconds per second in which a device idled although work "
         "waited for it; time without work and the queue delay do not count.", "percentunit",
         [(total("imagegpt_engine_gap_seconds_sum", "pod, device"), "{{pod}} {{device}}")]),
        ("Gap before a run", "The same time, before one run.", "s",
         quantiles("imagegpt_engine_gap_seconds", "gap")),
        ("Devices that are up", "Fewer than in --device-id: one has failed (ImageGptDeviceDown).", "short",
         [(gauge("imagegpt_device_up", "pod"), "{{pod}}")]),
        ("Images per second of a busy engine", "As measured by the workers.", "ops",
         [(gauge("imagegpt_drain_rate_images_per_second", "pod"), "{{pod}}")]),
        ("Fallbacks", "cuda: auto chose the CPU; cuda_graphs: kernels are launched one by one; "
         "gpu_copies: ONNX Runtime copies. GetModel gives the reason.", "short",
         [(f"max by (pod, kind) (imagegpt_engine_fallback{{{WORKER}}}) > 0", "{{pod}} {{kind}}")]),
        ("Faults", "", "ops",
         [(total("imagegpt_engine_faults_total", "kind"), "{{kind}}"),
          (total("imagegpt_canary_runs_total", labels='result="failed"'), "idle check failed")]),
        ("GPU memory", "By the driver, for all processes together. The runtime keeps the memory that it "
         "has allocated, so a level line is good.", "bytes",
         [(gauge("imagegpt_gpu_memory_used_bytes", "pod, device"), "{{pod}} {{device}}"),
          (f"max by (device) (imagegpt_gpu_memory_total_bytes{{{WORKER}}})", "total of device {{device}}")]),
        ("GPU utilization", "Share of time with a kernel running, by the driver; a MIG instance has no value.",
         "percentunit", [(gauge("imagegpt_gpu_utilization_ratio", "pod, device"), "{{pod}} {{device}}")]),
        ("GPU utilization, by DCGM", "From NVIDIA's DCGM exporter, where it runs.", "percent",
         [(f"avg by (pod) (DCGM_FI_DEV_GPU_UTIL{{{WORKER}}})", "{{pod}}")]),
        ("GPU memory, by DCGM", "From NVIDIA's DCGM exporter, where it runs.", "decmbytes",
         [(f"sum by (pod) (DCGM_FI_DEV_FB_USED{{{WORKER}}})", "{{pod}}")]),
    ],
    "Starts and drains": [
        ("Ready", "0 while a worker loads or drains.", "short", [(gauge("imagegpt_ready", "pod"), "{{pod}}")]),
        ("Remaining work of draining workers", "Images in flight of workers that are not ready: falls to "
         "0 within the grace period.", "short",
         [(f"imagegpt_images_in_flight{{{WORKER}}} and on (pod) imagegpt_ready{{{WORKER}}} == 0", "{{pod}}")]),
        ("Calls sent to another worker", "UNAVAILABLE: the client's retry policy moves the call.", "ops",
         [(total("imagegpt_requests_total", "pod", 'code="UNAVAILABLE"'), "{{pod}}")]),
        ("Time to load", "From start to a warmed-up model.", "s",
         [(f"imagegpt_model_load_duration_seconds{{{WORKER}}}", "{{pod}}")]),
        ("Models and versions", "More than one of a kind outside a rollout: ImageGptMixedModels.", "short",
         [(f"count by (name, digest, execution_provider) (imagegpt_model_info{{{WORKER}}})",
           "{{name}} {{digest}} {{execution_provider}}"),
          (f"count by (version) (imagegpt_build_info{{{WORKER}}})", "worker {{version}}")]),
        ("Certificate ends in", "Where the worker has a certificate.", "s",
         [(f"imagegpt_tls_certificate_expiry_timestamp_seconds{{{WORKER}}} - time() "
           f"and imagegpt_tls_certificate_expiry_timestamp_seconds{{{WORKER}}} > 0", "{{pod}}"),
          ]),
        ("Replaced files", "", "short",
         [(f"sum by (file) (increase(imagegpt_reloads_total{{{WORKER}}}[$__rate_interval]))", "{{file}} taken"),
          (gauge("imagegpt_reload_failed", "file"), "{{file}} cannot be used")]),
        ("Log lines lost", "Standard error was closed, full or not read fast enough: the worker "
         "does not wait for its log.", "ops",
         [(total("imagegpt_log_lines_dropped_total", "pod") + " > 0", "{{pod}}")]),
        ("Spans", "Sent to the OTLP collector, and lost because it did not take them or too many waited.",
         "ops",
         [(total("imagegpt_spans_exported_total", "pod"), "{{pod}} exported"),
          (total("imagegpt_spans_dropped_total", "reason") + " > 0", "lost: {{reason}}")]),
        ("Answers not read", "Ended after --answer-timeout, because their client read nothing.", "ops",
         [(total("imagegpt_answers_not_taken_total", "pod") + " > 0", "{{pod}}")]),
    ],
}

COLUMNS = 3
WIDTH = 24 // COLUMNS
HEIGHT = 8


def panels():
    made, y = [], 0
    for row, contents in ROWS.items():
        made.append({"type": "row", "title": row, "collapsed": False, "panels": [],
                     "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for idx, (title, description, unit, queries) in enumerate(contents):
            made.append({
                "type": "timeseries",
                "title": title,
                "description": description,
                "datasource": DATASOURCE,
                "gridPos": {"x": idx % COLUMNS * WIDTH, "y": y + idx // COLUMNS * HEIGHT,
                            "w": WIDTH, "h": HEIGHT},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0 if "ends" not in title else None},
                                "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"},
                            "tooltip": {"mode": "multi", "sort": "desc"}},
                "targets": [{"refId": chr(ord("A") + n), "expr": expr, "legendFormat": legend,
                             "datasource": DATASOURCE} for n, (expr, legend) in enumerate(queries)],
            })
        y += -(-len(contents) // COLUMNS) * HEIGHT
    for number, panel in enumerate(made, start=1):
        panel["id"] = number
    return made


def dashboard():
    return {
        "uid": "imagegpt-worker",
        "title": "ImageGPT workers",
        "tags": ["imagegpt"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
            {"name": "namespace", "label": "Namespace", "type": "query", "datasource": DATASOURCE,
             "query": "label_values(imagegpt_build_info, namespace)", "refresh": 2},
        ]},
        "annotations": {"list": []},
        "panels": panels(),
    }


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_name("dashboard.json")
    path.write_text(json.dumps(dashboard(), indent=1) + "\n")
