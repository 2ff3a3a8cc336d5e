/**
 * Video player for one of the chat's videos at a time.
 *
 *   const screen = player((video, seconds) => {});   // callback with the position
 *   screen.show(video); screen.seek(video, 12.5); screen.addFrames(video, pts, thumbnails);
 *
 * If the browser cannot play a video (a URL of another site, which the page's content security policy
 * forbids, or an unsupported format), the player shows the frames that the agent received.
 */
import { clock, el } from "./web/dom.js";

export function player(onTime) {
  const screen = el("video", { controls: true, playsinline: true, preload: "metadata" });
  const still = el("img.still", { alt: "" });
  const note = el("p.screen-note");
  const stand = el("div.stand-in", { hidden: true }, still, note);
  const element = el("div.screen", {}, screen, stand);
  let current = null;

  const reportTime = () => current && onTime(current, screen.currentTime);
  for (const event of ["timeupdate", "seeking", "seeked"]) screen.addEventListener(event, reportTime);
  screen.addEventListener("loadedmetadata", () => current?.setDuration(screen.duration));
  screen.addEventListener("error", () => {
    if (!current || !screen.getAttribute("src")) return;
    current.unplayable = true;
    standIn();
  });

  function standIn() {
    screen.hidden = true;
    stand.hidden = false;
    const why = current.url ? "This page cannot play videos of other sites." : "This browser does not support the video format; the agent does.";
    const link = current.url && el("a", { href: current.url, target: "_blank", rel: "noreferrer noopener" }, "Open it");
    note.replaceChildren(`${why} Showing the frames that the agent received. `, ...(link ? [link] : []));
    if (!current.frames.size) still.removeAttribute("src");
    else frame([...current.frames.keys()][0]);
  }

  /** Show the last received frame up to a time, or the first one. */
  function frame(seconds) {
    const times = [...current.frames.keys()].sort((a, b) => a - b);
    const time = times.findLast((candidate) => candidate <= seconds + 1e-3) ?? times[0];
    if (time === undefined) return;
    still.src = current.frames.get(time);
    still.alt = `Frame at ${clock(time)}`;
  }

  function show(video) {
    if (video === current) return;
    current = video;
    screen.hidden = false;
    stand.hidden = true;
    screen.pause();
    if (video?.source && !video.unplayable) {
      screen.src = video.source;
      screen.setAttribute("aria-label", video.name);
    } else {
      screen.removeAttribute("src");
      screen.load();
      if (video) standIn();
    }
  }

  return {
    element,
    show,
    seek(video, seconds) {
      show(video);
      if (screen.hidden) {
        frame(seconds);
        onTime(video, seconds);
      } else screen.currentTime = seconds;
    },
    /** Add frames of a video that the agent received. */
    addFrames(video, times, pictures) {
      times.forEach((time, k) => pictures[k] && video.frames.set(time, pictures[k]));
      if (video === current && screen.hidden && !still.getAttribute("src")) frame(0);
    },
  };
}
