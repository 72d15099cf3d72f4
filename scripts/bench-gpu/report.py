"""The report of scripts/bench-gpu.sh: Markdown from results.json.

    report.py RESULTS.json > bench-gpu.md
"""

import json
import sys
from pathlib import Path

import report_checks as checks
from tables import Results, percent, short, table


def is_loaded(load: float, n_cores: int) -> bool:
    return load > n_cores / 2


def loaded(load: float, n_cores: int) -> str:
    return (
        f"The machine was busy at the start (load average {load:.1f} on {n_cores} cores): work of the "
        "CPU, such as launching kernels, may have been slowed down"
    )


def engine(results: Results) -> list[str]:
    rooflines, best, sizes = [], [], []
    for shape, precision, found in results.of("engine"):
        model, findings = found["model"], found["findings"]
        roofline = findings["roofline"]
        name = f"{shape} {precision}"
        rooflines.append(
            [
                name,
                model["provider"],
                model["onnxruntime_version"],
                f"{roofline['precision']}, {roofline['side']}²",
                short(roofline["tflop_per_second"]),
                short(model["load_seconds"]),
            ]
        )
        for graph in dict.fromkeys(row["graph"] for row in findings["graphs"]):
            row = results.best(shape, precision, graph)
            best.append(
                [
                    name,
                    graph,
                    str(row["batch_size"]),
                    short(row["images_per_second"]),
                    short(row["tflop_per_second"]),
                    percent(row["roofline_share"]),
                ]
            )
        for row in findings["graphs"]:
            if row["graph"] in ("features", "hidden"):
                cells = [name, row["graph"], str(row["batch_size"]), short(row["median_ms"])]
                sizes.append(
                    cells + [short(row["images_per_second"]), percent(row["roofline_share"])]
                )
    return [
        "## The engine alone",
        "",
        "A bare loop without a server; FLOP are counted from the architecture (matrix products, and "
        "the causal half of attention), the roofline is a large matrix product in the same process.",
        "",
        *table(["model", "provider", "ONNX Runtime", "product", "TFLOP/s", "load s"], rooflines),
        "At the fastest batch size:",
        "",
        *table(["model", "graph", "batch", "images/s", "TFLOP/s", "of the roofline"], best),
        "By batch size:",
        "",
        *table(["model", "graph", "batch", "median ms", "images/s", "of the roofline"], sizes),
    ]


def saturation(found: dict) -> float:
    return found["findings"]["saturation_images_per_second"]


def grpc(results: Results) -> list[str]:
    rates, latencies = [], []
    for shape, precision, found in results.of("grpc"):
        name, rate = f"{shape} {precision}", saturation(found)
        bare = results.best(shape, precision, "features") or {}
        per_second, share = bare.get("images_per_second"), bare.get("roofline_share")
        of_bare = rate / per_second if per_second else None
        rates.append(
            [
                name,
                short(rate),
                short(per_second),
                percent(of_bare),
                percent(share * of_bare if share and of_bare else None),
            ]
        )
        for phase in found["measurements"]:
            latency = phase["latency"]
            if "%" in phase["name"] and latency:
                keys = ("p50_ms", "p99_ms", "p99_9_ms")
                rejected = sum(code["calls"] for code in phase["rejected"].values())
                failed = sum(code["calls"] for code in phase["failed"].values())
                latencies.append(
                    [name, phase["name"], short(phase["images_per_second"])]
                    + [short(latency[key]) for key in keys]
                    + [str(rejected + failed)]
                )
    header = ["model", "images/s", "bare engine", "of it", "of the roofline"]
    return [
        "## Through gRPC",
        "",
        "Embed of token images, one per call, in a closed loop; the bare engine is `features` above.",
        "",
        *table(header, rates),
        "Open loop, calls at random times at fractions of that rate; latency from when a call was due, in ms:",
        "",
        *table(["model", "load", "images/s", "p50", "p99", "p99.9", "not answered"], latencies),
    ]


