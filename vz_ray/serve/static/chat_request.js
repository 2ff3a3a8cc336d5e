/** Build chat requests and parse options of a question. No DOM access. */

/** Longest side of the returned thumbnails, pixels. */
const THUMBNAIL_SIZE = 96;

/**
 * Build the messages of a chat and a new question. All videos precede the first question, because the server
 * numbers videos in order of appearance. Exchanges without an answer (stopped or failed) are omitted.
 *
 *   messagesOf([{ id: "file-1" }], [{ question: "What?", answer: "B" }], "When?")
 */
export function messagesOf(videos, exchanges, question) {
  const videoParts = videos.map((video) =>
    video.id ? { type: "file", file: { file_id: video.id } } : { type: "video_url", video_url: { url: video.url } },
  );
  const messages = [];
  for (const exchange of exchanges) {
    if (!exchange.answer) continue;
    messages.push({ role: "user", content: exchange.question }, { role: "assistant", content: exchange.answer });
  }
  messages.push({ role: "user", content: question });
  messages[0] = { role: "user", content: [...videoParts, { type: "text", text: messages[0].content }] };
  return messages;
}

/** Build the body of a request; `zooms` is the maximum number of zooms, or null for the agent's limit. */
export function requestOf(model, messages, zooms) {
  const extensions = { thumbnails: THUMBNAIL_SIZE };
  if (zooms !== null) extensions.max_zooms = zooms;
  return { model, messages, stream: true, stream_options: { include_usage: true }, vz_ray: extensions };
}

/**
 * Split a question into its stem and options, on one line or several:
 *
 *   optionsOf("What flashes? A. disc B. ring") is { stem: "What flashes?", options: [["A", "disc"], ["B", "ring"]] }
 *
 * Options must start with A and be consecutive; otherwise the list is empty.
 */
export function optionsOf(text) {
  const markers = [...text.matchAll(/(^|\s)\(?([A-Z])[.):]\s+/g)];
  const first = markers.findIndex((marker, k) => marker[2] === "A" && markers[k + 1]?.[2] === "B");
  if (first < 0) return { stem: text.trim(), options: [] };
  const consecutive = [];
  for (const marker of markers.slice(first)) {
    if (marker[2].charCodeAt(0) !== 65 + consecutive.length) break;
    consecutive.push(marker);
  }
  const options = consecutive.map((marker, k) => [marker[2], text.slice(marker.index + marker[0].length, consecutive[k + 1]?.index).trim()]);
  return { stem: text.slice(0, consecutive[0].index).trim(), options };
}

/** Return the letter of the chosen option for answers such as "B", "(b)", "B. ring" or "ring"; else "". */
export function chosenOption(answer, options) {
  const match = /^\W*([A-Za-z])\W*$/.exec(answer) ?? /^\W*([A-Z])\s*[.):,]/.exec(answer);
  const letter = match?.[1].toUpperCase();
  const normalized = answer.trim().toLowerCase();
  return options.find(([name, text]) => name === letter || text.toLowerCase() === normalized)?.[0] ?? "";
}
