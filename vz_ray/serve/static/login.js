/**
 * Asks for the API key, once for all who need it: `await keyAsked(why)` resolves when the server has
 * taken one, and rejects where the question was put aside.
 */
import { logIn, Refusal } from "./api.js";
import { el } from "./web/dom.js";

let asking = null;

export function keyAsked(why) {
  asking ??= ask(why).finally(() => (asking = null));
  return asking;
}

function ask(why) {
  const input = el("input", { type: "password", id: "key", autocomplete: "current-password", required: true, autofocus: true });
  const problem = el("p.warn", { role: "alert" });
  const form = el(
    "form",
    { method: "dialog" },
    el("h2", { id: "key-title" }, "This server asks for a key"),
    el("p", {}, "It is exchanged for a cookie that this browser keeps for some hours. ", el("code", {}, "vz-ray keys create"), " makes one."),
    el("input", { type: "text", autocomplete: "username", value: "vz_ray", hidden: true }), // For password managers.
    el("label", { for: "key" }, "API key"),
    input,
    problem,
    el("div.row", {}, el("button.main", { type: "submit" }, "Go on"), el("button.quiet", { type: "button", onclick: () => dialog.close() }, "Not now")),
  );
  const dialog = el("dialog.key", { "aria-labelledby": "key-title" }, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve, reject) => {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      problem.textContent = "";
      try {
        await logIn(input.value.trim());
        resolve();
        dialog.close();
      } catch (refusal) {
        problem.textContent = refusal.message;
        input.select();
      }
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      reject(new Refusal(why, { status: 401, retry: 0 }));
    });
  });
}
