/**
 * One question and what came of it, drawn as it happens.
 *
 *   const round = new Round("What flashes? A. disc B. ring", videos, looks, { onRetry, onShow, onStatus });
 *   talk.append(round.element);
 *   round.hear(chunk);            // of the stream, as often as they come
 *   round.end() / round.stop() / round.fail(refusal)
 *
 * `answer` is the text of the answer, once it is complete; empty for a round that was stopped or failed.
 */
import { chosen, optionsOf } from "./chat.js";
import { clock, el } from "./web/dom.js";
import { count, rate } from "./words.js";

/** Characters of an answer that is shown large. */
const SHORT = 60;

export class Round {
  answer = "";
  #turns = [];
  #said = "";
  #facts = {};

  constructor(question, videos, looks, { onRetry, onShow, onStatus }) {
    Object.assign(this, { question, videos, looks, onRetry, onStatus });
    const { stem, options } = optionsOf(question);
    this.options = options;
    this.list = options.length > 0 && el("ol.options", {}, options.map(([name, text]) => el("li", { "data-name": name }, el("b", {}, name), " ", text)));
    this.steps = el("div.steps");
    this.reply = el("div.answer", { "aria-live": "polite", "aria-busy": "true", hidden: true });
    this.state = el("p.state.busy", {}, "Waiting");
    this.foot = el("div.foot");
    this.show = el("button.show", { type: "button", hidden: true, onclick: onShow }, "Show on the timeline");
    const asked = el("div.asked", {}, el("h2", {}, stem || "Which is it?"), this.list, this.show);
    this.element = el("article.round", { "aria-label": stem }, asked, this.steps, this.reply, this.state, this.foot);
  }

  /** Whether the timeline shows this round, where there are several. */
  onStage(several, here) {
    this.element.classList.toggle("here", several && here);
    this.show.hidden = !several || here;
  }

  /** What is being done now, in words. */
  status(words) {
    this.state.textContent = words;
    this.onStatus(words);
  }

  /** A chunk of the stream. */
  hear(chunk) {
    if (chunk.usage) this.#facts.usage = chunk.usage;
    if (chunk.vz_ray) Object.assign(this.#facts, chunk.vz_ray, { model: chunk.model });
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.finish_reason) this.#facts.finish = choice.finish_reason;
    const { overview, reasoning_content: thought, zooming, zoom, content } = choice.delta;
    if (overview) this.#looked(overview);
    if (thought) this.#thought(thought);
    if (zooming) this.#zooming(zooming);
    if (zoom) this.#zoomed(zoom);
    if (content) this.#answers(content);
  }

