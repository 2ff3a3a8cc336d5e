/**
 * Chat about videos: state of the page.
 *
 *   video picker -> videos -> video panel (player, timelines of the selected exchange)
 *   composer -> ask() -> Exchange, which renders the chunks of the stream
 */
import { call, chunks, get, onKeyNeeded, RequestError, session } from "./api.js";
import { messagesOf, requestOf } from "./chat_request.js";
import { acceptDrops, videoPicker } from "./video_picker.js";
import { zoomTimelines } from "./zoom_timelines.js";
import { askForKey } from "./login.js";
import { player } from "./player.js";
import { Exchange } from "./exchange.js";
import { Video, videoCard } from "./video.js";
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

const videoPlayer = player((video, seconds) => visibleTimelines?.setNow(video, seconds));
const picker = videoPicker({ onVideo: attach, onProblem: showProblem });
let videos = []; // of this chat: { video, card }
let exchanges = [];
let visibleTimelines = null; // the displayed timelines: of an exchange, or those before the first
let running = null; // { abort, exchange } while a question is being answered
let model = "";

// -- videos -----------------------------------------------------------------------

function attach(source) {
  const video = new Video(source);
  const card = videoCard(video, { onRemove: detach, onShow: videoPlayer.show });
  const entry = { video, card };
  videos.push(entry);
  video.onChange = () => update(entry);
  byId("add-dialog").close();
  videoPlayer.show(video);
  showEmptyTimelines();
  updateLayout();
  question.focus();
}

function detach(video) {
  video.close();
  videos = videos.filter((entry) => entry.video !== video);
  videoPlayer.show(videos.at(-1)?.video ?? null);
  showEmptyTimelines();
  updateLayout();
  question.focus();
}

/** True if an answer refers to a video: removing it would change the meaning of later questions. */
const isLocked = (video) => Boolean(running) || exchanges.some((exchange) => exchange.answer && exchange.videos.includes(video));
const hasAnswer = () => exchanges.some((exchange) => exchange.answer);

function update(entry) {
  entry.card.update(isLocked(entry.video));
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
  byId("timelines").replaceChildren(visibleTimelines.element);
}

function seek(video, seconds) {
  videoPlayer.seek(video, seconds);
  if (!narrow.matches) byId("video-panel").scrollTo({ top: 0 });
}

// -- layout ----------------------------------------------------------------------------

function updateLayout() {
  const empty = !videos.length && !exchanges.length;
  document.body.classList.toggle("empty", empty);
  byId("video-panel").hidden = empty;
  byId("intro").hidden = !empty;
  byId("question-heading").hidden = empty || exchanges.length > 0;
  byId("new-chat").hidden = empty;
  byId("add-video").hidden = empty;
  byId("examples").hidden = exchanges.length > 0;
  byId("stop").hidden = !running;
  byId("ask").hidden = Boolean(running);
  byId("composer-error").hidden = true;
  question.placeholder = hasAnswer() ? "Ask more about it" : "Your question. Options may follow: A. … B. …";
  document.body.classList.toggle("has-exchanges", exchanges.length > 0);
  byId("videos").replaceChildren(...videos.map((entry) => entry.card.element));
  for (const entry of videos) entry.card.update(isLocked(entry.video));
  if (empty) byId("picker").append(picker.element);
  else byId("add-dialog").append(picker.element);
}

function displayTimelines(timelines) {
  visibleTimelines = timelines;
  byId("timelines").replaceChildren(timelines.element);
  for (const exchange of exchanges) exchange.setDisplayed(exchange.timelines === timelines, exchanges.length > 1);
}

/** Apply a change and keep the end of the chat in view if it was in view. */
function keepEndInView(change) {
  const container = narrow.matches ? document.scrollingElement : byId("chat-scroll");
  const nearEnd = container.scrollHeight - container.scrollTop - container.clientHeight < FOLLOW_DISTANCE;
  change();
  if (nearEnd) container.scrollTop = container.scrollHeight;
}

const setStatus = (text) => (byId("status").textContent = text);

// -- questions --------------------------------------------------------------------------

