/**
 * Plays one of a chat's videos at a time.
 *
 *   const screen = player((video, seconds) => {});   // is told where it is
 *   screen.show(video); screen.seek(video, 12.5); screen.learn(video, pts, thumbnails);
 *
 * Where the browser cannot play a video (it lies at another address, which the page's own policy
 * forbids, or is of a kind that it does not know), the frames that the agent has seen stand in for it.
 */
import { clock, el } from "./web/dom.js";

export function player(onTime) {
  const screen = el("video", { controls: true, playsinline: true, preload: "metadata" });
  const still = el("img.still", { alt: "" });
  const note = el("p.screen-note");
  const stand = el("div.stand-in", { hidden: true }, still, note);
  const element = el("div.screen", {}, screen, stand);
  let current = null;

  const tell = () => current && onTime(current, screen.currentTime);
  for (const event of ["timeupdate", "seeking", "seeked"]) screen.addEventListener(event, tell);
  screen.addEventListener("loadedmetadata", () => current?.knows(screen.duration));
  screen.addEventListener("error", () => {
    if (!current || !screen.getAttribute("src")) return;
    current.unplayable = true;
    standIn();
  });

  function standIn() {
    screen.hidden = true;
    stand.hidden = false;
    const why = current.url ? "It is not played here, since it lies elsewhere." : "This browser cannot play this kind of video; the agent can.";
    const link = current.url && el("a", { href: current.url, target: "_blank", rel: "noreferrer noopener" }, "Open it");
    note.replaceChildren(`${why} Frames that the agent saw are shown here. `, ...(link ? [link] : []));
    if (!current.seen.size) still.removeAttribute("src");
    else frame([...current.seen.keys()][0]);
  }

  /** Shows the last frame seen up to a time, or the first. */
  function frame(seconds) {
    const times = [...current.seen.keys()].sort((a, b) => a - b);
    const time = times.findLast((one) => one <= seconds + 1e-3) ?? times[0];
    if (time === undefined) return;
    still.src = current.seen.get(time);
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
    /** Frames of a video that the agent has seen. */
    learn(video, times, pictures) {
      times.forEach((time, k) => pictures[k] && video.seen.set(time, pictures[k]));
      if (video === current && screen.hidden && !still.getAttribute("src")) frame(0);
    },
  };
}
