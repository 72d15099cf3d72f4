// The page in Chromium against real workers. `make web-test` runs it.

import assert from "node:assert/strict";
import { execFile, execFileSync } from "node:child_process";
import { copyFileSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";
import { after, before, describe, test } from "node:test";
import { promisify } from "node:util";
import { BINARY, openPage, ROOT, scratch, shown, startBrowser, startWorker } from "./worker.mjs";

const run = promisify(execFile);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const golden = (name) => join(ROOT, "tests", "golden", "images", name);
const ROOSTER = join(ROOT, "models/pictures/animals-nature/rooster.png");
const FORMATS = ["exif-6.png", "exif-6.jpg", "exif-8.webp", "gif-p.gif", "bmp-rgb.bmp", "exif-6.tiff"];

let browser;
let worker;

before(async () => {
  browser = await startBrowser();
  worker = await startWorker();
});
after(async () => {
  await browser?.close();
  await worker?.end();
});

/** Opens the page for a test, and checks at its end that nothing went astray. */
async function open(t, options = {}, to = worker) {
  const { page, account } = await openPage(browser, to, options);
  t.after(async () => {
    await page.context().close();
    assert.deepEqual(account, { foreign: [], violations: [], errors: [] });
  });
  return page;
}

/** Runs a command that the page shows, in a directory. */
async function runShown(page, section, folder) {
  const shell = await page.locator(`#${section}-code [data-code=shell] code`).textContent();
  const env = { ...process.env, PATH: `${dirname(BINARY)}:${process.env.PATH}` };
  return run("sh", ["-ec", shell], { cwd: folder, env });
}

/** Returns the colors of a canvas, or of a PNG file, as base64. */
function pixels(page, source) {
  return page.evaluate(async ({ selector, png }) => {
    let canvas = selector && document.querySelector(selector);
    if (png) {
      const bytes = Uint8Array.from(atob(png), (char) => char.charCodeAt(0));
      const bitmap = await createImageBitmap(new Blob([bytes]));
      canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
      canvas.getContext("2d").drawImage(bitmap, 0, 0);
    }
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Uint8Array(data.buffer).toBase64();
  }, source);
}

/** Keeps the bodies of all further calls: of those that the page takes from files a
 * browser tells its tools nothing. Returns those of a method. */
async function keepBodies(page) {
  await page.evaluate(() => {
    const send = window.fetch;
    window.bodies = [];
    window.fetch = async (request) => {
      const body = new Uint8Array(await request.clone().arrayBuffer());
      window.bodies.push({ url: request.url, body: body.toBase64() });
      return send(request);
    };
  });
  return async (method) => {
    await page.waitForFunction((end) => window.bodies.some(({ url }) => url.endsWith(end)), `/${method}`);
    const bodies = await page.evaluate(() => window.bodies);
    const those = bodies.filter(({ url }) => url.endsWith(`/${method}`));
    return those.map(({ body }) => Buffer.from(body, "base64"));
  };
}

/** Returns a BMP file of one color and three bytes per pixel. */
function bmp(width, height, shade) {
  const row = Math.ceil((3 * width) / 4) * 4;
  const file = Buffer.alloc(54 + row * height, shade);
  file.fill(0, 0, 54);
  file.write("BM");
  file.writeUInt32LE(file.length, 2);
  file.writeUInt32LE(54, 10);
  file.writeUInt32LE(40, 14);
  file.writeInt32LE(width, 18);
  file.writeInt32LE(height, 22);
  file.writeUInt16LE(1, 26);
  file.writeUInt16LE(24, 28);
  return file;
}

async function download(page, click) {
  const [file] = await Promise.all([page.waitForEvent("download"), click()]);
  return { name: file.suggestedFilename(), bytes: readFileSync(await file.path()) };
}

describe("pictures", () => {
  for (const name of FORMATS) {
    test(`${name} goes to the worker byte for byte, and comes back as its tokens`, async (t) => {
      const page = await open(t);
      await shown(page, "rooster.png");
      const bytes = readFileSync(golden(name));
      const bodies = await keepBodies(page);
      await page.setInputFiles("#files", golden(name));
      await shown(page, name);
      assert.ok((await bodies("Tokenize")).some((body) => body.includes(bytes)));
      const folder = scratch(t);
      copyFileSync(golden(name), join(folder, name));
      const flags = ["--alpha", "white", "--scale", "1", "--preview", join(folder, "preview")];
      await run(BINARY, ["tokenize", name, ...flags, "--endpoint", worker.url], { cwd: folder });
      const [preview] = readdirSync(join(folder, "preview"));
      const png = readFileSync(join(folder, "preview", preview)).toString("base64");
      assert.equal(await pixels(page, { selector: "#tokens" }), await pixels(page, { png }));
    });
  }

  test("dropped and pasted pictures and the camera are pictures too", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const give = (event, file) =>
      page.evaluate(
        ({ event, name, base64 }) => {
          const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], name, { type: "image/png" }));
          const init = { bubbles: true, cancelable: true };
          document.body.dispatchEvent(
            event === "drop"
              ? new DragEvent("drop", { ...init, dataTransfer: data })
              : new ClipboardEvent("paste", { ...init, clipboardData: data }),
          );
        },
        { event, name: basename(file), base64: readFileSync(file).toString("base64") },
      );
    await give("drop", golden("exif-1.png"));
    await shown(page, "exif-1.png");
    await give("paste", golden("exif-2.png"));
    await shown(page, "exif-2.png");
    await page.click("#open-camera");
    await page.click("#shoot:enabled");
    await shown(page, "camera-");
    assert.equal(await page.locator("#tray li").count(), 4);
    await page.click('#tray [aria-label^="Remove camera"]');
    await shown(page, "exif-2.png");
  });

  test("a switch says what it would change, and shows what it changed", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    // The head was trained on white, so the page begins with white.
    assert.ok(await page.isChecked("input[name=alpha][value=white]"));
    const said = await page.locator("#alpha-change").textContent();
    const n = /would change ([0-9,]+) token/.exec(said)?.[1];
    assert.ok(n, said);
    await page.check("input[name=alpha][value=drop]");
    const caption = page.locator("#tokens-caption");
    await caption.filter({ hasText: `changed ${n} token` }).waitFor();
    assert.ok(await page.isVisible("#changes"));
    await page.locator("#classes").getByText("as it was trained").waitFor();
  });

  test("hostile files are refused in a sentence, and nothing else changes", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    // A header of 60,000 × 60,000 pixels, and no pixels.
    const bomb = Buffer.from(readFileSync(ROOSTER));
    bomb.writeUInt32BE(60_000, 16);
    bomb.writeUInt32BE(60_000, 20);
    const cases = [
      ["bomb.png", bomb],
      ["<img src=x onerror=alert(1)>.png", Buffer.from("<svg onload=alert(1)>")],
      ["cut.png", readFileSync(ROOSTER).subarray(0, 200)],
      ["empty.png", Buffer.alloc(0)],
    ];
    for (const [name, buffer] of cases) {
      await page.setInputFiles("#files", { name, mimeType: "image/png", buffer });
      const sentence = page.locator("#look-problem", { hasText: name });
      await sentence.waitFor();
      assert.match(await sentence.textContent(), /^The worker refused .+ \(INVALID_ARGUMENT\)\.$/s);
      assert.equal(await page.locator("#classes .bars").count(), 0);
    }
    await page.click("#examples li:nth-child(2) button");
    await shown(page, "bread.png");
    assert.ok(await page.isHidden("#look-problem"));
  });

  test("grids are read with arrow keys", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.focus("#map-frame");
    await page.keyboard.press("ArrowDown");
    await page.keyboard.press("ArrowRight");
    const said = await page.locator("#readout").textContent();
    assert.match(said, /^Row 2, column 2: token \d+, #[0-9a-f]{6}, [0-9.]+ nats/);
  });
});

