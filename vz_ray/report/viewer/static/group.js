/** Group page: all samples on a common timeline. */
import { el } from "/web/dom.js";
import { timeline } from "/web/timeline.js";
import { address, get, listParams } from "./api.js";
import { count, humanize, number, outcomeLabel, outcomeOf, signed, stageLabel, tone } from "./format.js";

export async function groupPage(id, params) {
  const group = await get(`/api/episode/${id}/group`);
  const listSettings = listParams(params);
  const sampleAddress = (sample, time) => {
    const sampleParams = new URLSearchParams(listSettings);
    if (time !== undefined) sampleParams.set("t", time);
    return address("episode", sample.id, sampleParams);
  };
  const timelines = [];
  const addTimeline = (options) => {
    const track = timeline({ duration: group.duration, events: group.task.events, ...options });
    timelines.push(track);
    return track.element;
  };
  const row = (sample) =>
    el(
      sample.id === id ? "li.sample.current" : "li.sample", {},
      el("a", { href: sampleAddress(sample), "aria-current": sample.id === id && "true" },
        el("b", {}, `Sample ${sample.sample}${sample.attempt ? `, attempt ${sample.attempt}` : ""}`),
        el(`span.outcome.${tone(sample)}`, {}, outcomeLabel(outcomeOf(sample)))),
      addTimeline({ compact: true, zooms: sample.zoomed, label: `Sample ${sample.sample}`, onSeek: (time) => (location.hash = sampleAddress(sample, time)) }),
      el("dl.facts", {}, fact("Reward", number(sample.reward)), fact("Advantage", signed(sample.advantage)), fact("Answer", sample.answer ?? `none (${humanize(sample.status)})`), fact("Frames", sample.frames)),
    );
  const shownNote = group.samples.length < group.size ? `, ${count(group.samples.length)} are shown` : "";
  const rows = el("ol.samples", {}, group.samples.map(row));
  const element = el(
    "article.group", {},
    el("header.page-header", {},
      el("nav", { "aria-label": "Episodes" }, el("a.secondary", { href: address("list", 0, listSettings) }, "← Episodes"), el("a.secondary", { href: address("episode", id, listSettings) }, "Episode")),
      el("h2", { tabindex: -1 }, `${group.size} sample${group.size === 1 ? "" : "s"}`, el("small", {}, `${stageLabel(group.stage)}, step ${group.step}${shownNote}`)),
      el("p.question", {}, group.task.question.text), el("p.note", {}, `Ground truth: ${group.task.answer.text}`)),
    el("section.card", { "aria-label": "Samples" },
      el("div.sample.overview-row", {}, el("span.note", {}, "Overview"), addTimeline({ ticks: group.ticks, label: "Overview" }), el("span")),
      rows),
  );
  const links = () => [...rows.querySelectorAll("li > a")];

  function keys(event) {
    const focused = links().indexOf(document.activeElement);
    const current = group.samples.findIndex((sample) => sample.id === id);
    if (event.key === "Escape") location.hash = address("list", 0, listSettings);
    else if (event.key === "g") location.hash = address("episode", id, listSettings);
    else if (["j", "ArrowDown"].includes(event.key)) links()[focused < 0 ? current : Math.min(focused + 1, links().length - 1)].focus();
    else if (["k", "ArrowUp"].includes(event.key)) links()[focused < 0 ? current : Math.max(focused - 1, 0)].focus();
    else return false;
    return true;
  }

  /** Load the length of the video, if available. */
  async function onAttached() {
    const video = await get(`/api/video/${group.video}`).catch(() => ({ error: "gone" }));
    if (!video.error) timelines.forEach((track) => track.setDuration(Math.max(video.duration, group.duration * 0.5)));
  }

  return { element, title: `${group.size} samples, step ${group.step}`, keys, onAttached, close: () => {} };
}

const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)));
