// Pictures on the page, the one that is chosen, and the switches.

import { button, chosen, count, make, onChoice } from "./dom.ts";
import { byId } from "./elements.ts";
import { EXAMPLES } from "./examples.ts";
import { openCamera } from "./camera.ts";
import type { Alpha, Fit } from "./commands.ts";
import { preview } from "./preview.ts";
import {
  Alpha as AlphaValue,
  Fit as FitValue,
  type GetModelResponse,
} from "./gen/imagegpt/v1/imagegpt_pb.ts";

/** Most pictures, and most bytes of them, that the page keeps in memory. */
const PICTURES_MAX = 200;
const BYTES_MAX = 256 << 20;

/** A picture on the page. */
export interface Picture {
  id: number;
  /** Name on the page, which no other picture has. */
  name: string;
  /** Name that it came with. */
  given: string;
  bytes: Uint8Array<ArrayBuffer>;
  /** The bytes as the browser keeps them, which calls send from there. */
  file: Blob;
  /** Address within the browser of what the page shows: the file, or a smaller
   * picture made of it; none if the browser cannot show it, such as TIFF. */
  url: Promise<string | undefined>;
}

/** Options of preprocessing. */
export interface Switches {
  fit: Fit;
  alpha: Alpha;
}

export const FITS: Record<Fit, FitValue> = {
  squash: FitValue.SQUASH,
  "center-crop": FitValue.CENTER_CROP,
};
export const ALPHAS: Record<Alpha, AlphaValue> = {
  drop: AlphaValue.DROP,
  white: AlphaValue.WHITE,
};

const pictures: Picture[] = [];
let selected: Picture | undefined;
let nextId = 1;
let bytesMax = Number.POSITIVE_INFINITY;
let changed: () => void = () => {};

const tray = byId("tray");
const problem = byId("tray-problem");

export function all(): readonly Picture[] {
  return pictures;
}

/** Returns the chosen picture. */
export function current(): Picture | undefined {
  return selected;
}

export function switches(): Switches {
  return {
    fit: chosen("fit") === "center-crop" ? "center-crop" : "squash",
    alpha: chosen("alpha") === "white" ? "white" : "drop",
  };
}

/** Returns an image that shows a picture, or a word where the browser cannot. */
export function shown(picture: Picture, alt: string): HTMLElement {
  const image = make("img", { alt });
  void picture.url.then((url) => {
    if (url !== undefined) {
      image.src = url;
      return;
    }
    const said = "This browser cannot show the file; the worker reads it.";
    image.replaceWith(make("span", { class: "unseen" }, said));
  });
  return image;
}

/** Sets the switches as the model's heads were trained, and the limit of files. */
export function follow(model: GetModelResponse): void {
  bytesMax = Number(model.limits?.imageBytesMax ?? BYTES_MAX);
  const head = model.heads.find((head) => head.name === model.headDefault) ?? model.heads[0];
  const check = (group: string, value: string) => {
    const radio = document.querySelector<HTMLInputElement>(
      `input[name="${group}"][value="${value}"]`,
    );
    if (radio) {
      radio.checked = true;
    }
  };
  if (head?.fit === FitValue.CENTER_CROP) {
    check("fit", "center-crop");
  }
  if (head?.alpha === AlphaValue.WHITE) {
    check("alpha", "white");
  }
}

/** A picture that was left out, and why. */
interface LeftOut {
  name: string;
  size: number;
  why: "full" | "large" | "unread";
}

/** Says which pictures were left out, one sentence for each reason. */
function sayLeftOut(all: LeftOut[]): void {
  const sentences: string[] = [];
  for (const why of ["full", "large", "unread"] as const) {
    const [first, ...more] = all.filter((each) => each.why === why);
    if (!first) {
      continue;
    }
    const { name, size } = first;
    const isOne = more.length === 0;
    const begin = `${count(more.length + 1, "picture")} were left out:`;
    const most = `${PICTURES_MAX} pictures of ${BYTES_MAX >> 20} MiB together`;
    const limit = bytesMax.toLocaleString("en");
    switch (why) {
      case "full":
        sentences.push(
          isOne
            ? `The page keeps at most ${most}, so it left out ${name}: remove some.`
            : `${begin} the page keeps at most ${most}; remove some.`,
        );
        break;
      case "large":
        sentences.push(
          isOne
            ? `${name} has ${count(size, "byte")}; the limit of this worker is ${limit} (--image-bytes-max).`
            : `${begin} each has more than ${limit} bytes, the limit of this worker (--image-bytes-max).`,
        );
        break;
      case "unread":
        sentences.push(
          isOne
            ? `The browser cannot read ${name}: it may be a directory, or was removed.`
            : `${begin} the browser cannot read them; they may be directories, or were removed.`,
        );
        break;
    }
  }
  say(sentences.length > 0 ? sentences.join(" ") : undefined);
}

/** Returns a name that no picture has: `image-2.png` where one is `image.png`. */
function freeName(name: string): string {
  const dot = name.lastIndexOf(".");
  const [stem, end] = dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ""];
  let free = name;
  for (let n = 2; pictures.some((picture) => picture.name === free); n++) {
    free = `${stem}-${n}${end}`;
  }
  return free;
}

