// Completions: what is kept, the options, and samples that grow row by row.

import { command, keywords, python, pythonString, showCode } from "./commands.ts";
import { button, chosen, count, decimals, make, onChoice, save } from "./dom.ts";
import { byId } from "./elements.ts";
import {
  type GenerateResponse,
  type GetModelResponse,
  Task,
} from "./gen/imagegpt/v1/imagegpt_pb.ts";
import { explain, moved, tell } from "./look.ts";
import { colorOf, paint, paintRow, pngOf } from "./paint.ts";
import { ALPHAS, FITS, type Picture, type Switches } from "./pictures.ts";
import { type Encoded, primerOf } from "./sent.ts";
import { call, problemOf, refusal, workerWith } from "./worker.ts";

type Keep = "rows" | "mask" | "nothing";

/** Rows between two announcements of the progress. */
const SAY_ROWS = 8;

const form = byId("complete-form");
const canvas = byId("keep");
const frame = byId("keep-frame");
const line = byId("line");
const brush = byId("brush");
const caption = byId("keep-caption");
const state = byId("complete-state");
const problem = byId("complete-problem");
const start = byId("start");
const stop = byId("stop");
const list = byId("samples-out");

let model: GetModelResponse | undefined;
let picture: Picture | undefined;
let switches: Switches = { fit: "squash", alpha: "drop" };
let tokens: readonly number[] | undefined;
let keptRows = 16;
/** 1 for each pixel that is kept. */
let mask = new Uint8Array(1024).fill(1);
let brushAt = 0;
let running: AbortController | undefined;

export function setModel(to: GetModelResponse): void {
  model = to;
  const can = to.tasks.includes(Task.GENERATE);
  form.hidden = !can;
  byId("complete-missing").hidden = can;
  byId("complete-code").parentElement?.toggleAttribute("hidden", !can);
  const limit = (id: "samples" | "top-k", max: number) => {
    const field = byId(id);
    field.max = String(max);
    clamp(field);
  };
  limit("samples", to.limits?.samplesPerCallMax || 8);
  limit("top-k", to.paletteRgb8.length / 3);
  if (mask.length !== to.positions) {
    mask = new Uint8Array(to.positions).fill(1);
    keptRows = Math.floor(to.side / 2);
  }
  line.setAttribute("aria-valuemax", String(to.side));
  show();
}

/** Shows another picture in the editor, with its tokens once they are there. */
export function setPicture(
  to: Picture | undefined,
  how: Switches,
  its: readonly number[] | undefined,
): void {
  picture = to;
  switches = how;
  tokens = its;
  show();
}

function keep(): Keep {
  const value = chosen("keep");
  return value === "mask" || value === "nothing" ? value : "rows";
}

/** Returns true if a pixel is kept by what is chosen. */
function isKept(pixel: number): boolean {
  switch (keep()) {
    case "rows":
      return pixel < keptRows * (model?.side ?? 32);
    case "mask":
      return mask[pixel] === 1;
    case "nothing":
      return false;
  }
}

function show(): void {
  const how = keep();
  const side = model?.side ?? 32;
  const nKept = Array.from({ length: side * side }, (_, pixel) => isKept(pixel)).filter(Boolean).length;
  frame.hidden = how === "nothing";
  line.hidden = how !== "rows";
  brush.hidden = how !== "mask";
  byId("mask-tools").hidden = how !== "mask";
  byId("brush-tools").disabled = how !== "mask";
  const palette = model?.paletteRgb8;
  if (palette) {
    paint(
      canvas,
      side,
      (pixel) => (tokens ? colorOf(palette, tokens[pixel] ?? 0) : undefined),
      (pixel) => (isKept(pixel) ? 255 : 60),
    );
  }
  line.style.insetBlockStart = `${(100 * keptRows) / side}%`;
  line.setAttribute("aria-valuenow", String(keptRows));
  line.setAttribute("aria-valuetext", `${keptRows} of ${side} rows are kept`);
  brush.style.setProperty("--row", String(Math.floor(brushAt / side)));
  brush.style.setProperty("--column", String(brushAt % side));
  brush.style.setProperty("--side", String(side));
  brush.style.setProperty("--size", String(brushSize()));
  const nDrawn = side * side - nKept;
  caption.textContent =
    how === "nothing"
      ? `All ${count(nDrawn, "pixel")} are drawn.`
      : `${how === "rows" ? `${count(keptRows, "row")} and ` : ""}${count(nKept, "pixel")} kept, ${nDrawn.toLocaleString("en")} drawn.` +
        (how === "mask" ? " A pixel knows those above it and to its left." : "");
  start.disabled = running !== undefined || (how !== "nothing" && !tokens);
  showCommands();
}

