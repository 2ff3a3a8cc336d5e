/** Episode page: video with timeline, and the conversation. */
import { clock, el } from "/web/dom.js";
import { strip } from "/web/frame_strip.js";
import { timeline } from "/web/timeline.js";
import { address, get, listed } from "./api.js";
import { SHADES, shadeLegend, tokenText } from "./tokens.js";
import { cameOf, count, figure, number, outcomeWords, seconds, signed, stageWords, tone, words } from "./words.js";

let shade = "logprob"; // As it was chosen last.

export async function episodePage(id, params) {
  const one = await get(`/api/episode/${id}`);
  const around = await get(`/api/episode/${id}/neighbours?${listed(params)}`);
  const page = new Episode(id, params, one, around);
  return { element: page.element, title: `${one.task.id}, sample ${one.sample}`, keys: (event) => page.keys(event), begin: () => page.begin(), close: () => page.close() };
}

class Episode {
  constructor(id, params, one, around) {
    Object.assign(this, { id, params, one, around });
    this.strips = []; // Of the frames shown: { turn, strip }.
    this.spoken = []; // Of the turns: tokenText's.
    this.watch = new IntersectionObserver((seen) => this.inSight(seen), { rootMargin: "300px" });
    this.player = this.makePlayer();
    this.line = timeline({
      duration: one.duration,
      ticks: one.overview.times.filter((time) => time !== null),
      events: one.task.events,
      zooms: one.zoomed,
      onSeek: (time) => this.seek(time),
    });
    this.element = el("article.episode", { "data-id": id }, this.head(), el("div.sides", {}, this.watching(), this.conversation()));
    this.setShade(shade);
  }

  begin() {
    this.facts();
    const from = Number(this.params.get("t"));
    if (this.params.has("t") && Number.isFinite(from)) this.seek(from);
  }

  close() {
    this.watch.disconnect();
    this.player.removeAttribute("src");
    this.player.load();
  }

  // -- player ----------------------------------------------------------------------

  makePlayer() {
    const player = el("video", { controls: true, preload: "auto", playsinline: true, src: `/video/${this.one.video}`, "aria-label": "The video" });
    const moved = () => this.at(player.currentTime);
    for (const name of ["timeupdate", "seeking", "seeked"]) player.addEventListener(name, moved);
    player.addEventListener("error", () => player.getAttribute("src") && this.unplayable("This browser cannot play the file."));
    return player;
  }

  seek(time) {
    this.player.currentTime = time;
    this.at(time);
  }

  at(time) {
    this.line.setNow(time);
    for (const { strip: frames } of this.strips) frames.setNow(time);
  }

  /** Replace the player with a message. */
  unplayable(why) {
    this.player.hidden = true;
    this.trouble.hidden = false;
    if (!this.trouble.textContent) this.trouble.textContent = why;
  }

  /** Load the length of the video, or the reason why it cannot be played. */
  async facts() {
    const facts = await get(`/api/video/${this.one.video}`).catch((error) => ({ error: error.message }));
    if (facts.error) {
      this.trouble.textContent = facts.error;
      this.unplayable(facts.error);
    } else this.line.setDuration(Math.max(facts.duration, ...this.one.turns.map((turn) => turn.zoom?.end ?? 0)));
  }

  // -- parts -----------------------------------------------------------------------

  head() {
    const { one, around } = this;
    const step = (id, title, sign) => (id ? el("a.quiet", { href: this.to("episode", id), "aria-label": title }, sign) : el("span.quiet.off", { "aria-hidden": "true" }, sign));
    return el(
      "header.where", {},
      el("nav", { "aria-label": "Episodes" },
        el("a.quiet", { href: this.to("list", 0) }, "← Episodes"),
        step(around.previous, "Previous episode", "↑"), step(around.next, "Next episode", "↓"),
        el("a.quiet", { href: this.to("group", this.id) }, one.samples > 1 ? `Group of ${one.samples}` : "Group")),
      el("h2", { tabindex: -1 }, el(`span.came.${tone(one)}`, {}, outcomeWords(cameOf(one))), ` ${one.task.id}`, el("small", {}, `sample ${one.sample}${one.attempt ? `, attempt ${one.attempt}` : ""}`)),
      el("p.note", {}, [stageWords(one.stage), `step ${one.step}`, words(one.kind), one.task.source].filter(Boolean).join(" · "), " · ", el("code", {}, `${one.file}, line ${one.line}`)),
    );
  }

