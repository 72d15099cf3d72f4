// The chosen picture beside its tokens, its map of likelihood, its classes and
// its statistics.

import { command, keywords, python, showCode, pythonString } from "./commands.ts";
import { count, decimals, make } from "./dom.ts";
import { byId } from "./elements.ts";
import {
  type Classification,
  ClassifyRequestSchema,
  type GetModelResponse,
  type Score,
  ScoreRequestSchema,
  Task,
  TokenizeRequestSchema,
} from "./gen/imagegpt/v1/imagegpt_pb.ts";
import { colorOf, floats, hex, paint, viridis } from "./paint.ts";
import { ALPHAS, FITS, type Picture, shown, type Switches } from "./pictures.ts";
import { imagesOf } from "./sent.ts";
import { statistics } from "./statistics.ts";
import { CALL_TIMEOUT_MS, call, problemOf, refusal, report, workerWith } from "./worker.ts";

/** Classes that are shown of each head. */
const CLASSES = 5;
/** Most frequent colors that are shown. */
const COLORS = 6;

const frames = [byId("tokens-frame"), byId("map-frame")];
const canvas = byId("tokens");
const changesCanvas = byId("changes");
const mapCanvas = byId("map");
const problem = byId("look-problem");
const readout = byId("readout");
const section = byId("look");
/** What the readout says before a pixel is read. */
const POINT = readout.textContent ?? "";

let model: GetModelResponse | undefined;
/** What is on show. */
let tokens: readonly number[] | undefined;
let map: Float32Array | undefined;
let cursor = 0;
let before: { picture: Picture; tokens: readonly number[] } | undefined;

/** Tokens of pictures by their switches; the pictures' own life bounds them. */
const known = new WeakMap<Picture, Map<string, readonly number[]>>();

/** Says what is wrong with a picture, or nothing. */
class Refused extends Error {}

export function setModel(to: GetModelResponse): void {
  model = to;
  byId("map-figure").hidden = !to.tasks.includes(Task.SCORE);
  const chance = Math.log(to.paletteRgb8.length / 3);
  byId("scale-end").textContent =
    `${decimals(chance, 1)}: a guess among ${count(to.paletteRgb8.length / 3, "color")}`;
  const scale = byId("scale");
  const context = scale.getContext("2d");
  for (let x = 0; x < scale.width; x++) {
    if (context) {
      context.fillStyle = hex(viridis(x / (scale.width - 1)));
      context.fillRect(x, 0, 1, 1);
    }
  }
}

/** Returns the tokens of a picture, asked once for each setting of the switches. */
async function tokensOf(
  picture: Picture,
  switches: Switches,
  signal: AbortSignal,
): Promise<readonly number[]> {
  const key = `${switches.fit} ${switches.alpha}`;
  const all = known.get(picture) ?? new Map<string, readonly number[]>();
  known.set(picture, all);
  const there = all.get(key);
  if (there) {
    return there;
  }
  const request = {
    preprocess: { fit: FITS[switches.fit], alpha: ALPHAS[switches.alpha] },
  };
  const images = imagesOf(TokenizeRequestSchema.field.images, [picture.file]);
  const answer = await call(signal, () =>
    workerWith(images).tokenize(request, { signal, timeoutMs: CALL_TIMEOUT_MS }),
  );
  const outcome = answer.results[0]?.outcome;
  if (outcome?.case !== "tokens") {
    throw new Refused(refusal(picture.name, outcome?.value));
  }
  all.set(key, outcome.value.ids);
  return outcome.value.ids;
}

/** Forgets tokens that another model has made. */
export function forget(pictures: readonly Picture[]): void {
  for (const picture of pictures) {
    known.delete(picture);
  }
  before = undefined;
}

/** Says why a picture cannot be shown; problems of the worker stand at the top. */
export function explain(reason: unknown, into: HTMLElement): void {
  if (reason instanceof Refused) {
    tell(reason.message, into);
    return;
  }
  const found = problemOf(reason);
  if (found.kind === "canceled") {
    return;
  }
  if (found.kind === "other" || found.kind === "full") {
    tell(found.sentence, into);
  } else {
    report(found);
  }
}

export function tell(sentence: string | undefined, into: HTMLElement): void {
  into.textContent = sentence ?? "";
  into.hidden = sentence === undefined;
}

/** Shows a picture, and gives its tokens to `take`; `signal` ends what is no
 * longer wanted. */
