/**
 * Choose videos: local files, a URL, or an earlier upload.
 *
 *   const picker = videoPicker({ onVideo: (source) => {},      // argument of Video
 *                            onProblem: (message) => {} });  // called if the picker is not visible
 *   page.append(picker.element); await picker.refresh();
 *   acceptDrops(onFiles);                                 // also pasted files
 */
import { call, get } from "./api.js";
import { clock, el } from "./web/dom.js";
import { day, size } from "./format.js";

const KINDS = "video/*,.mp4,.m4v,.mov,.mkv,.webm,.avi,.ts,.mpg,.mpeg,.flv";
/** Number of earlier uploads in the short list. */
const SHOWN = 6;

export function videoPicker({ onVideo, onProblem }) {
  const problem = el("p.warn", { role: "alert", hidden: true });
  const showProblem = (message) => {
    problem.textContent = message;
    problem.hidden = !message;
    if (message && !element.checkVisibility()) onProblem(message);
  };
  const take = (files) => {
    const wrong = [...files].filter((file) => file.type && !file.type.startsWith("video/"));
    for (const file of files) if (!wrong.includes(file)) onVideo({ file });
    showProblem(wrong.length ? `${wrong.map((file) => file.name).join(", ")}: not a video.` : "");
  };
  const earlier = shelf(onVideo, showProblem);
  const element = el("div.chooser", {}, filePicker(take), urlForm(onVideo), problem, earlier.element);
  return { element, take, refresh: earlier.refresh };
}

function filePicker(take) {
  const input = el("input.hidden-input", { type: "file", accept: KINDS, multiple: true, tabindex: -1, "aria-hidden": "true" });
  input.addEventListener("change", () => {
    take(input.files);
    input.value = "";
  });
  const button = el("button.drop", { type: "button", onclick: () => input.click() }, el("b", {}, "Choose a video"), el("span", {}, "or drop one or several anywhere on this page"));
  return el("div", {}, button, input);
}

function urlForm(onVideo) {
  const input = el("input", { type: "url", id: "address", placeholder: "https://…", autocomplete: "off", spellcheck: "false", required: true, pattern: "https?://.+" });
  const form = el("form.address", {}, el("label", { for: "address" }, "By address"), input, el("button.quiet", { type: "submit" }, "Add"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onVideo({ url: input.value.trim() });
    form.reset();
  });
  return form;
}

function shelf(onVideo, showProblem) {
  const list = el("ul.shelf");
  const more = el("button.quiet", { type: "button", onclick: () => draw(Infinity) }, "Show all");
  const element = el("section.earlier", { hidden: true }, el("h2", {}, "Uploaded before"), list, more);
  let files = [];

  function draw(maximum) {
    element.hidden = !files.length;
    more.hidden = files.length <= maximum;
    list.replaceChildren(...files.slice(0, maximum).map(line));
  }

  function line(file) {
    const words = [file.duration_s && clock(Math.round(file.duration_s)), size(file.bytes), day(file.created_at)].filter(Boolean).join(" · ");
    const use = el("button.shelf-use", { type: "button", onclick: () => onVideo({ object: file }) }, el("b", {}, file.filename), el("span", {}, words));
    const remove = el("button.icon", { type: "button", title: "Delete from the server", "aria-label": `Delete ${file.filename} from the server` }, "×");
    remove.addEventListener("click", () => {
      // Deletion needs a second click because it cannot be undone.
      if (remove.dataset.sure) return forget(file);
      remove.dataset.sure = "yes";
      remove.textContent = "Delete?";
      remove.addEventListener("blur", () => draw(SHOWN), { once: true });
    });
    return el("li", {}, use, remove);
  }

  async function forget(file) {
    try {
      await call(`v1/files/${file.id}`, { method: "DELETE" });
      files = files.filter((one) => one !== file);
    } catch (error) {
      showProblem(error.message);
    }
    draw(SHOWN);
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
      draw(SHOWN);
    },
  };
}

/** Accept files that are dropped or pasted anywhere on the page. */
export function acceptDrops(onFiles) {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const over = (on) => document.body.classList.toggle("dropping", on);
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    over(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && over(false));
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    over(false);
    onFiles(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => event.clipboardData.files.length && onFiles(event.clipboardData.files));
}