/** Returns the picture that is looked at, once its smaller version is there. */
async function previewed(page) {
  await page.waitForFunction(() => document.querySelector("#original img")?.naturalWidth > 0);
  return page.locator("#original img");
}

describe("large pictures", () => {
  test("a BMP of 30 MB does not stall the page, which shows a smaller picture of it", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const file = join(scratch(t), "large.bmp");
    writeFileSync(file, bmp(4000, 2500, 90));
    await page.evaluate(() => {
      window.longest = 0;
      let last = performance.now();
      const tick = () => {
        const now = performance.now();
        window.longest = Math.max(window.longest, now - last);
        last = now;
        setTimeout(tick, 0);
      };
      tick();
    });
    await page.setInputFiles("#files", file);
    await shown(page, "large.bmp");
    const image = await previewed(page);
    assert.deepEqual(
      await image.evaluate((image) => [image.naturalWidth, image.naturalHeight]),
      [1024, 640],
    );
    // The same one everywhere.
    const address = await image.getAttribute("src");
    assert.equal(await page.locator('#tray [aria-pressed="true"] img').getAttribute("src"), address);
    const longest = await page.evaluate(() => window.longest);
    t.diagnostic(`longest pause ${Math.round(longest)} ms`);
    assert.ok(longest < 1000, `${longest} ms`);
  });

  test("a large photograph that is turned is shown upright", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const plain = await page.evaluate(async () => {
      const canvas = new OffscreenCanvas(2000, 1000);
      const context = canvas.getContext("2d");
      context.fillRect(0, 0, 1000, 1000);
      context.fillStyle = "white";
      context.fillRect(1000, 0, 1000, 1000);
      const blob = await canvas.convertToBlob({ type: "image/jpeg" });
      return new Uint8Array(await blob.arrayBuffer()).toBase64();
    });
    const jpeg = Buffer.from(plain, "base64");
    // Orientation 6: the left side of the file is the top of the picture.
    const exif = Buffer.from("ffe100224578696600004d4d002a00000008000101120003000000010006000000000000", "hex");
    const turned = Buffer.concat([jpeg.subarray(0, 2), exif, jpeg.subarray(2)]);
    await page.setInputFiles("#files", { name: "turned.jpg", mimeType: "image/jpeg", buffer: turned });
    await shown(page, "turned.jpg");
    const image = await previewed(page);
    const found = await image.evaluate((image) => {
      const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0);
      const isWhite = (y) => context.getImageData(canvas.width / 2, y, 1, 1).data[0] > 128;
      return [canvas.width, canvas.height, isWhite(20), isWhite(canvas.height - 20)];
    });
    assert.deepEqual(found, [512, 1024, false, true]);
  });

  test("each call about neighbors is under the worker's limit of bytes", async (t) => {
    const limit = 1 << 20;
    const flags = ["--request-bytes-max", "1MiB", "--image-bytes-max", "1MiB"];
    const small = await startWorker(flags);
    t.after(() => small.end());
    const page = await open(t, {}, small);
    await shown(page, "rooster.png");
    const bodies = await keepBodies(page);
    // With the rooster seven pictures, of which two fit into a call.
    const files = [40, 80, 120, 160, 200, 240].map((shade) => ({
      name: `gray-${shade}.bmp`,
      mimeType: "image/bmp",
      buffer: bmp(400, 350, shade),
    }));
    await page.setInputFiles("#files", files);
    await page.locator("#near-state", { hasText: "Nearest to gray-240.bmp" }).waitFor();
    await page.waitForFunction(() => document.querySelectorAll("#neighbors li").length === 6);
    assert.ok(await page.isHidden("#near-problem"));
    const sizes = (await bodies("Embed")).map((body) => body.length);
    assert.ok(sizes.length >= 3, `${sizes}`);
    assert.ok(sizes.every((size) => size <= limit), `${sizes}`);
  });
});

