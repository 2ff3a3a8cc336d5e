/**
 * Zooms of one exchange: a timeline for each video, and strips of the decoded frames.
 *
 *   const timelines = zoomTimelines(videos, (video, seconds) => {});
 *   page.append(timelines.element);
 *   turns.append(timelines.overview({ video: 0, duration: 64, pts: [0, 4], thumbnails: [...] }));
 *   timelines.zooming({ turn: 0, video: 0, segment: [8, 12], fps: 4 });
 *   turns.append(timelines.zoom({ turn: 0, video: 0, segment: [8, 12], fps: 4, pts: [...], refused: null }));
 *   timelines.setNow(video, 8.5);
 */
import { el } from "./web/dom.js";
import { frameStrip } from "./web/frame_strip.js";
import { timeline } from "./web/timeline.js";

/** The last frame of a zoom stays highlighted for this time after its own time, seconds. */
const HIGHLIGHT_S = 0.5;

export function zoomTimelines(videos, onSeek, compact) {
  const element = el("div.timelines");
  const slots = videos.map((video) => addSlot(video)); // one per video: { video, track, container }
  const strips = [];
  const pending = new Map();

  function addSlot(video) {
    const slotElement = el("div.video-timeline");
    if (videos.length > 1) slotElement.append(el("button.video-timeline-name", { type: "button", onclick: () => onSeek(video, 0) }, video.name));
    const container = el("div");
    slotElement.append(container);
    element.append(slotElement);
    return { video, track: null, container };
  }

  function draw(slot, duration, ticks) {
    const seek = (seconds) => onSeek(slot.video, Math.max(0, seconds));
    const label = videos.length > 1 ? `Timeline of ${slot.video.name},` : "Timeline";
    slot.track = timeline({ duration, ticks, compact, label, onSeek: seek });
    slot.container.replaceChildren(slot.track.element);
  }

  function addBar(zoom, state, reason) {
    const { track } = slots[zoom.video] ?? {};
    return track?.add({ turn: zoom.turn + 1, start: zoom.segment[0], end: zoom.segment[1], fps: zoom.fps }, state, reason);
  }

  /** Build a strip of frames. Their size is known after the first frame is decoded. */
  function frames(video, { pts, thumbnails = [] }, isZoom) {
    const container = el("div.frames");
    const build = (width, height) => {
      const strip = frameStrip({ times: pts, width, height, onSeek: (seconds) => onSeek(video, seconds) });
      if (thumbnails.length) strip.show(thumbnails);
      container.replaceChildren(strip.element);
      strips.push({ strip, video, from: pts[0], to: isZoom ? pts.at(-1) + HIGHLIGHT_S : Infinity });
    };
    if (!thumbnails.length) build(video.width || 16, video.height || 9);
    else {
      const first = new Image();
      first.src = thumbnails[0];
      first.decode().then(() => build(first.naturalWidth, first.naturalHeight), () => build(16, 9));
    }
    return container;
  }

  for (const slot of slots) if (slot.video.duration) draw(slot, slot.video.duration, []);

  return {
    element,
    /** Return " of NAME" if there are several videos. */
    nameSuffix: (number) => (videos.length > 1 ? ` of ${videos[number]?.name ?? `video ${number}`}` : ""),
    overview(event) {
      const slot = slots[event.video];
      slot.video.setDuration(event.duration);
      draw(slot, event.duration, event.pts);
      return frames(slot.video, event, false);
    },
    zooming(zoom) {
      pending.set(zoom.turn, addBar(zoom, "pending"));
    },
    zoom(zoom) {
      const bar = pending.get(zoom.turn);
      pending.delete(zoom.turn);
      if (bar) bar.settle(zoom.refused ? "refused" : "", zoom.refused ?? "");
      else if (zoom.segment) addBar(zoom, zoom.refused ? "refused" : "", zoom.refused ?? "");
      return zoom.pts.length ? frames(slots[zoom.video].video, zoom, true) : null;
    },
    /** Mark all pending zooms as refused. */
    end(reason) {
      for (const bar of pending.values()) bar?.settle("refused", reason);
      pending.clear();
    },
    setNow(video, seconds) {
      for (const { video: owner, track } of slots) track?.setNow(owner === video ? seconds : null);
      for (const { strip, video: owner, from, to } of strips) strip.setNow(owner === video && from - 1e-3 <= seconds && seconds <= to ? seconds : null);
    },
  };
}
