// Measures the page in Chromium: `make bench-page`. Each figure is the median
// of RUNS loads, each in a browser context of its own, without a cache.

import { openPage, shown, startBrowser, startWorker } from "./worker.mjs";

const RUNS = 9;

const browser = await startBrowser();
const worker = await startWorker();
const figures = {};
const note = (name, value) => {
  figures[name] ??= [];
  figures[name].push(value);
};

for (let run = 0; run < RUNS; run++) {
  const { page } = await openPage(browser, worker);
  await shown(page, "rooster.png");
  note("all of the first picture", await page.evaluate(() => performance.now()));
  const paints = await page.evaluate(() =>
    performance.getEntriesByType("paint").map(({ name, startTime }) => [name, startTime]),
  );
  for (const [name, time] of paints) {
    note(name.replaceAll("-", " "), time);
  }
  for (const keep of ["rows", "nothing"]) {
    await page.check(`input[name=keep][value=${keep}]`);
    await page.fill("#samples", "4");
    await page.click("#start");
    await page.getByRole("button", { name: "Save PNG of sample 3" }).waitFor();
    const [draw, row, end] = await page.evaluate(() => [
      performance.getEntriesByName("draw").at(-1).startTime,
      performance.getEntriesByName("first-row").at(-1).startTime,
      performance.now(),
    ]);
    const what = keep === "rows" ? "4 completions of 512 pixels" : "4 pictures of 1,024 pixels";
    note(`${what}: first streamed row`, row - draw);
    note(`${what}: all`, end - draw);
  }
  await page.context().close();
}
await browser.close();
await worker.end();

console.log(`milliseconds, median of ${RUNS} (least to most)`);
for (const [name, values] of Object.entries(figures)) {
  const sorted = values.toSorted((a, b) => a - b);
  const [least, middle, most] = [sorted[0], sorted[sorted.length >> 1], sorted.at(-1)];
  console.log(`${middle.toFixed(0).padStart(7)}  (${least.toFixed(0)} to ${most.toFixed(0)})  ${name}`);
}