describe("completions", () => {
  test("seed 7 gives the PNGs of the command that the page shows, byte for byte", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.fill("#samples", "2");
    await page.click("#start");
    const files = [];
    for (const n of [0, 1]) {
      const save = page.getByRole("button", { name: `Save PNG of sample ${n}` });
      files.push(await download(page, () => save.click()));
    }
    const folder = scratch(t);
    copyFileSync(ROOSTER, join(folder, "rooster.png"));
    await runShown(page, "complete", folder);
    for (const { name, bytes } of files) {
      assert.ok(bytes.equals(readFileSync(join(folder, "samples", name))), name);
    }
    assert.match(await page.locator("#complete-state").textContent(), /^Seed 7\..*2 samples done\.$/);
  });

  test("a painted mask gives the PNG of the command, too", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.check("input[name=keep][value=mask]");
    await page.fill("#samples", "1");
    await page.fill("#scale-png", "3");
    await page.fill("#brush-size", "9");
    await page.focus("#brush");
    for (let n = 0; n < 20; n++) {
      await page.keyboard.press("ArrowDown");
    }
    await page.keyboard.press(" ");
    assert.match(await page.locator("#keep-caption").textContent(), /943 pixels kept, 81 drawn/);
    const mask = await download(page, () => page.click("#mask-save"));
    await page.click("#start");
    const save = page.getByRole("button", { name: "Save PNG of sample 0" });
    const { name, bytes } = await download(page, () => save.click());
    const folder = scratch(t);
    copyFileSync(ROOSTER, join(folder, "rooster.png"));
    writeFileSync(join(folder, mask.name), mask.bytes);
    await runShown(page, "complete", folder);
    assert.ok(bytes.equals(readFileSync(join(folder, "samples", name))));
  });

  test("from nothing, seed 7 gives the PNG of the command, too", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.check("input[name=keep][value=nothing]");
    await page.fill("#samples", "1");
    await page.fill("#temperature", "0.9");
    await page.fill("#top-p", "0.95");
    await page.fill("#top-k", "40");
    await page.click("#start");
    const save = page.getByRole("button", { name: "Save PNG of sample 0" });
    const { name, bytes } = await download(page, () => save.click());
    const folder = scratch(t);
    await runShown(page, "complete", folder);
    assert.ok(bytes.equals(readFileSync(join(folder, "samples", name))));
  });

  test("the line of kept rows moves with keys and with the pointer", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const line = page.locator("#line");
    await line.focus();
    await page.keyboard.press("End");
    assert.equal(await line.getAttribute("aria-valuenow"), "32");
    await page.keyboard.press("PageUp");
    await page.keyboard.press("ArrowUp");
    assert.equal(await line.getAttribute("aria-valuenow"), "27");
    const box = await page.locator("#keep-frame").boundingBox();
    await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width / 2, box.y + box.height / 4, { steps: 4 });
    await page.mouse.up();
    assert.equal(await line.getAttribute("aria-valuenow"), "8");
    assert.equal(await line.getAttribute("aria-valuetext"), "8 of 32 rows are kept");
  });

  test("stop in the middle frees the slots, and keeps what is drawn", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.check("input[name=keep][value=nothing]");
    await page.fill("#samples", "64");
    await page.click("#start");
    await page.waitForFunction(() => performance.getEntriesByName("first-row").length === 1);
    assert.ok((await worker.metric("imagegpt_sequences")) > 0);
    await page.click("#stop");
    await page.locator("#complete-state", { hasText: "Stopped." }).waitFor();
    for (const series of ["imagegpt_sequences", "imagegpt_images_in_flight"]) {
      const until = Date.now() + 10_000;
      while ((await worker.metric(series)) !== 0) {
        assert.ok(Date.now() < until, `${series} is not 0`);
      }
    }
    const drawn = await pixels(page, { selector: "#samples-out canvas" });
    const colors = Buffer.from(drawn, "base64");
    assert.equal(colors[3], 255, "the first row is drawn");
    assert.equal(colors.at(-1), 0, "the last row is not");
    // The page draws again.
    await page.fill("#samples", "1");
    await page.click("#start");
    await page.getByRole("button", { name: "Save PNG of sample 0" }).waitFor();
  });
});

