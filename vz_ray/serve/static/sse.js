/**
 * Incremental parser of server-sent events.
 *
 *   const parser = new EventParser();
 *   parser.feed('data: {"a":1}\n\nda')   // [{ data: '{"a":1}', retry: null }]
 *   parser.feed('ta: [DONE]\n\n')        // [{ data: "[DONE]", retry: null }]
 *
 * Lines end with LF, CR LF or CR; consecutive `data` lines are joined; comments are ignored.
 * `retry` is the delay in milliseconds before a retry, or null.
 */
export class EventParser {
  #rest = "";
  #data = [];
  #retry = null;

  /** Return the events that `text` completes. */
  feed(text) {
    const events = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    // The last line is incomplete; a trailing CR may be the first half of a CR LF.
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line) this.#field(line);
      else if (this.#data.length) {
        events.push({ data: this.#data.join("\n"), retry: this.#retry });
        this.#data = [];
        this.#retry = null;
      }
    }
    return events;
  }

  #field(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") this.#data.push(value);
    if (name === "retry" && /^\d+$/.test(value)) this.#retry = Number(value);
  }
}
