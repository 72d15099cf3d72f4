// Builds the page into dist/: one file each of HTML, CSS, JavaScript and
// licenses. The same sources and lockfile give the same bytes.
//
// `node build.mjs` writes dist/; `node build.mjs --check` builds anew, and fails
// if dist/ has other bytes.

import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const isCheck = process.argv.includes("--check");
// The bytes of the page that a browser may take for its first paint.
const BYTES_MAX = 400_000;

const tool = (name, ...flags) =>
  execFileSync(name, flags, {
    cwd: here,
    stdio: "inherit",
    env: { ...process.env, PATH: `${join(here, "node_modules", ".bin")}:${process.env.PATH}` },
  });
tool("buf", "generate");
tool("tsc");

const result = await esbuild.build({
  absWorkingDir: here,
  entryPoints: { page: "src/main.ts" },
  bundle: true,
  minify: true,
  format: "esm",
  target: ["chrome111", "firefox113", "safari16.4"],
  charset: "utf8",
  // Licenses are in NOTICE.txt.
  legalComments: "none",
  loader: { ".png": "binary" },
  outdir: "out",
  metafile: true,
  write: false,
});
const style = await esbuild.build({
  absWorkingDir: here,
  entryPoints: { page: "src/page.css" },
  minify: true,
  charset: "utf8",
  target: ["chrome111", "firefox113", "safari16.4"],
  outdir: "out",
  write: false,
});

/** Returns the licenses of the packages whose code is in the bundle, and the
 * notices with which files of theirs begin. */
function notice(inputs) {
  const packages = new Map();
  for (const input of Object.keys(inputs)) {
    const match = /node_modules\/((?:@[^/]+\/)?[^/]+)\//.exec(input);
    if (match) {
      const notices = packages.get(match[1]) ?? new Set();
      packages.set(match[1], notices);
      const head = /^(?:\/\/.*\n)+/.exec(readFileSync(join(here, input), "utf8"))?.[0] ?? "";
      if (/copyright/i.test(head)) {
        const text = head.replace(/^\/\/ ?/gm, "").trim();
        notices.add(/[\s\S]*limitations under the License\./.exec(text)?.[0] ?? text);
      }
    }
  }
  const parts = [...packages].sort().flatMap(([name, notices]) => {
    const about = JSON.parse(readFileSync(join(here, "node_modules", name, "package.json"), "utf8"));
    return [`${name} ${about.version}: ${about.license}`, ...[...notices].sort()];
  });
  return [
    "The page of imagegpt-worker: Apache-2.0.",
    "Its example pictures are from the Noto emoji font, copyright Google Inc.: Apache-2.0.",
    "It has code of these packages, with the notices of their files:",
    ...parts,
    "The text of Apache-2.0:",
    readFileSync(join(here, "..", "LICENSE"), "utf8").trim(),
  ].join("\n\n").concat("\n");
}

const files = {
  "index.html": readFileSync(join(here, "src", "index.html")),
  "page.css": Buffer.from(style.outputFiles[0].contents),
  "page.js": Buffer.from(result.outputFiles[0].contents),
  "NOTICE.txt": Buffer.from(notice(result.metafile.inputs)),
};
const bytes = Object.values(files).reduce((sum, content) => sum + content.length, 0);
if (bytes > BYTES_MAX) {
  throw new Error(`the page has ${bytes} bytes; the limit is ${BYTES_MAX} (BYTES_MAX in build.mjs)`);
}

mkdirSync(join(here, "dist"), { recursive: true });
const stale = [];
for (const [name, content] of Object.entries(files)) {
  const path = join(here, "dist", name);
  if (!isCheck) {
    writeFileSync(path, content);
    console.log(`web/dist/${name}: ${content.length.toLocaleString("en")} bytes`);
    continue;
  }
  let there;
  try {
    there = readFileSync(path);
  } catch {
    there = Buffer.alloc(0);
  }
  if (!content.equals(there)) {
    stale.push(`web/dist/${name}`);
  }
}
if (stale.length > 0) {
  console.error(`${stale.join(", ")}: not what the sources give; run \`make web\` and commit web/dist`);
  process.exit(1);
}
