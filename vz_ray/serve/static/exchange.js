/**
 * One question and its answer, rendered while it is streamed.
 *
 *   const exchange = new Exchange("What flashes? A. disc B. ring", videos, timelines, { onRetry, onShow, onStatus });
 *   chat.append(exchange.element);
 *   exchange.addChunk(chunk);     // each chunk of the stream
 *   exchange.end() / exchange.stop() / exchange.fail(error)
 *
 * `answer` is the text of the complete answer; empty if the exchange was stopped or failed.
 */
import { chosen, optionsOf } from "./chat_request.js";
import { clock, el } from "./web/dom.js";
import { count, rate } from "./format.js";

/** Maximum length of an answer in large type. */
const SHORT = 60;

export class Exchange {
  answer = "";
  #turns = [];
  #answerText = "";
  #result = {};

  constructor(question, videos, timelines, { onRetry, onShow, onStatus }) {
    Object.assign(this, { question, videos, timelines, onRetry, onStatus });
    const { stem, options } = optionsOf(question);
    this.options = options;
    this.list = options.length > 0 && el("ol.options", {}, options.map(([name, text]) => el("li", { "data-name": name }, el("b", {}, name), " ", text)));
    this.steps = el("div.steps");
    this.reply = el("div.answer", { "aria-live": "polite", "aria-busy": "true", hidden: true });
    this.state = el("p.state.busy", {}, "Waiting");
    this.foot = el("div.foot");
    this.show = el("button.show", { type: "button", hidden: true, onclick: onShow }, "Show on the timeline");
    const head = el("div.asked", {}, el("h2", {}, stem || "Which is it?"), this.list, this.show);
    this.element = el("article.round", { "aria-label": stem }, head, this.steps, this.reply, this.state, this.foot);
  }

  /** Mark the exchange that the timeline shows, if there are several. */
  onStage(several, here) {
    this.element.classList.toggle("here", several && here);
    this.show.hidden = !several || here;
  }

  /** Show the current activity. */
  status(words) {
    this.state.textContent = words;
    this.onStatus(words);
  }

  /** Render a chunk of the stream. */
  addChunk(chunk) {
    if (chunk.usage) this.#result.usage = chunk.usage;
    if (chunk.vz_ray) Object.assign(this.#result, chunk.vz_ray, { model: chunk.model });
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.finish_reason) this.#result.finish = choice.finish_reason;
    const { overview, reasoning_content: reasoning, zooming, zoom, content } = choice.delta;
    if (overview) this.#addOverview(overview);
    if (reasoning) this.#addReasoning(reasoning);
    if (zooming) this.#startZoom(zooming);
    if (zoom) this.#finishZoom(zoom);
    if (content) this.#addAnswer(content);
  }

