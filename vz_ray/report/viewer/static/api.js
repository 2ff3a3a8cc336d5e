/** Questions to the server, and where in the page we are. */

/** JSON of an address; an Error in words where the server refuses or is gone. */
export async function get(path, signal) {
  let answer;
  try {
    answer = await fetch(path, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `vz-ray view` still running?");
  }
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(value.error || `The server answered ${answer.status}.`);
  return value;
}

/** `#/episode/12?kind=count` as { page: "episode", id: 12, params }. */
export function where() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, id] = path.split("/");
  return { page: page || "list", id: Number(id) || 0, params: new URLSearchParams(query) };
}

/** The address of a page, with the list's settings kept in it. */
export function address(page, id, params) {
  const query = params.toString();
  return `#/${page === "list" ? "" : `${page}/${id}`}${query ? `?${query}` : ""}`;
}

/** Those of the settings that the list is asked with. */
export function listed(params) {
  const kept = new URLSearchParams(params);
  kept.delete("t");
  return kept;
}
