/**
 * Login dialog, shared by all pending requests: `await askForKey(reason)` resolves after a successful login
 * and rejects if the user cancels.
 */
import { logIn, RequestError } from "./api.js";
import { el } from "./web/dom.js";

let pending = null;

export function askForKey(reason) {
  pending ??= openDialog(reason).finally(() => (pending = null));
  return pending;
}

function openDialog(reason) {
  const input = el("input", { type: "password", id: "api-key", autocomplete: "current-password", required: true, autofocus: true });
  const errorMessage = el("p.error", { role: "alert" });
  const form = el(
    "form",
    { method: "dialog" },
    el("h2", { id: "login-title" }, "This server requires an API key"),
    el("p", {}, "The browser keeps a session cookie for some hours instead of the key. Create a key with ", el("code", {}, "vz-ray keys create"), "."),
    el("input", { type: "text", autocomplete: "username", value: "vz_ray", hidden: true }), // for password managers
    el("label", { for: "api-key" }, "API key"),
    input,
    errorMessage,
    el("div.row", {}, el("button.primary", { type: "submit" }, "Log in"), el("button.secondary", { type: "button", onclick: () => dialog.close() }, "Not now")),
  );
  const dialog = el("dialog.login", { "aria-labelledby": "login-title" }, form);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve, reject) => {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      errorMessage.textContent = "";
      try {
        await logIn(input.value.trim());
        resolve();
        dialog.close();
      } catch (error) {
        errorMessage.textContent = error.message;
        input.select();
      }
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      reject(new RequestError(reason, { status: 401, retry: 0 }));
    });
  });
}