export async function look(
  picture: Picture,
  switches: Switches,
  signal: AbortSignal,
  take: (tokens: readonly number[]) => void,
): Promise<void> {
  tell(undefined, problem);
  const original = byId("original");
  original.replaceChildren(shown(picture, picture.name));
  byId("original-caption").textContent =
    `${picture.name}, ${count(picture.bytes.length, "byte")}`;
  showCommands(picture, switches);
  section.setAttribute("aria-busy", "true");
  try {
    const found = await tokensOf(picture, switches, signal);
    if (signal.aborted) {
      return;
    }
    showTokens(picture, found);
    take(found);
    const work = [classify(picture, switches, signal), sayChanges(picture, switches, signal)];
    if (model?.tasks.includes(Task.SCORE)) {
      work.push(score(picture, switches, signal));
    }
    await Promise.all(work);
  } catch (reason) {
    if (!signal.aborted) {
      clear();
      explain(reason, problem);
    }
  } finally {
    if (!signal.aborted) {
      section.removeAttribute("aria-busy");
    }
  }
}

/** Shows no picture. */
export function leave(): void {
  clear();
  tell(undefined, problem);
  byId("original").replaceChildren();
  byId("original-caption").textContent = "";
  byId("look-code").replaceChildren();
  section.removeAttribute("aria-busy");
}

/** Empties what another picture has left. */
function clear(): void {
  tokens = undefined;
  map = undefined;
  before = undefined;
  for (const each of [canvas, mapCanvas]) {
    paint(each, model?.side ?? 32, () => undefined);
    each.removeAttribute("role");
    each.removeAttribute("aria-label");
  }
  readout.textContent = POINT;
  changesCanvas.hidden = true;
  for (const id of ["tokens-caption", "map-caption"] as const) {
    byId(id).textContent = "";
  }
  byId("classes").replaceChildren();
  byId("statistics").replaceChildren();
  byId("colors").replaceChildren();
  for (const id of ["fit-change", "alpha-change"] as const) {
    byId(id).textContent = "";
  }
}

