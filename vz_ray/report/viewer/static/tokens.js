/** Sampled tokens of a turn, shaded by log-prob or advantage. */
import { el } from "/web/dom.js";
import { signed } from "./format.js";

export const SHADES = [["logprob", "Log-prob"], ["advantage", "Advantage"], ["none", "None"]];
const MAX_OPACITY = 0.55;
const MAX_ADVANTAGE = 2; // Advantage with full shading, standard deviations.

/** Weight version that sampled token k. */
function versionOf(sampled, k) {
  const span = sampled.versions.find(([start, end]) => start <= k && k < end);
  return span ? span[2] : null;
}

/** Text of a turn: { element, shade(kind) }. */
export function tokenText(turn, advantage) {
  const sampled = turn.sampled;
  if (!sampled || !sampled.logprobs) return { element: el("div.turn-text", {}, turn.text.text), shade: () => {} };
  const hasTexts = sampled.texts !== null;
  const spans = sampled.logprobs.map((logprob, k) => {
    const version = versionOf(sampled, k);
    const tooltip = `p ${Math.exp(logprob).toFixed(3)} · log-prob ${signed(logprob, 3)} · id ${sampled.ids[k]}${version === null ? "" : ` · weights v${version}`}`;
    return el("span.token", { title: tooltip }, hasTexts ? sampled.texts[k] : `${sampled.ids[k]} `);
  });
  const text = el(hasTexts ? "div.turn-text" : "div.turn-text.token-ids", {}, spans);
  const element = hasTexts
    ? text
    : el("div", {}, el("div.turn-text", {}, turn.text.text), el("p.note", {}, "The tokenizer of this run is not available or does not match; showing token ids."), text);
  const shade = (kind) => {
    element.dataset.shade = kind;
    sampled.logprobs.forEach((logprob, k) => {
      const opacity = kind === "logprob" ? 1 - Math.exp(logprob) : kind === "advantage" ? Math.min(Math.abs(advantage ?? 0) / MAX_ADVANTAGE, 1) : 0;
      const color = kind === "logprob" ? "--s2" : (advantage ?? 0) >= 0 ? "--s3" : "--wrong";
      spans[k].style.background = opacity > 0.02 ? `color-mix(in srgb, var(${color}) ${(100 * MAX_OPACITY * opacity).toFixed(0)}%, transparent)` : "";
    });
  };
  return { element, shade };
}

/** Legend of the shading. */
export function shadeLegend(kind, advantage) {
  if (kind === "logprob") return ["likely", el("i.ramp.s2"), "unlikely: probability of the token under the engine that sampled it"];
  if (kind === "advantage")
    return [advantage === null ? "This episode has no advantage: it was not used for training." : `Every sampled token was trained with advantage ${signed(advantage)}: ${advantage >= 0 ? "made likelier" : "made less likely"}.`];
  return [];
}
