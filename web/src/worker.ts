// Calls of the worker that serves the page, and its errors as sentences.

import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import type { Status } from "./gen/google/rpc/status_pb.ts";
import { ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.ts";
import { type GetModelResponse, ImageGptService } from "./gen/imagegpt/v1/imagegpt_pb.ts";

/** Time after which a call without a stream is given up. */
export const CALL_TIMEOUT_MS = 120_000;
/** Shortest pause before a call that a full worker has rejected is repeated. */
const RETRY_MS_MIN = 200;
/** Most repetitions of a call that a full worker rejects. */
const RETRIES_MAX = 20;

/** Address of the worker: that of the page, without the page's own name. */
export const ENDPOINT = new URL(".", location.href).href.replace(/\/$/, "");

// The token is kept in memory alone, and is gone with the page.
let token = "";

/** True if calls carry a token. */
export function hasToken(): boolean {
  return token !== "";
}

/** Sets the bearer token of all further calls. */
export function setToken(value: string): void {
  token = value;
}

const authorize: Interceptor = (next) => (request) => {
  if (token !== "") {
    request.header.set("authorization", `Bearer ${token}`);
  }
  return next(request);
};

/** Client of the worker that serves the page. */
export const worker = createClient(
  ImageGptService,
  createGrpcWebTransport({ baseUrl: ENDPOINT, interceptors: [authorize] }),
);

/** What went wrong, for a person. */
export interface Problem {
  sentence: string;
  kind: "canceled" | "token" | "unreachable" | "unavailable" | "full" | "other";
  /** Time after which a full worker wants to be asked again. */
  retryMs?: number;
}

/** Returns the name of a code in the contract's spelling: INVALID_ARGUMENT. */
function codeName(code: Code | number): string {
  const name = Code[code] ?? `code ${code}`;
  // gRPC spells one of its codes with two l.
  if (code === Code.Canceled) {
    return "CANCELLED";
  }
  return name.replace(/([a-z])([A-Z])/g, "$1_$2").toUpperCase();
}

/** Makes a sentence of a worker's message, which begins in lower case. */
function sentence(message: string, code: Code | number): string {
  const text = message.trim() || "the worker says no more";
  return `${text.charAt(0).toUpperCase()}${text.slice(1)} (${codeName(code)}).`;
}

/** Says what is wrong with a call that failed. */
export function problemOf(reason: unknown): Problem {
  const error = ConnectError.from(reason);
  if (error.code === Code.Canceled) {
    return { kind: "canceled", sentence: "Stopped (CANCELLED)." };
  }
  if (error.cause instanceof TypeError) {
    return {
      kind: "unreachable",
      sentence: `The worker at ${ENDPOINT} does not answer: it has ended, or the network is down (UNAVAILABLE).`,
    };
  }
  const info = error.findDetails(ErrorInfoSchema)[0]?.reason ?? "";
  switch (error.code) {
    case Code.Unauthenticated:
      return { kind: "token", sentence: sentence(error.rawMessage, error.code) };
    case Code.Unavailable:
      return {
        kind: "unavailable",
        sentence:
          info === "DRAINING"
            ? "The worker is shutting down and takes no new work (UNAVAILABLE)."
            : sentence(error.rawMessage, error.code),
      };
    case Code.ResourceExhausted: {
      const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
      if (delay) {
        const ms = Number(delay.seconds) * 1000 + delay.nanos / 1e6;
        return {
          kind: "full",
          sentence: "The worker is full (RESOURCE_EXHAUSTED).",
          retryMs: Math.max(ms, RETRY_MS_MIN),
        };
      }
      return { kind: "other", sentence: sentence(error.rawMessage, error.code) };
    }
    default:
      return { kind: "other", sentence: sentence(error.rawMessage, error.code) };
  }
}

/** Says why one image of a call has no answer. */
export function refusal(name: string, status: Status | undefined): string {
  return status
    ? `The worker refused ${name}: ${status.message} (${codeName(status.code)}).`
    : `The worker sent no outcome for ${name}.`;
}

/** Listener of the state of the worker. */
export interface StateListener {
  /** A call failed; `undefined` once calls succeed again. */
  problem(problem: Problem | undefined): void;
  /** A full worker is asked again in `ms`; `stop` gives up. */
  waiting(ms: number, stop: () => void): void;
  model(model: GetModelResponse): void;
}

let listener: StateListener | undefined;
let poll: ReturnType<typeof setTimeout> | undefined;

/** Sets the listener and asks for the model. */
export async function connect(to: StateListener): Promise<void> {
  listener = to;
  await askModel();
}

/** Asks for the model, again and again while the worker does not answer. */
export async function askModel(): Promise<void> {
  clearTimeout(poll);
  try {
    const model = await worker.getModel({}, { timeoutMs: 10_000 });
    listener?.problem(undefined);
    listener?.model(model);
  } catch (reason) {
    report(problemOf(reason));
  }
}

/** Tells the listener of a problem, and looks for the worker's return. */
export function report(problem: Problem): void {
  listener?.problem(problem);
  clearTimeout(poll);
  if (problem.kind === "unreachable" || problem.kind === "unavailable") {
    poll = setTimeout(() => void askModel(), 2000);
  }
}

/** Makes a call, and repeats it as often as a full worker asks for it. */
export async function call<T>(signal: AbortSignal, make: () => Promise<T>): Promise<T> {
  for (let n = 0; ; n++) {
    try {
      return await make();
    } catch (reason) {
      const problem = problemOf(reason);
      if (problem.retryMs === undefined || n === RETRIES_MAX || signal.aborted) {
        throw reason;
      }
      if (!(await pause(problem.retryMs, signal))) {
        throw reason;
      }
    }
  }
}

/** Waits, and returns false if a person has stopped the wait. */
function pause(ms: number, signal: AbortSignal): Promise<boolean> {
  return new Promise((resolve) => {
    const end = (goesOn: boolean) => {
      clearTimeout(timer);
      signal.removeEventListener("abort", stop);
      resolve(goesOn);
    };
    const stop = () => end(false);
    const timer = setTimeout(() => end(true), ms);
    signal.addEventListener("abort", stop);
    listener?.waiting(ms, stop);
  });
}