/** Adds a picture, and chooses it unless `isQuiet`; returns why it is left out. */
function put(
  given: string,
  bytes: Uint8Array<ArrayBuffer>,
  isQuiet: boolean,
): LeftOut | undefined {
  const known = pictures.find((picture) => picture.given === given && same(picture.bytes, bytes));
  if (known) {
    if (!isQuiet) {
      choose(known);
    }
    return undefined;
  }
  const total = pictures.reduce((sum, picture) => sum + picture.bytes.length, bytes.length);
  if (pictures.length >= PICTURES_MAX || total > BYTES_MAX) {
    return { name: given, size: bytes.length, why: "full" };
  }
  if (bytes.length > bytesMax) {
    return { name: given, size: bytes.length, why: "large" };
  }
  const file = new Blob([bytes]);
  const picture: Picture = {
    id: nextId++,
    name: freeName(given),
    given,
    bytes,
    file,
    url: preview(file),
  };
  pictures.push(picture);
  tray.append(thumb(picture));
  if (!isQuiet || !selected) {
    choose(picture);
  } else {
    changed();
  }
  return undefined;
}

/** Adds a picture, and chooses it. */
export function add(name: string, bytes: Uint8Array<ArrayBuffer>): void {
  sayLeftOut([put(name, bytes, false)].filter((each) => each !== undefined));
}

export function addExamples(): void {
  const left = EXAMPLES.map((example) => put(example.name, example.bytes, true));
  sayLeftOut(left.filter((each) => each !== undefined));
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  if (a.length !== b.length) {
    return false;
  }
  // A loop, since a call for each byte of a large file stalls the page.
  for (let i = 0; i < a.length; i++) {
    if (a[i] !== b[i]) {
      return false;
    }
  }
  return true;
}

function say(sentence: string | undefined): void {
  problem.textContent = sentence ?? "";
  problem.hidden = sentence === undefined;
}

function thumb(picture: Picture): HTMLLIElement {
  const item = make("li", { "data-id": String(picture.id) });
  const open = button("", () => choose(picture), { "aria-pressed": "false", class: "thumb" });
  open.append(shown(picture, ""), make("span", {}, picture.name));
  const remove = button("×", () => drop(picture, item), {
    "aria-label": `Remove ${picture.name}`,
    class: "remove",
  });
  item.append(open, remove);
  return item;
}

export function choose(picture: Picture): void {
  selected = picture;
  for (const item of tray.children) {
    const is = item.getAttribute("data-id") === String(picture.id);
    item.querySelector(".thumb")?.setAttribute("aria-pressed", String(is));
  }
  changed();
}

function drop(picture: Picture, item: HTMLLIElement): void {
  const at = pictures.indexOf(picture);
  pictures.splice(at, 1);
  void picture.url.then((url) => url && URL.revokeObjectURL(url));
  const beside = pictures[at] ?? pictures[at - 1];
  item.remove();
  say(undefined);
  if (selected === picture) {
    selected = undefined;
    if (beside) {
      choose(beside);
    }
  }
  const focus = beside && tray.querySelector<HTMLElement>(`[data-id="${beside.id}"] .thumb`);
  (focus ?? byId("choose")).focus();
  changed();
}

async function addFiles(files: Iterable<File>): Promise<void> {
  say(undefined);
  const left: LeftOut[] = [];
  for (const file of files) {
    const { name, size } = file;
    if (size > bytesMax) {
      left.push({ name, size, why: "large" });
      continue;
    }
    try {
      const bytes = new Uint8Array(await file.arrayBuffer());
      const out = put(name || "pasted.png", bytes, false);
      left.push(...(out ? [out] : []));
    } catch {
      left.push({ name, size, why: "unread" });
    }
  }
  if (left.length > 0) {
    sayLeftOut(left);
  }
}

/** Listens to files, drops, pastes, examples, the camera and the switches. */
export function listen(onChange: () => void): void {
  changed = onChange;
  const files = byId("files");
  byId("choose").addEventListener("click", () => files.click());
  files.addEventListener("change", () => {
    void addFiles([...(files.files ?? [])]);
    files.value = "";
  });
  const zone = byId("drop");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) {
      zone.classList.remove("over");
    }
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    void addFiles([...(event.dataTransfer?.files ?? [])]);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files ?? [])];
    if (pasted.length > 0) {
      event.preventDefault();
      void addFiles(pasted);
    }
  });
  byId("examples").append(
    ...EXAMPLES.map((example) => {
      const url = URL.createObjectURL(new Blob([example.bytes], { type: "image/png" }));
      const open = button("", () => add(example.name, example.bytes), { class: "thumb" });
      open.append(make("img", { src: url, alt: "" }), make("span", {}, example.name));
      return make("li", {}, open);
    }),
  );
  openCamera((bytes) => add(`camera-${nextId}.png`, bytes));
  onChoice("fit", changed);
  onChoice("alpha", changed);
}
