// Nearest pictures of those on the page, by the cosine of their features, which
// stay in the page.

import { command, keywords, python, pythonString, showCode } from "./commands.ts";
import { button, count, decimals, make } from "./dom.ts";
import { byId } from "./elements.ts";
import { EmbedRequestSchema, type GetModelResponse, Task } from "./gen/imagegpt/v1/imagegpt_pb.ts";
import { explain, tell } from "./look.ts";
import { floats } from "./paint.ts";
import { ALPHAS, addExamples, choose, FITS, type Picture, shown, type Switches } from "./pictures.ts";
import { imagesOf, parts } from "./sent.ts";
import { CALL_TIMEOUT_MS, call, refusal, workerWith } from "./worker.ts";

/** Most neighbors of a picture that the command takes. */
const COMMAND_NEIGHBORS_MAX = 16;
/** Most pictures that the command compares unless it is told otherwise. */
const COMMAND_IMAGES_MAX = 48;
/** Pictures of one call: a few, so that the list grows while it is made. */
const CALL_IMAGES = 8;
/** Bytes of the pictures of one call, unless one alone has more: a quarter of the
 * worker's own limit, which takes a slow network a few seconds. */
const CALL_BYTES = 16 << 20;
/** Bytes of a call beside its pictures: options and layers take less. */
const CALL_BYTES_BESIDE = 16 << 10;
/** Bytes of a picture beside its file: two fields with lengths take less. */
const IMAGE_BYTES_BESIDE = 16;

const list = byId("neighbors");
const state = byId("near-state");
const problem = byId("near-problem");
const slider = byId("layer");

let model: GetModelResponse | undefined;
/** Layers that one run of the model gives. */
let layers: number[] = [];
let shownNow: { picture: Picture; pictures: readonly Picture[]; switches: Switches } | undefined;

/** Unit vectors of all layers, or the worker's reason for which there are none,
 * by picture and switches. */
const known = new WeakMap<Picture, Map<string, Float32Array | string>>();

export function setModel(to: GetModelResponse): void {
  model = to;
  const can = to.tasks.includes(Task.EMBED);
  byId("near-missing").hidden = can;
  state.hidden = !can;
  layers = to.layersServed.filter((layer) => layer <= to.layerDefault);
  byId("layer-row").hidden = layers.length < 2;
  slider.max = String(Math.max(layers.length - 1, 0));
  slider.value = slider.max;
  showLayer();
}

export function forget(pictures: readonly Picture[]): void {
  for (const picture of pictures) {
    known.delete(picture);
  }
}

function showLayer(): void {
  const layer = layers[Number(slider.value)];
  byId("layer-value").textContent = `${layer ?? ""}`;
  slider.setAttribute("aria-valuetext", `layer ${layer}`);
}

/** Embeds what is not embedded yet, and lists the nearest to `picture`. */
export async function compare(
  picture: Picture | undefined,
  pictures: readonly Picture[],
  switches: Switches,
  signal: AbortSignal,
): Promise<void> {
  tell(undefined, problem);
  shownNow = picture && { picture, pictures: [...pictures], switches };
  showCommands();
  if (!model?.tasks.includes(Task.EMBED) || !picture || pictures.length < 2) {
    list.replaceChildren();
    state.textContent =
      "With two pictures or more on this page, the nearest to the chosen one stand here.";
    return;
  }
  const key = `${switches.fit} ${switches.alpha}`;
  const missing = pictures.filter((each) => !known.get(each)?.has(key));
  const limits = model.limits;
  const nMax = Math.min(CALL_IMAGES, limits?.imagesPerCallMax || CALL_IMAGES);
  const bytesMax = Number(limits?.requestBytesMax || CALL_BYTES) - CALL_BYTES_BESIDE;
  const size = (picture: Picture) => picture.file.size + IMAGE_BYTES_BESIDE;
  let nLeft = missing.length;
  try {
    for (const part of parts(missing, nMax, Math.min(CALL_BYTES, bytesMax), size)) {
      state.textContent = `Embedding ${count(nLeft, "picture")} …`;
      await embed(part, key, switches, signal);
      if (signal.aborted) {
        return;
      }
      nLeft -= part.length;
    }
    show();
  } catch (reason) {
    if (!signal.aborted) {
      state.textContent = "";
      explain(reason, problem);
    }
  }
}

