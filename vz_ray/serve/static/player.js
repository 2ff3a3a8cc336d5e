/**
 * Video player for one of the chat's videos at a time.
 *
 *   const videoPlayer = player((video, seconds) => {});   // callback with the position
 *   videoPlayer.show(video); videoPlayer.seek(video, 12.5); videoPlayer.addFrames(video, pts, thumbnails);
 *
 * If the browser cannot play a video (a URL of another site, which the page's content security policy
 * forbids, or an unsupported format), the player shows the frames that the agent received.
 */
import { clock, el } from "./web/dom.js";

export function player(onTime) {
  const videoElement = el("video", { controls: true, playsinline: true, preload: "metadata" });
  const image = el("img.frame-image", { alt: "" });
  const note = el("p.player-note");
  const fallback = el("div.frame-fallback", { hidden: true }, image, note);
  const element = el("div.player", {}, videoElement, fallback);
  let current = null;

  const reportTime = () => current && onTime(current, videoElement.currentTime);
  for (const event of ["timeupdate", "seeking", "seeked"]) videoElement.addEventListener(event, reportTime);
  videoElement.addEventListener("loadedmetadata", () => current?.setDuration(videoElement.duration));
  videoElement.addEventListener("error", () => {
    if (!current || !videoElement.getAttribute("src")) return;
    current.unplayable = true;
    showFallback();
  });

  function showFallback() {
    videoElement.hidden = true;
    fallback.hidden = false;
    const reason = current.url ? "This page cannot play videos of other sites." : "This browser does not support the video format; the agent does.";
    const link = current.url && el("a", { href: current.url, target: "_blank", rel: "noreferrer noopener" }, "Open it");
    note.replaceChildren(`${reason} Showing the frames that the agent received. `, ...(link ? [link] : []));
    if (!current.frames.size) image.removeAttribute("src");
    else showFrame([...current.frames.keys()][0]);
  }

  /** Show the last received frame up to a time, or the first one. */
  function showFrame(seconds) {
    const times = [...current.frames.keys()].sort((a, b) => a - b);
    const time = times.findLast((candidate) => candidate <= seconds + 1e-3) ?? times[0];
    if (time === undefined) return;
    image.src = current.frames.get(time);
    image.alt = `Frame at ${clock(time)}`;
  }

  function show(video) {
    if (video === current) return;
    current = video;
    videoElement.hidden = false;
    fallback.hidden = true;
    videoElement.pause();
    if (video?.source && !video.unplayable) {
      videoElement.src = video.source;
      videoElement.setAttribute("aria-label", video.name);
    } else {
      videoElement.removeAttribute("src");
      videoElement.load();
      if (video) showFallback();
    }
  }

  return {
    element,
    show,
    seek(video, seconds) {
      show(video);
      if (videoElement.hidden) {
        showFrame(seconds);
        onTime(video, seconds);
      } else videoElement.currentTime = seconds;
    },
    /** Add frames of a video that the agent received. */
    addFrames(video, times, images) {
      times.forEach((time, k) => images[k] && video.frames.set(time, images[k]));
      if (video === current && videoElement.hidden && !image.getAttribute("src")) showFrame(0);
    },
  };
}
