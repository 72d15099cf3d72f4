// The page that `imagegpt serve --playground` serves.

import * as complete from "./complete.ts";
import { button, decimals, make } from "./dom.ts";
import { byId } from "./elements.ts";
import { EXAMPLES } from "./examples.ts";
import type { GetModelResponse } from "./gen/imagegpt/v1/imagegpt_pb.ts";
import * as look from "./look.ts";
import * as neighbors from "./neighbors.ts";
import * as pictures from "./pictures.ts";
import { askModel, connect, type Problem, setToken } from "./worker.ts";

const state = byId("state");
const tokenForm = byId("token-form");

let model: GetModelResponse | undefined;
let showing = new AbortController();
let comparing = new AbortController();
/** What is on show, so that another picture beside it asks nothing anew. */
let onShow: unknown[] = [];
let isDue = false;
const waits = new Set<() => void>();
/** True after a problem of the worker, until it answers again. */
let isAway = false;
let countdown: ReturnType<typeof setInterval> | undefined;

/** Shows all changes of this moment at once. */
function update(): void {
  if (!isDue) {
    isDue = true;
    queueMicrotask(() => {
      isDue = false;
      show();
    });
  }
}

/** Shows the chosen picture everywhere, and drops what was on its way. */
function show(): void {
  if (!model) {
    return;
  }
  const picture = pictures.current();
  const switches = pictures.switches();
  comparing.abort();
  comparing = new AbortController();
  void neighbors.compare(picture, pictures.all(), switches, comparing.signal);
  const now = [picture, switches.fit, switches.alpha];
  if (now.every((value, i) => value === onShow[i]) && onShow.length > 0) {
    return;
  }
  onShow = now;
  showing.abort();
  showing = new AbortController();
  const { signal } = showing;
  complete.setPicture(picture, switches, undefined);
  if (picture) {
    void look.look(picture, switches, signal, (tokens) =>
      complete.setPicture(picture, switches, tokens),
    );
  } else {
    look.leave();
  }
}

function showModel(to: GetModelResponse): void {
  const isNew = model?.digest !== to.digest;
  const isFirst = model === undefined;
  const digests = (of: GetModelResponse | undefined) => of?.heads.map((head) => head.digest).join();
  const hasNewHeads = digests(model) !== digests(to);
  const wasAway = isAway;
  isAway = false;
  model = to;
  const where = to.devices.find((device) => device.name)?.name ?? to.executionProvider;
  const facts = [to.layers > 0 ? `${to.layers} layers` : "", to.precision, where];
  byId("model").replaceChildren(
    "Model ",
    make("strong", {}, to.name),
    ` (${facts.filter(Boolean).join(", ")}), ${to.digest.slice(0, 15)}…, worker ${to.workerVersion}`,
  );
  const notice = byId("notice");
  notice.textContent = to.notice;
  notice.hidden = !to.notice;
  if (isNew) {
    look.forget(pictures.all());
    neighbors.forget(pictures.all());
  }
  if (isNew || hasNewHeads) {
    look.setModel(to);
    complete.setModel(to);
    neighbors.setModel(to);
    pictures.follow(to);
  }
  const example = EXAMPLES[0];
  if (isFirst && example && !pictures.current()) {
    pictures.add(example.name, example.bytes);
  } else if (isNew || hasNewHeads || wasAway) {
    onShow = [];
    update();
  }
}

function showProblem(problem: Problem | undefined): void {
  clearInterval(countdown);
  tokenForm.hidden = problem?.kind !== "token";
  if (!problem) {
    state.replaceChildren();
    return;
  }
  isAway = true;
  const parts: Node[] = [make("p", { class: "problem" }, problem.sentence)];
  if (problem.kind === "unreachable" || problem.kind === "unavailable") {
    parts.push(make("p", { class: "hint" }, "The page looks for the worker every two seconds."));
  }
  state.replaceChildren(...parts);
  if (problem.kind === "token") {
    byId("token").focus();
  }
}

function showWait(ms: number, stop: () => void): void {
  waits.add(stop);
  clearInterval(countdown);
  const until = performance.now() + ms;
  // Readers hear the sentence once, and not each tenth of a second.
  const left = make("span", { "aria-hidden": "true", id: "countdown" });
  const tick = () => {
    const seconds = (until - performance.now()) / 1000;
    if (seconds <= 0) {
      clearInterval(countdown);
      waits.clear();
      state.replaceChildren();
    } else {
      left.textContent = ` ${decimals(seconds, 1)} s`;
    }
  };
  const end = button("Stop waiting", () => {
    clearInterval(countdown);
    state.replaceChildren();
    for (const each of waits) {
      each();
    }
    waits.clear();
  });
  state.replaceChildren(
    make("p", { class: "busy" }, "The worker is full (RESOURCE_EXHAUSTED); the page asks again in a moment.", left),
    end,
  );
  countdown = setInterval(tick, 100);
  tick();
}

look.listen();
complete.listen();
neighbors.listen();
pictures.listen(update);
tokenForm.addEventListener("submit", (event) => {
  event.preventDefault();
  const field = byId("token");
  const fault = setToken(field.value.trim());
  field.value = "";
  if (fault === undefined) {
    void askModel();
  } else {
    showProblem({ kind: "token", sentence: fault });
  }
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && model) {
    void askModel();
  }
});
void connect({ problem: showProblem, waiting: showWait, model: showModel });