describe("fields", () => {
  test("a value that no call takes is refused in a sentence, and is in no command", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const code = page.locator("#complete-code [data-code=shell] code");
    const right = await code.textContent();
    const wrong = [
      ["#seed", "18446744073709551616", "7", "Seed takes a whole number from 0 to 18446744073709551615"],
      ["#seed", "-1", "7", "Seed takes"],
      ["#temperature", "100.5", "1", "Temperature takes a number from 0 to 100"],
      ["#samples", "", "4", "Samples takes a whole number from 1 to "],
      ["#top-k", "1.5", "0", "Top-k takes a whole number"],
    ];
    for (const [field, value, before, sentence] of wrong) {
      await page.fill(field, value);
      assert.equal(await code.textContent(), right);
      await page.click("#start");
      await page.locator("#complete-problem", { hasText: sentence }).waitFor();
      assert.equal(await page.locator("#samples-out li").count(), 0);
      await page.fill(field, before);
    }
    await page.fill("#temperature", "0.333");
    assert.match(await code.textContent(), /--temperature 0\.333 /);
  });

  test("a hidden field does not hinder Draw, and samples keep the name of their picture", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.check("input[name=keep][value=mask]");
    await page.fill("#brush-size", "99");
    await page.press("#brush-size", "Tab");
    assert.equal(await page.inputValue("#brush-size"), "16");
    await page.check("input[name=keep][value=rows]");
    await page.fill("#samples", "1");
    await page.click("#start");
    await page.click("#examples li:nth-child(3) button");
    const save = page.getByRole("button", { name: "Save PNG of sample 0" });
    await save.waitFor();
    assert.equal((await download(page, () => save.click())).name, "rooster-0.png");
  });

  test("a smaller limit of samples lowers the field", async (t) => {
    const small = await startWorker(["--samples-per-call-max", "2"]);
    t.after(() => small.end());
    const page = await open(t, {}, small);
    await shown(page, "rooster.png");
    assert.equal(await page.inputValue("#samples"), "2");
  });
});

