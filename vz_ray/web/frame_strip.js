/**
 * A strip of frames with their times; a click on a frame seeks to it. Styles are in components.css.
 *
 *   const frames = strip({ times: [0, 4, 8], events: [[4, 5]], width: 112, height: 112, onSeek: (s) => {} });
 *   page.append(frames.element);
 *   frames.show(["data:image/png;base64,...", ...]);   // images, in the order of the times
 *   frames.fail("the video is gone");                  // error message instead of images
 *   frames.setNow(4.2);                                // mark the frame at that time; null marks none
 *
 * Times are ascending, in seconds; null for an image without a time. Frames within an event are marked.
 */
import { clock, el } from "./dom.js";

const HEIGHT = 68;

export function strip({ times, events = [], width = 1, height = 1, onSeek = null, more = 0 }) {
  const side = Math.round(Math.min(HEIGHT * (width / Math.max(height, 1)), 2.4 * HEIGHT));
  const inEvent = (time) => events.some(([start, end]) => (start <= time && time < end) || time === start);
  const frames = times.map((time) => {
    const box = el("span.frame");
    box.style.width = `${side}px`;
    const picture = time === null;
    const words = el("time", {}, picture ? "picture" : clock(time));
    const inside = picture || !onSeek
      ? el("div.picture", {}, box, words)
      : el("button", { type: "button", "aria-label": `Frame at ${clock(time)}${inEvent(time) ? ", in the event" : ""}`, onclick: () => onSeek(time) }, box, words);
    return { time, box, item: el(inEvent(time) ? "li.hit" : "li", {}, inside) };
  });
  const list = el(Math.max(width, height) <= 64 ? "ol.strip.tiny" : "ol.strip", {}, frames.map((frame) => frame.item));
  if (more) list.append(el("li", {}, el("div.picture", {}, `and ${more} more`)));
  const element = el("div", {}, list);

  return {
    element,
    show(sources) {
      sources.forEach((source, k) => frames[k].box.replaceChildren(el("img", { src: source, alt: "" })));
    },
    fail(why) {
      list.classList.add("gone");
      frames.forEach((frame) => frame.item.classList.add("bare"));
      element.prepend(el("p.strip-note", {}, why));
    },
    setNow(now) {
      let last = -1;
      if (now !== null) frames.forEach((frame, k) => (last = frame.time !== null && frame.time <= now + 1e-3 ? k : last));
      frames.forEach((frame, k) => frame.item.classList.toggle("at", k === last));
    },
  };
}
