/**
 * Videos of a chat and their uploads.
 *
 *   const video = new Video({ file });          // or { url }, or { object } of GET /v1/files
 *   video.onChange = () => {};
 *   await video.ready;                          // rejects with the error of the upload
 *
 * `source` is the URL for the player: the local file or the server's copy; null for a video of another site.
 */
import { upload } from "./api.js";
import { clock, el } from "./web/dom.js";
import { nameOf, size, timeLeft } from "./format.js";

/** Upload time before the remaining time is estimated, seconds. */
const MIN_ESTIMATE_S = 1;

export class Video {
  onChange = () => {};
  frames = new Map(); // time of a received frame -> its image
  unplayable = false;
  id = null;
  duration = null;
  #abort = new AbortController();

  constructor({ file = null, url = null, object = null }) {
    Object.assign(this, { file, url, state: "ready", sent: 0, error: null });
    this.name = file?.name ?? object?.filename ?? nameOf(url);
    this.source = file ? URL.createObjectURL(file) : object ? `v1/files/${object.id}/content` : null;
    if (object) this.#setObject(object);
    this.ready = Promise.resolve();
    if (file) this.send();
  }

  /** Upload the file; also used for a retry. */
  send() {
    Object.assign(this, { state: "sending", sent: 0, error: null, startedAt: performance.now() });
    const progress = (sent) => {
      this.sent = Math.min(sent, this.file.size);
      this.state = sent >= this.file.size ? "checking" : "sending";
      this.onChange();
    };
    this.ready = upload(this.file, progress, this.#abort.signal).then(
      (object) => {
        this.state = "ready";
        this.#setObject(object);
        this.onChange();
      },
      (error) => {
        this.state = "failed";
        this.error = error;
        this.onChange();
        throw error;
      },
    );
    this.ready.catch(() => {}); // videoCard shows the error.
    this.onChange();
  }

  #setObject({ id, duration_s: duration, width, height, bytes }) {
    Object.assign(this, { id, width, height, bytes });
    this.setDuration(duration);
  }

  /** Set the duration in seconds; the first call wins. */
  setDuration(duration) {
    if (this.duration || !(duration > 0 && duration < Infinity)) return;
    this.duration = duration;
    this.onChange();
  }

  /** Cancel the upload and free the file. */
  close() {
    this.onChange = () => {};
    this.#abort.abort();
    if (this.file) URL.revokeObjectURL(this.source);
  }

  /** Short description of the state. */
  get statusText() {
    const length = this.duration ? `${clock(Math.round(this.duration))} · ` : "";
    if (this.state === "sending") return `Uploading ${Math.floor(100 * this.sentFraction)} %${this.#remaining()}`;
    if (this.state === "checking") return "Uploaded; the server is checking it";
    if (this.state === "failed") return this.error.message;
    return this.url ? `${length}${new URL(this.url).hostname}` : `${length}${size(this.bytes)}`;
  }

  get sentFraction() {
    return this.file?.size ? this.sent / this.file.size : 0;
  }

  #remaining() {
    const elapsed = (performance.now() - this.startedAt) / 1000;
    if (elapsed < MIN_ESTIMATE_S || !this.sent) return ` of ${size(this.file.size)}`;
    return ` of ${size(this.file.size)}, ${timeLeft((elapsed * (this.file.size - this.sent)) / this.sent)} left`;
  }
}

/** Create the list item of a video. */
export function videoCard(video, { onRemove, onShow }) {
  const status = el("span.video-status");
  const bar = el("progress", { max: 1, "aria-label": `Upload of ${video.name}` });
  const retry = el("button.secondary", { type: "button", onclick: () => video.send() }, "Try again");
  const remove = el("button.icon-button", { type: "button", "aria-label": `Remove ${video.name}`, title: "Remove", onclick: () => onRemove(video) }, "×");
  const name = el("button.video-name", { type: "button", title: video.name, onclick: () => onShow(video) }, video.name);
  const element = el("li.video", {}, el("div.video-row", {}, name, status, retry, remove), bar);

  function update(locked) {
    status.textContent = video.statusText;
    element.classList.toggle("failed", video.state === "failed");
    element.classList.toggle("sending", video.state === "sending" || video.state === "checking");
    status.setAttribute("role", video.state === "failed" ? "alert" : "none");
    retry.hidden = video.state !== "failed" || video.error?.retry === null;
    remove.hidden = locked && video.state !== "failed";
    bar.hidden = video.state !== "sending" && video.state !== "checking";
    if (video.state === "sending") bar.value = video.sentFraction;
    else bar.removeAttribute("value"); // The duration of the check is unknown.
  }
  return { element, update };
}