describe("neighbors", () => {
  test("the nearest come first, at each layer", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.click("#add-examples");
    const state = page.locator("#near-state");
    await state.filter({ hasText: "Nearest to rooster.png at layer 8" }).waitFor();
    const cosines = async () => {
      const texts = await page.locator("#neighbors .value").allTextContents();
      return texts.map((text) => Number(text.replace("−", "-")));
    };
    const last = await cosines();
    assert.equal(last.length, 7);
    assert.deepEqual(last, last.toSorted((a, b) => b - a));
    await page.focus("#layer");
    await page.keyboard.press("Home");
    await state.filter({ hasText: "at layer 0" }).waitFor();
    assert.notDeepEqual(await cosines(), last);
  });
});

describe("commands", () => {
  test("all commands that the page shows run as they stand", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.click("#add-examples");
    await page.locator("#near-state", { hasText: "Nearest to" }).waitFor();
    const folder = scratch(t);
    for (const name of ["animals-nature", "food-drink", "smileys-emotion", "flags", "travel-places", "objects"]) {
      const from = join(ROOT, "models", "pictures", name);
      for (const file of readdirSync(from)) {
        copyFileSync(join(from, file), join(folder, file));
      }
    }
    await runShown(page, "look", folder);
    await runShown(page, "near", folder);
    assert.ok(readdirSync(folder).includes("neighbors.png"));
  });

  test("commands name each picture once, and leave out those that were refused", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const file = (name, buffer) => page.setInputFiles("#files", { name, mimeType: "image/png", buffer });
    await file("image.png", readFileSync(golden(FORMATS[0])));
    await file("image.png", readFileSync(golden(FORMATS[1])));
    await file("image.png", Buffer.from("no picture"));
    const shell = page.locator("#near-code [data-code=shell] code");
    await page.locator("#near-problem", { hasText: "refused image-3.png" }).waitFor();
    assert.match(await shell.textContent(), /^imagegpt neighbors rooster\.png image\.png image-2\.png .*--neighbors 2 /);
    assert.doesNotMatch(await page.locator("#near-code [data-code=python] code").textContent(), /image-3/);
    await page.focus("#layer");
    await page.keyboard.press("Home");
    assert.match(await shell.textContent(), /^# The command uses the worker's default layer, 8, not layer 0\.\n/);
  });

  test("of many files that are left out the number is said", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const bytes = readFileSync(ROOSTER).toString("base64");
    await page.evaluate((base64) => {
      const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
      const data = new DataTransfer();
      for (let i = 0; i < 210; i++) {
        data.items.add(new File([bytes], `many-${i}.png`, { type: "image/png" }));
      }
      document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }, bytes);
    await page.locator("#tray-problem", { hasText: "11 pictures were left out: the page keeps at most 200" }).waitFor();
    assert.match(await page.locator("#near-code [data-code=shell] code").textContent(), /--neighbors 16 --images-max 200 /);
  });

  test("the last picture takes all that was about it along", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.getByRole("button", { name: "Remove rooster.png" }).click();
    await page.waitForFunction(() => document.querySelector("#original-caption").textContent === "");
    assert.equal(await page.locator("#look-code *").count(), 0);
    assert.equal(await page.locator("#near-code *").count(), 0);
    assert.equal(await page.getAttribute("#tokens", "aria-label"), null);
    assert.equal(await page.getAttribute("#look", "aria-busy"), null);
  });

  test("programs in Python run as they stand", { skip: !process.env.PYTHON }, async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    await page.fill("#samples", "1");
    const folder = scratch(t);
    copyFileSync(ROOSTER, join(folder, "rooster.png"));
    const env = { ...process.env, PYTHONPATH: join(ROOT, "python", "src") };
    for (const section of ["look", "near", "complete"]) {
      const code = await page.locator(`#${section}-code [data-code=python] code`).textContent();
      await run(process.env.PYTHON, ["-c", code], { cwd: folder, env });
    }
    await page.click("#start");
    const save = page.getByRole("button", { name: "Save PNG of sample 0" });
    const { bytes } = await download(page, () => save.click());
    const [own, theirs] = [bytes, readFileSync(join(folder, "sample-0.png"))];
    const png = (bytes) => ({ png: bytes.toString("base64") });
    assert.equal(await pixels(page, png(own)), await pixels(page, png(theirs)));
  });

  test("a command is copied", async (t) => {
    const page = await open(t, { permissions: ["clipboard-read", "clipboard-write"] });
    await shown(page, "rooster.png");
    await page.click("#look summary");
    await page.getByRole("button", { name: "Copy command" }).first().click();
    await page.locator("#look-code").getByText("copied").waitFor();
    const copied = await page.evaluate(() => navigator.clipboard.readText());
    assert.match(copied, /^imagegpt tokenize rooster\.png --fit squash --alpha white/);
  });
});

