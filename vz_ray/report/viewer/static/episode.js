/** Episode page: video with timeline, and the conversation. */
import { clock, el } from "/web/dom.js";
import { frameStrip } from "/web/frame_strip.js";
import { timeline } from "/web/timeline.js";
import { address, get, listParams } from "./api.js";
import { compact, count, humanize, number, outcomeLabel, outcomeOf, seconds, signed, stageLabel, tone } from "./format.js";
import { SHADES, shadeLegend, tokenText } from "./tokens.js";

let shade = "logprob"; // Last chosen shading.

export async function episodePage(id, params) {
  const episode = await get(`/api/episode/${id}`);
  const neighbours = await get(`/api/episode/${id}/neighbours?${listParams(params)}`);
  const page = new Episode(id, params, episode, neighbours);
  return { element: page.element, title: `${episode.task.id}, sample ${episode.sample}`, keys: (event) => page.keys(event), onAttached: () => page.onAttached(), close: () => page.close() };
}

class Episode {
  constructor(id, params, episode, neighbours) {
    Object.assign(this, { id, params, episode, neighbours });
    this.strips = []; // Displayed frame strips: { turn, strip }.
    this.tokenTexts = []; // Result of tokenText for each turn.
    this.observer = new IntersectionObserver((entries) => this.onVisible(entries), { rootMargin: "300px" });
    this.player = this.makePlayer();
    this.timeline = timeline({
      duration: episode.duration,
      ticks: episode.overview.times.filter((time) => time !== null),
      events: episode.task.events,
      zooms: episode.zoomed,
      onSeek: (time) => this.seek(time),
    });
    this.element = el("article.episode", { "data-id": id }, this.head(), el("div.columns", {}, this.playerColumn(), this.conversation()));
    this.setShade(shade);
  }

  onAttached() {
    this.loadVideo();
    const start = Number(this.params.get("t"));
    if (this.params.has("t") && Number.isFinite(start)) this.seek(start);
  }

  close() {
    this.observer.disconnect();
    this.player.removeAttribute("src");
    this.player.load();
  }

  // -- player ----------------------------------------------------------------------

  makePlayer() {
    const player = el("video", { controls: true, preload: "auto", playsinline: true, src: `/video/${this.episode.video}`, "aria-label": "Video" });
    const onTime = () => this.setNow(player.currentTime);
    for (const name of ["timeupdate", "seeking", "seeked"]) player.addEventListener(name, onTime);
    player.addEventListener("error", () => player.getAttribute("src") && this.showPlayerError("This browser cannot play the file."));
    return player;
  }

  seek(time) {
    this.player.currentTime = time;
    this.setNow(time);
  }

  setNow(time) {
    this.timeline.setNow(time);
    for (const { strip } of this.strips) strip.setNow(time);
  }

  /** Replace the player with a message. */
  showPlayerError(message) {
    this.player.hidden = true;
    this.playerError.hidden = false;
    if (!this.playerError.textContent) this.playerError.textContent = message;
  }

  /** Load the length of the video, or the reason why it cannot be played. */
  async loadVideo() {
    const video = await get(`/api/video/${this.episode.video}`).catch((error) => ({ error: error.message }));
    if (video.error) {
      this.playerError.textContent = video.error;
      this.showPlayerError(video.error);
    } else this.timeline.setDuration(Math.max(video.duration, ...this.episode.turns.map((turn) => turn.zoom?.end ?? 0)));
  }

  // -- parts -----------------------------------------------------------------------

