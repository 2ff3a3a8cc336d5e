/** Page: routing, live updates and keyboard shortcuts. */
import { el } from "/web/dom.js";
import { address, get, listParams, parseAddress } from "./api.js";
import { episodePage } from "./episode.js";
import { count } from "./format.js";
import { groupPage } from "./group.js";
import { listPage } from "./list.js";

const POLL_MS = 1000;

const [list, detail, liveStatus, skippedButton, dialog] = ["list", "detail", "live-status", "skipped-lines", "dialog"].map((id) =>
  document.getElementById(id),
);
const episodes = listPage(list);
let detailPage = null; // Page in #detail: { keys, close }.
let lastState = { revision: -1 };
let listScroll = 0;
let routes = 0; // Number of navigations; late responses are dropped.

// -- pages ------------------------------------------------------------------------

async function route() {
  const { page, id, params } = parseAddress();
  const navigation = ++routes;
  detailPage?.close();
  detailPage = null;
  detail.replaceChildren();
  const inList = page !== "episode" && page !== "group";
  if (!list.hidden) listScroll = inList ? listScroll : window.scrollY;
  const wasInDetail = list.hidden;
  list.hidden = !inList;
  detail.hidden = inList;
  if (inList) {
    document.title = `${lastState.run || "vz_ray"} · episodes`;
    episodes.show(params);
    if (wasInDetail) {
      window.scrollTo(0, listScroll);
      episodes.focus();
    }
    return;
  }
  window.scrollTo(0, 0);
  const createPage = page === "episode" ? episodePage : groupPage;
  detail.append(el("p.loading", {}, "…"));
  try {
    const newPage = await createPage(id, params);
    if (navigation !== routes) return newPage.close();
    detailPage = newPage;
    detail.replaceChildren(newPage.element);
    document.title = `${newPage.title} · ${lastState.run || "vz_ray"}`;
    newPage.element.querySelector("h2").focus({ preventScroll: true });
    newPage.onAttached?.();
  } catch (error) {
    if (navigation !== routes) return;
    detail.replaceChildren(
      el("section.card.error", {}, el("h2", { tabindex: -1 }, "This page cannot be displayed"), el("p", {}, error.message),
        el("p", {}, el("a", { href: address("list", 0, listParams(params)) }, "Back to the episodes"))),
    );
  }
}

// -- live updates -----------------------------------------------------------------

function showState(state) {
  const [done, total] = state.indexed;
  document.getElementById("run").textContent = state.run;
  liveStatus.className = state.error ? "disconnected" : state.is_behind ? "busy" : "connected";
  liveStatus.textContent = state.error
    ? state.error
    : state.is_behind
      ? `Reading the logs: ${Math.floor((100 * done) / Math.max(total, 1))} % of ${(total / 1e6).toFixed(0)} MB`
      : `${count(state.episodes)} episode${state.episodes === 1 ? "" : "s"}, following`;
  skippedButton.hidden = !state.skipped_lines;
  skippedButton.textContent = `${count(state.skipped_lines)} line${state.skipped_lines === 1 ? "" : "s"} skipped`;
}

async function poll() {
  if (!document.hidden) {
    try {
      const state = await get("/api/state");
      showState(state);
      if (state.revision !== lastState.revision) {
        const isFirst = !lastState.run;
        lastState = state;
        await episodes.refresh(state);
        if (isFirst) document.title = document.title.replace(/vz_ray$/, state.run);
      }
    } catch (error) {
      liveStatus.className = "disconnected";
      liveStatus.textContent = error.message;
      lastState = { ...lastState, revision: -1 }; // Forces a full reload on the next response.
    }
  }
  setTimeout(poll, POLL_MS);
}

// -- dialogs ----------------------------------------------------------------------

function open(title, ...content) {
  dialog.replaceChildren(
    el("h2", { id: "dialog-title" }, title), ...content,
    el("form", { method: "dialog" }, el("button", {}, "Close")),
  );
  dialog.showModal();
}

const KEYS = [
  ["j, ↓ / k, ↑", "next, previous episode"],
  ["Enter", "open the episode"],
  ["Esc", "back to the list; there, clear the search"],
  ["/", "search in questions and answers"],
  ["g", "samples of the same group, and back"],
  ["s", "shade tokens: log-prob, advantage, none"],
  ["Space", "play or pause"],
  ["?", "this help"],
];

function help() {
  open("Keys", el("dl.keys", {}, KEYS.map(([key, action]) => el("div", {}, el("dt", {}, el("kbd", {}, key)), el("dd", {}, action)))));
}

async function showSkippedLines() {
  const skipped = await get("/api/skipped_lines");
  const numOmitted = skipped.count - skipped.lines.length;
  open(
    "Skipped lines",
    el("p", {}, "These lines are not valid episodes."),
    el("ul.skipped-lines", {}, skipped.lines.map((line) => el("li", {}, el("code", {}, `${line.file}, line ${line.line}`), el("span", {}, line.reason)))),
    numOmitted > 0 && el("p", {}, `and ${count(numOmitted)} more`),
  );
}

document.getElementById("keys").addEventListener("click", help);
skippedButton.addEventListener("click", showSkippedLines);

// -- keys -------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
  const typing = event.target.closest("input, select, textarea");
  if (typing && event.key !== "Escape") return;
  if (event.key === "?") help();
  else if (event.key === "/") {
    if (list.hidden) location.hash = address("list", 0, listParams(parseAddress().params));
    episodes.search();
  } else if (!(list.hidden ? detailPage?.keys(event) : episodes.keys(event))) return;
  event.preventDefault();
});

window.addEventListener("hashchange", route);
route();
poll();