def cores(results: Results, images: str) -> list[str]:
    rows = []
    for shape, precision, found in results.of("cores"):
        tokens = [
            saturation(own)
            for own_shape, own_precision, own in results.of("grpc")
            if (own_shape, own_precision) == (shape, precision)
        ]
        for row in found:
            rate = row["images_per_second"]
            rows.append(
                [
                    f"{shape} {precision}",
                    str(row["threads"]),
                    short(rate),
                    percent(rate / tokens[0] if tokens else None),
                    short(row["cores"]),
                ]
            )
    header = ["model", "--preprocess-threads", "images/s", "of token images", "cores of the worker"]
    return [
        "## Encoded images",
        "",
        f"The same with files ({images}): the images per second that decoding threads can supply "
        "to the engine. Files repeat, and identical images in flight run once, so the engine is "
        "not the limit here.",
        "",
        *table(header, rows),
    ]


def generate(results: Results) -> list[str]:
    bare, served = [], []
    for shape, precision, found in results.of("engine"):
        for row in found["findings"]["generate"]:
            cells = [str(row["slots"]), str(row["past"]), short(row["median_ms"])]
            bare.append([f"{shape} {precision}", *cells, short(row["tokens_per_second"])])
    for shape, precision, found in results.of("generate"):
        for row in found:
            cells = [str(row["images"]), short(row["seconds"]), short(row["tokens_per_second"])]
            served.append([f"{shape} {precision}", *cells])
    return [
        "## Generation",
        "",
        "Steps of the engine alone, by the number of sequences and of tokens before the step:",
        "",
        *table(["model", "sequences", "past", "median ms", "tokens/s"], bare),
        "Whole images of 1024 tokens through gRPC, by the number of images requested at the same time:",
        "",
        *table(["model", "images", "seconds", "tokens/s"], served),
    ]


def graphs(results: Results) -> list[str]:
    rows, without = [], []
    for shape, precision, found in results.of("graphs"):
        # `auto` runs without CUDA graphs where they are not possible; a gain is
        # then chance.
        if reason := found["auto"]["model"]["fallbacks"].get("cuda_graphs"):
            without.append(f"{shape} {precision} could not be captured ({reason}); both columns are runs without graphs.")
        pairs = zip(found["auto"]["findings"]["graphs"], found["off"]["findings"]["graphs"])
        for auto, off in pairs:
            rows.append(
                [
                    f"{shape} {precision}",
                    auto["graph"],
                    str(auto["batch_size"]),
                    short(auto["median_ms"]),
                    short(off["median_ms"]),
                    f"{off['median_ms'] / auto['median_ms']:.2f} ×",
                ]
            )
    header = ["model", "graph", "batch", "captured ms", "kernel by kernel ms", "gain"]
    return [
        "## CUDA graphs",
        "",
        "Medians of the bare engine with `--cuda-graphs auto`, where a run of a batch size is captured "
        "while the engine warms up and then launched as one, and with `off`, where its kernels are "
        "launched one by one. Only small batches, for which launches are most of a run.",
        "",
        *[line for reason in without for line in (reason, "")],
        *table(header, rows),
    ]


def nearness(results: Results) -> list[str]:
    rows = []
    for shape, precision, found in results.of("engine"):
        for row in found["findings"]["nearness"]:
            error = f"{row['relative_error']:.1e}"
            rows.append([f"{shape} {precision}", row["graph"], error, f"{row['cosine']:.6f}"])
    header = ["model", "graph", "‖answer − fp32‖ / ‖fp32‖", "smallest cosine"]
    return ["## Against fp32", "", *table(header, rows)]


