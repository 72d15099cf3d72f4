"""The report of scripts/bench-peers.sh: Markdown from results.json.

report.py RESULTS.json > bench-peers.md
"""

import json
import statistics
import sys
from pathlib import Path

import systems

WIDTH, INNER_WIDTH, POSITIONS = 512, 2048, 1024
# Threads that have a core for less of the time share it with other work.
ON_CORES_MIN = 0.85
# By precision, the instructions that may do a product exactly.
INSTRUCTIONS = {
    "fp32": ("fp32_fma",),
    "bf16": ("bf16_dot", "bf16_amx"),
    "int8": ("int8_vpmaddwd", "int8_vnni", "int8_amx"),
}


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def operations(n_layers: int) -> tuple[int, int]:
    """Returns the operations of products with weights, and of the causal half of attention."""
    weights = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER_WIDTH
    return 2 * weights * POSITIONS * n_layers, 2 * WIDTH * POSITIONS * POSITIONS * n_layers


def bound(precision: str, n_layers: int, peaks: dict[str, float]) -> float | None:
    """Returns the seconds in which this CPU can compute one image at best.

    Products in 8 bits have attention in floats.
    """

    def fastest(*precisions: str) -> float | None:
        names = [name for precision in precisions for name in INSTRUCTIONS[precision]]
        return max((peaks[name] for name in names if name in peaks), default=None)

    floats = ("fp32", "bf16") if precision == "int8" else (precision,)
    products, attention = operations(n_layers)
    rate, float_rate = fastest(precision), fastest(*floats)
    return products / rate + attention / float_rate if rate and float_rate else None


class Results:
    def __init__(self, results: dict):
        self.all = results
        self.systems = {row["name"]: row for row in results["systems"]}

    def median(self, name: str) -> float | None:
        seconds = self.systems.get(name, {}).get("seconds")
        return statistics.median(seconds) if seconds else None

    def ratio(self, peer: str, ours: str) -> float | None:
        """Returns how many times the peer's time is that of ours."""
        theirs, own = self.median(peer), self.median(ours)
        return theirs / own if theirs and own else None


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f} ×"


def compared(results: Results) -> list[str]:
    rows = []
    for row in results.all["systems"]:
        if "not_run" in row:
            rows.append([row["label"], f"not run: {row['not_run']}", "", "", "", "", ""])
            continue
        seconds = row["seconds"]
        least = bound(row["precision"], row["n_layers"], results.all["peaks"])
        ratio = results.ratio(row["name"], f"{systems.OURS}-{row['precision']}")
        rows.append([
            row["label"],
            f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f} to {max(seconds):.3f}",
            f"{statistics.median(row['cpu_seconds']):.3f}",
            f"{row['cosine']:.5f}",
            "" if row["is_ours"] else times(ratio),
            f"{100 * least / statistics.median(seconds):.0f} %" if least else "–",
        ])  # fmt: skip
    header = ["system", "s/image", "least to most", "CPU s/image", "cosine", "imagegpt's speed against it"]
    header.append("share of the bound")
    return table(header, rows)


def goals(results: Results) -> list[str]:
    rows = []
    for goal in systems.goals(set(results.all["cpu_features"])):
        ours = f"{systems.OURS}-{goal.precision}"
        ratio = results.ratio(goal.peer, ours)
        wanted = f"{goal.ratio} × at cosine {goal.cosine}" if goal.ratio else "none on this CPU"
        if ratio is None:
            rows.append([f"{ours} against {goal.peer}", wanted, "", "not measured"])
            continue
        cosine = results.systems[ours]["cosine"]
        if not goal.ratio:
            verdict = "–"
        elif busy(results):
            verdict = "undecided: the machine was busy"
        else:
            is_reached = ratio >= goal.ratio and cosine >= goal.cosine
            verdict = "reached" if is_reached else "not reached"
        found = f"{times(ratio)} at cosine {cosine:.5f}"
        rows.append([f"{ours} against {goal.peer}", wanted, found, verdict])
    return table(["what", "goal", "found", "reached or not"], rows)


def busy(results: Results) -> list[str]:
    """Warns if other work took the cores away."""
    n_threads = results.all["settings"]["THREADS"]
    shares = [
        sum(row["cpu_seconds"]) / sum(row["seconds"]) / n_threads
        for row in results.all["systems"]
        if "seconds" in row
    ]
    share = statistics.median(shares) if shares else 1.0
    if share >= ON_CORES_MIN:
        return []
    return [
        f"- **The machine was busy: threads had a core for {100 * share:.0f} % of the time. Measure "
        "again when it is quiet; until then trust only the CPU seconds**"
    ]


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def worker(results: Results) -> list[str]:
    start, score = results.all["start"], results.all["score"]
    if "not_run" in start:
        ready = resident = f"not run: {start['not_run']}"
    else:
        ready = spread(start["ready_seconds"], ".2f") + " s"
        resident = spread([size / 1e6 for size in start["resident_bytes"]], ".0f") + " MB"
    scored = f"not run: {score['not_run']}" if "not_run" in score else spread(score["seconds"], ".2f") + " s"
    small = "imagegpt-small in int8, all tasks"
    rows = [
        [f"`imagegpt serve`, {small}: from start to ready", ready],
        ["the same: resident memory when ready", resident],
        ["`imagegpt score models/pictures/food-drink --model models/emoji`, five pictures", scored],
    ]
    return table(["what", "figure"], rows)


def markdown(everything: dict) -> str:
    results = Results(everything)
    n_rounds, n_threads = (everything["settings"][name] for name in ("ROUNDS", "THREADS"))
    settings = " ".join(
        f'{name}="{value}"' if " " in str(value) else f"{name}={value}"
        for name, value in everything["settings"].items()
    )
    peaks = [[name, f"{rate / 1e12:.3f}"] for name, rate in everything["peaks"].items()]
    versions = [f"- {row['label']}: {row['version']}" for row in everything["systems"] if "version" in row]
    before, after = everything["load"]
    lines = [
        "# This worker's CPU engine beside its peers",
        "",
        f"- `{settings} make bench-peers`, {everything['date']}",
        f"- {everything['program']}, commit {everything['commit']}",
        f"- {everything['cpu']}, {everything['cores']} cores, with "
        f"{', '.join(everything['cpu_features']) or 'none of the features that matter'}",
        f"- load average {before:.1f} before and {after:.1f} after; the systems alone make about {n_threads}",
        *busy(results),
        *versions,
        "",
        f"Peaks of bare loops on {n_threads} threads, TOP/s, one multiplication and addition being two:",
        "",
        *table(["instruction", "TOP/s"], peaks),
        f"Features at layer {systems.LAYER} of imagegpt-small's architecture with random weights, one "
        f"image of {POSITIONS} tokens, mean over positions, {n_threads} threads, medians of {n_rounds} "
        "interleaved rounds; the cosine is the least over a few images, to PyTorch in float64:",
        "",
        *compared(results),
        "Goals:",
        "",
        *goals(results),
        "The worker:",
        "",
        *worker(results),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
