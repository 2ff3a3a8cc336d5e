/**
 * A strip of frames with their times; a click on a frame seeks to it. Styles are in components.css.
 *
 *   const strip = frameStrip({ times: [0, 4, 8], events: [[4, 5]], width: 112, height: 112, onSeek: (s) => {} });
 *   page.append(strip.element);
 *   strip.show(["data:image/png;base64,...", ...]);   // images, in the order of the times
 *   strip.fail("the video is gone");                  // error message instead of images
 *   strip.setNow(4.2);                                // mark the frame at that time; null marks none
 *
 * Times are ascending, in seconds; null for an image without a time. Frames within an event are marked.
 */
import { clock, el } from "./dom.js";

const HEIGHT = 68;

export function frameStrip({ times, events = [], width = 1, height = 1, onSeek = null, numOmitted = 0 }) {
  const frameWidth = Math.round(Math.min(HEIGHT * (width / Math.max(height, 1)), 2.4 * HEIGHT));
  const inEvent = (time) => events.some(([start, end]) => (start <= time && time < end) || time === start);
  const frames = times.map((time) => {
    const box = el("span.frame");
    box.style.width = `${frameWidth}px`;
    const isImage = time === null;
    const label = el("time", {}, isImage ? "picture" : clock(time));
    const content = isImage || !onSeek
      ? el("div.frame-item", {}, box, label)
      : el("button", { type: "button", "aria-label": `Frame at ${clock(time)}${inEvent(time) ? ", in the event" : ""}`, onclick: () => onSeek(time) }, box, label);
    return { time, box, item: el(inEvent(time) ? "li.in-event" : "li", {}, content) };
  });
  const list = el(Math.max(width, height) <= 64 ? "ol.frame-strip.tiny" : "ol.frame-strip", {}, frames.map((frame) => frame.item));
  if (numOmitted) list.append(el("li", {}, el("div.frame-item", {}, `and ${numOmitted} more`)));
  const element = el("div", {}, list);

  return {
    element,
    show(sources) {
      sources.forEach((source, k) => frames[k].box.replaceChildren(el("img", { src: source, alt: "" })));
    },
    fail(message) {
      list.classList.add("failed");
      frames.forEach((frame) => frame.item.classList.add("no-image"));
      element.prepend(el("p.frame-strip-error", {}, message));
    },
    setNow(now) {
      let last = -1;
      if (now !== null) frames.forEach((frame, k) => (last = frame.time !== null && frame.time <= now + 1e-3 ? k : last));
      frames.forEach((frame, k) => frame.item.classList.toggle("current", k === last));
    },
  };
}
