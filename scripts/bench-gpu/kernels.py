"""The kernels of a command by their total time, as a profiler of NVIDIA counts them.

    kernels.py test    # checks the reading of both tools' output; tests/it/scripts.rs runs it

Nsight Systems (nsys) measures at full speed and is asked first; Nsight Compute (ncu) runs one
kernel after another, so its times are those of kernels alone on the device.
"""

import csv
import io
import re
import shutil
import sys
from pathlib import Path

# Directories of CUDA's installer beside those on PATH.
ELSEWHERE = ("/usr/local/cuda/bin",)
# Most kernels that ncu measures: it needs some ten milliseconds for each.
LAUNCHES = 1500
TOP = 10

NANOSECONDS = {
    "ns": 1, "nsecond": 1, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9,
    "second": 1e9,
}  # fmt: skip


def tools() -> list[tuple[str, str]]:
    """Returns the names and paths of the tools that are installed, the first choice first."""
    places = [None, *ELSEWHERE]
    found = [
        (name, [path for place in places if (path := shutil.which(name, path=place))])
        for name in ("nsys", "ncu")
    ]
    return [(name, paths[0]) for name, paths in found if paths]


def commands(tool: str, path: str, report: Path, command: list[str]) -> list[list[str]]:
    """Returns the commands that profile a command, of which the last prints a table."""
    if tool == "nsys":
        measured = report.with_suffix(".nsys-rep")
        return [
            [
                path, "profile", "--trace", "cuda", "--sample", "none", "--cpuctxsw", "none",
                "--force-overwrite", "true", "--output", str(report), *command,
            ],
            [path, "stats", "--report", "cuda_gpu_kern_sum", "--format", "csv", str(measured)],
        ]  # fmt: skip
    # The clocks stay as they are: a machine may be shared.
    return [
        [
            path, "--csv", "--metrics", "gpu__time_duration.sum", "--clock-control", "none",
            "--cache-control", "none", "--target-processes", "all", "--launch-count",
            str(LAUNCHES), *command,
        ],
    ]  # fmt: skip


def rows_after(text: str, first: str) -> list[dict[str, str]]:
    """Reads a table with a header that begins with `first`, after any other lines."""
    lines = text.splitlines()
    starts = [idx for idx, line in enumerate(lines) if line.lstrip('"').startswith(first)]
    if not starts:
        return []
    # Between the rows are lines of the tool and of the program.
    begins = [line for line in lines[starts[0] + 1 :] if re.match('"?[0-9]', line)]
    reader = csv.DictReader(io.StringIO("\n".join([lines[starts[0]], *begins])))
    return [row for row in reader if None not in row.values()]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def by_nsys(text: str) -> dict[str, list[float]]:
    """Reads the times of `nsys stats --report cuda_gpu_kern_sum --format csv`."""
    kernels = {}
    for row in rows_after(text, "Time (%)"):
        total = next(value for name, value in row.items() if name.startswith("Total Time"))
        seen = kernels.setdefault(row["Name"], [0, 0.0])
        seen[0] += int(number(row["Instances"]))
        seen[1] += number(total)
    return kernels


def by_ncu(text: str) -> dict[str, list[float]]:
    """Reads the times of `ncu --csv --metrics gpu__time_duration.sum`, a row per launch."""
    kernels = {}
    for row in rows_after(text, "ID"):
        if row["Metric Name"] == "gpu__time_duration.sum":
            seen = kernels.setdefault(row["Kernel Name"], [0, 0.0])
            seen[0] += 1
            seen[1] += number(row["Metric Value"]) * NANOSECONDS[row["Metric Unit"]]
    return kernels


def table(tool: str, text: str) -> list[dict]:
    """Returns the kernels with the largest total time, the largest first.

    Raises ValueError if the tool measured no kernel.
    """
    kernels = {"nsys": by_nsys, "ncu": by_ncu}[tool](text)
    total = sum(nanoseconds for _, nanoseconds in kernels.values())
    if not total:
        raise ValueError(f"{tool} printed no times of kernels")
    most = sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP]
    return [
        {
            "kernel": name,
            "launches": launches,
            "total_ms": nanoseconds / 1e6,
            "mean_us": nanoseconds / launches / 1e3,
            "share": nanoseconds / total,
        }
        for name, (launches, nanoseconds) in most
    ]


def measure(found: list, run, failure: type, report: Path, command: list[str]) -> dict:
    """Returns the kernels of a command by the first tool that measures any.

    `run` runs a command and returns its output, or raises a `failure`. Raises ValueError with
    what each tool said if none measured a kernel.
    """
    said = []
    for name, path in found:
        try:
            output = ""
            for part in commands(name, path, report, command):
                output = run(*part)
            return {"tool": name, "kernels": table(name, output)}
        except (failure, ValueError, KeyError) as failed:
            said.append(f"{name}: {failed}")
    raise ValueError("; ".join(said))


