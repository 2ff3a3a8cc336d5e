/** Virtual list of episodes: renders visible rows and fetches only their pages. */
import { el } from "/web/dom.js";
import { address, get, listParams } from "./api.js";
import { drawCharts } from "./charts.js";
import { filterBar } from "./filters.js";
import { count } from "./format.js";
import { cells, headers } from "./row.js";

const PAGE_SIZE = 60; // Rows per request.
const OVERSCAN = 12; // Rows drawn above and below the visible ones.
const MAX_HEIGHT = 15e6; // Maximum height that browsers lay out, pixels; filters reach the rows beyond.

export function listPage(root) {
  let params = new URLSearchParams();
  let pages = new Map(); // Page number -> { rows, fresh }.
  let requests = new Map(); // Page number -> AbortController.
  let total = 0;
  let cursor = 0; // Index of the row that keys act on.
  let refocus = false;
  let redraw = null;
  let errorText = "";
  let width = 0;

  const filters = filterBar(set);
  const charts = el("section.charts", { "aria-label": "Charts" });
  const columnHeaders = el("div.column-headers", { role: "group", "aria-label": "Sort by" });
  const countLabel = el("p.list-status", { role: "status" });
  const newest = el("button.secondary", { type: "button", onclick: () => set({ sort: "", ascending: "" }) }, "Newest first");
  const rows = el("ol.rows", { "aria-label": "Episodes" });
  const empty = el("p.empty", { hidden: true });
  root.append(charts, el("div.sticky-header", {}, filters.element, el("div.list-toolbar", {}, countLabel, newest), columnHeaders), rows, empty);

  const rowHeight = () => parseFloat(getComputedStyle(rows).getPropertyValue("--row"));
  const query = (more = {}) => {
    const values = new URLSearchParams(params);
    for (const [name, value] of Object.entries(more)) values.set(name, value);
    return values.toString();
  };
  const row = (index) => pages.get(Math.floor(index / PAGE_SIZE))?.rows[index % PAGE_SIZE];

  function set(changes) {
    for (const [name, value] of Object.entries(changes)) value === "" ? params.delete(name) : params.set(name, value);
    history.replaceState(null, "", address("list", 0, params));
    restart();
  }

  function restart() {
    pages = new Map();
    cursor = 0;
    abortRequests();
    filters.fill(null, params);
    columnHeaders.replaceChildren(...headers(params, set));
    refresh();
    if (window.scrollY > root.offsetTop + charts.offsetHeight) window.scrollTo(0, charts.offsetHeight + root.offsetTop);
  }

  function abortRequests() {
    for (const control of requests.values()) control.abort();
    requests = new Map();
  }

  // -- requests ----------------------------------------------------------------------

  /** Reload everything; keep the current rows until the responses arrive. */
  async function refresh() {
    abortRequests();
    for (const page of pages.values()) page.fresh = false;
    const current = query();
    try {
      const [choices, data] = await Promise.all([get("/api/filter_options"), get(`/api/charts?${current}`)]);
      if (current !== query()) return;
      filters.fill(choices, params);
      redraw = drawCharts(charts, data, params, set);
      width = charts.clientWidth;
    } catch (error) {
      errorText = error.message;
    }
    await loadPage(Math.max(0, firstPage()));
    draw();
  }

  async function loadPage(page) {
    if (requests.has(page)) return;
    const control = new AbortController();
    requests.set(page, control);
    try {
      const response = await get(`/api/episodes?${query({ offset: page * PAGE_SIZE, limit: PAGE_SIZE })}`, control.signal);
      const added = response.total - total;
      errorText = "";
      pages.set(page, { rows: response.rows, fresh: true });
      if (added) insertNew(response.total, added);
    } catch (error) {
      if (error.name === "AbortError") return;
      errorText = error.message;
      total = 0;
    }
    if (requests.get(page) === control) requests.delete(page);
    draw();
  }

  /** Insert new episodes at the top without changing the scroll position or the selected row. */
  function insertNew(newTotal, added) {
    const before = total;
    total = newTotal;
    const newestFirst = !params.get("sort") && !params.get("ascending") && before > 0 && added > 0;
    if (!newestFirst) return;
    const focusedLink = document.activeElement?.closest(".rows a");
    if (focusedLink || cursor > 0) {
      cursor += added;
      refocus = Boolean(focusedLink);
    }
    if (rows.getBoundingClientRect().top < 0) {
      rows.style.height = `${Math.min(total * rowHeight(), MAX_HEIGHT)}px`;
      window.scrollBy(0, added * rowHeight());
    }
    pages = new Map([...pages].filter(([, page]) => page.fresh));
  }

  // -- rendering ---------------------------------------------------------------------

  const top = () => rows.getBoundingClientRect().top;
  const firstPage = () => Math.floor(Math.max(0, Math.floor(-top() / rowHeight()) - OVERSCAN) / PAGE_SIZE);

  function draw() {
    if (root.hidden) return;
    const height = rowHeight();
    const numRows = Math.min(total, Math.floor(MAX_HEIGHT / height));
    rows.style.height = `${numRows * height}px`;
    const begin = Math.max(0, Math.floor(-top() / height) - OVERSCAN);
    const end = Math.min(numRows, Math.ceil((window.innerHeight - top()) / height) + OVERSCAN);
    const existing = new Map([...rows.children].map((item) => [Number(item.dataset.index), item]));
    for (const [index, item] of existing) if (index < begin || index >= end) item.remove();
    cursor = Math.max(0, Math.min(cursor, numRows - 1));
    for (let index = begin; index < end; index++) {
      const page = pages.get(Math.floor(index / PAGE_SIZE));
      if (!page?.fresh) loadPage(Math.floor(index / PAGE_SIZE));
      let item = existing.get(index);
      if (!item) rows.append((item = drawRow(index, height)));
      fillRow(item, row(index), index);
    }
    sortItems();
    const shown = numRows < total ? `, of which the first ${count(numRows)} are listed` : "";
    countLabel.textContent = errorText || `${count(total)} episode${total === 1 ? "" : "s"}${shown}`;
    newest.hidden = !params.get("sort") && !params.get("ascending");
    empty.hidden = total > 0 || requests.size > 0;
    empty.textContent = errorText || ([...params].length ? "No episode matches the filters." : "No episodes yet.");
    if (refocus) focus();
  }

  /** Keep the document order, which the Tab key and screen readers use. */
  function sortItems() {
    const items = [...rows.children];
    const inOrder = items.every((item, k) => !k || Number(items[k - 1].dataset.index) < Number(item.dataset.index));
    if (inOrder) return;
    const focused = document.activeElement;
    items.sort((a, b) => a.dataset.index - b.dataset.index).forEach((item) => rows.append(item));
    if (rows.contains(focused)) focused.focus({ preventScroll: true });
  }

  function drawRow(index, height) {
    const item = el("li", { "data-index": index });
    item.style.transform = `translateY(${index * height}px)`;
    return item;
  }

  function fillRow(item, episode, index) {
    item.setAttribute("aria-posinset", index + 1);
    item.setAttribute("aria-setsize", total);
    const link = item.firstChild;
    if (!episode) {
      if (!link) item.append(el("span.loading", { "aria-hidden": "true" }));
      return;
    }
    if (item.dataset.id !== String(episode.id) || link?.tagName !== "A") {
      const hadFocus = link !== null && document.activeElement === link;
      item.dataset.id = episode.id;
      item.replaceChildren(cells(episode));
      item.firstChild.addEventListener("focus", () => setCursor(Number(item.dataset.index)));
      if (hadFocus) item.firstChild.focus({ preventScroll: true });
    }
    item.firstChild.setAttribute("href", address("episode", episode.id, params));
    item.firstChild.tabIndex = index === cursor ? 0 : -1;
    item.firstChild.classList.toggle("cursor", index === cursor);
  }

  // -- keys ------------------------------------------------------------------------

  function setCursor(index) {
    cursor = index;
    for (const item of rows.children)
      if (item.firstChild?.tagName === "A") {
        item.firstChild.tabIndex = Number(item.dataset.index) === index ? 0 : -1;
        item.firstChild.classList.toggle("cursor", Number(item.dataset.index) === index);
      }
  }

  function focus() {
    const link = rows.querySelector(`li[data-index="${cursor}"] a`);
    refocus = !link;
    if (link) link.focus({ preventScroll: true });
  }

  function moveTo(index) {
    setCursor(Math.max(0, Math.min(index, total - 1)));
    const height = rowHeight();
    const [rowTop, headerBottom] = [top() + cursor * height, root.querySelector(".sticky-header").getBoundingClientRect().bottom];
    if (rowTop < headerBottom) window.scrollBy(0, rowTop - Math.max(headerBottom, 0));
    else if (rowTop + height > window.innerHeight) window.scrollBy(0, rowTop + height - window.innerHeight + 4);
    draw();
    focus();
  }

  function keys(event) {
    const inSearch = document.activeElement === filters.search;
    const screenRows = Math.max(1, Math.floor(window.innerHeight / rowHeight()) - 4);
    const onRow = document.activeElement?.closest(".rows a");
    const moves = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: screenRows, PageUp: -screenRows };
    if (event.key === "Escape") {
      if (inSearch || params.get("text")) {
        set({ text: "" });
        filters.search.value = "";
        filters.search.blur();
      }
    } else if (event.target.closest("input, select")) return false;
    else if (event.key in moves) moveTo(onRow ? cursor + moves[event.key] : cursor);
    else if (event.key === "Home") moveTo(0);
    else if (event.key === "End") moveTo(total - 1);
    else if (event.key === "Enter" && !event.target.closest("a, button") && row(cursor)) location.hash = address("episode", row(cursor).id, params);
    else return false;
    return true;
  }

  window.addEventListener("scroll", draw, { passive: true });
  window.addEventListener("resize", () => {
    rows.replaceChildren();
    draw();
    if (!root.hidden && charts.clientWidth !== width) {
      width = charts.clientWidth;
      redraw?.();
    }
  });

  return {
    show(newParams) {
      const changed = listParams(newParams).toString() !== params.toString();
      params = listParams(newParams);
      if (changed || !columnHeaders.firstChild) restart();
      else draw();
    },
    refresh,
    keys,
    focus,
    search: () => filters.search.focus(),
  };
}
