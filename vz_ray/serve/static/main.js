/**
 * Chat about videos: state of the page.
 *
 *   video picker -> videos -> stage (player, timelines of the selected exchange)
 *   composer -> ask() -> Exchange, which renders the chunks of the stream
 */
import { call, chunks, get, onKeyNeeded, RequestError, session } from "./api.js";
import { messagesOf, requestOf } from "./chat_request.js";
import { acceptDrops, videoPicker } from "./video_picker.js";
import { zoomTimelines } from "./zoom_timelines.js";
import { askForKey } from "./login.js";
import { player } from "./player.js";
import { Exchange } from "./exchange.js";
import { card, Video } from "./video.js";
import { el } from "./web/dom.js";

const EXAMPLES = [
  "What happens in this video, in order?",
  "How many times does the person jump?",
  "What colour is the car that passes last? A. red B. white C. black",
];
/** The chat scrolls with new content if it is within this distance from its end, pixels. */
const FOLLOW_DISTANCE = 120;

const byId = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 860px)");
const question = byId("question");

const screen = player((video, seconds) => visibleTimelines?.setNow(video, seconds));
const picker = videoPicker({ onVideo: attach, onProblem: showProblem });
let videos = []; // of this chat: { video, line }
let exchanges = [];
let visibleTimelines = null; // the timelines on stage: of an exchange, or those before the first
let running = null; // { abort, exchange } while a question is being answered
let model = "";

// -- videos -----------------------------------------------------------------------

function attach(source) {
  const video = new Video(source);
  const line = card(video, { onRemove: detach, onShow: (chosen) => screen.show(chosen) });
  const entry = { video, line };
  videos.push(entry);
  video.onChange = () => update(entry);
  byId("adding").close();
  screen.show(video);
  showEmptyTimelines();
  arrange();
  question.focus();
}

function detach(video) {
  video.close();
  videos = videos.filter((entry) => entry.video !== video);
  screen.show(videos.at(-1)?.video ?? null);
  showEmptyTimelines();
  arrange();
  question.focus();
}

/** True if an answer refers to a video: removing it would change the meaning of later questions. */
const isLocked = (video) => Boolean(running) || exchanges.some((exchange) => exchange.answer && exchange.videos.includes(video));
const hasAnswer = () => exchanges.some((exchange) => exchange.answer);

function update(entry) {
  entry.line.update(isLocked(entry.video));
  if (visibleTimelines?.before && entry.video.duration && !entry.hasTimeline) {
    entry.hasTimeline = true;
    showEmptyTimelines();
  }
}

/** Show empty timelines before the first answer. */
function showEmptyTimelines() {
  if (running || hasAnswer()) return;
  visibleTimelines = zoomTimelines(videos.map((entry) => entry.video), seek, narrow.matches);
  visibleTimelines.before = true;
  byId("lanes").replaceChildren(visibleTimelines.element);
}

function seek(video, seconds) {
  screen.seek(video, seconds);
  if (narrow.matches) return;
  byId("stage").scrollTo({ top: 0 });
}

// -- layout ----------------------------------------------------------------------------

function arrange() {
  const empty = !videos.length && !exchanges.length;
  document.body.classList.toggle("empty", empty);
  byId("stage").hidden = empty;
  byId("intro").hidden = !empty;
  byId("lead").hidden = empty || exchanges.length > 0;
  byId("new").hidden = empty;
  byId("add").hidden = empty;
  byId("examples").hidden = exchanges.length > 0;
  byId("stop").hidden = !running;
  byId("ask").hidden = Boolean(running);
  byId("missing").hidden = true;
  question.placeholder = hasAnswer() ? "Ask more about it" : "Your question. Options may follow: A. … B. …";
  document.body.classList.toggle("asked", exchanges.length > 0);
  byId("videos").replaceChildren(...videos.map((entry) => entry.line.element));
  for (const entry of videos) entry.line.update(isLocked(entry.video));
  if (empty) byId("choose").append(picker.element);
  else byId("adding").append(picker.element);
}

function onStage(timelines) {
  visibleTimelines = timelines;
  byId("lanes").replaceChildren(timelines.element);
  for (const exchange of exchanges) exchange.onStage(exchanges.length > 1, exchange.timelines === timelines);
}

/** Apply a change and keep the end of the chat in view if it was in view. */
function follow(change) {
  const box = narrow.matches ? document.scrollingElement : byId("scroll");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < FOLLOW_DISTANCE;
  change();
  if (near) box.scrollTop = box.scrollHeight;
}

const setStatus = (text) => (byId("status").textContent = text);

// -- questions --------------------------------------------------------------------------