  watching() {
    this.trouble = el("p.trouble", { hidden: true, role: "status" });
    const key = el("p.note.key", {}, el("span", {}, el("b.tick"), "overview frame"), el("span", {}, el("b.zoom"), "zoom"),
      this.one.zoomed.some((zoom) => zoom.refused) && el("span", {}, el("b.refused"), "zoom that was refused"),
      this.one.task.events.length > 0 && el("span", {}, el("b.event"), "evidence span"));
    return el("div.watching", {}, el("div.card", {}, el("div.screen", {}, this.player, this.trouble), this.line.element, key), this.worth(), this.cost());
  }

  worth() {
    const { one } = this;
    const reward = one.reward;
    const rows = [["Answer", one.answer === null ? `none (${words(one.status)})` : one.answer.text], ["Truth", one.task.answer.text]];
    if (reward) rows.push(["Reward", number(reward.total, 3)], ...Object.entries(reward.parts).map(([name, value]) => [words(name), figure(value)]));
    rows.push(["Advantage", one.advantage === null ? "none: not learned from" : signed(one.advantage, 3)]);
    const notes = [reward?.note, reward && !reward.valid && "Not scored: counts neither as right nor as wrong.", one.error].filter(Boolean);
    return el("section.card", { "aria-label": "Reward" }, facts(rows), notes.map((note) => el("p.note", {}, note)));
  }

  cost() {
    const { one } = this;
    const rows = [["Frames", one.frames], ["Tokens", count(one.tokens)], ["Time", seconds(one.seconds)], ["Worker", one.worker || "–"],
      ["Weights", one.versions.map((version) => `v${version}`).join(", ") || "–"], ["Wire format", one.wire]];
    return el("section.card", { "aria-label": "What it took" }, facts(rows), this.mismatch());
  }

  mismatch() {
    const found = Object.entries(this.one.mismatch);
    if (!found.length) return null;
    const name = (key) => ({ [this.one.names.max]: "largest |Δ log-prob|", [this.one.names.kl]: "KL" })[key] || words(key.replace("/", ": "));
    return el("details", {}, el("summary", {}, "Engine against learner"),
      el("p.note", {}, `Aggregated over step ${this.one.step}; in nats.`),
      facts(found.map(([key, value]) => [name(key), figure(value)])));
  }

  conversation() {
    const { one } = this;
    const choice = el("fieldset.shades", {}, el("legend", {}, "Shade tokens by"), SHADES.map(([kind, title]) =>
      el("label", {}, el("input", { type: "radio", name: "shade", value: kind, checked: kind === shade, onchange: () => this.setShade(kind) }), title)));
    this.legend = el("p.note.ramp-note", {});
    const asked = el("section.turn.asked", {}, el("h3", {}, "Question"), el("div.said", {}, one.task.question.text), cut(one.task.question),
      el("h4", {}, `Overview, ${one.overview.count} frames`), this.frames(one.overview, 0));
    return el("div.conversation.card", {}, one.turns.some((turn) => turn.sampled) && [choice, this.legend], asked, one.turns.map((turn, k) => this.turn(turn, k + 1)));
  }

  turn(turn, k) {
    const said = tokenText(turn, this.one.advantage);
    this.spoken.push(said);
    return el("section.turn", {}, el("h3", {}, `Turn ${k}`, el("small", {}, this.took(turn))), said.element, cut(turn.text), this.got(turn, k));
  }

