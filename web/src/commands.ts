// The page's calls as Python and as commands, to copy.

import { button, make } from "./dom.ts";
import { ENDPOINT, hasToken } from "./worker.ts";

export type Fit = "squash" | "center-crop";
export type Alpha = "drop" | "white";

/** Writes a text as a word of a shell. */
export function shellWord(text: string): string {
  return /^[A-Za-z0-9_./:@%+=,-]+$/.test(text) && !text.startsWith("-")
    ? text
    : `'${text.startsWith("-") ? "./" : ""}${text.replaceAll("'", `'\\''`)}'`;
}

/** Writes a text as a string of Python: JSON's escapes are Python's too, but for
 * characters beyond 16 bits, which stay as they are. */
export function pythonString(text: string): string {
  return JSON.stringify(text);
}

/** Makes a command of `imagegpt` from its words. */
export function command(name: string, files: string[], flags: (string | number)[]): string {
  const words = [
    "imagegpt",
    name,
    ...files.map(shellWord),
    ...flags.map((flag) => (String(flag).startsWith("--") ? String(flag) : shellWord(String(flag)))),
    "--endpoint",
    shellWord(ENDPOINT),
    ...(hasToken() ? ["--token-file", "token"] : []),
  ];
  return words.join(" ");
}

/** Makes a program of Python that calls this worker. */
export function python(lines: string[]): string {
  const token = hasToken() ? `, token_file="token"` : "";
  return [
    "from imagegpt import Client",
    "",
    `with Client(${pythonString(ENDPOINT)}${token}) as client:`,
    ...lines.map((line) => (line ? `    ${line}` : "")),
  ].join("\n");
}

/** Writes arguments of a call: names with values that are not undefined. */
export function keywords(values: Record<string, string | number | boolean | undefined>): string {
  return Object.entries(values)
    .filter(([, value]) => value !== undefined)
    .map(([name, value]) => {
      switch (typeof value) {
        case "string":
          return `, ${name}=${pythonString(value)}`;
        case "boolean":
          return `, ${name}=${value ? "True" : "False"}`;
        default:
          return `, ${name}=${value}`;
      }
    })
    .join("");
}

/** Shows programs with a button each that copies them. */
export function showCode(into: HTMLElement, python: string, shell: string): void {
  const what = into.closest("section")?.querySelector("h2")?.textContent ?? "";
  const block = (title: string, id: string, text: string) => {
    const code = make("code", {}, text);
    const name = `${title}: ${what}`;
    const pre = make("pre", { tabindex: "0", "aria-label": name, role: "region" }, code);
    const said = make("span", { role: "status", class: "hint" });
    const copy = button(`Copy ${id === "shell" ? "command" : title}`, () => void copyText(text, code, said));
    return make("div", { class: "code", "data-code": id }, make("h3", {}, title), copy, said, pre);
  };
  into.replaceChildren(block("Python", "python", python), block("Command", "shell", shell));
}

async function copyText(text: string, code: HTMLElement, said: HTMLElement): Promise<void> {
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = "copied";
  } catch {
    // Browsers have no clipboard on pages without TLS, loopback aside.
    getSelection()?.selectAllChildren(code);
    said.textContent = "selected: copy it with Ctrl-C";
  }
}
