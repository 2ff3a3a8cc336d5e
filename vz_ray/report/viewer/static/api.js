/** Server requests and page addresses. */

/** Fetch JSON; throw an Error with a readable message on failure. */
export async function get(path, signal) {
  let response;
  try {
    response = await fetch(path, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is `vz-ray view` still running?");
  }
  const value = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error; // aborted after the headers arrived
    return {};
  });
  if (!response.ok) throw new Error(value.error || `The server answered ${response.status}.`);
  return value;
}

/** Parse the address: `#/episode/12?kind=count` as { page: "episode", id: 12, params }. */
export function parseAddress() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, id] = path.split("/");
  return { page: page || "list", id: Number(id) || 0, params: new URLSearchParams(query) };
}

/** Address of a page; keeps the settings of the list. */
export function address(page, id, params) {
  const query = params.toString();
  return `#/${page === "list" ? "" : `${page}/${id}`}${query ? `?${query}` : ""}`;
}

/** Settings that select the rows of the list. */
export function listParams(params) {
  const listed = new URLSearchParams(params);
  listed.delete("t");
  return listed;
}