/** Return why the question cannot be submitted; empty if it can. */
function whyNotReady(text) {
  if (!videos.length) return "Choose a video first.";
  if (!text.trim()) return "Write a question first.";
  const failed = videos.find(({ video }) => video.state === "failed");
  return failed ? `${failed.video.name} is not on the server: remove it, or try again.` : "";
}

async function ask(text) {
  const attached = videos.map((entry) => entry.video);
  const timelines = newTimelines(attached);
  const exchange = new Exchange(text.trim(), attached, timelines, { onRetry: retry, onShow: () => displayTimelines(timelines), onStatus: setStatus });
  const earlier = [...exchanges];
  const abort = new AbortController();
  running = { abort, exchange };
  exchanges.push(exchange);
  displayTimelines(timelines);
  keepEndInView(() => byId("exchanges").append(exchange.element));
  updateLayout();
  exchange.element.scrollIntoView({ block: "nearest" });
  try {
    await run(exchange, earlier, abort.signal);
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
  keepEndInView(updateLayout);
  question.focus({ preventScroll: narrow.matches });
}

/** Create the timelines of a new exchange. */
function newTimelines(attached) {
  const timelines = zoomTimelines(attached, (video, seconds) => {
    displayTimelines(timelines);
    seek(video, seconds);
  }, narrow.matches);
  return timelines;
}

async function run(exchange, earlier, signal) {
  exchange.status("Waiting for the upload");
  await abortable(Promise.all(exchange.videos.map((video) => video.ready)), signal);
  exchange.status("Decoding the overview");
  model ||= (await models()).id;
  const zooms = byId("zoom-limit").value;
  const request = requestOf(model, messagesOf(exchange.videos, earlier, exchange.question), zooms === "" ? null : Number(zooms));
  for await (const chunk of chunks(request, signal)) {
    keepEndInView(() => exchange.addChunk(chunk));
    keepFrames(chunk.choices[0]?.delta ?? {}, exchange.videos);
  }
}

/** Keep the frames that the agent received, for videos that the player cannot play. */
function keepFrames({ overview, zoom }, attached) {
  for (const event of [overview, zoom]) if (event?.thumbnails) videoPlayer.addFrames(attached[event.video], event.pts, event.thumbnails);
}

function abortable(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
    promise.then(resolve, reject);
  });
}

function retry(exchange) {
  const reason = running ? "Another question is being answered." : whyNotReady(exchange.question);
  if (reason) return showProblem(reason);
  exchange.element.remove();
  exchanges = exchanges.filter((entry) => entry !== exchange);
  ask(exchange.question);
}

function showProblem(message) {
  byId("composer-error").textContent = message;
  byId("composer-error").hidden = false;
}

const stop = () => running?.abort.abort();

function newChat() {
  stop();
  running = null;
  for (const { video } of videos) video.close();
  videos = [];
  exchanges = [];
  videoPlayer.show(null);
  byId("exchanges").replaceChildren();
  question.value = "";
  setStatus("");
  showEmptyTimelines();
  updateLayout();
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

async function start() {
  onKeyNeeded(askForKey);
  try {
    if ((await session()).needs_key) await askForKey("An API key is needed.");
    byId("sign-out").hidden = !(await session()).name;
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
  const reason = whyNotReady(text);
  if (reason) return showProblem(reason);
  question.value = "";
  ask(text);
});
question.addEventListener("input", () => (byId("composer-error").hidden = true));
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  byId("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});
byId("stop").addEventListener("click", stop);
byId("sign-out").addEventListener("click", async () => {
  await call("session", { method: "DELETE" });
  location.reload();
});
byId("new-chat").addEventListener("click", newChat);
byId("add-video").addEventListener("click", () => {
  picker.refresh();
  byId("add-dialog").showModal();
});
byId("add-dialog-close").addEventListener("click", () => byId("add-dialog").close());
acceptDrops((files) => picker.addFiles(files));
for (const text of EXAMPLES) {
  const insert = () => {
    question.value = text;
    question.focus();
  };
  byId("examples").append(el("button.example", { type: "button", onclick: insert }, text));
}
if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("ask-keys").textContent = "⌘ ↵";
byId("player").append(videoPlayer.element);
showEmptyTimelines();
updateLayout();
start();
