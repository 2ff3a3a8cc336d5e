/**
 * Where the agent looked in one round: a timeline for each video, and strips of what it saw.
 *
 *   const looks = roundLooks(videos, (video, seconds) => {});
 *   stage.append(looks.element);
 *   steps.append(looks.overview({ video: 0, duration: 64, pts: [0, 4], thumbnails: [...] }));
 *   looks.zooming({ turn: 0, video: 0, segment: [8, 12], fps: 4 });
 *   steps.append(looks.zoom({ turn: 0, video: 0, segment: [8, 12], fps: 4, pts: [...], refused: null }));
 *   looks.setNow(video, 8.5);
 */
import { el } from "./web/dom.js";
import { strip } from "./web/frame_strip.js";
import { timeline } from "./web/timeline.js";

/** Seconds after the last frame of a zoom while it is still what a player shows. */
const AFTER_S = 0.5;

export function roundLooks(videos, onSeek, compact) {
  const element = el("div.lanes");
  const lanes = videos.map((video) => lane(video));
  const strips = [];
  const pending = new Map();

  function lane(video) {
    const slot = el("div.lane");
    if (videos.length > 1) slot.append(el("button.lane-name", { type: "button", onclick: () => onSeek(video, 0) }, video.name));
    const hold = el("div");
    slot.append(hold);
    element.append(slot);
    return { video, line: null, hold };
  }

  function draw(lane, duration, ticks) {
    const seek = (seconds) => onSeek(lane.video, Math.max(0, seconds));
    const label = videos.length > 1 ? `Timeline of ${lane.video.name},` : "Timeline";
    lane.line = timeline({ duration, ticks, compact, label, onSeek: seek });
    lane.hold.replaceChildren(lane.line.element);
  }

  function bar(zoom, state, why) {
    const { line } = lanes[zoom.video] ?? {};
    return line?.add({ turn: zoom.turn + 1, start: zoom.segment[0], end: zoom.segment[1], fps: zoom.fps }, state, why);
  }

  /** A strip of frames; how large they are is known once the first of them is decoded. */
  function frames(video, { pts, thumbnails = [] }, zoomed) {
    const slot = el("div.frames");
    const build = (width, height) => {
      const one = strip({ times: pts, width, height, onSeek: (seconds) => onSeek(video, seconds) });
      if (thumbnails.length) one.show(thumbnails);
      slot.replaceChildren(one.element);
      strips.push({ one, video, from: pts[0], to: zoomed ? pts.at(-1) + AFTER_S : Infinity });
    };
    if (!thumbnails.length) build(video.width || 16, video.height || 9);
    else {
      const first = new Image();
      first.src = thumbnails[0];
      first.decode().then(() => build(first.naturalWidth, first.naturalHeight), () => build(16, 9));
    }
    return slot;
  }

  for (const one of lanes) if (one.video.duration) draw(one, one.video.duration, []);

  return {
    element,
    /** " of NAME", where there are several videos. */
    of: (number) => (videos.length > 1 ? ` of ${videos[number]?.name ?? `video ${number}`}` : ""),
    overview(seen) {
      const one = lanes[seen.video];
      one.video.knows(seen.duration);
      draw(one, seen.duration, seen.pts);
      return frames(one.video, seen, false);
    },
    zooming(zoom) {
      pending.set(zoom.turn, bar(zoom, "pending"));
    },
    zoom(zoom) {
      const begun = pending.get(zoom.turn);
      pending.delete(zoom.turn);
      if (begun) begun.settle(zoom.refused ? "refused" : "", zoom.refused ?? "");
      else if (zoom.segment) bar(zoom, zoom.refused ? "refused" : "", zoom.refused ?? "");
      return zoom.pts.length ? frames(lanes[zoom.video].video, zoom, true) : null;
    },
    /** Nothing more will come of what has begun. */
    end(why) {
      for (const begun of pending.values()) begun?.settle("refused", why);
      pending.clear();
    },
    setNow(video, seconds) {
      for (const { video: whose, line } of lanes) line?.setNow(whose === video ? seconds : null);
      for (const { one, video: whose, from, to } of strips) one.setNow(whose === video && from - 1e-3 <= seconds && seconds <= to ? seconds : null);
    },
  };
}
