/** Client of the server that serves this page. URLs are relative, so the server can be mounted at any path. */
import { EventParser } from "./sse.js";

const RETRY_DELAY_S = 5;
const NO_RESPONSE = "The server does not respond. Check that it is running and that the network is connected.";

/**
 * Error of a request, with the server's message.
 *
 * `status` is the HTTP status (0: no response), `retry` the delay in seconds before a retry, or null if a
 * retry is useless.
 */
export class RequestError extends Error {
  constructor(message, { status = 0, code = "", retry = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retry });
  }
}

let askForKey = () => Promise.reject(new RequestError("An API key is needed.", { status: 401 }));

/** Register `ask(reason)`. It is called if the server requires a key, and resolves after a successful login. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Build the error of an unsuccessful response. */
function errorOf(status, text, retryAfter) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Not JSON: probably an error page of a proxy.
  }
  const retryable = [0, 408, 429, 500, 502, 503, 504].includes(status);
  const retry = retryable ? Number(retryAfter) || RETRY_DELAY_S : null;
  return new RequestError(error.message ?? `The server responded with status ${status}.`, { status, code: error.code ?? "", retry });
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(NO_RESPONSE, { retry: RETRY_DELAY_S });
  }
}

/** `fetch` that throws `RequestError`. If a key is required, it asks for one and retries. */
export async function call(path, options = {}) {
  for (;;) {
    const response = await send(path, options);
    if (response.ok) return response;
    const error = errorOf(response.status, await response.text(), response.headers.get("retry-after"));
    if (response.status !== 401) throw error;
    await askForKey(error.message);
  }
}

/** Return the JSON at a path. */
export async function get(path, options) {
  return (await call(path, options)).json();
}

/** Exchange an API key for a session cookie. */
export async function logIn(key) {
  const body = JSON.stringify({ key });
  const response = await send("session", { method: "POST", headers: { "content-type": "application/json" }, body });
  if (!response.ok) throw errorOf(response.status, await response.text(), null);
}

/** Return the session: `{ needs_key, name }`. */
export async function session() {
  return (await send("session", {})).json();
}

/** Yield the chunks of a streamed chat completion; throws if the stream ends with an error. */
export async function* chunks(request, signal) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(request), signal };
  const response = await call("v1/chat/completions", options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parser = new EventParser();
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new RequestError("The connection was lost before the answer was complete.", { retry: RETRY_DELAY_S });
    });
    if (done) throw new RequestError("The answer ended before it was complete.", { retry: RETRY_DELAY_S });
    for (const { data, retry } of parser.feed(value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw streamError(chunk.error, retry);
      yield chunk;
    }
  }
}

/** Build the error of an error event in a stream. */
function streamError(error, retry) {
  const retryable = retry !== null || error.type === "server_error";
  return new RequestError(error.message, { status: 200, code: error.code ?? "", retry: retryable ? (retry ?? 1e3 * RETRY_DELAY_S) / 1e3 : null });
}

/**
 * Upload a file and resolve to its file object. `progress(sent)` receives the number of sent bytes;
 * XMLHttpRequest is used because `fetch` reports no upload progress.
 */
export async function upload(file, progress, signal) {
  for (;;) {
    try {
      return await sendFile(file, progress, signal);
    } catch (error) {
      if (error.status !== 401) throw error;
      await askForKey(error.message);
    }
  }
}

function sendFile(file, progress, signal) {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file, file.name);
    const request = new XMLHttpRequest();
    request.open("POST", "v1/files");
    request.upload.addEventListener("progress", (event) => progress(event.loaded));
    request.addEventListener("error", () => reject(new RequestError(NO_RESPONSE, { retry: RETRY_DELAY_S })));
    request.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    request.addEventListener("load", () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText));
      else reject(errorOf(request.status, request.responseText, request.getResponseHeader("retry-after")));
    });
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
