#!/usr/bin/env python3
"""Run the commands of README.md and docs/, page by page, as a reader would.

Each fenced block with the language sh, python or console is run from the root of
the repository, with target/demo (or BINARY's directory) first on PATH, and has to
end with exit code 0. A comment above a block changes that:

    <!-- not run: REASON -->          the block is not run
    <!-- background: URL -->          the block runs until the page ends; the next
                                      block begins once URL answers 200
    <!-- output differs by machine --> a console block's output is not compared

The standard output of a console block is compared with the page: numbers to one in 200,
"…" stands for any text, and "..." on a line of its own for any lines. Directories
that a page names after --output below target/ are removed before the page runs.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\s*$")
DIRECTIVE = re.compile(r"^<!-- (not run|background|output differs by machine)(?:: (.*?))? -->$")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SHELL = ["bash", "-euo", "pipefail", "-c"]
TIMEOUT_S = 1800
READY_S = 180


class Block:
    def __init__(self, page, line, language, directive, reason, text):
        self.place = f"{page}:{line}"
        self.language, self.directive, self.reason, self.text = language, directive, reason, text


def blocks(page):
    """Runnable blocks of a page."""
    found, lines = [], (ROOT / page).read_text().splitlines()
    index, above = 0, ""
    while index < len(lines):
        fence = FENCE.match(lines[index])
        if not fence:
            above = lines[index].strip() or above
            index += 1
            continue
        begin = index + 1
        index = begin
        while lines[index] != "```":
            index += 1
        text = "\n".join(lines[begin:index]) + "\n"
        index += 1
        match = DIRECTIVE.match(above)
        if fence[1] in ("sh", "python", "console"):
            directive, reason = (match[1], match[2] or "") if match else ("", "")
            found.append(Block(page, begin, fence[1], directive, reason, text))
        above = ""
    return found


def same(expected, actual):
    """True if a line of output agrees with the line of a page."""
    expected, actual = " ".join(expected.split()), " ".join(actual.split())
    shape = "(.*)".join(
        "([-0-9.]+)".join(re.escape(part) for part in NUMBER.split(text)) for text in expected.split("…")
    )
    match = re.fullmatch(shape, actual)
    if not match:
        return False
    groups = list(match.groups())
    for part in re.split(f"({NUMBER.pattern}|…)", expected):
        if part == "…":
            groups.pop(0)
        elif part and NUMBER.fullmatch(part):
            try:
                value = float(groups.pop(0))
            except ValueError:
                return False
            if abs(value - float(part)) > max(abs(float(part)) / 200, 1.5 * 10 ** -len(part.partition(".")[2])):
                return False
    return True


def compare(expected, actual):
    """First line of a page's output that the actual output does not have, or None."""
    expected, actual = expected.splitlines(), actual.splitlines()
    while expected:
        line = expected.pop(0)
        if line == "...":
            if not expected:
                return None
            while actual and not same(expected[0], actual[0]):
                actual.pop(0)
            continue
        if not actual or not same(line, actual.pop(0)):
            return line
    return None if not actual else f"(more: {actual[0]})"


def transcript(text):
    """Commands of a console block, each with its expected output."""
    steps = []
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append([line[2:], ""])
        else:
            steps[-1][1] += line + "\n"
    return steps


class Page:
    def __init__(self, page, environment):
        self.page, self.environment, self.background = page, environment, []

    def run(self, command, text=""):
        """Runs a command with text on standard input."""
        run = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        return run.returncode, run.stdout, run.stderr

    def shell(self, text):
        return self.run([*SHELL, text])

    def python(self, text):
        return self.run([self.environment["DOCS_PYTHON"], "-"], text)

    def start(self, block):
        log = open(ROOT / "target" / "docs-check.log", "w+")
        process = subprocess.Popen(
            [*SHELL, f"exec {block.text}"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.background.append((block, process))
        end = time.monotonic() + READY_S
        while time.monotonic() < end and process.poll() is None:
            try:
                with urllib.request.urlopen(block.reason, timeout=5) as answer:
                    if answer.status == 200:
                        return None
            except OSError:
                time.sleep(0.2)
        log.seek(0)
        return f"not ready within {READY_S} s:\n{log.read()[-3000:]}"

    def stop(self):
        """Ends what runs in the background, and returns what did not end well."""
        failed = []
        for block, process in self.background:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                code = process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = "no end within 60 s"
            if code != 0:
                failed.append((block, f"exit code {code}"))
        return failed

    def check(self, block):
        """Runs a block; returns why it failed, or None."""
        if block.directive == "background":
            return self.start(block)
        if block.language != "console":
            run = self.shell if block.language == "sh" else self.python
            code, out, err = run(block.text)
            return None if code == 0 else f"exit code {code}:\n{(out + err)[-3000:]}"
        for command, expected in transcript(block.text):
            code, out, err = self.shell(command)
            if code != 0:
                return f"$ {command}\nexit code {code}:\n{(out + err)[-3000:]}"
            if block.directive != "output differs by machine":
                line = compare(expected, out)
                if line is not None:
                    return f"$ {command}\nthe page has a line that the output lacks: {line}\n{out + err}"
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", help="pages, relative to the repository; default: all")
    parser.add_argument("--list", action="store_true", help="list the blocks, and run none")
    args = parser.parse_args()
    pages = args.pages or ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
    environment = dict(os.environ)
    program = ROOT / environment.get("BINARY", "target/demo/imagegpt")
    environment["DOCS_PYTHON"] = str((ROOT / environment.get("DOCS_PYTHON", sys.executable)).absolute())
    # `python3` of the pages is the one that has what they import.
    first = [str(program.parent), str(Path(environment["DOCS_PYTHON"]).parent)]
    environment["PATH"] = ":".join([*first, environment["PATH"]])
    # The Python client from its sources, with this program.
    environment["IMAGEGPT_BINARY"] = str(program)
    environment["PYTHONPATH"] = str(ROOT / "python" / "src")
    passed, skipped, failed = 0, 0, 0
    for name in pages:
        page, found = Page(name, environment), blocks(name)
        if not args.list:
            for output in {o for block in found for o in re.findall(r"--output (target/[\w./-]+)", block.text)}:
                path = ROOT / output
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for block in found:
            if args.list or block.directive == "not run":
                print(f"{'-' if block.directive == 'not run' else ' '} {block.place} {block.language} {block.directive} {block.reason}".rstrip())
                skipped += 1
                continue
            begun = time.monotonic()
            try:
                why = page.check(block)
            except subprocess.TimeoutExpired:
                why = f"no end within {TIMEOUT_S} s"
            print(f"{'FAILED' if why else 'ok'} {block.place} ({time.monotonic() - begun:.1f} s)", flush=True)
            if why:
                print(why, flush=True)
                failed += 1
            else:
                passed += 1
        for block, why in page.stop():
            print(f"FAILED {block.place}: {why}")
            failed += 1
    print(f"{passed} blocks passed, {failed} failed, {skipped} {'listed' if args.list else 'not run'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
