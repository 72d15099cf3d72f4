// Elements of the page. Text is only ever set as text, never parsed as HTML.

type Child = Node | string;

/** Makes an element with attributes and children. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Record<string, string> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Makes a button that calls `action`. */
export function button(label: string, action: () => void, attributes: Record<string, string> = {}) {
  const element = make("button", { type: "button", ...attributes }, label);
  element.addEventListener("click", action);
  return element;
}

/** Returns the value of the chosen radio button of a group. */
export function chosen(group: string): string {
  const radio = document.querySelector<HTMLInputElement>(`input[name="${group}"]:checked`);
  return radio?.value ?? "";
}

/** Calls `action` with each new choice of a group of radio buttons. */
export function onChoice(group: string, action: (value: string) => void): void {
  for (const radio of document.querySelectorAll<HTMLInputElement>(`input[name="${group}"]`)) {
    radio.addEventListener("change", () => action(radio.value));
  }
}

/** Lets a browser save a file. */
export function save(name: string, bytes: Uint8Array<ArrayBuffer>, type: string): void {
  const url = URL.createObjectURL(new Blob([bytes], { type }));
  make("a", { href: url, download: name }).click();
  // The browser has read the URL when the click returns; the delay is for those
  // that read it later.
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Writes a number with a fixed number of decimals and a real minus sign. */
export function decimals(value: number, n: number): string {
  return value.toFixed(n).replace("-", "−");
}

/** Writes a number of things: `1 picture`, `1,024 tokens`. */
export function count(n: number, noun: string): string {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}
