// Addresses of what the page shows of a file.

/** Most pixels of a picture that is shown as it is: a browser decodes it in the
 * moment in which it is first painted. */
const PIXELS_MAX = 1 << 20;
/** Longest side of the smaller picture that is made of a larger one: more than any
 * frame of the page has on a screen of double density. */
const SIDE_MAX = 1024;

/** The smaller picture that is being made. One at a time, because the pixels of
 * a file of 64 megapixels take 256 MB while it is. */
let last: Promise<unknown> = Promise.resolve();

/** Returns the address of a file within the browser, or of a smaller picture of
 * it, which is decoded beside the page's own thread; nothing if the browser
 * cannot show the file. */
export function preview(file: Blob): Promise<string | undefined> {
  const made = last.then(async () => {
    const url = URL.createObjectURL(file);
    const image = new Image();
    image.src = url;
    // Reads the size, and not yet the pixels.
    const isImage = await new Promise<boolean>((resolve) => {
      image.addEventListener("load", () => resolve(true));
      image.addEventListener("error", () => resolve(false));
    });
    const { naturalWidth: width, naturalHeight: height } = image;
    if (isImage && width * height <= PIXELS_MAX) {
      return url;
    }
    const small = isImage ? await smaller(file, width, height).catch(() => undefined) : undefined;
    URL.revokeObjectURL(url);
    return small && URL.createObjectURL(small);
  });
  last = made;
  return made;
}

/** Makes a picture of at most `SIDE_MAX` pixels a side. */
async function smaller(file: Blob, width: number, height: number): Promise<Blob> {
  const scale = Math.min(SIDE_MAX / Math.max(width, height), 1);
  const [resizeWidth, resizeHeight] = [width, height].map((side) =>
    Math.max(Math.round(side * scale), 1),
  ) as [number, number];
  const bitmap = await createImageBitmap(file, { resizeWidth, resizeHeight, resizeQuality: "medium" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d")?.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.convertToBlob();
}
