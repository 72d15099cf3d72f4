// Draws the pictures of docs/playground.md: `make web-pictures`.

import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { openPage, ROOT, shown, startBrowser, startWorker } from "./worker.mjs";

const folder = join(ROOT, "docs", "images");
mkdirSync(folder, { recursive: true });
const browser = await startBrowser();
const worker = await startWorker();
const clip = async (page, selector, name) =>
  page.locator(selector).screenshot({ path: join(folder, name), animations: "disabled" });

const { page } = await openPage(browser, worker, {
  viewport: { width: 900, height: 900 },
  colorScheme: "light",
});
await shown(page, "rooster.png");
await clip(page, "#look", "page-look.png");
await page.context().close();

const dark = await openPage(browser, worker, {
  viewport: { width: 900, height: 900 },
  colorScheme: "dark",
});
await shown(dark.page, "rooster.png");
await dark.page.fill("#samples", "5");
await dark.page.click("#start");
await dark.page.waitForFunction(() =>
  document.querySelector("#samples-out p").textContent.includes("row 26"),
);
await dark.page.click("#stop");
await dark.page.locator("#complete-state", { hasText: "Stopped" }).waitFor();
await clip(dark.page, "#complete", "page-complete.png");
await browser.close();
await worker.end();
