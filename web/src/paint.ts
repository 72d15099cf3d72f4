// Tokens, maps and masks as pixels.

/** Colors of viridis at equal distances, between which is interpolated. */
const VIRIDIS = [
  [68, 1, 84],
  [71, 45, 123],
  [59, 82, 139],
  [44, 114, 142],
  [33, 145, 140],
  [40, 174, 128],
  [94, 201, 98],
  [173, 220, 48],
  [253, 231, 37],
] as const;

export type Rgb = readonly [number, number, number];

/** Returns the color of a share of the scale, which is readable without red and
 * green. */
export function viridis(share: number): Rgb {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const [a, b] = [VIRIDIS[low], VIRIDIS[low + 1]];
  if (!a || !b) {
    return [0, 0, 0];
  }
  const mix = (i: 0 | 1 | 2) => Math.round(a[i] + (b[i] - a[i]) * (at - low));
  return [mix(0), mix(1), mix(2)];
}

/** Returns the color of a token. */
export function colorOf(palette: Uint8Array, token: number): Rgb {
  return [palette[3 * token] ?? 0, palette[3 * token + 1] ?? 0, palette[3 * token + 2] ?? 0];
}

/** Writes a color as in CSS. */
export function hex(color: Rgb): string {
  return `#${color.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}

/** Paints a square of pixels; `undefined` leaves a pixel clear. */
export function paint(
  canvas: HTMLCanvasElement,
  side: number,
  color: (pixel: number) => Rgb | undefined,
  alpha: (pixel: number) => number = () => 255,
): void {
  if (canvas.width !== side || canvas.height !== side) {
    canvas.width = side;
    canvas.height = side;
  }
  const context = canvas.getContext("2d");
  if (!context) {
    return;
  }
  const image = context.createImageData(side, side);
  for (let pixel = 0; pixel < side * side; pixel++) {
    const rgb = color(pixel);
    if (rgb) {
      image.data.set([...rgb, alpha(pixel)], 4 * pixel);
    }
  }
  context.putImageData(image, 0, 0);
}

/** Paints one row of tokens. */
export function paintRow(
  canvas: HTMLCanvasElement,
  side: number,
  row: number,
  ids: readonly number[],
  palette: Uint8Array,
): void {
  const context = canvas.getContext("2d");
  if (!context) {
    return;
  }
  const image = context.createImageData(side, 1);
  ids.forEach((id, column) => {
    image.data.set([...colorOf(palette, id), 255], 4 * column);
  });
  context.putImageData(image, 0, row);
}

/** Returns a canvas as the bytes of a PNG file. */
export async function pngOf(canvas: HTMLCanvasElement): Promise<Uint8Array<ArrayBuffer>> {
  const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) {
    throw new Error("the browser made no PNG of a canvas");
  }
  return new Uint8Array(await blob.arrayBuffer());
}

/** Returns the numbers of a tensor of f32, little-endian. */
export function floats(data: Uint8Array): Float32Array {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  return Float32Array.from({ length: data.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
