// Elements of `index.html`: the one list of their ids and kinds, in its order.

const KINDS = {
  model: HTMLParagraphElement,
  notice: HTMLParagraphElement,
  state: HTMLDivElement,
  "token-form": HTMLFormElement,
  token: HTMLInputElement,
  drop: HTMLDivElement,
  choose: HTMLButtonElement,
  "open-camera": HTMLButtonElement,
  files: HTMLInputElement,
  examples: HTMLUListElement,
  tray: HTMLUListElement,
  "tray-problem": HTMLParagraphElement,
  "fit-change": HTMLParagraphElement,
  "alpha-change": HTMLParagraphElement,
  look: HTMLElement,
  "look-problem": HTMLParagraphElement,
  original: HTMLDivElement,
  "original-caption": HTMLSpanElement,
  "tokens-frame": HTMLDivElement,
  tokens: HTMLCanvasElement,
  changes: HTMLCanvasElement,
  "tokens-caption": HTMLSpanElement,
  "map-figure": HTMLElement,
  "map-frame": HTMLDivElement,
  map: HTMLCanvasElement,
  "map-caption": HTMLSpanElement,
  scale: HTMLCanvasElement,
  "scale-end": HTMLSpanElement,
  readout: HTMLParagraphElement,
  classes: HTMLDivElement,
  statistics: HTMLDListElement,
  colors: HTMLDivElement,
  "look-code": HTMLDivElement,
  "complete-missing": HTMLParagraphElement,
  "complete-form": HTMLFormElement,
  "keep-frame": HTMLDivElement,
  keep: HTMLCanvasElement,
  line: HTMLDivElement,
  brush: HTMLDivElement,
  "keep-caption": HTMLParagraphElement,
  "mask-tools": HTMLDivElement,
  "brush-tools": HTMLFieldSetElement,
  "brush-size": HTMLInputElement,
  "mask-keep": HTMLButtonElement,
  "mask-draw": HTMLButtonElement,
  "mask-save": HTMLButtonElement,
  samples: HTMLInputElement,
  temperature: HTMLInputElement,
  "top-k": HTMLInputElement,
  "top-p": HTMLInputElement,
  seed: HTMLInputElement,
  "scale-png": HTMLInputElement,
  start: HTMLButtonElement,
  stop: HTMLButtonElement,
  "complete-state": HTMLParagraphElement,
  "complete-problem": HTMLParagraphElement,
  "samples-out": HTMLUListElement,
  "complete-code": HTMLDivElement,
  "near-missing": HTMLParagraphElement,
  "near-state": HTMLParagraphElement,
  "near-problem": HTMLParagraphElement,
  "layer-row": HTMLParagraphElement,
  "layer-value": HTMLOutputElement,
  layer: HTMLInputElement,
  "add-examples": HTMLButtonElement,
  neighbors: HTMLOListElement,
  "near-code": HTMLDivElement,
  camera: HTMLDialogElement,
  "camera-title": HTMLHeadingElement,
  video: HTMLVideoElement,
  shoot: HTMLButtonElement,
  "close-camera": HTMLButtonElement,
} satisfies Record<string, new () => HTMLElement>;

type Kinds = typeof KINDS;

/** Id of an element of `index.html`. */
export type Id = keyof Kinds;

/** Returns the element of `index.html` with an id. */
export function byId<K extends Id>(id: K): InstanceType<Kinds[K]> {
  const element = document.getElementById(id);
  if (!(element instanceof KINDS[id])) {
    throw new Error(`index.html has no ${KINDS[id].name} #${id}`);
  }
  return element as InstanceType<Kinds[K]>;
}
