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
import { chosenOption, optionsOf } from "./chat_request.js";
import { clock, el } from "./web/dom.js";
import { count, rate } from "./format.js";

/** Maximum length of an answer in large type. */
const SHORT_ANSWER = 60;

export class Exchange {
  answer = "";
  #turns = [];
  #answerText = "";
  #result = {};

  constructor(question, videos, timelines, { onRetry, onShow, onStatus }) {
    Object.assign(this, { question, videos, timelines, onRetry, onStatus });
    const { stem, options } = optionsOf(question);
    this.options = options;
    this.optionList = options.length > 0 && el("ol.options", {}, options.map(([name, text]) => el("li", { "data-name": name }, el("b", {}, name), " ", text)));
    this.turns = el("div.turns");
    this.reply = el("div.answer", { "aria-live": "polite", "aria-busy": "true", hidden: true });
    this.activity = el("p.activity", {}, "Waiting");
    this.footer = el("div.exchange-footer");
    this.showButton = el("button.show-timeline", { type: "button", hidden: true, onclick: onShow }, "Show on the timeline");
    const head = el("div.exchange-question", {}, el("h2", {}, stem || "Which is it?"), this.optionList, this.showButton);
    this.element = el("article.exchange", { "aria-label": stem }, head, this.turns, this.reply, this.activity, this.footer);
  }

  /** Mark the exchange that the timeline shows, if there are several. */
  setDisplayed(displayed, several) {
    this.element.classList.toggle("displayed", several && displayed);
    this.showButton.hidden = !several || displayed;
  }

  /** Show the current activity. */
  status(text) {
    this.activity.textContent = text;
    this.onStatus(text);
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
    if (last && !last.finished) return last;
    const number = this.#turns.length + 1;
    const turn = { finished: false, reasoning: el("p.reasoning"), zoomSummary: el("p.zoom-summary"), element: null };
    turn.element = el("section.turn", {}, el("h3", {}, `Turn ${number}`), el("div.turn-body", {}, turn.reasoning, turn.zoomSummary));
    this.#turns.push(turn);
    this.turns.append(turn.element);
    return turn;
  }

  #addOverview(event) {
    const head = el("p.zoom-summary", {}, `${count(event.pts.length, "frame")} of ${clock(event.duration)}${this.timelines.nameSuffix(event.video)}`);
    this.turns.append(el("section.turn.overview", {}, el("h3", {}, "Overview"), el("div.turn-body", {}, head, this.timelines.overview(event))));
    this.status("Thinking");
  }

  #addReasoning(text) {
    const { reasoning } = this.#turn();
    reasoning.textContent = (reasoning.textContent + text).trimStart();
  }

  #startZoom(zoom) {
    this.#turn().zoomSummary.textContent = `Zooms into ${this.#zoomText(zoom)}`;
    this.timelines.zooming(zoom);
    this.status(`Zooming into ${clock(zoom.segment[0])} to ${clock(zoom.segment[1])}`);
  }

  #finishZoom(zoom) {
    const turn = this.#turn();
    turn.finished = true;
    this.#answerText = "";
    this.#showAnswer();
    if (zoom.reasoning) turn.reasoning.textContent = zoom.reasoning;
    const strip = this.timelines.zoom(zoom);
    if (zoom.refused) {
      turn.zoomSummary.replaceWith(el("p.refused", {}, turn.zoomSummary.textContent && `${turn.zoomSummary.textContent}. `, `Refused: ${zoom.refused}`));
    } else {
      const latency = zoom.latency ? ` · decoded in ${zoom.latency.clip_s.toFixed(2)} s` : "";
      turn.zoomSummary.textContent = `Zoomed into ${this.#zoomText(zoom)} · ${count(zoom.pts.length, "frame")}${latency}`;
    }
    if (strip) turn.element.querySelector(".turn-body").append(strip);
    this.status("Thinking");
  }

  #zoomText({ segment, fps, video }) {
    return `${clock(segment[0])} to ${clock(segment[1])}${this.timelines.nameSuffix(video)} at ${rate(fps)}`;
  }

  #addAnswer(text) {
    this.#answerText += text;
    this.#showAnswer();
    if (this.activity.textContent !== "Answering") this.status("Answering");
  }

  #showAnswer() {
    const text = this.#answerText.trim();
    const letter = chosenOption(text, this.options);
    const option = this.options.find(([name]) => name === letter);
    this.reply.hidden = !text;
    this.reply.classList.toggle("short", text.length <= SHORT_ANSWER);
    if (option && text.length <= option[1].length + 4) this.reply.replaceChildren(el("b", {}, letter), " ", el("span", {}, option[1]));
    else this.reply.replaceChildren(el("span", {}, text));
    if (this.optionList) for (const item of this.optionList.children) item.classList.toggle("chosen", item.dataset.name === letter);
  }

  /** The stream is complete. */
  end() {
    // The streamed text may contain an answer of an earlier turn that also zoomed; the result has the final one.
    this.#answerText = this.#result.answer ?? this.#answerText;
    this.#showAnswer();
    this.answer = this.#answerText.trim();
    this.#close("no clip was decoded");
    const { status, finish, gated, usage, seconds, model } = this.#result;
    const noAnswer = this.answer ? "The agent gave no answer; this is its last text." : "The agent gave no answer, only reasoning.";
    const incomplete = finish === "length" ? "Truncated: the token limit was reached." : status === "no_answer" ? noAnswer : "";
    this.reply.classList.toggle("incomplete", incomplete !== "");
    if (incomplete) this.footer.append(el("p.error", {}, incomplete));
    else if (gated) this.footer.append(el("p.note", {}, "Answered from the overview: the agent was certain without a zoom."));
    const facts = [
      seconds !== undefined && ["time", `${seconds.toFixed(1)} s`],
      usage && ["frames", usage.frames.toLocaleString("en")],
      usage && ["zooms", usage.zooms],
      usage && ["tokens", usage.total_tokens.toLocaleString("en"), `${count(usage.prompt_tokens, "token")} prompt, ${usage.completion_tokens.toLocaleString("en")} completion`],
      model && ["model", model],
    ].filter(Boolean);
    this.footer.append(el("dl.facts", {}, facts.map(([name, value, title]) => el("div", { title }, el("dt", {}, name), el("dd", {}, String(value))))));
    this.onStatus(this.answer ? `Answer: ${this.reply.textContent}` : "The agent gave no answer.");
  }

  /** The user stopped the exchange. */
  stop() {
    this.#close("stopped");
    this.footer.append(el("p.note", {}, "Stopped. It is not part of the chat."), this.#retryButton("Ask again"));
    this.onStatus("Stopped");
  }

  /** The request failed; `error.retry` is the delay before a retry. */
  fail(error) {
    this.#close("failed");
    const retryDelay = el("span.retry-delay");
    const errorBox = el("div.error-box", { role: "alert" }, el("p", {}, error.message));
    this.footer.append(errorBox);
    if (error.retry !== null) {
      errorBox.append(el("div.row", {}, this.#retryButton("Try again"), retryDelay));
      this.#countDown(retryDelay, Math.ceil(error.retry));
    }
  }

  #countDown(element, seconds) {
    element.textContent = seconds > 0 ? `best in ${seconds} s` : "";
    if (seconds > 0) setTimeout(() => element.isConnected && this.#countDown(element, seconds - 1), 1000);
  }

  #retryButton(label) {
    return el("button.secondary", { type: "button", onclick: () => this.onRetry(this) }, label);
  }

  #close(reason) {
    this.timelines.end(reason);
    this.activity.hidden = true;
    this.reply.setAttribute("aria-busy", "false");
  }
}
