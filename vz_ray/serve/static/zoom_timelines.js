/**
 * Zooms of one exchange: a timeline for each video, and strips of the decoded frames.
 *
 *   const timelines = zoomTimelines(videos, (video, seconds) => {});
 *   stage.append(timelines.element);
 *   steps.append(timelines.overview({ video: 0, duration: 64, pts: [0, 4], thumbnails: [...] }));
 *   timelines.zooming({ turn: 0, video: 0, segment: [8, 12], fps: 4 });
 *   steps.append(timelines.zoom({ turn: 0, video: 0, segment: [8, 12], fps: 4, pts: [...], refused: null }));
 *   timelines.setNow(video, 8.5);
 */
import { el } from "./web/dom.js";
import { strip } from "./web/frame_strip.js";
import { timeline } from "./web/timeline.js";

/** A zoom's last frame is highlighted for this time after its own, seconds. */
const AFTER_S = 0.5;

export function zoomTimelines(videos, onSeek, compact) {
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

  /** Build a strip of frames. Their size is known after the first frame is decoded. */
  function frames(video, { pts, thumbnails = [] }, zoomed) {
    const slot = el("div.frames");
    const build = (width, height) => {
      const entry = strip({ times: pts, width, height, onSeek: (seconds) => onSeek(video, seconds) });
      if (thumbnails.length) entry.show(thumbnails);
      slot.replaceChildren(entry.element);
      strips.push({ frameStrip: entry, video, from: pts[0], to: zoomed ? pts.at(-1) + AFTER_S : Infinity });
    };
    if (!thumbnails.length) build(video.width || 16, video.height || 9);
    else {
      const first = new Image();
      first.src = thumbnails[0];
      first.decode().then(() => build(first.naturalWidth, first.naturalHeight), () => build(16, 9));
    }
    return slot;
  }

  for (const entry of lanes) if (entry.video.duration) draw(entry, entry.video.duration, []);

  return {
    element,
    /** Return " of NAME" if there are several videos. */
    nameSuffix: (number) => (videos.length > 1 ? ` of ${videos[number]?.name ?? `video ${number}`}` : ""),
    overview(event) {
      const entry = lanes[event.video];
      entry.video.setDuration(event.duration);
      draw(entry, event.duration, event.pts);
      return frames(entry.video, event, false);
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
    /** Mark all pending zooms as refused. */
    end(why) {
      for (const begun of pending.values()) begun?.settle("refused", why);
      pending.clear();
    },
    setNow(video, seconds) {
      for (const { video: owner, line } of lanes) line?.setNow(owner === video ? seconds : null);
      for (const { frameStrip, video: owner, from, to } of strips) frameStrip.setNow(owner === video && from - 1e-3 <= seconds && seconds <= to ? seconds : null);
    },
  };
}
