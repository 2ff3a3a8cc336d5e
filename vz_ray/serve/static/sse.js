/**
 * Server-sent events from pieces of text, however the network has cut them.
 *
 *   const events = new Events();
 *   events.hear('data: {"a":1}\n\nda')   // [{ data: '{"a":1}', retry: null }]
 *   events.hear('ta: [DONE]\n\n')        // [{ data: "[DONE]", retry: null }]
 *
 * Lines may end with LF, CR LF or CR; several `data` lines make one text; comments are passed over.
 * `retry` is the milliseconds after which the server wants to be asked again, or null.
 */
export class Events {
  #rest = "";
  #data = [];
  #retry = null;

  /** The events that `text` completes. */
  hear(text) {
    const found = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    // What has no end yet; a CR at the very end may be the first half of a CR LF.
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line) this.#field(line);
      else if (this.#data.length) {
        found.push({ data: this.#data.join("\n"), retry: this.#retry });
        this.#data = [];
        this.#retry = null;
      }
    }
    return found;
  }

  #field(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    if (name === "retry" && /^\d+$/.test(value)) this.#retry = Number(value);
  }
}
