// Pictures from the camera, where the browser allows it: on loopback and over
// TLS.

import { byId } from "./elements.ts";
import { pngOf } from "./paint.ts";

/** Offers the camera, and calls `take` with each picture as a PNG file. */
export function openCamera(take: (png: Uint8Array<ArrayBuffer>) => void): void {
  const open = byId("open-camera");
  const dialog = byId("camera");
  const title = byId("camera-title");
  const video = byId("video");
  const shoot = byId("shoot");
  let stream: MediaStream | undefined;
  open.hidden = navigator.mediaDevices === undefined;
  open.addEventListener("click", async () => {
    title.textContent = "Camera";
    shoot.disabled = true;
    dialog.showModal();
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: true });
      video.srcObject = stream;
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error);
      title.textContent = `The browser gives no camera: ${why}.`;
    }
  });
  // Before its first frame a video has no size.
  video.addEventListener("loadeddata", () => {
    shoot.disabled = false;
  });
  shoot.addEventListener("click", async () => {
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d")?.drawImage(video, 0, 0);
    const png = await pngOf(canvas);
    dialog.close();
    take(png);
  });
  byId("close-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    for (const track of stream?.getTracks() ?? []) {
      track.stop();
    }
    stream = undefined;
    video.srcObject = null;
  });
}
