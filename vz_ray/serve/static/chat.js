/** What is sent to the server, and what a question's text says; nothing here touches the page. */

/** Pixels of the longest side of the frames that are sent back. */
const THUMBNAILS = 96;

/**
 * The messages of a chat and one more question. All videos stand before the first question, since the
 * server shows them in the order in which they are mentioned, and counts zooms by it; rounds that were
 * stopped or failed were never answered, and are left out.
 *
 *   messagesOf([{ id: "file-1" }], [{ question: "What?", answer: "B" }], "When?")
 */
export function messagesOf(videos, rounds, question) {
  const shown = videos.map((video) =>
    video.id ? { type: "file", file: { file_id: video.id } } : { type: "video_url", video_url: { url: video.url } },
  );
  const messages = [];
  for (const round of rounds) {
    if (!round.answer) continue;
    messages.push({ role: "user", content: round.question }, { role: "assistant", content: round.answer });
  }
  messages.push({ role: "user", content: question });
  messages[0] = { role: "user", content: [...shown, { type: "text", text: messages[0].content }] };
  return messages;
}

/** The body of a request; `zooms` is the most that may be taken, or null for the agent's own limit. */
export function requestOf(model, messages, zooms) {
  const own = { thumbnails: THUMBNAILS };
  if (zooms !== null) own.max_zooms = zooms;
  return { model, messages, stream: true, stream_options: { include_usage: true }, vz_ray: own };
}

/**
 * A question and the options that are written in it, on one line or on several:
 *
 *   optionsOf("What flashes? A. disc B. ring") is { stem: "What flashes?", options: [["A", "disc"], ["B", "ring"]] }
 *
 * Options begin with A and go on without a gap; else there are none.
 */
export function optionsOf(text) {
  const marks = [...text.matchAll(/(^|\s)\(?([A-Z])[.):]\s+/g)];
  const first = marks.findIndex((mark, k) => mark[2] === "A" && marks[k + 1]?.[2] === "B");
  if (first < 0) return { stem: text.trim(), options: [] };
  const run = [];
  for (const mark of marks.slice(first)) {
    if (mark[2].charCodeAt(0) !== 65 + run.length) break;
    run.push(mark);
  }
  const options = run.map((mark, k) => [mark[2], text.slice(mark.index + mark[0].length, run[k + 1]?.index).trim()]);
  return { stem: text.slice(0, run[0].index).trim(), options };
}

/** The letter of the option that an answer names ("B", "(b)", "B. ring", "ring"), or ""; "A ring" names none. */
export function chosen(answer, options) {
  const marked = /^\W*([A-Za-z])\W*$/.exec(answer) ?? /^\W*([A-Z])\s*[.):,]/.exec(answer);
  const letter = marked?.[1].toUpperCase();
  const said = answer.trim().toLowerCase();
  return options.find(([name, text]) => name === letter || text.toLowerCase() === said)?.[0] ?? "";
}