  took(turn) {
    const { sampled } = turn;
    if (!sampled) return "written, not sampled";
    const spans = sampled.versions;
    const of = (span) => (spans.length > 1 ? `v${span[2]} (tokens ${span[0] + 1}–${span[1]})` : `v${span[2]}`);
    const parts = [`${count(sampled.count)} tokens in ${seconds(turn.seconds[0])}`, turn.seconds[1] > 0 && turn.zoom && `clip in ${seconds(turn.seconds[1])}`, spans.length && `weights ${spans.map(of).join(", ")}`,
      sampled.temperature === 0 ? "greedy" : `temperature ${sampled.temperature}`, `stopped at ${{ end: "end of turn", zoom: "the zoom", length: "the limit" }[sampled.stop] || sampled.stop}`];
    return parts.filter(Boolean).join(" · ");
  }

  got(turn, k) {
    if (turn.refused) return el("p.got.refused", {}, `Zoom rejected (${words(turn.refused.fault)}): ${turn.refused.message}`);
    if (!turn.zoom) return null;
    const { start, end, fps, asked_fps: asked } = turn.zoom;
    const told = `Zoom ${clock(start)}–${clock(end)} at ${figure(fps)} fps${asked === null ? "" : ` (requested ${figure(asked)})`}`;
    return [el("button.got", { type: "button", onclick: () => this.seek(start) }, told), turn.frames && this.frames(turn.frames, k)];
  }

  frames(shown, turn) {
    if (!shown.count) return null;
    const frames = strip({ times: shown.times, events: this.one.task.events, width: shown.width, height: shown.height, more: shown.count - shown.times.length, onSeek: (time) => this.seek(time) });
    frames.element.dataset.turn = turn;
    this.strips.push({ turn, strip: frames });
    this.watch.observe(frames.element);
    return frames.element;
  }

  /** Load the thumbnails of strips that become visible. */
  inSight(seen) {
    for (const { target } of seen.filter((entry) => entry.isIntersecting)) {
      this.watch.unobserve(target);
      const { turn, strip: frames } = this.strips.find((one) => one.strip.element === target);
      get(`/api/episode/${this.id}/frames/${turn}`)
        .then((found) => (found.error ? frames.fail(found.error) : frames.show(found.frames)))
        .catch((error) => frames.fail(error.message));
    }
  }

  setShade(kind) {
    shade = kind;
    this.spoken.forEach((said) => said.shade(kind));
    this.legend.replaceChildren(...shadeLegend(kind, this.one.advantage));
    const button = this.element.querySelector(`input[value="${kind}"]`);
    if (button) button.checked = true;
  }

  // -- keys ------------------------------------------------------------------------

  to(page, id) {
    return address(page, id, listed(this.params));
  }

  keys(event) {
    const { next, previous } = this.around;
    const onControl = event.target.closest("button, a, input, video, summary");
    if (event.key === "Escape") location.hash = this.to("list", 0);
    else if (["j", "ArrowDown"].includes(event.key) && next && !event.target.closest("video, input")) location.hash = this.to("episode", next);
    else if (["k", "ArrowUp"].includes(event.key) && previous && !event.target.closest("video, input")) location.hash = this.to("episode", previous);
    else if (event.key === "g") location.hash = this.to("group", this.id);
    else if (event.key === "s") this.setShade(SHADES[(SHADES.findIndex(([kind]) => kind === shade) + 1) % SHADES.length][0]);
    else if (event.key === " " && !onControl) this.player.paused ? this.player.play().catch(() => {}) : this.player.pause();
    else return false;
    return true;
  }
}

const facts = (rows) => el("dl.facts", {}, rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));

const cut = (text) => text.length > text.text.length && el("p.note", {}, `${count(text.length)} characters, of which the first ${count(text.text.length)} are shown.`);
