/**
 * The videos of a chat, and their way to the server.
 *
 *   const video = new Video({ file });          // or { url }, or { object } of GET /v1/files
 *   video.onChange = () => {};
 *   await video.ready;                          // rejects with why it cannot be used
 *
 * `source` is what the browser plays: the file itself, or the server's copy; null where it lies elsewhere.
 */
import { upload } from "./api.js";
import { clock, el } from "./web/dom.js";
import { nameOf, size, span } from "./words.js";

/** Seconds of upload after which its pace says how long the rest will take. */
const PACE_S = 1;

export class Video {
  onChange = () => {};
  seen = new Map(); // Time of a frame that the agent saw -> its picture.
  unplayable = false;
  id = null;
  duration = null;
  #taken = new AbortController();

  constructor({ file = null, url = null, object = null }) {
    Object.assign(this, { file, url, state: "ready", sent: 0, refusal: null });
    this.name = file?.name ?? object?.filename ?? nameOf(url);
    this.source = file ? URL.createObjectURL(file) : object ? `v1/files/${object.id}/content` : null;
    if (object) this.#is(object);
    this.ready = Promise.resolve();
    if (file) this.send();
  }

  /** Uploads the file, perhaps again. */
  send() {
    Object.assign(this, { state: "sending", sent: 0, refusal: null, began: performance.now() });
    const progress = (sent) => {
      this.sent = Math.min(sent, this.file.size);
      this.state = sent >= this.file.size ? "checking" : "sending";
      this.onChange();
    };
    this.ready = upload(this.file, progress, this.#taken.signal).then(
      (object) => {
        this.state = "ready";
        this.#is(object);
        this.onChange();
      },
      (refusal) => {
        this.state = "failed";
        this.refusal = refusal;
        this.onChange();
        throw refusal;
      },
    );
    this.ready.catch(() => {}); // Shown beside the video, whether or not somebody waits for it.
    this.onChange();
  }

  #is({ id, duration_s: duration, width, height, bytes }) {
    Object.assign(this, { id, width, height, bytes });
    this.knows(duration);
  }

  /** Its duration, seconds, from whoever knows it first. */
  knows(duration) {
    if (this.duration || !(duration > 0 && duration < Infinity)) return;
    this.duration = duration;
    this.onChange();
  }

  /** It is not wanted any more. */
  close() {
    this.onChange = () => {};
    this.#taken.abort();
    if (this.file) URL.revokeObjectURL(this.source);
  }

  /** What is to be said of it, in a few words. */
  get words() {
    const length = this.duration ? `${clock(Math.round(this.duration))} · ` : "";
    if (this.state === "sending") return `Uploading ${Math.floor(100 * this.part)} %${this.#left()}`;
    if (this.state === "checking") return "Uploaded; the server looks at it";
    if (this.state === "failed") return this.refusal.message;
    return this.url ? `${length}${new URL(this.url).hostname}` : `${length}${size(this.bytes)}`;
  }

  get part() {
    return this.file?.size ? this.sent / this.file.size : 0;
  }

  #left() {
    const passed = (performance.now() - this.began) / 1000;
    if (passed < PACE_S || !this.sent) return ` of ${size(this.file.size)}`;
    return ` of ${size(this.file.size)}, ${span((passed * (this.file.size - this.sent)) / this.sent)} left`;
  }
}

/** A video as a line of the list of those of the chat. */
export function card(video, { onRemove, onShow }) {
  const words = el("span.video-words");
  const bar = el("progress", { max: 1, "aria-label": `Upload of ${video.name}` });
  const again = el("button.quiet", { type: "button", onclick: () => video.send() }, "Try again");
  const remove = el("button.icon", { type: "button", "aria-label": `Remove ${video.name}`, title: "Remove", onclick: () => onRemove(video) }, "×");
  const name = el("button.video-name", { type: "button", title: video.name, onclick: () => onShow(video) }, video.name);
  const element = el("li.video", {}, el("div.video-line", {}, name, words, again, remove), bar);

  function update(locked) {
    words.textContent = video.words;
    element.classList.toggle("failed", video.state === "failed");
    element.classList.toggle("sending", video.state === "sending" || video.state === "checking");
    words.setAttribute("role", video.state === "failed" ? "alert" : "none");
    again.hidden = video.state !== "failed" || video.refusal?.retry === null;
    remove.hidden = locked && video.state !== "failed";
    bar.hidden = video.state !== "sending" && video.state !== "checking";
    if (video.state === "sending") bar.value = video.part;
    else bar.removeAttribute("value"); // How long the look will take is not known.
  }
  return { element, update };
}