  #turn() {
    const last = this.#turns.at(-1);
    if (last && !last.over) return last;
    const number = this.#turns.length + 1;
    const turn = { over: false, words: el("p.thought"), zoomLine: el("p.zoom-line"), element: null };
    turn.element = el("section.step", {}, el("h3", {}, `Turn ${number}`), el("div.step-body", {}, turn.words, turn.zoomLine));
    this.#turns.push(turn);
    this.steps.append(turn.element);
    return turn;
  }

  #addOverview(event) {
    const head = el("p.zoom-line", {}, `${count(event.pts.length, "frame")} of ${clock(event.duration)}${this.timelines.nameSuffix(event.video)}`);
    this.steps.append(el("section.step.look", {}, el("h3", {}, "Overview"), el("div.step-body", {}, head, this.timelines.overview(event))));
    this.status("Thinking");
  }

  #addReasoning(text) {
    const { words } = this.#turn();
    words.textContent = (words.textContent + text).trimStart();
  }

  #startZoom(zoom) {
    this.#turn().zoomLine.textContent = `Zooms into ${this.#where(zoom)}`;
    this.timelines.zooming(zoom);
    this.status(`Zooming into ${clock(zoom.segment[0])} to ${clock(zoom.segment[1])}`);
  }

  #finishZoom(zoom) {
    const turn = this.#turn();
    turn.over = true;
    this.#answerText = "";
    this.#showAnswer();
    if (zoom.reasoning) turn.words.textContent = zoom.reasoning;
    const strip = this.timelines.zoom(zoom);
    if (zoom.refused) {
      turn.zoomLine.replaceWith(el("p.refused", {}, turn.zoomLine.textContent && `${turn.zoomLine.textContent}. `, `Refused: ${zoom.refused}`));
    } else {
      const took = zoom.latency ? ` · decoded in ${zoom.latency.clip_s.toFixed(2)} s` : "";
      turn.zoomLine.textContent = `Zoomed into ${this.#where(zoom)} · ${count(zoom.pts.length, "frame")}${took}`;
    }
    if (strip) turn.element.querySelector(".step-body").append(strip);
    this.status("Thinking");
  }

  #where({ segment, fps, video }) {
    return `${clock(segment[0])} to ${clock(segment[1])}${this.timelines.nameSuffix(video)} at ${rate(fps)}`;
  }

  #addAnswer(text) {
    this.#answerText += text;
    this.#showAnswer();
    if (this.state.textContent !== "Answering") this.status("Answering");
  }

  #showAnswer() {
    const text = this.#answerText.trim();
    const letter = chosen(text, this.options);
    const option = this.options.find(([name]) => name === letter);
    this.reply.hidden = !text;
    this.reply.classList.toggle("short", text.length <= SHORT);
    if (option && text.length <= option[1].length + 4) this.reply.replaceChildren(el("b", {}, letter), " ", el("span", {}, option[1]));
    else this.reply.replaceChildren(el("span", {}, text));
    if (this.list) for (const item of this.list.children) item.classList.toggle("chosen", item.dataset.name === letter);
  }

  /** The stream is complete. */
  end() {
    // The streamed text may contain an answer of an earlier turn that also zoomed; the result has the final one.
    this.#answerText = this.#result.answer ?? this.#answerText;
    this.#showAnswer();
    this.answer = this.#answerText.trim();
    this.#close("no clip was decoded");
    const { status, finish, gated, usage, seconds, model } = this.#result;
    const short = finish === "length" ? "Truncated: the token limit was reached." : status === "no_answer" ? "The agent gave no answer; this is its last text." : "";
    this.reply.classList.toggle("none", short !== "");
    if (short) this.foot.append(el("p.warn", {}, short));
    else if (gated) this.foot.append(el("p.aside", {}, "Answered from the overview: the agent was certain without a zoom."));
    const facts = [
      seconds !== undefined && ["time", `${seconds.toFixed(1)} s`],
      usage && ["frames", usage.frames.toLocaleString("en")],
      usage && ["zooms", usage.zooms],
      usage && ["tokens", usage.total_tokens.toLocaleString("en"), `${count(usage.prompt_tokens, "token")} prompt, ${usage.completion_tokens.toLocaleString("en")} completion`],
      model && ["model", model],
    ].filter(Boolean);
    this.foot.append(el("dl.facts", {}, facts.map(([name, value, title]) => el("div", { title }, el("dt", {}, name), el("dd", {}, String(value))))));
    this.onStatus(this.answer ? `Answer: ${this.reply.textContent}` : "The agent gave no answer.");
  }

  /** The user stopped the exchange. */
  stop() {
    this.#close("stopped");
    this.foot.append(el("p.aside", {}, "Stopped. It is not part of the chat."), this.#retryButton("Ask again"));
    this.onStatus("Stopped");
  }

  /** The request failed; `error.retry` is the delay before a retry. */
  fail(error) {
    this.#close("failed");
    const when = el("span.when");
    const problem = el("div.problem", { role: "alert" }, el("p", {}, error.message));
    this.foot.append(problem);
    if (error.retry !== null) {
      problem.append(el("div.row", {}, this.#retryButton("Try again"), when));
      this.#countDown(when, Math.ceil(error.retry));
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
    this.timelines.end(why);
    this.state.hidden = true;
    this.reply.setAttribute("aria-busy", "false");
  }
}
