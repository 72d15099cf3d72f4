// Calls of the worker that serves the page, and its errors as sentences.

import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import type { Status } from "./gen/google/rpc/status_pb.ts";
import { ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.ts";
import { type GetModelResponse, ImageGptService } from "./gen/imagegpt/v1/imagegpt_pb.ts";
import { type Encoded, sizeOf } from "./sent.ts";

/** Time after which a call without a stream is given up. */
export const CALL_TIMEOUT_MS = 120_000;
/** Time after which the page takes a worker that says nothing for away. */
const CHECK_TIMEOUT_MS = 10_000;
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

/** Sets the bearer token of all further calls; returns what is wrong with one
 * that no header can carry. */
export function setToken(value: string): string | undefined {
  if (!/^[\x21-\x7e]+$/.test(value)) {
    return "A token has only ASCII characters and no spaces: copy it again from where it is kept.";
  }
  token = value;
  return undefined;
}

const authorize: Interceptor = (next) => (request) => {
  if (token !== "") {
    request.header.set("authorization", `Bearer ${token}`);
  }
  return next(request);
};

/** The network failed; other errors of a browser's kind are the page's own. */
class Lost extends Error {}

function lost(reason: unknown): unknown {
  return reason instanceof TypeError ? new Lost(reason.message, { cause: reason }) : reason;
}

/** Fetches, and throws `Lost` where the network fails, also within an answer. */
async function fetchOrLose(...given: Parameters<typeof fetch>): Promise<Response> {
  // A request that cannot be made fails here, and is no fault of the network.
  const request = new Request(...given);
  const response = await fetch(request).catch((reason: unknown) => {
    throw lost(reason);
  });
  const reader = response.body?.getReader();
  if (!reader) {
    return response;
  }
  const body = new ReadableStream<Uint8Array>({
    async pull(control) {
      try {
        const { done, value } = await reader.read();
        if (done) {
          control.close();
        } else {
          control.enqueue(value);
        }
      } catch (reason) {
        control.error(lost(reason));
      }
    },
    cancel: (reason) => reader.cancel(reason),
  });
  const { status, statusText, headers } = response;
  return new Response(body, { status, statusText, headers });
}

/** Bytes before the message in the body of a call: a flag and its length. */
const ENVELOPE = 5;

/** Adds encoded fields to the message in the body of a call. */
function added(body: BodyInit | null | undefined, more: Encoded): BodyInit {
  if (!(body instanceof Uint8Array)) {
    throw new Error("the body of a call is no bytes");
  }
  const head = new Uint8Array(body);
  const view = new DataView(head.buffer);
  view.setUint32(1, head.length - ENVELOPE + sizeOf(more));
  return new Blob([head, ...more]);
}

/** Returns a client of the worker that serves the page, whose calls have `more`
 * behind the fields of their message: pictures, which are read where the browser
 * keeps them, and not copied by the page. */
export function workerWith(more: Encoded) {
  const send: typeof fetch = (url, init) => fetchOrLose(url, { ...init, body: added(init?.body, more) });
  return createClient(
    ImageGptService,
    createGrpcWebTransport({ baseUrl: ENDPOINT, interceptors: [authorize], fetch: send }),
  );
}

/** Client of the worker that serves the page. */
export const worker = workerWith([]);

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
  if (error.cause instanceof Lost) {
    return {
      kind: "unreachable",
      sentence: `The worker at ${ENDPOINT} does not answer: it has ended, or the network is down (UNAVAILABLE).`,
    };
  }
  if (error.cause instanceof Error) {
    // The worker's own errors have no cause: the page could not write the call,
    // or not read the answer.
    const field = /cannot encode field (?:\w+\.)*(\w+)/.exec(error.rawMessage)?.[1];
    return {
      kind: "other",
      sentence: field
        ? `The page cannot send this value of ${field.replaceAll("_", " ")}: change it.`
        : "The page cannot make this call, or read its answer: load the page again.",
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
    const model = await worker.getModel({}, { timeoutMs: CHECK_TIMEOUT_MS });
    listener?.problem(undefined);
    listener?.model(model);
  } catch (reason) {
    if (ConnectError.from(reason).code === Code.DeadlineExceeded) {
      const sentence = `The worker at ${ENDPOINT} has not answered within ${CHECK_TIMEOUT_MS / 1000} seconds: it hangs, or the network does (DEADLINE_EXCEEDED).`;
      report({ kind: "unreachable", sentence });
    } else {
      report(problemOf(reason));
    }
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