function showTokens(picture: Picture, found: readonly number[]): void {
  if (!model) {
    return;
  }
  const { paletteRgb8: palette, side } = model;
  paint(canvas, side, (pixel) => colorOf(palette, found[pixel] ?? 0));
  const old = before?.picture === picture ? before.tokens : undefined;
  const nChanged = old ? found.filter((token, pixel) => token !== old[pixel]).length : 0;
  changesCanvas.hidden = nChanged === 0;
  if (old && nChanged > 0) {
    // What the switch has left as it was steps back.
    paint(
      changesCanvas,
      side,
      (pixel) => (found[pixel] === old[pixel] ? [128, 128, 128] : undefined),
      () => 170,
    );
  }
  byId("tokens-caption").textContent =
    `${side}×${side} color tokens` +
    (nChanged > 0 ? `; the switch changed ${count(nChanged, "token")}, the others are gray` : "");
  before = { picture, tokens: found };
  if (tokens !== found) {
    map = undefined;
    paint(mapCanvas, side, () => undefined);
    byId("map-caption").textContent = "";
  }
  tokens = found;
  showStatistics(undefined);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${picture.name} in ${count(new Set(found).size, "color")}`);
}

async function sayChanges(picture: Picture, switches: Switches, signal: AbortSignal) {
  const here = await tokensOf(picture, switches, signal);
  const other = async (to: Switches, id: "fit-change" | "alpha-change", what: string) => {
    const there = await tokensOf(picture, to, signal);
    if (!signal.aborted) {
      const n = here.filter((token, pixel) => token !== there[pixel]).length;
      byId(id).textContent =
        n === 0 ? `${what} would change no token` : `${what} would change ${count(n, "token")}`;
    }
  };
  const { fit, alpha } = switches;
  if (fit === "squash") {
    await other({ fit: "center-crop", alpha }, "fit-change", "Cropping");
  } else {
    await other({ fit: "squash", alpha }, "fit-change", "Squashing");
  }
  if (alpha === "drop") {
    await other({ fit, alpha: "white" }, "alpha-change", "White");
  } else {
    await other({ fit, alpha: "drop" }, "alpha-change", "The stored color");
  }
}

async function score(picture: Picture, switches: Switches, signal: AbortSignal) {
  const request = {
    preprocess: { fit: FITS[switches.fit], alpha: ALPHAS[switches.alpha] },
    map: true,
    complexity: true,
  };
  const images = imagesOf(ScoreRequestSchema.field.images, [picture.file]);
  const answer = await call(signal, () =>
    workerWith(images).score(request, { signal, timeoutMs: CALL_TIMEOUT_MS }),
  );
  if (signal.aborted || !model) {
    return;
  }
  const outcome = answer.results[0]?.outcome;
  if (outcome?.case !== "score") {
    throw new Refused(refusal(picture.name, outcome?.value));
  }
  const nats = floats(outcome.value.map?.data ?? new Uint8Array());
  map = nats;
  const { side } = model;
  const chance = Math.log(model.paletteRgb8.length / 3);
  paint(mapCanvas, side, (pixel) => viridis((nats[pixel] ?? 0) / chance));
  const caption = `${decimals(outcome.value.natsPerToken, 2)} nats per token on average`;
  byId("map-caption").textContent = caption;
  const worst = nats.indexOf(Math.max(...nats));
  mapCanvas.setAttribute("role", "img");
  mapCanvas.setAttribute(
    "aria-label",
    `Map of likelihood: ${caption}; least likely in row ${Math.floor(worst / side) + 1}, column ${(worst % side) + 1}`,
  );
  showStatistics(outcome.value);
}

function showStatistics(score: Score | undefined): void {
  if (!tokens || !model) {
    return;
  }
  const nColors = model.paletteRgb8.length / 3;
  const found = statistics(tokens, model.side);
  const lines: [string, string][] = [
    ["Colors", `${found.counts.length} of ${nColors}`],
    ["A guess among all colors", `${decimals(Math.log2(nColors), 2)} bits per token`],
    ["Entropy of the colors, without their places", `${decimals(found.entropyBits, 2)} bits per token`],
  ];
  if (score?.complexityBitsPerToken !== undefined) {
    lines.push(["As a PNG file", `${decimals(score.complexityBitsPerToken, 2)} bits per token`]);
  }
  if (score) {
    lines.push(
      ["By this model", `${decimals(score.bitsPerToken, 2)} bits per token`],
      ["By this model, in all", `${decimals(score.nats, 1)} nats`],
    );
  }
  lines.push(["Same as the pixel to the left", `${Math.round(100 * found.equalToLeft)} %`]);
  byId("statistics").replaceChildren(
    ...lines.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
  );
  const most = found.counts[0]?.[1] ?? 1;
  const rows = found.counts.slice(0, COLORS).map(([token, n]) => {
    const color = hex(colorOf(model?.paletteRgb8 ?? new Uint8Array(), token));
    const swatch = make("span", { class: "swatch" });
    swatch.style.background = color;
    const name = make("span", { class: "name" }, swatch, `token ${token}, ${color}`);
    return bar(name, n / most, String(n));
  });
  const title = make("h4", {}, "Most frequent colors, in pixels");
  byId("colors").replaceChildren(title, make("ul", { class: "bars" }, ...rows));
}

function bar(name: HTMLElement, share: number, value: string): HTMLLIElement {
  const fill = make("span", { class: "fill" });
  fill.style.inlineSize = `${100 * share}%`;
  const track = make("span", { class: "track", "aria-hidden": "true" }, fill);
  return make("li", {}, name, track, make("span", { class: "value" }, value));
}

interface HeadCall {
  name: string;
  title: string;
  note: string;
  /** Switches that the call leaves to the head. */
  fit: boolean;
  alpha: boolean;
}

/** Returns the heads that can be asked: the checkpoint's own and the linear ones. */
function heads(switches: Switches): HeadCall[] {
  if (!model?.tasks.includes(Task.CLASSIFY)) {
    return [];
  }
  const calls: HeadCall[] = model.heads.map((head) => {
    const fit = head.fit !== 0;
    const alpha = head.alpha !== 0;
    const differs =
      (fit && head.fit !== FITS[switches.fit]) || (alpha && head.alpha !== ALPHAS[switches.alpha]);
    return {
      name: head.name,
      title: `Head ${head.name}, at layer ${head.layer}`,
      note: differs ? "This head reads pictures as it was trained, not as the switches say." : "",
      fit,
      alpha,
    };
  });
  if (model.labels.length > 0) {
    calls.unshift({ name: "", title: "The checkpoint's own head", note: "", fit: false, alpha: false });
  }
  return calls;
}

async function classify(picture: Picture, switches: Switches, signal: AbortSignal) {
  const into = byId("classes");
  const calls = heads(switches);
  if (calls.length === 0) {
    into.replaceChildren(
      make("p", { class: "hint" }, "This worker has no head with names of classes (--head NAME=FILE)."),
    );
    return;
  }
  const parts = await Promise.all(
    calls.map(async (head) => {
      const request = {
        preprocess: {
          fit: head.fit ? 0 : FITS[switches.fit],
          alpha: head.alpha ? 0 : ALPHAS[switches.alpha],
        },
        topK: CLASSES,
        head: head.name,
      };
      const images = imagesOf(ClassifyRequestSchema.field.images, [picture.file]);
      const answer = await call(signal, () =>
        workerWith(images).classify(request, { signal, timeoutMs: CALL_TIMEOUT_MS }),
      );
      const outcome = answer.results[0]?.outcome;
      if (outcome?.case !== "classification") {
        throw new Refused(refusal(picture.name, outcome?.value));
      }
      return classes(head, outcome.value);
    }),
  );
  if (!signal.aborted) {
    into.replaceChildren(...parts);
  }
}

function classes(head: HeadCall, found: Classification): HTMLElement {
  const rows = found.classes.map((each) =>
    bar(
      make("span", { class: "name" }, each.label),
      each.score,
      `${decimals(100 * each.score, 1)} %`,
    ),
  );
  const part = make("div", {}, make("h4", {}, head.title), make("ul", { class: "bars" }, ...rows));
  if (head.note) {
    part.append(make("p", { class: "hint" }, head.note));
  }
  return part;
}

function showCommands(picture: Picture, switches: Switches): void {
  const { fit, alpha } = switches;
  const file = pythonString(picture.name);
  const options = keywords({ fit, alpha });
  const flags = ["--fit", fit, "--alpha", alpha];
  const lines = [`[tokens] = client.tokenize([${file}]${options})`];
  const commands = [command("tokenize", [picture.name], [...flags, "--preview", "previews"])];
  if (model?.tasks.includes(Task.SCORE)) {
    lines.push(`[score] = client.score([${file}], map=True, complexity=True${options})`);
    commands.push(command("score", [picture.name], [...flags, "--complexity", "--map", "maps"]));
  }
  for (const head of heads(switches)) {
    const given = keywords({
      head: head.name || undefined,
      top_k: CLASSES,
      fit: head.fit ? undefined : fit,
      alpha: head.alpha ? undefined : alpha,
    });
    lines.push(`[found] = client.classify([${file}]${given})`);
    commands.push(
      command("classify", [picture.name], [
        ...(head.name ? ["--head", head.name] : []),
        ...["--top-k", CLASSES],
        ...(head.fit ? [] : ["--fit", fit]),
        ...(head.alpha ? [] : ["--alpha", alpha]),
      ]),
    );
  }
  showCode(byId("look-code"), python(lines), commands.join("\n"));
}

function say(pixel: number): void {
  if (!tokens || !model) {
    return;
  }
  cursor = pixel;
  const { side, paletteRgb8: palette } = model;
  const token = tokens[pixel] ?? 0;
  const nats = map?.[pixel];
  readout.textContent =
    `Row ${Math.floor(pixel / side) + 1}, column ${(pixel % side) + 1}: token ${token}, ${hex(colorOf(palette, token))}` +
    (nats === undefined ? "" : `, ${decimals(nats, 2)} nats (probability ${probability(nats)})`);
}

function probability(nats: number): string {
  const p = Math.exp(-nats);
  return p >= 0.001 ? `${decimals(100 * p, 1)} %` : p.toExponential(1).replace("-", "−");
}

/** Listens to pointers and arrow keys on the two grids. */
export function listen(): void {
  for (const frame of frames) {
    frame.addEventListener("pointermove", (event) => {
      const side = model?.side ?? 32;
      const box = frame.getBoundingClientRect();
      const at = (part: number, whole: number) =>
        Math.min(Math.max(Math.floor((part / whole) * side), 0), side - 1);
      say(at(event.clientY - box.top, box.height) * side + at(event.clientX - box.left, box.width));
    });
    frame.addEventListener("keydown", (event) => {
      const side = model?.side ?? 32;
      const to = moved(event.key, cursor, side);
      if (to !== undefined) {
        event.preventDefault();
        say(to);
      }
    });
  }
}

/** Returns the pixel to which a key goes; `undefined` for other keys. */
export function moved(key: string, from: number, side: number): number | undefined {
  const row = Math.floor(from / side);
  const column = from % side;
  switch (key) {
    case "ArrowLeft":
      return column > 0 ? from - 1 : from;
    case "ArrowRight":
      return column < side - 1 ? from + 1 : from;
    case "ArrowUp":
      return row > 0 ? from - side : from;
    case "ArrowDown":
      return row < side - 1 ? from + side : from;
    default:
      return undefined;
  }
}
