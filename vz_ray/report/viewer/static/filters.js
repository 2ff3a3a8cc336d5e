/** Filter bar; the values are part of the page address. */
import { el } from "/web/dom.js";
import { count, humanize, outcomeLabel, stageLabel } from "./format.js";

const FAILURES = [
  "never_zoomed", "zoomed_elsewhere", "right_place_too_coarse", "right_evidence_wrong_answer", "zoomed_place_unknown",
  "bad_format", "ran_out_of_rounds", "truncated", "failed",
];
const FILTERS = ["text", "stage", "kind", "zooms", "outcome", "step_from", "step_to", "reward_from", "reward_to"];
const DEBOUNCE_MS = 250;

/**
 * Returns { element, fill(choices, params), search }.
 *
 * set(changes) receives new values by name; an empty value removes the filter.
 */
export function filterBar(set) {
  const fields = {};
  const select = (name, title) => {
    fields[name] = el("select", { onchange: (event) => set({ [name]: event.target.value }) });
    return el("label", {}, el("span", {}, title), fields[name]);
  };
  const numberField = (name, title, step) => {
    fields[name] = el("input", { type: "number", step, "aria-label": title, onchange: (event) => set({ [name]: event.target.value }) });
    return fields[name];
  };
  const range = (name, title, step) =>
    el("fieldset", {}, el("legend", {}, title), numberField(`${name}_from`, `${title} from`, step), el("span", { "aria-hidden": "true" }, "–"), numberField(`${name}_to`, `${title} to`, step));

  let typingTimer = 0;
  fields.text = el("input", {
    type: "search", placeholder: "Question or answer", maxlength: 200, autocomplete: "off", spellcheck: "false",
    oninput: (event) => {
      clearTimeout(typingTimer);
      typingTimer = setTimeout(() => set({ text: event.target.value }), DEBOUNCE_MS);
    },
  });
  const search = el("label.search", {}, el("span", {}, "Search ", el("kbd", {}, "/")), fields.text);
  const clear = el("button.secondary", { type: "button", onclick: () => set(Object.fromEntries(FILTERS.map((name) => [name, ""]))) }, "Clear");
  const more = el("div.more-filters", { id: "filters-more" }, select("stage", "Stage"), select("kind", "Kind"), select("outcome", "Outcome"), select("zooms", "Zooms"), range("step", "Step", "1"), range("reward", "Reward", "any"), clear);
  const toggle = el("button.secondary.filters-toggle", { type: "button", "aria-expanded": "false", "aria-controls": "filters-more" }, "Filters");
  toggle.addEventListener("click", () => toggle.setAttribute("aria-expanded", String(element.classList.toggle("open"))));
  const element = el("form.filters", { role: "search", onsubmit: (event) => event.preventDefault() }, search, toggle, more);

  const setOptions = (name, allLabel, rows) => {
    const option = ([value, title, number]) => el("option", { value }, number === undefined ? title : `${title} (${count(number)})`);
    fields[name].replaceChildren(option(["", allLabel]), ...rows.map((row) => (row.group ? el("optgroup", { label: row.group }, row.rows.map(option)) : option(row))));
  };

  return {
    element,
    search: fields.text,
    fill(choices, params) {
      if (choices) {
        setOptions("stage", "all", choices.stages.map(([stage, number]) => [stage, stageLabel(stage), number]));
        setOptions("kind", "all", choices.kinds.map(([kind, number]) => [kind, humanize(kind) || "none", number]));
        const belowMany = choices.zooms.filter(([zooms]) => zooms < choices.many_zooms);
        const many = choices.zooms.filter(([zooms]) => zooms >= choices.many_zooms).reduce((sum, [, number]) => sum + number, 0);
        setOptions("zooms", "any", [...belowMany.map(([zooms, number]) => [zooms, zooms, number]), ...(many ? [[choices.many_zooms, `${choices.many_zooms} or more`, many]] : [])]);
        setOptions("outcome", "all", [["right", "right"], ["wrong", "wrong"], ["unjudged", "not scored"], { group: "Failure modes", rows: FAILURES.map((name) => [name, outcomeLabel(name)]) }]);
        const [low, high] = choices.steps;
        for (const [name, value] of [["step_from", low], ["step_to", high]]) fields[name].placeholder = value ?? "";
        const [minimum, maximum] = choices.rewards;
        for (const [name, value] of [["reward_from", minimum], ["reward_to", maximum]]) fields[name].placeholder = value === null ? "" : Number(value.toFixed(2));
      }
      const active = FILTERS.filter((name) => params.get(name));
      for (const name of FILTERS) if (document.activeElement !== fields[name]) fields[name].value = params.get(name) || "";
      clear.hidden = !active.length;
      const numHidden = active.filter((name) => name !== "text").length;
      toggle.textContent = numHidden ? `Filters (${numHidden})` : "Filters";
    },
  };
}