  #turn() {
    const last = this.#turns.at(-1);
    if (last && !last.over) return last;
    const number = this.#turns.length + 1;
    const turn = { over: false, words: el("p.thought"), asked: el("p.zoom-line"), element: null };
    turn.element = el("section.step", {}, el("h3", {}, `Turn ${number}`), el("div.step-body", {}, turn.words, turn.asked));
    this.#turns.push(turn);
    this.steps.append(turn.element);
    return turn;
  }

  #looked(seen) {
    const head = el("p.zoom-line", {}, `${count(seen.pts.length, "frame")} of ${clock(seen.duration)}${this.looks.of(seen.video)}`);
    this.steps.append(el("section.step.look", {}, el("h3", {}, "First look"), el("div.step-body", {}, head, this.looks.overview(seen))));
    this.status("Thinking");
  }

  #thought(text) {
    const { words } = this.#turn();
    words.textContent = (words.textContent + text).trimStart();
  }

  #zooming(zoom) {
    this.#turn().asked.textContent = `Zooms into ${this.#where(zoom)}`;
    this.looks.zooming(zoom);
    this.status(`Zooming into ${clock(zoom.segment[0])} to ${clock(zoom.segment[1])}`);
  }

  #zoomed(zoom) {
    const turn = this.#turn();
    turn.over = true;
    this.#said = "";
    this.#showAnswer();
    if (zoom.reasoning) turn.words.textContent = zoom.reasoning;
    const strip = this.looks.zoom(zoom);
    if (zoom.refused) {
      turn.asked.replaceWith(el("p.refused", {}, turn.asked.textContent && `${turn.asked.textContent}. `, `Refused: ${zoom.refused}`));
    } else {
      const took = zoom.latency ? ` · decoded in ${zoom.latency.clip_s.toFixed(2)} s` : "";
      turn.asked.textContent = `Zoomed into ${this.#where(zoom)} · ${count(zoom.pts.length, "frame")}${took}`;
    }
    if (strip) turn.element.querySelector(".step-body").append(strip);
    this.status("Thinking");
  }

  #where({ segment, fps, video }) {
    return `${clock(segment[0])} to ${clock(segment[1])}${this.looks.of(video)} at ${rate(fps)}`;
  }

  #answers(text) {
    this.#said += text;
    this.#showAnswer();
    if (this.state.textContent !== "Answering") this.status("Answering");
  }

  #showAnswer() {
    const said = this.#said.trim();
    const letter = chosen(said, this.options);
    const option = this.options.find(([name]) => name === letter);
    this.reply.hidden = !said;
    this.reply.classList.toggle("short", said.length <= SHORT);
    if (option && said.length <= option[1].length + 4) this.reply.replaceChildren(el("b", {}, letter), " ", el("span", {}, option[1]));
    else this.reply.replaceChildren(el("span", {}, said));
    if (this.list) for (const item of this.list.children) item.classList.toggle("chosen", item.dataset.name === letter);
  }

  /** The stream has ended as it should. */
  end() {
    // What was streamed may hold the answer of a turn that zoomed as well, which does not count.
    this.#said = this.#facts.answer ?? this.#said;
    this.#showAnswer();
    this.answer = this.#said.trim();
    this.#close("no clip came");
    const { status, finish, gated, usage, seconds, model } = this.#facts;
    const short = finish === "length" ? "Cut off: the room for its tokens ran out." : status === "no_answer" ? "It gave no answer; this is what it said." : "";
    this.reply.classList.toggle("none", short !== "");
    if (short) this.foot.append(el("p.warn", {}, short));
    else if (gated) this.foot.append(el("p.aside", {}, "Answered from the first look: it was sure enough not to zoom."));
    const facts = [
      seconds !== undefined && ["time", `${seconds.toFixed(1)} s`],
      usage && ["frames", usage.frames.toLocaleString("en")],
      usage && ["zooms", usage.zooms],
      usage && ["tokens", usage.total_tokens.toLocaleString("en"), `${count(usage.prompt_tokens, "token")} read, ${usage.completion_tokens.toLocaleString("en")} said`],
      model && ["model", model],
    ].filter(Boolean);
    this.foot.append(el("dl.facts", {}, facts.map(([name, value, title]) => el("div", { title }, el("dt", {}, name), el("dd", {}, String(value))))));
    this.onStatus(this.answer ? `Answer: ${this.reply.textContent}` : "It gave no answer.");
  }

  /** Whoever asked does not want it any more. */
  stop() {
    this.#close("stopped");
    this.foot.append(el("p.aside", {}, "Stopped. It is not part of the chat."), this.#retryButton("Ask again"));
    this.onStatus("Stopped");
  }

  /** It could not be answered; `refusal.retry` counts down to when it is worth another try. */
  fail(refusal) {
    this.#close("given up");
    const when = el("span.when");
    const problem = el("div.problem", { role: "alert" }, el("p", {}, refusal.message));
    this.foot.append(problem);
    if (refusal.retry !== null) {
      problem.append(el("div.row", {}, this.#retryButton("Try again"), when));
      this.#countDown(when, Math.ceil(refusal.retry));
    }
  }

  #countDown(when, left) {
    when.textContent = left > 0 ? `best in ${left} s` : "";
    if (left > 0) setTimeout(() => when.isConnected && this.#countDown(when, left - 1), 1000);
  }

  #retryButton(words) {
    return el("button.quiet", { type: "button", onclick: () => this.onRetry(this) }, words);
  }

  #close(why) {
    this.looks.end(why);
    this.state.hidden = true;
    this.reply.setAttribute("aria-busy", "false");
  }
}