# Written by the tools' documented formats, and not recorded from a run.
NSYS = """\
Generating SQLite file /tmp/kernels.sqlite from /tmp/kernels.nsys-rep
Processing [/tmp/kernels.sqlite] with [/opt/nsys/reports/cuda_gpu_kern_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Name
60.0,6000000,32,187500.0,187000.0,186000,190000,900.5,"void gemm<float, (int)128>(Params)"
30.0,3000000,16,187500.0,187000.0,186000,190000,900.5,quick_gelu_16
10.0,1000000,64,15625.0,15000.0,14000,19000,800.0,"copy_kernel(const int *, int)"
"""
NCU = """\
==PROF== Connected to process 4242 (/opt/imagegpt)
==PROF== Profiling "quick_gelu_16" - 0: 0%....50%....100% - 1 pass
serving "emoji, as 5" of
3 images
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4242","imagegpt","127.0.0.1","quick_gelu_16","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","us","110.5"
"1","4242","imagegpt","127.0.0.1","void gemm<float, (int)128>(Params)","1","7","(128, 1, 1)",\
"(8, 8, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","ms","1.5"
==PROF== Disconnected from process 4242
"2","4242","imagegpt","127.0.0.1","quick_gelu_16","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0",\
"Command line profiler metrics","gpu__time_duration.sum","nsecond","1,109,500"
"""


def test() -> None:
    rows = table("nsys", NSYS)
    assert [row["kernel"] for row in rows] == [
        "void gemm<float, (int)128>(Params)", "quick_gelu_16", "copy_kernel(const int *, int)",
    ]  # fmt: skip
    first = {
        "kernel": "void gemm<float, (int)128>(Params)", "launches": 32, "total_ms": 6.0,
        "mean_us": 187.5, "share": 0.6,
    }  # fmt: skip
    assert rows[0] == first, rows[0]
    rows = table("ncu", NCU)
    assert [(row["kernel"], row["launches"]) for row in rows] == [
        ("void gemm<float, (int)128>(Params)", 1), ("quick_gelu_16", 2),
    ]  # fmt: skip
    assert abs(rows[1]["total_ms"] - 1.22) < 1e-9, rows
    assert abs(rows[1]["mean_us"] - 610) < 1e-9, rows
    many = NSYS + "".join(f"0.0,{idx + 1},1,1.0,1.0,1,1,0.0,small_{idx}\n" for idx in range(20))
    assert len(table("nsys", many)) == TOP
    assert table("nsys", many)[-1]["kernel"] == "small_13"
    for tool, text in (
        ("nsys", "SKIPPED: kernels.sqlite does not contain CUDA kernel data.\n"),
        ("ncu", "==PROF== Connected to process 1\n==WARNING== No kernels were profiled.\n"),
        ("nsys", ""),
    ):
        try:
            table(tool, text)
        except ValueError as error:
            assert str(error) == f"{tool} printed no times of kernels"
        else:
            raise AssertionError(text)
    asked = commands("ncu", "ncu", Path("kernels"), ["imagegpt", "embed"])
    assert len(asked) == 1
    assert asked[0][-2:] == ["imagegpt", "embed"]
    assert asked[0][asked[0].index("--clock-control") + 1] == "none"
    asked = commands("nsys", "nsys", Path("out/kernels"), ["imagegpt", "embed"])
    assert asked[0][-2:] == ["imagegpt", "embed"]
    assert asked[1][-1] == "out/kernels.nsys-rep"
    test_measure()
    print("kernels: fine")


def test_measure() -> None:
    both = [("nsys", "/opt/nsys"), ("ncu", "/opt/ncu")]
    # Answers of commands by their first two words; no answer is a failure.
    good = {"/opt/nsys profile": "", "/opt/nsys stats": NSYS, "/opt/ncu --csv": NCU}

    def measured(answers: dict) -> dict:
        ran = []

        def run(*part: str) -> str:
            ran.append(" ".join(part[:2]))
            if ran[-1] not in answers:
                raise OSError(f"{ran[-1]} failed")
            return answers[ran[-1]]

        return measure(both, run, OSError, Path("kernels"), ["imagegpt"]) | {"ran": ran}

    found = measured(good)
    assert found["tool"] == "nsys"
    assert found["ran"] == ["/opt/nsys profile", "/opt/nsys stats"]
    assert len(found["kernels"]) == 3
    # A profile of which no report can be made, and one without kernels.
    for answers in (
        {"/opt/nsys profile": "", "/opt/ncu --csv": NCU},
        {**good, "/opt/nsys stats": "SKIPPED: no CUDA kernel data.\n"},
    ):
        found = measured(answers)
        assert found["tool"] == "ncu"
        assert len(found["kernels"]) == 2
    try:
        measured({})
    except ValueError as error:
        assert str(error) == "nsys: /opt/nsys profile failed; ncu: /opt/ncu --csv failed"
    else:
        raise AssertionError


if __name__ == "__main__":
    if sys.argv[1:] != ["test"]:
        sys.exit(__doc__)
    test()