interface Options {
  samples: number;
  temperature: number;
  topK: number;
  topP: number;
  seed: bigint | undefined;
  scale: number;
}

/** Fields of numbers, each with its name in a sentence. */
const NUMBERS = [
  { id: "samples", name: "Samples", isWhole: true },
  { id: "temperature", name: "Temperature", isWhole: false },
  { id: "top-k", name: "Top-k", isWhole: true },
  { id: "top-p", name: "Top-p", isWhole: false },
  { id: "scale-png", name: "Pixels of the PNG per pixel", isWhole: true },
] as const;
const SEED_MAX = 2n ** 64n - 1n;

/** What the commands show: the options when all fields were last right. */
let written: Options = { samples: 4, temperature: 1, topK: 0, topP: 1, seed: 7n, scale: 8 };

/** Returns the fields whose values no call takes, with a sentence for each. The
 * form is not validated by browsers, which know no steps as mere hints. */
function faults(): [field: HTMLInputElement, sentence: string][] {
  const found: [HTMLInputElement, string][] = [];
  for (const { id, name, isWhole } of NUMBERS) {
    const field = byId(id);
    const value = field.valueAsNumber;
    const isIn = value >= Number(field.min) && value <= Number(field.max);
    if (!isIn || (isWhole && !Number.isInteger(value))) {
      const kind = isWhole ? "whole number" : "number";
      found.push([field, `${name} takes a ${kind} from ${field.min} to ${field.max}: change it.`]);
    }
  }
  const seed = byId("seed");
  const text = seed.value.trim();
  if (text !== "" && !(/^[0-9]+$/.test(text) && BigInt(text) <= SEED_MAX)) {
    found.push([
      seed,
      `Seed takes a whole number from 0 to ${SEED_MAX}: change it, or leave it empty for a random one.`,
    ]);
  }
  return found;
}

/** Returns the options in the fields, which are right. */
function options(): Options {
  const number = (id: (typeof NUMBERS)[number]["id"]) => byId(id).valueAsNumber;
  const seed = byId("seed").value.trim();
  return {
    samples: number("samples"),
    temperature: number("temperature"),
    topK: number("top-k"),
    topP: number("top-p"),
    seed: seed === "" ? undefined : BigInt(seed),
    scale: number("scale-png"),
  };
}

/** Brings the number in a field into its range; a field without one stays. */
function clamp(field: HTMLInputElement): void {
  const value = field.valueAsNumber;
  if (!Number.isNaN(value)) {
    field.value = String(Math.min(Math.max(value, Number(field.min)), Number(field.max)));
  }
}

function showCommands(): void {
  const from = keep();
  const wrong = new Set(faults().map(([field]) => field));
  for (const field of [...NUMBERS.map(({ id }) => byId(id)), byId("seed")]) {
    field.setAttribute("aria-invalid", String(wrong.has(field)));
  }
  if (wrong.size === 0) {
    written = options();
  }
  const { samples, temperature, topK, topP, seed, scale } = written;
  const number = seed === undefined ? undefined : String(seed);
  const sampling =
    `, samples=${samples}${keywords({ temperature, top_k: topK, top_p: topP })}` +
    `${number === undefined ? "" : `, seed=${number}`}, scale=${scale}`;
  const flags = [
    ...["--samples", samples, "--temperature", temperature, "--top-k", topK, "--top-p", topP],
    ...(number === undefined ? [] : ["--seed", number]),
    ...["--scale", scale, "--save-samples", "samples", "--output", "sheet.png"],
  ];
  const write = [
    "for drawn in images:",
    `    drawn.image.save(f"sample-{drawn.sample}.png")`,
  ];
  const into = byId("complete-code");
  if (from === "nothing") {
    const program = python([`images = client.generate(${sampling.slice(2)})`, ...write]);
    showCode(into, program, command("generate", [], flags));
    return;
  }
  const name = picture?.name ?? "picture.png";
  const { fit, alpha } = switches;
  const kept = from === "rows" ? `rows=${keptRows}` : "mask=mask";
  const lines = [
    ...(from === "mask"
      ? [`mask = numpy.asarray(Image.open("mask.png").convert("L")) > 127`]
      : []),
    `images = client.complete(${pythonString(name)}, ${kept}${sampling}${keywords({ fit, alpha })})`,
    ...write,
  ];
  const program = (from === "mask" ? "import numpy\nfrom PIL import Image\n" : "") + python(lines);
  const which = from === "rows" ? ["--rows", keptRows] : ["--mask", "mask.png"];
  showCode(
    into,
    program,
    command("generate", [], ["--input", name, ...which, "--fit", fit, "--alpha", alpha, ...flags]),
  );
}

