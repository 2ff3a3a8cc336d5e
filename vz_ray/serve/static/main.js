/**
 * A chat about videos: what is attached, what was asked, what is shown.
 *
 *   chooser -> videos -> stage (player, timelines of the round that is shown)
 *   composer -> ask() -> Round, which hears the stream and draws itself
 */
import { call, chunks, get, onKeyNeeded, Refusal, session } from "./api.js";
import { messagesOf, requestOf } from "./chat.js";
import { acceptDrops, chooser } from "./video_picker.js";
import { roundLooks } from "./zoom_timelines.js";
import { keyAsked } from "./login.js";
import { player } from "./player.js";
import { Round } from "./round.js";
import { card, Video } from "./videos.js";
import { el } from "./web/dom.js";

const EXAMPLES = [
  "What happens in this video, in order?",
  "How many times does the person jump?",
  "What colour is the car that passes last? A. red B. white C. black",
];
/** Pixels from its end within which the talk follows what is added to it. */
const NEAR = 120;

const byId = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 860px)");
const question = byId("question");

const screen = player((video, seconds) => shown?.setNow(video, seconds));
const source = chooser({ onVideo: attach, onProblem: missing });
let videos = []; // Of this chat: { video, card, index }.
let rounds = [];
let shown = null; // The looks on stage: of a round, or those before the first.
let running = null; // { abort, round } while a question is being answered.
let model = "";

// -- videos -----------------------------------------------------------------------

function attach(given) {
  const video = new Video(given);
  const line = card(video, { onRemove: detach, onShow: (one) => screen.show(one) });
  const one = { video, line };
  videos.push(one);
  video.onChange = () => update(one);
  byId("adding").close();
  screen.show(video);
  rest();
  arrange();
  question.focus();
}

function detach(video) {
  video.close();
  videos = videos.filter((one) => one.video !== video);
  screen.show(videos.at(-1)?.video ?? null);
  rest();
  arrange();
  question.focus();
}

/** Whether an answer is about a video: taking it away would change what the chat's later questions mean. */
const bound = (video) => Boolean(running) || rounds.some((round) => round.answer && round.videos.includes(video));
const answered = () => rounds.some((round) => round.answer);

function update(one) {
  one.line.update(bound(one.video));
  if (shown?.before && one.video.duration && !one.known) {
    one.known = true;
    rest();
  }
}

/** Timelines without looks, while there is nothing to show on them. */
function rest() {
  if (running || answered()) return;
  shown = roundLooks(videos.map((one) => one.video), seek, narrow.matches);
  shown.before = true;
  byId("lanes").replaceChildren(shown.element);
}

function seek(video, seconds) {
  screen.seek(video, seconds);
  if (narrow.matches) return;
  byId("stage").scrollTo({ top: 0 });
}

// -- what is shown where ----------------------------------------------------------------

function arrange() {
  const empty = !videos.length && !rounds.length;
  document.body.classList.toggle("empty", empty);
  byId("stage").hidden = empty;
  byId("intro").hidden = !empty;
  byId("lead").hidden = empty || rounds.length > 0;
  byId("new").hidden = empty;
  byId("add").hidden = empty;
  byId("examples").hidden = rounds.length > 0;
  byId("stop").hidden = !running;
  byId("ask").hidden = Boolean(running);
  byId("missing").hidden = true;
  question.placeholder = answered() ? "Ask more about it" : "Your question. Options may follow: A. … B. …";
  document.body.classList.toggle("asked", rounds.length > 0);
  byId("videos").replaceChildren(...videos.map((one) => one.line.element));
  for (const one of videos) one.line.update(bound(one.video));
  if (empty) byId("choose").append(source.element);
  else byId("adding").append(source.element);
}

function onStage(looks) {
  shown = looks;
  byId("lanes").replaceChildren(looks.element);
  for (const round of rounds) round.onStage(rounds.length > 1, round.looks === looks);
}

/** Keeps the end of the talk in sight, for whoever is reading there. */
function follow(change) {
  const box = narrow.matches ? document.scrollingElement : byId("scroll");
  const near = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR;
  change();
  if (near) box.scrollTop = box.scrollHeight;
}

const tellStatus = (words) => (byId("status").textContent = words);

// -- questions --------------------------------------------------------------------------

