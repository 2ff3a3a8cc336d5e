/**
 * Choose videos: local files, a URL, or an earlier upload.
 *
 *   const picker = videoPicker({ onVideo: (source) => {},      // argument of Video
 *                                onProblem: (message) => {} });  // called if the picker is not visible
 *   page.append(picker.element); await picker.refresh();
 *   acceptDrops(onFiles);                                 // also pasted files
 */
import { call, get } from "./api.js";
import { clock, el } from "./web/dom.js";
import { day, size } from "./format.js";

const ACCEPTED_TYPES = "video/*,.mp4,.m4v,.mov,.mkv,.webm,.avi,.ts,.mpg,.mpeg,.flv";
/** Number of earlier uploads in the short list. */
const SHORT_LIST = 6;

export function videoPicker({ onVideo, onProblem }) {
  const errorMessage = el("p.error", { role: "alert", hidden: true });
  const showProblem = (message) => {
    errorMessage.textContent = message;
    errorMessage.hidden = !message;
    if (message && !element.checkVisibility()) onProblem(message);
  };
  const addFiles = (files) => {
    const notVideos = [...files].filter((file) => file.type && !file.type.startsWith("video/"));
    for (const file of files) if (!notVideos.includes(file)) onVideo({ file });
    showProblem(notVideos.length ? `${notVideos.map((file) => file.name).join(", ")}: not a video.` : "");
  };
  const earlier = earlierUploads(onVideo, showProblem);
  const element = el("div.video-picker", {}, filePicker(addFiles), urlForm(onVideo), errorMessage, earlier.element);
  return { element, addFiles, refresh: earlier.refresh };
}

function filePicker(addFiles) {
  const input = el("input.hidden-input", { type: "file", accept: ACCEPTED_TYPES, multiple: true, tabindex: -1, "aria-hidden": "true" });
  input.addEventListener("change", () => {
    addFiles(input.files);
    input.value = "";
  });
  const button = el("button.drop-target", { type: "button", onclick: () => input.click() }, el("b", {}, "Choose a video"), el("span", {}, "or drop one or several anywhere on this page"));
  return el("div", {}, button, input);
}

function urlForm(onVideo) {
  const input = el("input", { type: "url", id: "video-url", placeholder: "https://…", autocomplete: "off", spellcheck: "false", required: true, pattern: "https?://.+" });
  const form = el("form.url-form", {}, el("label", { for: "video-url" }, "By address"), input, el("button.secondary", { type: "submit" }, "Add"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onVideo({ url: input.value.trim() });
    form.reset();
  });
  return form;
}

function earlierUploads(onVideo, showProblem) {
  const list = el("ul.upload-list");
  const more = el("button.secondary", { type: "button", onclick: () => draw(Infinity) }, "Show all");
  const element = el("section.earlier-uploads", { hidden: true }, el("h2", {}, "Uploaded before"), list, more);
  let files = [];

  function draw(maximum) {
    element.hidden = !files.length;
    more.hidden = files.length <= maximum;
    list.replaceChildren(...files.slice(0, maximum).map(item));
  }

  function item(file) {
    const details = [file.duration_s && clock(Math.round(file.duration_s)), size(file.bytes), day(file.created_at)].filter(Boolean).join(" · ");
    const select = el("button.upload-select", { type: "button", onclick: () => onVideo({ object: file }) }, el("b", {}, file.filename), el("span", {}, details));
    const remove = el("button.icon-button", { type: "button", title: "Delete from the server", "aria-label": `Delete ${file.filename} from the server` }, "×");
    remove.addEventListener("click", () => {
      // Deletion needs a second click because it cannot be undone.
      if (remove.dataset.confirm) return deleteFile(file);
      remove.dataset.confirm = "yes";
      remove.textContent = "Delete?";
      remove.addEventListener("blur", () => draw(SHORT_LIST), { once: true });
    });
    return el("li", {}, select, remove);
  }

  async function deleteFile(file) {
    try {
      await call(`v1/files/${file.id}`, { method: "DELETE" });
      files = files.filter((other) => other !== file);
    } catch (error) {
      showProblem(error.message);
    }
    draw(SHORT_LIST);
    (list.querySelector("button") ?? element.parentElement.querySelector("button")).focus();
  }

  return {
    element,
    async refresh() {
      try {
        files = (await get("v1/files")).data.filter((file) => file.content_type.startsWith("video/"));
      } catch (error) {
        showProblem(error.message);
      }
      draw(SHORT_LIST);
    },
  };
}

/** Accept files that are dropped or pasted anywhere on the page. */
export function acceptDrops(onFiles) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const setDropping = (dropping) => document.body.classList.toggle("dropping", dropping);
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    setDropping(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && setDropping(false));
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    setDropping(false);
    onFiles(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => event.clipboardData.files.length && onFiles(event.clipboardData.files));
}
