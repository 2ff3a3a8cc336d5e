/** Formatting of values. */

export const humanize = (name) => name.replaceAll("_", " ");

const OUTCOME_LABELS = {
  right_place_too_coarse: "too coarse",
  right_evidence_wrong_answer: "saw it, misread",
  zoomed_place_unknown: "zoomed, wrong",
  unjudged: "not scored",
};

/** Label of an outcome or failure. */
export const outcomeLabel = (name) => OUTCOME_LABELS[name] || humanize(name);

/** Outcome of an episode: its failure mode, right, wrong or unscored. */
export const outcomeOf = (row) => row.failure || row.outcome;

/** CSS class of the outcome. */
export const tone = (row) => (row.outcome === "right" ? "right" : row.outcome === "wrong" ? "wrong" : "unknown");

export function number(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

export function signed(value, digits = 2) {
  return value === null || value === undefined ? "–" : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(digits)}`;
}

/** Format a number of any size briefly: 3.2e-6, 0.125, 12,345. */
export function compact(value) {
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return count(value);
  return Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}

export const count = (value) => value.toLocaleString("en");

export const seconds = (value) => (value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(0)} s`);

export const stageLabel = (stage) =>
  ({ train: "training", rl: "after RL", cold_start: "after cold start", sft_continued: "SFT continued" })[stage] ||
  (stage.startsWith("uniform_") ? `uniform, ${stage.slice(8)} frames` : humanize(stage));