  head() {
    const { episode, neighbours } = this;
    const neighbourLink = (id, title, arrow) => (id ? el("a.secondary", { href: this.addressOf("episode", id), "aria-label": title }, arrow) : el("span.secondary.disabled", { "aria-hidden": "true" }, arrow));
    return el(
      "header.page-header", {},
      el("nav", { "aria-label": "Episodes" },
        el("a.secondary", { href: this.addressOf("list", 0) }, "← Episodes"),
        neighbourLink(neighbours.previous, "Previous episode", "↑"), neighbourLink(neighbours.next, "Next episode", "↓"),
        el("a.secondary", { href: this.addressOf("group", this.id) }, episode.samples > 1 ? `Group of ${episode.samples}` : "Group")),
      el("h2", { tabindex: -1 }, el(`span.outcome.${tone(episode)}`, {}, outcomeLabel(outcomeOf(episode))), ` ${episode.task.id}`, el("small", {}, `sample ${episode.sample}${episode.attempt ? `, attempt ${episode.attempt}` : ""}`)),
      el("p.note", {}, [stageLabel(episode.stage), `step ${episode.step}`, humanize(episode.kind), episode.task.source].filter(Boolean).join(" · "), " · ", el("code", {}, `${episode.file}, line ${episode.line}`)),
    );
  }

  playerColumn() {
    this.playerError = el("p.error", { hidden: true, role: "status" });
    const legend = el("p.note.legend-row", {}, el("span", {}, el("b.tick"), "overview frame"), el("span", {}, el("b.zoom"), "zoom"),
      this.episode.zoomed.some((zoom) => zoom.refused) && el("span", {}, el("b.refused"), "rejected zoom"),
      this.episode.task.events.length > 0 && el("span", {}, el("b.event"), "evidence span"));
    return el("div.player-column", {}, el("div.card", {}, el("div.player", {}, this.player, this.playerError), this.timeline.element, legend), this.rewardCard(), this.costCard());
  }

  rewardCard() {
    const { episode } = this;
    const reward = episode.reward;
    const rows = [["Answer", episode.answer === null ? `none (${humanize(episode.status)})` : episode.answer.text], ["Truth", episode.task.answer.text]];
    if (reward) rows.push(["Reward", number(reward.total, 3)], ...Object.entries(reward.parts).map(([name, value]) => [humanize(name), compact(value)]));
    rows.push(["Advantage", episode.advantage === null ? "none: not used for training" : signed(episode.advantage, 3)]);
    const notes = [reward?.note, reward && !reward.valid && "Not scored: excluded from accuracy.", episode.error].filter(Boolean);
    return el("section.card", { "aria-label": "Reward" }, facts(rows), notes.map((note) => el("p.note", {}, note)));
  }

  costCard() {
    const { episode } = this;
    const rows = [["Frames", episode.frames], ["Tokens", count(episode.tokens)], ["Time", seconds(episode.seconds)], ["Worker", episode.worker || "–"],
      ["Weights", episode.versions.map((version) => `v${version}`).join(", ") || "–"], ["Chat format", episode.chat_format]];
    return el("section.card", { "aria-label": "Cost" }, facts(rows), this.mismatch());
  }

  mismatch() {
    const metrics = Object.entries(this.episode.mismatch);
    if (!metrics.length) return null;
    const name = (key) => ({ [this.episode.names.max]: "maximum |Δ log-prob|", [this.episode.names.kl]: "KL" })[key] || humanize(key.replace("/", ": "));
    return el("details", {}, el("summary", {}, "Engine against learner"),
      el("p.note", {}, `Aggregated over step ${this.episode.step}; in nats.`),
      facts(metrics.map(([key, value]) => [name(key), compact(value)])));
  }

  conversation() {
    const { episode } = this;
    const shadeSelector = el("fieldset.shades", {}, el("legend", {}, "Shade tokens by"), SHADES.map(([kind, title]) =>
      el("label", {}, el("input", { type: "radio", name: "shade", value: kind, checked: kind === shade, onchange: () => this.setShade(kind) }), title)));
    this.legend = el("p.note.ramp-note", {});
    const question = el("section.turn.question-turn", {}, el("h3", {}, "Question"), el("div.turn-text", {}, episode.task.question.text), truncationNote(episode.task.question),
      el("h4", {}, `Overview, ${episode.overview.count} frames`), this.frames(episode.overview, 0));
    return el("div.conversation.card", {}, episode.turns.some((turn) => turn.sampled) && [shadeSelector, this.legend], question, episode.turns.map((turn, k) => this.turn(turn, k + 1)));
  }