describe("looks", () => {
  const looks = [
    ["light", { colorScheme: "light" }],
    ["dark", { colorScheme: "dark" }],
    ["a phone's width", { viewport: { width: 360, height: 740 }, colorScheme: "light" }],
  ];
  for (const [name, options] of looks) {
    test(`axe finds nothing in ${name}`, async (t) => {
      const page = await open(t, options);
      await shown(page, "rooster.png");
      await page.click("#add-examples");
      await page.locator("#near-state", { hasText: "Nearest to" }).waitFor();
      await page.fill("#samples", "1");
      await page.click("#start");
      await page.getByRole("button", { name: "Save PNG of sample 0" }).waitFor();
      for (const summary of await page.locator("summary").all()) {
        await summary.click();
      }
      for (const keep of ["rows", "mask", "nothing"]) {
        await page.check(`input[name=keep][value=${keep}]`);
        await page.evaluate(axe);
        const found = await page.evaluate(() => window.axe.run());
        const said = found.violations.map(({ impact, id, nodes }) => [impact, id, nodes[0]?.html]);
        assert.deepEqual(said, []);
      }
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert.ok(width <= (options.viewport?.width ?? 1100), `${width} pixels wide`);
    });
  }
});

describe("workers", () => {
  test("a full worker is asked again after its own time", async (t) => {
    const limits = ["--images-in-flight-max", "--images-per-call-max", "--samples-in-flight-max"];
    const flags = limits.concat("--stream-window-max", "--max-batch-size").flatMap((flag) => [flag, "1"]);
    const full = await startWorker(["--fake-engine", "700ms", ...flags]);
    t.after(() => full.end());
    const page = await open(t, {}, full);
    await page.locator("#state", { hasText: "The worker is full (RESOURCE_EXHAUSTED)" }).waitFor();
    assert.match(await page.locator("#countdown").textContent(), /^ [0-9.]+ s$/);
    await page.locator("#map-caption", { hasText: "nats per token" }).waitFor();
    await page.waitForFunction(() => document.querySelector("#state").textContent === "");
  });

  test("a token is asked for, and kept in memory alone", async (t) => {
    const folder = scratch(t);
    writeFileSync(join(folder, "token"), "0123456789abcdef\n");
    const guarded = await startWorker(["--auth-tokens-file", join(folder, "token")]);
    t.after(() => guarded.end());
    const page = await open(t, {}, guarded);
    await page.locator("#state", { hasText: "UNAUTHENTICATED" }).waitFor();
    await page.fill("#token", "wrong-wrong-wrong");
    await page.click("#token-form button");
    await page.locator("#state", { hasText: "not one that the worker accepts" }).waitFor();
    await page.fill("#token", "0123456789abcdef");
    await page.click("#token-form button");
    await shown(page, "rooster.png");
    assert.ok(await page.isHidden("#token-form"));
    const kept = await page.evaluate(
      () => JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie,
    );
    assert.equal(kept, "{}{}");
    copyFileSync(ROOSTER, join(folder, "rooster.png"));
    await runShown(page, "look", folder);
    await page.reload();
    await page.locator("#state", { hasText: "UNAUTHENTICATED" }).waitFor();
  });

  test("a token that no header can carry is refused in a sentence", async (t) => {
    const folder = scratch(t);
    writeFileSync(join(folder, "token"), "0123456789abcdef\n");
    const guarded = await startWorker(["--auth-tokens-file", join(folder, "token")]);
    t.after(() => guarded.end());
    const page = await open(t, {}, guarded);
    await page.locator("#state", { hasText: "UNAUTHENTICATED" }).waitFor();
    for (const token of ["“0123456789abcdef”", "0123456789 abcdef"]) {
      await page.fill("#token", token);
      await page.click("#token-form button");
      await page.locator("#state", { hasText: "only ASCII characters and no spaces" }).waitFor();
      assert.ok(await page.isVisible("#token-form"));
    }
    await page.fill("#token", "0123456789abcdef");
    await page.click("#token-form button");
    await shown(page, "rooster.png");
  });

  test("a worker that has ended is said so, and found again", async (t) => {
    let mortal = await startWorker();
    t.after(() => mortal.end());
    const page = await open(t, {}, mortal);
    await shown(page, "rooster.png");
    await mortal.end();
    await page.click("#examples li:nth-child(3) button");
    await page.locator("#state", { hasText: "does not answer: it has ended" }).waitFor();
    mortal = await startWorker([], { port: mortal.port });
    await shown(page, "cherries.png");
    assert.equal(await page.locator("#state").textContent(), "");
  });

  test("a worker that hangs is said so, and found again", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    const held = [];
    await page.route("**/imagegpt.v1.ImageGptService/GetModel", (route) => held.push(route));
    await page.evaluate(() => document.dispatchEvent(new Event("visibilitychange")));
    await page.locator("#state", { hasText: "has not answered within 10 seconds" }).waitFor();
    await page.unroute("**/imagegpt.v1.ImageGptService/GetModel");
    await page.waitForFunction(() => document.querySelector("#state").textContent === "");
  });

  test("a worker that drains is said so", async (t) => {
    const page = await open(t);
    await shown(page, "rooster.png");
    // What a worker answers on a connection that it has not closed yet.
    const field = (number, bytes) => Buffer.concat([Buffer.from([8 * number + 2, bytes.length]), bytes]);
    const info = Buffer.concat([field(1, Buffer.from("DRAINING")), field(2, Buffer.from("imagegpt.v1"))]);
    const any = Buffer.concat([
      field(1, Buffer.from("type.googleapis.com/google.rpc.ErrorInfo")),
      field(2, info),
    ]);
    const status = Buffer.concat([Buffer.from([8, 14]), field(3, any)]);
    await page.route("**/imagegpt.v1.ImageGptService/*", (route) =>
      route.fulfill({
        contentType: "application/grpc-web+proto",
        headers: {
          "grpc-status": "14",
          "grpc-message": "the worker is draining and takes no new work",
          "grpc-status-details-bin": status.toString("base64"),
        },
      }),
    );
    await page.click("#examples li:nth-child(4) button");
    await page.locator("#state", { hasText: "The worker is shutting down and takes no new work (UNAVAILABLE)." }).waitFor();
    await page.unrouteAll();
    await shown(page, "flushed.png");
  });

  test("over TLS the page and its calls use HTTP/2", async (t) => {
    const folder = scratch(t);
    const [key, certificate] = [join(folder, "tls.key"), join(folder, "tls.crt")];
    execFileSync(
      "openssl",
      ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"].concat(
        ["-days", "2", "-subj", "/CN=localhost", "-addext", "basicConstraints=critical,CA:FALSE"],
        ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", certificate],
      ),
      { stdio: "ignore" },
    );
    const flags = ["--tls-cert", certificate, "--tls-key", key];
    const secured = await startWorker(flags, { scheme: "https" });
    t.after(() => secured.end());
    const page = await open(t, {}, secured);
    await shown(page, "rooster.png");
    await page.fill("#samples", "1");
    await page.click("#start");
    await page.getByRole("button", { name: "Save PNG of sample 0" }).waitFor();
    const protocols = await page.evaluate(() =>
      performance
        .getEntriesByType("resource")
        .filter((entry) => entry.name.startsWith("https:"))
        .map((entry) => entry.nextHopProtocol)
        // What WEB_DIST puts in the place of the worker's files has none.
        .filter((protocol) => protocol !== ""),
    );
    assert.ok(protocols.length > 5);
    assert.deepEqual([...new Set(protocols)], ["h2"]);
  });
});
