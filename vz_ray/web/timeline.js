/**
 * Timeline of a video: ticks, events, and one bar per zoom. Styles are in components.css.
 *
 *   const track = timeline({ duration: 64, ticks: [0, 4], events: [[9, 10]], zooms: [], onSeek: (s, zoom) => {} });
 *   page.append(track.element);
 *   const bar = track.add({ turn: 1, start: 8, end: 12, fps: 4 }, "pending");   // for each zoom
 *   bar.settle();                                       // it was executed, or
 *   bar.settle("refused", "no room is left");           // it was refused; a zoom that was refused before decoding:
 *   track.add({ turn: 2, start: 60, end: 90, fps: 1, refused: "it is outside the video" });
 *   track.setDuration(63.9);                             // when the exact duration is known
 *   track.setNow(8.2);                                   // position of the player; null hides it
 *
 * Times are seconds. A zoom is { turn, start, end, fps, video?, refused? }, `video` is a name if there are
 * several; `refused` is the error of a refused zoom, whose segment may be reversed or beyond the end.
 * `compact` puts bars without overlap into one row, labels them with their turn, and omits the scale.
 * Bars are buttons with labels; `onSeek` is called with the start of a bar and its zoom, or with the
 * time of a click elsewhere on the track. Without `onSeek` the timeline is not clickable.
 */
import { clock, el } from "./dom.js";

const STATE_NOTES = { pending: () => ", being decoded", refused: (reason) => `, refused: ${reason}` };

function describe(zoom) {
  const videoName = zoom.video ? ` of ${zoom.video}` : "";
  return `Turn ${zoom.turn}: ${clock(zoom.start)} to ${clock(zoom.end)}${videoName} at ${Number(zoom.fps.toFixed(2))} fps`;
}

export function timeline({ duration, ticks = [], events = [], zooms = [], onSeek = null, compact = false, label = "" }) {
  let length = Math.max(duration, 1e-3);
  const positioners = []; // functions that update positions when the duration changes
  const overview = el("div.tl-row.tl-overview");
  const playhead = el("span.tl-playhead", { hidden: true });
  const track = el("div.tl-track", {}, overview);
  const scale = compact ? null : el("div.tl-scale", { "aria-hidden": "true" });
  const element = el(compact ? "div.tl.compact" : "div.tl", { role: "group" }, track, scale);
  const barStates = []; // functions that return the state of a bar
  const rows = [{ row: overview, spans: [] }]; // rows of a compact timeline

  const percent = (seconds) => `${(100 * Math.min(Math.max(seconds / length, 0), 1)).toFixed(3)}%`;
  const keepPositioned = (position) => {
    positioners.push(position);
    position();
  };
  const setSpan = (node, start, end) =>
    keepPositioned(() => {
      // A bar that begins beyond the end is shown at the end.
      node.style.left = `min(${percent(start)}, 100% - 5px)`;
      node.style.width = percent(Math.max(0, Math.min(end, length) - Math.max(start, 0)));
    });

  /** Return the first row in which the bar overlaps no other bar. */
  function rowFor({ start, end }) {
    let available = rows.find(({ spans }) => spans.every(([from, to]) => end <= from || to <= start));
    if (!available) {
      available = { row: el("div.tl-row"), spans: [] };
      rows.push(available);
      track.append(available.row);
    }
    available.spans.push([start, end]);
    return available.row;
  }

  function relabel() {
    const refused = barStates.filter((state) => state() === "refused").length;
    const zooms = barStates.length - refused;
    const counts = `${zooms} zoom${zooms === 1 ? "" : "s"}${refused ? ` and ${refused} refused` : ""}, ${events.length} event${events.length === 1 ? "" : "s"}`;
    element.setAttribute("aria-label", `${label || "Timeline"} of ${clock(length)}: ${counts}`);
    if (scale) scale.replaceChildren(...[0, 1, 2, 3, 4].map((k) => el("span", {}, clock((length * k) / 4))));
  }

  function add(zoom, state = zoom.refused ? "refused" : "", reason = zoom.refused ?? "") {
    const bar = el("button.tl-zoom", { type: "button", disabled: !onSeek });
    barStates.push(() => bar.dataset.state);
    const settle = (newState = "", reason = "") => {
      bar.dataset.state = newState;
      bar.title = describe(zoom) + (STATE_NOTES[newState]?.(reason) ?? "");
      bar.setAttribute("aria-label", bar.title);
      relabel();
    };
    settle(state, reason);
    const [start, end] = [Math.min(zoom.start, zoom.end), Math.max(zoom.start, zoom.end)];
    if (onSeek) bar.addEventListener("click", () => onSeek(Math.min(Math.max(start, 0), length), zoom));
    setSpan(bar, start, end);
    if (compact) {
      bar.append(String(zoom.turn));
      rowFor({ start, end }).append(bar);
    } else {
      const zoomLabel = el("span.tl-label", { "aria-hidden": "true" }, `turn ${zoom.turn} · ${Number(zoom.fps.toFixed(2))} fps`);
      keepPositioned(() => {
        const labelLeft = (start + end) / 2 > 0.55 * length;
        zoomLabel.style.left = labelLeft ? "auto" : percent(end);
        zoomLabel.style.right = labelLeft ? percent(length - start) : "auto";
      });
      track.append(el("div.tl-row", {}, bar, zoomLabel));
    }
    return { settle };
  }

  for (const [start, end] of events) {
    const band = el("span.tl-event", { title: `event ${clock(start)} to ${clock(end)}` });
    setSpan(band, start, end);
    track.prepend(band);
  }
  for (const tick of ticks) {
    const mark = el("span.tl-tick", { title: clock(tick) });
    keepPositioned(() => (mark.style.left = percent(tick)));
    overview.append(mark);
  }
  track.append(playhead);
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
      positioners.forEach((position) => position());
      relabel();
    },
    setNow(seconds) {
      playhead.hidden = seconds === null;
      if (seconds !== null) playhead.style.left = percent(seconds);
    },
  };
}
