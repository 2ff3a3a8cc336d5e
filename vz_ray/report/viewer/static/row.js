/** Rows and column headers of the list, without behavior. */
import { el } from "/web/dom.js";
import { cameOf, number, outcomeWords, signed, stageWords, tone, words } from "./words.js";

const COLUMNS = [
  [null, "Outcome", ""], [null, "Stage", ""], ["step", "Step", "right"], [null, "Kind", ""], [null, "Question", ""], [null, "Answer", ""],
  ["reward", "Reward", "right"], ["advantage", "Advantage", "right"], ["zooms", "Zooms", "right"],
  ["frames", "Frames", "right"], ["seconds", "Seconds", "right"],
];

/** Row element, a link; the caller sets its target. */
export function cells(one) {
  const answer = one.answer === null ? words(one.status) : one.answer;
  return el(
    "a", {},
    el(`span.came.${tone(one)}`, {}, outcomeWords(cameOf(one))),
    el("span.stage", {}, stageWords(one.stage)),
    el("span.num.step", {}, String(one.step)),
    el("span.kind", {}, words(one.kind)),
    el("span.question", {}, one.question),
    el("span.answer", {}, answer),
    el("span.num.reward", {}, number(one.reward)),
    el("span.num.advantage", {}, signed(one.advantage)),
    el("span.num.zooms", { title: one.refused > 0 && `${one.refused} refused` }, one.refused ? el("small", {}, `${one.refused}✕ `) : null, String(one.zooms)),
    el("span.num.frames", {}, String(one.frames)),
    el("span.num.seconds", {}, number(one.seconds, 1)),
  );
}

/** Sort buttons and titles; `set` receives the sort order. */
export function headsOf(params, set) {
  const sort = params.get("sort") || "newest";
  const up = params.get("up") === "true";
  return COLUMNS.map(([name, title, side]) => {
    if (!name) return el("span", {}, title);
    const on = sort === name;
    const way = on ? (up ? "↑" : "↓") : "";
    const label = on ? `${title}, sorted ${up ? "lowest" : "highest"} first` : `Sort by ${title.toLowerCase()}`;
    const press = () => set({ sort: on && up ? "" : name, up: on && !up ? "true" : "" });
    return el(side ? `button.${side}` : "button", { type: "button", "aria-label": label, "aria-pressed": String(on), onclick: press }, `${title}${way && ` ${way}`}`);
  });
}
