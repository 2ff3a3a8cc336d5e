/** Talks to the server this page came from. Addresses are relative: the server may be mounted anywhere. */
import { Events } from "./sse.js";

const AGAIN_S = 5;
const GONE = "The server does not answer. Is it running, and is the network there?";

/**
 * A refusal, in the server's words.
 *
 * `status` is HTTP's (0: nobody answered), `retry` the seconds after which to try again, or null where
 * trying again would not help.
 */
export class Refusal extends Error {
  constructor(message, { status = 0, code = "", retry = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retry });
  }
}

let askForKey = () => Promise.reject(new Refusal("An API key is needed.", { status: 401 }));

/** `ask(why)` is called where the server wants a key, and resolves once it has taken one. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** What an answer that is no success says. */
function refusalOf(status, text, retryAfter) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // A proxy's own page, most likely.
  }
  const again = [0, 408, 429, 500, 502, 503, 504].includes(status);
  const retry = again ? Number(retryAfter) || AGAIN_S : null;
  return new Refusal(error.message ?? `The server answered with status ${status}.`, { status, code: error.code ?? "", retry });
}

async function answered(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(GONE, { retry: AGAIN_S });
  }
}

/** `fetch`, with refusals thrown; asks for a key where one is needed, and then goes on. */
export async function call(path, options = {}) {
  for (;;) {
    const answer = await answered(path, options);
    if (answer.ok) return answer;
    const refusal = refusalOf(answer.status, await answer.text(), answer.headers.get("retry-after"));
    if (answer.status !== 401) throw refusal;
    await askForKey(refusal.message);
  }
}

/** The JSON of an address. */
export async function get(path, options) {
  return (await call(path, options)).json();
}

/** Shows the server a key; a cookie takes its place. */
export async function logIn(key) {
  const body = JSON.stringify({ key });
  const answer = await answered("session", { method: "POST", headers: { "content-type": "application/json" }, body });
  if (!answer.ok) throw refusalOf(answer.status, await answer.text(), null);
}

/** Whether a key is needed, and whose is shown: `{ needs_key, name }`. */
export async function session() {
  return (await answered("session", {})).json();
}

/** The chunks of a streamed chat completion; throws what the stream ends with, where that is an error. */
export async function* chunks(request, signal) {
  const options = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(request), signal };
  const answer = await call("v1/chat/completions", options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = new Events();
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The connection was lost before the answer was complete.", { retry: AGAIN_S });
    });
    if (done) throw new Refusal("The answer ended before it was complete.", { retry: AGAIN_S });
    for (const { data, retry } of events.hear(value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw failed(chunk.error, retry);
      yield chunk;
    }
  }
}

/** An error that came inside a stream, which has no status of its own. */
function failed(error, retry) {
  const again = retry !== null || error.type === "server_error";
  return new Refusal(error.message, { status: 200, code: error.code ?? "", retry: again ? (retry ?? 1e3 * AGAIN_S) / 1e3 : null });
}

/**
 * Uploads a file, and resolves to its object; `progress(sent)` is told the bytes. `fetch` cannot tell
 * how far a body has gone, hence XMLHttpRequest.
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
    request.addEventListener("error", () => reject(new Refusal(GONE, { retry: AGAIN_S })));
    request.addEventListener("abort", () => reject(new DOMException("taken back", "AbortError")));
    request.addEventListener("load", () => {
      if (request.status === 200) resolve(JSON.parse(request.responseText));
      else reject(refusalOf(request.status, request.responseText, request.getResponseHeader("retry-after")));
    });
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