  turn(turn, k) {
    const text = tokenText(turn, this.episode.advantage);
    this.tokenTexts.push(text);
    return el("section.turn", {}, el("h3", {}, `Turn ${k}`, el("small", {}, this.samplingNote(turn))), text.element, truncationNote(turn.text), this.observation(turn, k));
  }

  samplingNote(turn) {
    const { sampled } = turn;
    if (!sampled) return "not sampled";
    const spans = sampled.versions;
    const label = (span) => (spans.length > 1 ? `v${span[2]} (tokens ${span[0] + 1}–${span[1]})` : `v${span[2]}`);
    const parts = [`${count(sampled.count)} tokens in ${seconds(turn.seconds[0])}`, turn.seconds[1] > 0 && turn.zoom && `clip in ${seconds(turn.seconds[1])}`, spans.length && `weights ${spans.map(label).join(", ")}`,
      sampled.temperature === 0 ? "greedy" : `temperature ${sampled.temperature}`, `stopped at ${{ end: "end of turn", zoom: "the zoom", length: "the limit" }[sampled.stop] || sampled.stop}`];
    return parts.filter(Boolean).join(" · ");
  }

  observation(turn, k) {
    if (turn.refused) return el("p.zoom-result.refused", {}, `Zoom rejected (${humanize(turn.refused.kind)}): ${turn.refused.message}`);
    if (!turn.zoom) return null;
    const { start, end, fps, requested_fps: requested } = turn.zoom;
    const label = `Zoom ${clock(start)}–${clock(end)} at ${compact(fps)} fps${requested === null ? "" : ` (requested ${compact(requested)})`}`;
    return [el("button.zoom-result", { type: "button", onclick: () => this.seek(start) }, label), turn.frames && this.frames(turn.frames, k)];
  }

  frames(context, turn) {
    if (!context.count) return null;
    const strip = frameStrip({ times: context.times, events: this.episode.task.events, width: context.width, height: context.height, numOmitted: context.count - context.times.length, onSeek: (time) => this.seek(time) });
    strip.element.dataset.turn = turn;
    this.strips.push({ turn, strip });
    this.observer.observe(strip.element);
    return strip.element;
  }

  /** Load the thumbnails of strips that become visible. */
  onVisible(entries) {
    for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
      this.observer.unobserve(target);
      const { turn, strip } = this.strips.find((item) => item.strip.element === target);
      get(`/api/episode/${this.id}/frames/${turn}`)
        .then((loaded) => (loaded.error ? strip.fail(loaded.error) : strip.show(loaded.frames)))
        .catch((error) => strip.fail(error.message));
    }
  }

  setShade(kind) {
    shade = kind;
    this.tokenTexts.forEach((text) => text.shade(kind));
    this.legend.replaceChildren(...shadeLegend(kind, this.episode.advantage));
    const radio = this.element.querySelector(`input[value="${kind}"]`);
    if (radio) radio.checked = true;
  }

  // -- keys ------------------------------------------------------------------------

  addressOf(page, id) {
    return address(page, id, listParams(this.params));
  }

  keys(event) {
    const { next, previous } = this.neighbours;
    const onControl = event.target.closest("button, a, input, video, summary");
    if (event.key === "Escape") location.hash = this.addressOf("list", 0);
    else if (["j", "ArrowDown"].includes(event.key) && next && !event.target.closest("video, input")) location.hash = this.addressOf("episode", next);
    else if (["k", "ArrowUp"].includes(event.key) && previous && !event.target.closest("video, input")) location.hash = this.addressOf("episode", previous);
    else if (event.key === "g") location.hash = this.addressOf("group", this.id);
    else if (event.key === "s") this.setShade(SHADES[(SHADES.findIndex(([kind]) => kind === shade) + 1) % SHADES.length][0]);
    else if (event.key === " " && !onControl) this.player.paused ? this.player.play().catch(() => {}) : this.player.pause();
    else return false;
    return true;
  }
}

const facts = (rows) => el("dl.facts", {}, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));

const truncationNote = (text) => text.length > text.text.length && el("p.note", {}, `${count(text.length)} characters; the first ${count(text.text.length)} are shown.`);