/** A sample that is being drawn. */
interface Sample {
  canvas: HTMLCanvasElement;
  caption: HTMLElement;
  item: HTMLLIElement;
  isDone: boolean;
}

function makeSamples(n: number, from: Keep): Sample[] {
  const side = model?.side ?? 32;
  const palette = model?.paletteRgb8 ?? new Uint8Array();
  const given = tokens;
  const samples = Array.from({ length: n }, (_, i) => {
    const canvas = make("canvas", { role: "img", "aria-label": `Sample ${i}, being drawn` });
    paint(
      canvas,
      side,
      (pixel) =>
        from !== "nothing" && given && isKept(pixel) ? colorOf(palette, given[pixel] ?? 0) : undefined,
    );
    const caption = make("p", {}, `Sample ${i}`);
    const item = make("li", {}, make("div", { class: "frame pixels" }, canvas), caption);
    return { canvas, caption, item, isDone: false };
  });
  list.replaceChildren(...samples.map((sample) => sample.item));
  return samples;
}

function primer(from: Keep): Encoded {
  if (from === "nothing" || !picture) {
    return [];
  }
  const { fit, alpha } = switches;
  const kept =
    from === "rows"
      ? { case: "rows" as const, value: keptRows }
      : { case: "mask" as const, value: mask.slice() };
  return primerOf(picture.file, {
    preprocess: { fit: FITS[fit], alpha: ALPHAS[alpha] },
    keep: kept,
  });
}

async function draw(): Promise<void> {
  const from = keep();
  if (!model || running || (from !== "nothing" && !tokens)) {
    return;
  }
  const [fault] = faults();
  if (fault) {
    const [field, sentence] = fault;
    tell(sentence, problem);
    field.focus();
    return;
  }
  const { seed, ...given } = options();
  // Another picture may be chosen before the samples are done.
  const stem = from === "nothing" ? "sample" : (picture?.name.replace(/\.[^.]*$/, "") ?? "sample");
  const control = new AbortController();
  running = control;
  tell(undefined, problem);
  const samples = makeSamples(given.samples, from);
  stop.disabled = false;
  state.textContent = `Drawing ${count(given.samples, "sample")} …`;
  show();
  // The browser's own clock, for whoever measures the page.
  performance.clearMarks("first-row");
  performance.mark("draw");
  const client = workerWith(primer(from));
  const request = {
    ...given,
    ...(seed === undefined ? {} : { seed }),
    logProbs: true,
  };
  let hasBegun = false;
  try {
    // A full worker rejects the call before its first message.
    const [first, rest] = await call(control.signal, async () => {
      const stream = client.generate(request, { signal: control.signal });
      const messages = stream[Symbol.asyncIterator]();
      return [await messages.next(), messages] as const;
    });
    hasBegun = true;
    for (let next = first; !next.done; next = await rest.next()) {
      take(next.value, samples, stem);
    }
    const nDone = samples.filter((sample) => sample.isDone).length;
    state.textContent += ` ${count(nDone, "sample")} done.`;
  } catch (reason) {
    if (problemOf(reason).kind === "canceled") {
      state.textContent = "Stopped.";
    } else {
      state.textContent = "";
      explain(reason, problem);
    }
    if (!hasBegun) {
      list.replaceChildren();
    }
    for (const sample of samples.filter((sample) => !sample.isDone)) {
      sample.caption.textContent += ", not finished";
    }
  } finally {
    running = undefined;
    stop.disabled = true;
    show();
  }
}

function take({ message }: GenerateResponse, samples: Sample[], stem: string): void {
  const side = model?.side ?? 32;
  switch (message.case) {
    case "started":
      state.textContent = `Seed ${message.value.seed}.`;
      break;
    case "row": {
      const { sample: number, row, ids } = message.value;
      const sample = samples[number];
      if (performance.getEntriesByName("first-row").length === 0) {
        performance.mark("first-row");
      }
      if (sample) {
        paintRow(sample.canvas, side, row, ids, model?.paletteRgb8 ?? new Uint8Array());
        sample.caption.textContent = `Sample ${number}: row ${row + 1} of ${side}`;
      }
      if (number === 0 && (row + 1) % SAY_ROWS === 0) {
        state.textContent = `${state.textContent?.split(" Row")[0]} Row ${row + 1} of ${side}.`;
      }
      break;
    }
    case "result": {
      const { sample: number, outcome } = message.value;
      const sample = samples[number];
      if (sample && outcome.case === "image") {
        finish(sample, number, stem, outcome.value.png, outcome.value.logProbs);
      } else if (sample) {
        sample.caption.textContent = refusal(`sample ${number}`, outcome.case === "error" ? outcome.value : undefined);
      }
      break;
    }
  }
}

