"""The report of the steps that check a GPU: those of checks.py."""

from tables import Results, percent, short, table


def yes(flag: bool) -> str:
    return "yes" if flag else "**no**"


def answers(results: Results) -> list[str]:
    rows = [
        [
            row["model"],
            row["precision"],
            row["graph"],
            str(row["numbers"]),
            f"{row['error']:.1e}" if row["error"] is not None else "–",
            yes(row["fits"]),
        ]
        for _, _, found in results.of("answers")
        for row in found
    ]
    header = ["model", "precision", "answer", "numbers", "error", "within the limit"]
    return [
        "## Served answers against the CPU",
        "",
        "‖answer − answer of the CPU in fp32‖ / ‖answer of the CPU in fp32‖, of `imagegpt score` and `embed`.",
        "",
        *table(header, rows),
    ]


def caches(results: Results) -> list[str]:
    nan = [
        [str(row["head"]), row["attention"]] + [yes(row[key]) for key in ("finite", "same_bits", "repeats")]
        for _, _, found in results.of("nan")
        for row in found
    ]
    seeds = [
        [str(row["head"]), row["attention"], f"{row['same']} of {row['images']}"]
        for _, _, found in results.of("seeds")
        for row in found
    ]
    steps = [
        [row["attention"], str(row["slots"]), str(row["past"]), short(row["median_ms"]), short(row["tokens_per_second"])]
        for _, _, found in results.of("steps")
        for row in found
    ]
    primers = [
        [str(row["tokens"]), short(row["first"]), short(row["second"])]
        for _, _, found in results.of("primers")
        for row in found
    ]
    return [
        "## Steps of generation",
        "",
        "Steps beside a key/value cache of NaN, by elements per head:",
        "",
        *table(["head", "attention", "finite", "bits as beside zeros", "bits repeat"], nan),
        "Images that were the same in three turns with one seed, in as many slots:",
        "",
        *table(["head", "attention", "same"], seeds),
        "Times of steps:",
        "",
        *table(["attention", "slots", "past", "median ms", "tokens/s"], steps),
        "Completions after a primer, with the start of the command:",
        "",
        *table(["tokens of the primer", "first, s", "second, s"], primers),
    ]


def copies(results: Results) -> list[str]:
    rows = [
        [
            f"{shape} {precision}",
            row["copies"],
            str(row["batch_size"]),
            short(row["features_per_second"]),
            short(row["grpc_per_second"]),
            yes(row["same_bits"]),
        ]
        for shape, precision, found in results.of("copies")
        for row in found
    ]
    header = ["model", "--gpu-copies", "batch", "features/s", "through gRPC, images/s", "same bits"]
    return [
        "## Kinds of copies",
        "",
        "In turns, a process for each; bits of scores and features are compared with those of the first row.",
        "",
        *table(header, rows),
    ]


def two(results: Results) -> list[str]:
    rows = []
    for shape, precision, found in results.of("two"):
        one, first, second = (
            found[name]["saturation_images_per_second"] for name in ("one", "first", "second")
        )
        both = first + second
        cells = [short(one), f"{short(first)} and {short(second)}", f"{both / one:.2f} ×"]
        rows.append([f"{shape} {precision}", *cells])
    header = ["model", "one worker, images/s", "two, images/s", "both to one"]
    return ["## Two workers on one device", "", *table(header, rows)]


def kernels(results: Results) -> list[str]:
    lines = []
    for shape, precision, found in results.of("kernels"):
        rows = [
            [
                "`" + row["kernel"][:100].replace("|", "/") + "`",
                str(row["launches"]),
                short(row["total_ms"]),
                short(row["mean_us"]),
                percent(row["share"]),
            ]
            for row in found["kernels"]
        ]
        lines += [
            f"{shape} {precision}, features at a batch of {found['batch_size']}, by {found['tool']}; "
            "loading and warming up included:",
            "",
            *table(["kernel", "launches", "total ms", "mean µs", "of all kernels"], rows),
        ]
    return ["## Kernels by time", "", *(lines or ["Not measured.", ""])]


def fault(results: Results) -> list[str]:
    lines = []
    for _, _, found in results.of("fault"):
        lines += [
            f"Exit code of the worker: {found['worker_exit_code']} (4 is a failed device), of the client: {found['client_exit_code']}.",
            "",
            "```text",
            *found["worker"],
            *found["client"],
            "```",
        ]
    return ["## A GPU that fails", "", *(lines or ["Not measured."]), ""]
