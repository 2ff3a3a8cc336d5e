/**
 * Where in a video somebody looked: ticks, events, and one bar per zoom. Styles are in components.css.
 *
 *   const line = timeline({ duration: 64, ticks: [0, 4], events: [[9, 10]], zooms: [], onSeek: (s, zoom) => {} });
 *   page.append(line.element);
 *   const bar = line.add({ turn: 1, start: 8, end: 12, fps: 4 }, "pending");   // as often as zooms arrive
 *   bar.settle();                                       // it was carried out, or
 *   bar.settle("refused", "no room is left");           // it was not; one that never began to be decoded:
 *   line.add({ turn: 2, start: 60, end: 90, fps: 1, refused: "it is outside the video" });
 *   line.setDuration(63.9);                             // once it is known better
 *   line.setNow(8.2);                                   // where a player is; null hides it
 *
 * Times are seconds. A zoom is { turn, start, end, fps, video?, refused? }, `video` a name where there are
 * several, `refused` why it was not carried out; such a one may be reversed, or lie beyond the end.
 * `compact` puts bars that do not overlap into one row, with their turns in place of tags, without a scale.
 * Bars are buttons with labels; `onSeek` is called with the start of a bar and its zoom, or with the
 * time of a click elsewhere on the track. Without `onSeek` nothing can be clicked.
 */
import { clock, el } from "./dom.js";

const NOTES = { pending: () => ", being decoded", refused: (why) => `, refused: ${why}` };

function describe(zoom) {
  const where = zoom.video ? ` of ${zoom.video}` : "";
  return `Turn ${zoom.turn}: ${clock(zoom.start)} to ${clock(zoom.end)}${where} at ${Number(zoom.fps.toFixed(2))} fps`;
}

export function timeline({ duration, ticks = [], events = [], zooms = [], onSeek = null, compact = false, label = "" }) {
  let length = Math.max(duration, 1e-3);
  const placed = []; // What has to move when the duration changes: functions.
  const overview = el("div.tl-row.tl-overview");
  const now = el("span.tl-now", { hidden: true });
  const track = el("div.tl-track", {}, overview);
  const scale = compact ? null : el("div.tl-scale", { "aria-hidden": "true" });
  const element = el(compact ? "div.tl.compact" : "div.tl", { role: "group" }, track, scale);
  const shown = []; // The states of the bars: functions.
  const rows = [{ row: overview, taken: [] }]; // Of a compact timeline.

  const percent = (seconds) => `${(100 * Math.min(Math.max(seconds / length, 0), 1)).toFixed(3)}%`;
  const place = (move) => {
    placed.push(move);
    move();
  };
  const span = (node, start, end) =>
    place(() => {
      // What begins beyond the end is still seen, at the end.
      node.style.left = `min(${percent(start)}, 100% - 5px)`;
      node.style.width = percent(Math.max(0, Math.min(end, length) - Math.max(start, 0)));
    });

  /** The first row in which a bar overlaps no other. */
  function rowFor({ start, end }) {
    let free = rows.find(({ taken }) => taken.every(([from, to]) => end <= from || to <= start));
    if (!free) {
      free = { row: el("div.tl-row"), taken: [] };
      rows.push(free);
      track.append(free.row);
    }
    free.taken.push([start, end]);
    return free.row;
  }

  function relabel() {
    const refused = shown.filter((state) => state() === "refused").length;
    const zooms = shown.length - refused;
    const found = `${zooms} zoom${zooms === 1 ? "" : "s"}${refused ? ` and ${refused} refused` : ""}, ${events.length} event${events.length === 1 ? "" : "s"}`;
    element.setAttribute("aria-label", `${label || "Timeline"} of ${clock(length)}: ${found}`);
    if (scale) scale.replaceChildren(...[0, 1, 2, 3, 4].map((k) => el("span", {}, clock((length * k) / 4))));
  }

  function add(zoom, state = zoom.refused ? "refused" : "", why = zoom.refused ?? "") {
    const bar = el("button.tl-zoom", { type: "button", disabled: !onSeek });
    shown.push(() => bar.dataset.state);
    const settle = (now = "", why = "") => {
      bar.dataset.state = now;
      bar.title = describe(zoom) + (NOTES[now]?.(why) ?? "");
      bar.setAttribute("aria-label", bar.title);
      relabel();
    };
    settle(state, why);
    const [start, end] = [Math.min(zoom.start, zoom.end), Math.max(zoom.start, zoom.end)];
    if (onSeek) bar.addEventListener("click", () => onSeek(Math.min(Math.max(start, 0), length), zoom));
    span(bar, start, end);
    if (compact) {
      bar.append(String(zoom.turn));
      rowFor({ start, end }).append(bar);
    } else {
      const tag = el("span.tl-tag", { "aria-hidden": "true" }, `turn ${zoom.turn} · ${Number(zoom.fps.toFixed(2))} fps`);
      place(() => {
        const left = (start + end) / 2 > 0.55 * length;
        tag.style.left = left ? "auto" : percent(end);
        tag.style.right = left ? percent(length - start) : "auto";
      });
      track.append(el("div.tl-row", {}, bar, tag));
    }
    return { settle };
  }

  for (const [start, end] of events) {
    const band = el("span.tl-event", { title: `event ${clock(start)} to ${clock(end)}` });
    span(band, start, end);
    track.prepend(band);
  }
  for (const tick of ticks) {
    const mark = el("span.tl-tick", { title: clock(tick) });
    place(() => (mark.style.left = percent(tick)));
    overview.append(mark);
  }
  track.append(now);
  zooms.forEach((zoom) => add(zoom));
  relabel();
  if (onSeek)
    track.addEventListener("click", (event) => {
      if (event.target.closest("button")) return;
      const box = track.getBoundingClientRect();
      onSeek(((event.clientX - box.left) / box.width) * length, null);
    });

  return {
    element,
    add,
    setDuration(seconds) {
      length = Math.max(seconds, 1e-3);
      placed.forEach((move) => move());
      relabel();
    },
    setNow(seconds) {
      now.hidden = seconds === null;
      if (seconds !== null) now.style.left = percent(seconds);
    },
  };
}
