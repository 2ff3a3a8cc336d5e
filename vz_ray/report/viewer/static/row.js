/** Rows and column headers of the list, without behavior. */
import { el } from "/web/dom.js";
import { humanize, number, outcomeLabel, outcomeOf, signed, stageLabel, tone } from "./format.js";

const COLUMNS = [
  [null, "Outcome", ""], [null, "Stage", ""], ["step", "Step", "right"], [null, "Kind", ""], [null, "Question", ""], [null, "Answer", ""],
  ["reward", "Reward", "right"], ["advantage", "Advantage", "right"], ["zooms", "Zooms", "right"],
  ["frames", "Frames", "right"], ["seconds", "Seconds", "right"],
];

/** Row element, a link; the caller sets its target. */
export function cells(row) {
  const answer = row.answer === null ? humanize(row.status) : row.answer;
  return el(
    "a", {},
    el(`span.outcome.${tone(row)}`, {}, outcomeLabel(outcomeOf(row))),
    el("span.stage", {}, stageLabel(row.stage)),
    el("span.num.step", {}, String(row.step)),
    el("span.kind", {}, humanize(row.kind)),
    el("span.question", {}, row.question),
    el("span.answer", {}, answer),
    el("span.num.reward", {}, number(row.reward)),
    el("span.num.advantage", {}, signed(row.advantage)),
    el("span.num.zooms", { title: row.refused > 0 && `${row.refused} rejected` }, row.refused ? el("small", {}, `${row.refused}✕ `) : null, String(row.zooms)),
    el("span.num.frames", {}, String(row.frames)),
    el("span.num.seconds", {}, number(row.seconds, 1)),
  );
}

/** Sort buttons and titles; `set` receives the sort order. */
export function headers(params, set) {
  const sort = params.get("sort") || "newest";
  const ascending = params.get("ascending") === "true";
  return COLUMNS.map(([name, title, align]) => {
    if (!name) return el("span", {}, title);
    const active = sort === name;
    const arrow = active ? (ascending ? "↑" : "↓") : "";
    const label = active ? `${title}, sorted ${ascending ? "lowest" : "highest"} first` : `Sort by ${title.toLowerCase()}`;
    const onclick = () => set({ sort: active && ascending ? "" : name, ascending: active && !ascending ? "true" : "" });
    return el(align ? `button.${align}` : "button", { type: "button", "aria-label": label, "aria-pressed": String(active), onclick }, `${title}${arrow && ` ${arrow}`}`);
  });
}
