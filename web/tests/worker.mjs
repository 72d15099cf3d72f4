// Workers and pages for the tests of the page: real processes of BINARY, and
// Debian's Chromium.

import { spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

export const ROOT = resolve(dirname(fileURLToPath(import.meta.url)), "..", "..");
export const BINARY = resolve(ROOT, process.env.BINARY ?? "target/release/imagegpt");
const CHROMIUM = ["/usr/bin/chromium", "/usr/bin/chromium-browser"].find(existsSync);
/** Files of the page by path. With WEB_DIST=1 they are those of web/dist and not
 * the program's, so that a change of the page needs no build of the program. */
const FILES = { "/": "index.html", "/page.css": "page.css", "/page.js": "page.js" };
/** Longest wait for a worker: the first start compiles the model. */
const READY_MS = 180_000;

/** Returns a port that is free now. */
async function freePort() {
  const server = createServer();
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  const { port } = server.address();
  await new Promise((done) => server.close(done));
  return port;
}

/** Makes a directory that is removed with the test. */
export function scratch(t) {
  const folder = mkdtempSync(join(tmpdir(), "imagegpt-page-"));
  t.after(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Starts a worker with the page, and waits until it is ready. */
export async function startWorker(flags = [], { port, scheme = "http" } = {}) {
  const cache = join(ROOT, "target", "web-models");
  mkdirSync(cache, { recursive: true });
  const listen = `127.0.0.1:${port ?? (await freePort())}`;
  const metrics = `127.0.0.1:${await freePort()}`;
  const args = ["serve", "--model", "models/emoji", "--model-name", "emoji", "--cache-dir", cache];
  args.push("--feature-layer", "8", "--execution-provider", "cpu", "--playground");
  if (!flags.includes("--fake-engine")) {
    args.push("--head", "category=models/emoji/category.safetensors");
  }
  args.push("--listen", listen, "--metrics-listen", metrics, ...flags);
  const child = spawn(BINARY, args, { cwd: ROOT, stdio: ["ignore", "ignore", "pipe"] });
  let log = "";
  child.stderr.on("data", (chunk) => {
    log = (log + chunk).slice(-4000);
  });
  const ended = new Promise((done) => child.on("exit", done));
  const until = Date.now() + READY_MS;
  for (;;) {
    if (child.exitCode !== null || Date.now() > until) {
      child.kill("SIGKILL");
      throw new Error(`the worker is not ready:\n${log}`);
    }
    try {
      const answer = await fetch(`http://${metrics}/readyz`);
      if (answer.ok) {
        break;
      }
    } catch {
      // Not listening yet.
    }
    await new Promise((done) => setTimeout(done, 50));
  }
  return {
    url: `${scheme}://${listen}/`,
    port: Number(listen.split(":")[1]),
    /** Returns the value of one series. */
    async metric(series) {
      const page = await (await fetch(`http://${metrics}/metrics`)).text();
      const line = page.split("\n").find((line) => line.startsWith(`${series} `));
      return line === undefined ? undefined : Number(line.split(" ").at(-1));
    },
    /** Ends the worker as SIGTERM does. */
    async end() {
      child.kill("SIGTERM");
      const late = setTimeout(() => child.kill("SIGKILL"), 30_000);
      await ended;
      clearTimeout(late);
    },
  };
}

/** Starts Chromium, with a camera that shows a test picture. */
export async function startBrowser() {
  if (!CHROMIUM) {
    throw new Error("Chromium is missing: apt-get install chromium");
  }
  const args = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"];
  // Chromium's own sandbox needs a user who is not root.
  if (process.getuid() === 0) {
    args.push("--no-sandbox");
  }
  return chromium.launch({ executablePath: CHROMIUM, args });
}

/** Opens a page that keeps account of requests, violations and errors. */
export async function openPage(browser, worker, options = {}) {
  const context = await browser.newContext({
    viewport: { width: 1100, height: 900 },
    ignoreHTTPSErrors: true,
    ...options,
  });
  const page = await context.newPage();
  page.setDefaultTimeout(Number(process.env.PAGE_TIMEOUT_MS ?? 60_000));
  const account = { foreign: [], violations: [], errors: [] };
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(worker.url) && !url.startsWith("blob:") && !url.startsWith("data:")) {
      account.foreign.push(url);
    }
  });
  page.on("pageerror", (error) => account.errors.push(error.message));
  page.on("console", (message) => {
    // Chromium writes calls that the worker refuses, too.
    if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) {
      account.errors.push(message.text());
    }
  });
  await page.exposeFunction("tellViolation", (text) => account.violations.push(text));
  await page.addInitScript(() => {
    document.addEventListener("securitypolicyviolation", (event) => {
      window.tellViolation(`${event.violatedDirective}: ${event.blockedURI}`);
    });
  });
  if (process.env.WEB_DIST) {
    await context.route(
      (url) => FILES[url.pathname] !== undefined,
      async (route) => {
        const response = await route.fetch();
        const body = readFileSync(join(ROOT, "web", "dist", FILES[new URL(route.request().url()).pathname]));
        await route.fulfill({ response, body });
      },
    );
  }
  await page.goto(worker.url);
  return { page, account };
}

/** Waits until all of the chosen picture is shown. */
export async function shown(page, name) {
  await page.waitForFunction(
    (name) =>
      document.querySelector("#original-caption").textContent.startsWith(name) &&
      document.querySelector("#map-caption").textContent.includes("nats per token") &&
      document.querySelector("#classes .bars") !== null &&
      document.querySelector("#alpha-change").textContent !== "",
    name,
  );
}
