// Pictures on the page, the one that is chosen, and the switches.

import { byId, button, chosen, count, make, onChoice } from "./dom.ts";
import { EXAMPLES } from "./examples.ts";
import { openCamera } from "./camera.ts";
import type { Alpha, Fit } from "./commands.ts";
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
  name: string;
  bytes: Uint8Array<ArrayBuffer>;
  /** Address of the bytes within the browser. */
  url: string;
  /** True for pictures that the browser cannot show, such as TIFF. */
  isHidden: boolean;
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

const tray = byId("tray", HTMLUListElement);
const problem = byId("tray-problem", HTMLParagraphElement);

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
  const word = () =>
    make("span", { class: "unseen" }, "This browser cannot show the file; the worker reads it.");
  if (picture.isHidden) {
    return word();
  }
  const image = make("img", { src: picture.url, alt });
  image.addEventListener("error", () => {
    picture.isHidden = true;
    image.replaceWith(word());
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

/** Adds a picture, and chooses it unless `isQuiet`. */
export function add(name: string, bytes: Uint8Array<ArrayBuffer>, isQuiet = false): void {
  const known = pictures.find((picture) => picture.name === name && same(picture.bytes, bytes));
  if (known) {
    if (!isQuiet) {
      choose(known);
    }
    return;
  }
  const total = pictures.reduce((sum, picture) => sum + picture.bytes.length, bytes.length);
  if (pictures.length >= PICTURES_MAX || total > BYTES_MAX) {
    say(
      `The page keeps at most ${PICTURES_MAX} pictures of ${BYTES_MAX >> 20} MiB together, so it left out ${name}: remove some.`,
    );
    return;
  }
  if (bytes.length > bytesMax) {
    say(
      `${name} has ${count(bytes.length, "byte")}; the limit of this worker is ${bytesMax.toLocaleString("en")} (--image-bytes-max).`,
    );
    return;
  }
  const picture: Picture = {
    id: nextId++,
    name,
    bytes,
    url: URL.createObjectURL(new Blob([bytes])),
    isHidden: false,
  };
  pictures.push(picture);
  tray.append(thumb(picture));
  if (!isQuiet || !selected) {
    choose(picture);
  } else {
    changed();
  }
}

export function addExamples(): void {
  for (const example of EXAMPLES) {
    add(example.name, example.bytes, true);
  }
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
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
  URL.revokeObjectURL(picture.url);
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
  (focus ?? byId("choose", HTMLButtonElement)).focus();
  changed();
}

async function addFiles(files: Iterable<File>): Promise<void> {
  say(undefined);
  for (const file of files) {
    if (file.size > bytesMax) {
      say(
        `${file.name} has ${count(file.size, "byte")}; the limit of this worker is ${bytesMax.toLocaleString("en")} (--image-bytes-max).`,
      );
      continue;
    }
    try {
      add(file.name || "pasted.png", new Uint8Array(await file.arrayBuffer()));
    } catch {
      say(`The browser cannot read ${file.name}: it may be a directory, or was removed.`);
    }
  }
}

/** Listens to files, drops, pastes, examples, the camera and the switches. */
export function listen(onChange: () => void): void {
  changed = onChange;
  const files = byId("files", HTMLInputElement);
  byId("choose", HTMLButtonElement).addEventListener("click", () => files.click());
  files.addEventListener("change", () => {
    void addFiles([...(files.files ?? [])]);
    files.value = "";
  });
  const zone = byId("drop", HTMLDivElement);
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
  byId("examples", HTMLUListElement).append(
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