async function embed(part: Picture[], key: string, switches: Switches, signal: AbortSignal) {
  const request = {
    preprocess: { fit: FITS[switches.fit], alpha: ALPHAS[switches.alpha] },
    normalize: true,
    layers,
  };
  const images = imagesOf(
    EmbedRequestSchema.field.images,
    part.map((picture) => picture.file),
  );
  const answer = await call(signal, () =>
    workerWith(images).embed(request, { signal, timeoutMs: CALL_TIMEOUT_MS }),
  );
  part.forEach((picture, i) => {
    const outcome = answer.results[i]?.outcome;
    const all = known.get(picture) ?? new Map<string, Float32Array | string>();
    known.set(picture, all);
    all.set(
      key,
      outcome?.case === "embedding"
        ? floats(outcome.value.data)
        : refusal(picture.name, outcome?.case === "error" ? outcome.value : undefined),
    );
  });
}

/** Returns the cosine of the vectors of one layer, which have length 1. */
function cosine(a: Float32Array, b: Float32Array, layer: number, dimension: number): number {
  let sum = 0;
  for (let i = layer * dimension; i < (layer + 1) * dimension; i++) {
    sum += (a[i] ?? 0) * (b[i] ?? 0);
  }
  return sum;
}

function show(): void {
  if (!shownNow || !model) {
    return;
  }
  const { picture, pictures, switches } = shownNow;
  const key = `${switches.fit} ${switches.alpha}`;
  const dimension = model.dimension;
  const here = known.get(picture)?.get(key);
  const layer = Math.max(Number(slider.value), 0);
  showCommands();
  const near: { picture: Picture; cosine: number }[] = [];
  const refused: string[] = [];
  for (const other of pictures) {
    const there = known.get(other)?.get(key);
    if (typeof there === "string") {
      refused.push(there);
    } else if (other !== picture && here instanceof Float32Array && there) {
      near.push({ picture: other, cosine: cosine(here, there, layer, dimension) });
    }
  }
  near.sort((a, b) => b.cosine - a.cosine || a.picture.id - b.picture.id);
  tell(refused.length > 0 ? refused.join(" ") : undefined, problem);
  state.textContent =
    near.length > 0
      ? `Nearest to ${picture.name}${layers.length > 0 ? ` at layer ${layers[layer]}` : ""}, by the cosine of their features:`
      : "";
  list.replaceChildren(
    ...near.map(({ picture, cosine }) => {
      const open = button("", () => choose(picture), { class: "thumb" });
      open.append(shown(picture, ""), make("span", {}, picture.name));
      return make("li", {}, open, make("span", { class: "value" }, decimals(cosine, 4)));
    }),
  );
}

function showCommands(): void {
  const into = byId("near-code");
  const { pictures, switches } = shownNow ?? {};
  if (!pictures || !switches) {
    into.replaceChildren();
    return;
  }
  const { fit, alpha } = switches;
  const key = `${fit} ${alpha}`;
  // One picture that is refused would end the whole program.
  const names = pictures
    .filter((picture) => typeof known.get(picture)?.get(key) !== "string")
    .map((picture) => picture.name);
  const layer = layers[Number(slider.value)];
  const some = layers.length > 1 ? layer : undefined;
  const options = keywords({ layers: some === undefined ? undefined : some, fit, alpha });
  const lines = [
    `files = [${names.map(pythonString).join(", ")}]`,
    `vectors = client.embed(files, normalize=True${options})`,
    "cosines = vectors @ vectors.T",
  ];
  const n = Math.min(Math.max(names.length - 1, 1), COMMAND_NEIGHBORS_MAX);
  const flags = [
    ...["--fit", fit, "--alpha", alpha, "--neighbors", n],
    ...(names.length > COMMAND_IMAGES_MAX ? ["--images-max", names.length] : []),
    ...["--picture", "neighbors.png"],
  ];
  const own = model?.layerDefault;
  const note =
    layer === undefined || layer === own
      ? ""
      : `# The command uses the worker's default layer, ${own}, not layer ${layer}.\n`;
  showCode(into, python(lines), note + command("neighbors", names, flags));
}

/** Listens to the slider. */
export function listen(): void {
  slider.addEventListener("input", () => {
    showLayer();
    show();
  });
  byId("add-examples").addEventListener("click", addExamples);
}