/** Return why the question cannot be submitted; empty if it can. */
function obstacle(text) {
  if (!videos.length) return "Choose a video first.";
  if (!text.trim()) return "Write a question first.";
  const broken = videos.find(({ video }) => video.state === "failed");
  return broken ? `${broken.video.name} is not on the server: remove it, or try again.` : "";
}

async function ask(text) {
  const attached = videos.map((entry) => entry.video);
  const timelines = newTimelines(attached);
  const exchange = new Exchange(text.trim(), attached, timelines, { onRetry: retry, onShow: () => onStage(timelines), onStatus: setStatus });
  const past = [...exchanges];
  const abort = new AbortController();
  running = { abort, exchange };
  exchanges.push(exchange);
  onStage(timelines);
  follow(() => byId("rounds").append(exchange.element));
  arrange();
  exchange.element.scrollIntoView({ block: "nearest" });
  try {
    await run(exchange, past, abort.signal);
    exchange.end();
  } catch (error) {
    if (abort.signal.aborted) exchange.stop();
    else if (error instanceof RequestError) exchange.fail(error);
    else {
      exchange.fail(new RequestError("The page failed to show the answer; see the browser's console.", { retry: 0 }));
      console.error(error);
    }
  }
  if (running?.exchange !== exchange) return; // A new chat has started meanwhile.
  running = null;
  follow(arrange);
  question.focus({ preventScroll: narrow.matches });
}

/** Create the timelines of a new exchange. */
function newTimelines(attached) {
  const timelines = zoomTimelines(attached, (video, seconds) => {
    onStage(timelines);
    seek(video, seconds);
  }, narrow.matches);
  return timelines;
}

async function run(exchange, past, signal) {
  exchange.status("Waiting for the upload");
  await orAborted(Promise.all(exchange.videos.map((video) => video.ready)), signal);
  exchange.status("Decoding the overview");
  model ||= (await models()).id;
  const zooms = byId("zooms").value;
  const request = requestOf(model, messagesOf(exchange.videos, past, exchange.question), zooms === "" ? null : Number(zooms));
  for await (const chunk of chunks(request, signal)) {
    follow(() => exchange.addChunk(chunk));
    remember(chunk.choices[0]?.delta ?? {}, exchange.videos);
  }
}

/** Keep the frames that the agent received, for videos that the player cannot play. */
function remember({ overview, zoom }, attached) {
  for (const event of [overview, zoom]) if (event?.thumbnails) screen.addFrames(attached[event.video], event.pts, event.thumbnails);
}

function orAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
    promise.then(resolve, reject);
  });
}

function retry(exchange) {
  const why = running ? "Another question is being answered." : obstacle(exchange.question);
  if (why) return showProblem(why);
  exchange.element.remove();
  exchanges = exchanges.filter((entry) => entry !== exchange);
  ask(exchange.question);
}

function showProblem(message) {
  byId("missing").textContent = message;
  byId("missing").hidden = false;
}

const stop = () => running?.abort.abort();

function newChat() {
  stop();
  running = null;
  for (const { video } of videos) video.close();
  videos = [];
  exchanges = [];
  screen.show(null);
  byId("rounds").replaceChildren();
  question.value = "";
  setStatus("");
  showEmptyTimelines();
  arrange();
  picker.refresh();
  picker.element.querySelector("button").focus();
}

// -- the server ---------------------------------------------------------------------------

async function models() {
  const [latest, exact] = (await get("v1/models")).data;
  byId("model").textContent = exact.id;
  byId("model").title = exact.refused ?? "The served agent and its weight version";
  return latest;
}

async function begin() {
  onKeyNeeded(askForKey);
  try {
    if ((await session()).needs_key) await askForKey("An API key is needed.");
    byId("leave").hidden = !(await session()).name;
    await picker.refresh();
    model = (await models()).id;
  } catch (error) {
    byId("model").textContent = error.message;
  }
}

// -- events -----------------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = question.value;
  const why = obstacle(text);
  if (why) return showProblem(why);
  question.value = "";
  ask(text);
});
question.addEventListener("input", () => (byId("missing").hidden = true));
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});
byId("stop").addEventListener("click", stop);
byId("leave").addEventListener("click", async () => {
  await call("session", { method: "DELETE" });
  location.reload();
});
byId("new").addEventListener("click", newChat);
byId("add").addEventListener("click", () => {
  picker.refresh();
  byId("adding").showModal();
});
byId("adding-close").addEventListener("click", () => byId("adding").close());
acceptDrops((files) => picker.take(files));
for (const text of EXAMPLES) {
  const use = () => {
    question.value = text;
    question.focus();
  };
  byId("examples").append(el("button.example", { type: "button", onclick: use }, text));
}
if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("ask-keys").textContent = "⌘ ↵";
byId("screen").append(screen.element);
showEmptyTimelines();
arrange();
begin();