function finish(
  sample: Sample,
  number: number,
  stem: string,
  bytes: Uint8Array,
  logProbs: number[],
): void {
  sample.isDone = true;
  const mean = logProbs.reduce((sum, each) => sum + each, 0) / logProbs.length;
  const likely = logProbs.length > 0 ? `, ln p ${decimals(mean, 2)} per drawn pixel` : ", nothing to draw";
  sample.caption.textContent = `Sample ${number}${likely}`;
  sample.canvas.setAttribute("aria-label", `Sample ${number}, done`);
  const png = new Uint8Array(bytes);
  sample.item.append(
    button(`Save PNG`, () => save(`${stem}-${number}.png`, png, "image/png"), {
      "aria-label": `Save PNG of sample ${number}`,
    }),
  );
}

function brushSize(): number {
  const size = Math.floor(byId("brush-size").valueAsNumber || 1);
  return Math.min(Math.max(size, 1), 16);
}

/** Paints the square of the brush around a pixel. */
function dab(at: number): void {
  const side = model?.side ?? 32;
  const size = brushSize();
  const value = chosen("brush") === "keep" ? 1 : 0;
  const [row, column] = [Math.floor(at / side), at % side];
  for (let y = row; y < Math.min(row + size, side); y++) {
    mask.fill(value, y * side + column, y * side + Math.min(column + size, side));
  }
}

function pixelAt(event: PointerEvent): number {
  const side = model?.side ?? 32;
  const box = frame.getBoundingClientRect();
  // The brush hangs around the pointer, and stays within the picture.
  const half = Math.floor((brushSize() - 1) / 2);
  const at = (part: number, whole: number) =>
    Math.min(Math.max(Math.floor((part / whole) * side) - half, 0), side - 1);
  return at(event.clientY - box.top, box.height) * side + at(event.clientX - box.left, box.width);
}

function listenToLine(): void {
  const set = (rows: number) => {
    const side = model?.side ?? 32;
    keptRows = Math.min(Math.max(rows, 0), side);
    show();
  };
  const drag = (event: PointerEvent) => {
    const box = frame.getBoundingClientRect();
    set(Math.round(((event.clientY - box.top) / box.height) * (model?.side ?? 32)));
  };
  frame.addEventListener("pointerdown", (event) => {
    if (keep() === "rows") {
      event.preventDefault();
      line.focus();
      frame.setPointerCapture(event.pointerId);
      drag(event);
    }
  });
  frame.addEventListener("pointermove", (event) => {
    if (keep() === "rows" && frame.hasPointerCapture(event.pointerId)) {
      drag(event);
    }
  });
  line.addEventListener("keydown", (event) => {
    const side = model?.side ?? 32;
    const to: Record<string, number> = {
      ArrowUp: keptRows - 1,
      ArrowLeft: keptRows - 1,
      ArrowDown: keptRows + 1,
      ArrowRight: keptRows + 1,
      PageUp: keptRows - 4,
      PageDown: keptRows + 4,
      Home: 0,
      End: side,
    };
    const rows = to[event.key];
    if (rows !== undefined) {
      event.preventDefault();
      set(rows);
    }
  });
}

function listenToBrush(): void {
  const at = (event: PointerEvent, paints: boolean) => {
    brushAt = pixelAt(event);
    if (paints) {
      dab(brushAt);
    }
    show();
  };
  brush.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    brush.focus();
    brush.setPointerCapture(event.pointerId);
    at(event, true);
  });
  brush.addEventListener("pointermove", (event) => at(event, brush.hasPointerCapture(event.pointerId)));
  brush.addEventListener("keydown", (event) => {
    const to = moved(event.key, brushAt, model?.side ?? 32);
    if (to !== undefined) {
      brushAt = to;
      caption.textContent = "";
    } else if (event.key === " ") {
      dab(brushAt);
    } else {
      return;
    }
    event.preventDefault();
    show();
  });
  const size = byId("brush-size");
  size.addEventListener("change", () => {
    size.value = String(brushSize());
    show();
  });
  const fill = (value: number) => () => {
    mask.fill(value);
    show();
  };
  byId("mask-keep").addEventListener("click", fill(1));
  byId("mask-draw").addEventListener("click", fill(0));
  byId("mask-save").addEventListener("click", async () => {
    const drawing = document.createElement("canvas");
    paint(drawing, model?.side ?? 32, (pixel) => (mask[pixel] === 1 ? [255, 255, 255] : [0, 0, 0]));
    save("mask.png", await pngOf(drawing), "image/png");
  });
}

/** Listens to the form and the editor. */
export function listen(): void {
  onChoice("keep", show);
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void draw();
  });
  stop.addEventListener("click", () => running?.abort());
  listenToLine();
  listenToBrush();
  show();
}