/** Why a question cannot be asked now, or "". */
function obstacle(text) {
  if (!videos.length) return "Choose a video first.";
  if (!text.trim()) return "Write a question first.";
  const broken = videos.find(({ video }) => video.state === "failed");
  return broken ? `${broken.video.name} is not on the server: remove it, or try again.` : "";
}

async function ask(text) {
  const attached = videos.map((one) => one.video);
  const looks = newLooks(attached);
  const round = new Round(text.trim(), attached, looks, { onRetry: again, onShow: () => onStage(looks), onStatus: tellStatus });
  const past = [...rounds];
  const abort = new AbortController();
  running = { abort, round };
  rounds.push(round);
  onStage(looks);
  follow(() => byId("rounds").append(round.element));
  arrange();
  round.element.scrollIntoView({ block: "nearest" });
  try {
    await play(round, past, abort.signal);
    round.end();
  } catch (error) {
    if (abort.signal.aborted) round.stop();
    else if (error instanceof Refusal) round.fail(error);
    else {
      round.fail(new Refusal("This page failed on the answer; the browser's console has more.", { retry: 0 }));
      console.error(error);
    }
  }
  if (running?.round !== round) return; // Another chat has begun meanwhile.
  running = null;
  follow(arrange);
  question.focus({ preventScroll: narrow.matches });
}

/** The timelines and strips of a new round. */
function newLooks(attached) {
  const looks = roundLooks(attached, (video, seconds) => {
    onStage(looks);
    seek(video, seconds);
  }, narrow.matches);
  return looks;
}

async function play(round, past, signal) {
  round.status("Waiting for the video");
  await orAborted(Promise.all(round.videos.map((video) => video.ready)), signal);
  round.status("Looking over the video");
  model ||= (await models()).id;
  const zooms = byId("zooms").value;
  const request = requestOf(model, messagesOf(round.videos, past, round.question), zooms === "" ? null : Number(zooms));
  for await (const chunk of chunks(request, signal)) {
    follow(() => round.hear(chunk));
    remember(chunk.choices[0]?.delta ?? {}, round.videos);
  }
}

/** What the agent saw, for a player that cannot play. */
function remember({ overview, zoom }, attached) {
  for (const look of [overview, zoom]) if (look?.thumbnails) screen.learn(attached[look.video], look.pts, look.thumbnails);
}

function orAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
    promise.then(resolve, reject);
  });
}

function again(round) {
  const why = running ? "Another question is being answered." : obstacle(round.question);
  if (why) return missing(why);
  round.element.remove();
  rounds = rounds.filter((one) => one !== round);
  ask(round.question);
}

function missing(words) {
  byId("missing").textContent = words;
  byId("missing").hidden = false;
}

const stop = () => running?.abort.abort();

function newChat() {
  stop();
  running = null;
  for (const { video } of videos) video.close();
  videos = [];
  rounds = [];
  screen.show(null);
  byId("rounds").replaceChildren();
  question.value = "";
  tellStatus("");
  rest();
  arrange();
  source.refresh();
  source.element.querySelector("button").focus();
}

// -- the server ---------------------------------------------------------------------------

async function models() {
  const [any, exact] = (await get("v1/models")).data;
  byId("model").textContent = exact.id;
  byId("model").title = exact.refused ?? "The agent that answers, and the version of its weights";
  return any;
}

async function begin() {
  onKeyNeeded(keyAsked);
  try {
    if ((await session()).needs_key) await keyAsked("An API key is needed.");
    byId("leave").hidden = !(await session()).name;
    await source.refresh();
    model = (await models()).id;
  } catch (refusal) {
    byId("model").textContent = refusal.message;
  }
}

// -- what people do ---------------------------------------------------------------------------

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return;
  const text = question.value;
  const why = obstacle(text);
  if (why) return missing(why);
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
  source.refresh();
  byId("adding").showModal();
});
byId("adding-close").addEventListener("click", () => byId("adding").close());
acceptDrops((files) => source.take(files));
for (const text of EXAMPLES) {
  const use = () => {
    question.value = text;
    question.focus();
  };
  byId("examples").append(el("button.example", { type: "button", onclick: use }, text));
}
if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("ask-keys").textContent = "⌘ ↵";
byId("screen").append(screen.element);
rest();
arrange();
begin();