def soak(results: Results) -> list[str]:
    rows = []
    for shape, precision, found in results.of("soak"):
        said, gpu = found["soak"], found["gpu_bytes"]
        findings = said["findings"]
        broken = said["broken"]
        rss = [(findings.get(name) or {}).get("rss_kib") for name in SERVER]
        slope = findings.get("rss_slope_kib_per_minute")
        # After a quarter of the time, the GPU memory that is allocated once has
        # been allocated.
        settled = gpu[len(gpu) // 4 :]
        mebibytes = [f"{value / 2**20:,.0f}" for value in (settled[:1] + settled[-1:])]
        rows.append(
            [
                f"{shape} {precision}",
                short(findings["seconds"]),
                str(findings["ledger"]["verified"]),
                "; ".join(broken) if broken else "nothing",
                " → ".join("–" if kib is None else f"{kib / 1024:,.0f}" for kib in rss),
                # The soak reports no growth if its readings span less than a
                # minute.
                short(slope) if slope is not None else "too short",
                " → ".join(mebibytes) + f" (most {max(gpu) / 2**20:,.0f})" if gpu else "–",
            ]
        )
    header = ["model", "s", "answers verified", "broke", "RSS MiB", "KiB/min", "GPU MiB"]
    return [
        "## Soak",
        "",
        "RSS and the GPU's memory after a quarter of the time and at the end. Growth per minute needs "
        "readings over more than a minute (`SOAK` of at least 90).",
        "",
        *table(header, rows),
    ]


SERVER = ("server_after_warm_up", "server_at_the_end")


def torch(results: Results) -> list[str]:
    rows, versions = [], set()
    for shape, precision, found in results.of("torch"):
        theirs = found["torch"]
        versions.add(f"PyTorch {theirs['torch_version']}")
        for row in theirs["rows"]:
            ours = [
                own["images_per_second"]
                for said in found["ours"]
                for own in said["findings"]["graphs"]
                if (own["graph"], own["batch_size"]) == (row["graph"], row["batch_size"])
            ]
            rate = row["images_per_second"]
            mean = sum(ours) / len(ours) if ours else None
            rows.append(
                [
                    f"{shape} {precision}",
                    row["graph"],
                    row["variant"],
                    str(row["batch_size"]),
                    short(rate),
                    " and ".join(short(one) for one in ours),
                    f"{mean / rate:.2f} ×" if mean else "–",
                ]
            )
        rows += [
            [f"{shape} {precision}", "–", f"{variant}: {why}", "–", "–", "–", "–"]
            for variant, why in theirs["failed"].items()
        ]
    header = ["model", "graph", "variant", "batch", "PyTorch images/s", "ours, before and after", "ratio"]
    return [
        "## PyTorch",
        "",
        "The same architecture in the same precision, on the same device, between two measurements "
        f"of imagegpt. {', '.join(sorted(versions))}".rstrip(),
        "",
        *table(header, rows),
    ]


def markdown(everything: dict) -> str:
    facts, results = everything["facts"], Results(everything)
    settings = " ".join(
        f'{name}="{" ".join(value) if isinstance(value, list) else value}"'
        for name, value in facts["settings"].items()
    )
    device, load, n_cores = facts["gpu"] or "no GPU", facts["load"], facts["cores"]
    lines = [
        "# GPU measurements" if facts["gpu"] else "# Measurements on a CPU",
        "",
        f"- {facts['date']}, {facts['program']}, commit {facts['commit'] or 'unknown'}",
        f"- {device}; {facts['cpu']}, {n_cores} cores",
        *([f"- **{loaded(load, n_cores)}**"] if is_loaded(load, n_cores) else []),
        f"- `{settings} {facts['command']}`",
        "- Weights are random (such as `random:small`): speed depends only on the shape; answers "
        "mean nothing.",
        "",
        *checks.answers(results),
        *checks.caches(results),
        *checks.copies(results),
        *checks.two(results),
        *checks.kernels(results),
        *checks.fault(results),
        *engine(results),
        *grpc(results),
        *cores(results, facts["settings"]["IMAGES"]),
        *generate(results),
        *graphs(results),
        *nearness(results),
        *soak(results),
        *torch(results),
        "## Left out",
        "",
        *([f"- {line}" for line in everything["missing"]] or ["Nothing; all steps were measured."]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
