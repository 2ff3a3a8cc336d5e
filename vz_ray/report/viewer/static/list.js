/** Virtual list of episodes: renders visible rows and fetches only their pages. */
import { el } from "/web/dom.js";
import { address, get, listed } from "./api.js";
import { drawCharts } from "./charts.js";
import { filterBar } from "./filters.js";
import { cells, headsOf } from "./row.js";
import { count } from "./words.js";

const PAGE = 60; // Rows of a request.
const SPARE = 12; // Rows drawn above and below what is in sight.
const TALLEST = 15e6; // Pixels that browsers lay out; rows beyond are found by filters.

export function listPage(root) {
  let params = new URLSearchParams();
  let pages = new Map(); // Number of a page -> { rows, fresh }.
  let asking = new Map(); // Number of a page -> AbortController.
  let total = 0;
  let cursor = 0; // Index of the row that keys act on.
  let refocus = false;
  let redraw = null;
  let failed = "";
  let width = 0;

  const filters = filterBar(set);
  const charts = el("section.charts", { "aria-label": "Charts" });
  const head = el("div.head", { role: "group", "aria-label": "Sort by" });
  const found = el("p.found", { role: "status" });
  const newest = el("button.quiet", { type: "button", onclick: () => set({ sort: "", up: "" }) }, "Newest first");
  const rows = el("ol.rows", { "aria-label": "Episodes" });
  const empty = el("p.empty", { hidden: true });
  root.append(charts, el("div.stick", {}, filters.element, el("div.count", {}, found, newest), head), rows, empty);

  const tall = () => parseFloat(getComputedStyle(rows).getPropertyValue("--row"));
  const query = (more = {}) => {
    const asked = new URLSearchParams(params);
    for (const [name, value] of Object.entries(more)) asked.set(name, value);
    return asked.toString();
  };
  const row = (index) => pages.get(Math.floor(index / PAGE))?.rows[index % PAGE];

  function set(changes) {
    for (const [name, value] of Object.entries(changes)) value === "" ? params.delete(name) : params.set(name, value);
    history.replaceState(null, "", address("list", 0, params));
    restart();
  }

  function restart() {
    pages = new Map();
    cursor = 0;
    forget();
    filters.fill(null, params);
    head.replaceChildren(...headsOf(params, set));
    refresh();
    if (window.scrollY > root.offsetTop + charts.offsetHeight) window.scrollTo(0, charts.offsetHeight + root.offsetTop);
  }

  function forget() {
    for (const one of asking.values()) one.abort();
    asking = new Map();
  }

  // -- requests ----------------------------------------------------------------------

  /** Reload everything; keep the current rows until the responses arrive. */
  async function refresh() {
    forget();
    for (const page of pages.values()) page.fresh = false;
    const asked = query();
    try {
      const [choices, data] = await Promise.all([get("/api/filter_options"), get(`/api/charts?${asked}`)]);
      if (asked !== query()) return;
      filters.fill(choices, params);
      redraw = drawCharts(charts, data, params, set);
      width = charts.clientWidth;
    } catch (error) {
      failed = error.message;
    }
    await ask(Math.max(0, first()));
    draw();
  }

  async function ask(page) {
    if (asking.has(page)) return;
    const control = new AbortController();
    asking.set(page, control);
    try {
      const answer = await get(`/api/episodes?${query({ offset: page * PAGE, limit: PAGE })}`, control.signal);
      const grown = answer.total - total;
      failed = "";
      pages.set(page, { rows: answer.rows, fresh: true });
      if (grown) grow(answer.total, grown);
    } catch (error) {
      if (error.name === "AbortError") return;
      failed = error.message;
      total = 0;
    }
    if (asking.get(page) === control) asking.delete(page);
    draw();
  }

  /** Insert new episodes at the top without changing the scroll position or the selected row. */
  function grow(now, by) {
    const before = total;
    total = now;
    const above = !params.get("sort") && !params.get("up") && before > 0 && by > 0;
    if (!above) return;
    const chosen = document.activeElement?.closest(".rows a");
    if (chosen || cursor > 0) {
      cursor += by;
      refocus = Boolean(chosen);
    }
    if (rows.getBoundingClientRect().top < 0) {
      rows.style.height = `${Math.min(total * tall(), TALLEST)}px`;
      window.scrollBy(0, by * tall());
    }
    pages = new Map([...pages].filter(([, page]) => page.fresh));
  }

  // -- rendering ---------------------------------------------------------------------

  const top = () => rows.getBoundingClientRect().top;
  const first = () => Math.floor(Math.max(0, Math.floor(-top() / tall()) - SPARE) / PAGE);

  function draw() {
    if (root.hidden) return;
    const height = tall();
    const held = Math.min(total, Math.floor(TALLEST / height));
    rows.style.height = `${held * height}px`;
    const begin = Math.max(0, Math.floor(-top() / height) - SPARE);
    const end = Math.min(held, Math.ceil((window.innerHeight - top()) / height) + SPARE);
    const kept = new Map([...rows.children].map((item) => [Number(item.dataset.index), item]));
    for (const [index, item] of kept) if (index < begin || index >= end) item.remove();
    cursor = Math.max(0, Math.min(cursor, held - 1));
    for (let index = begin; index < end; index++) {
      const page = pages.get(Math.floor(index / PAGE));
      if (!page?.fresh) ask(Math.floor(index / PAGE));
      let item = kept.get(index);
      if (!item) rows.append((item = drawRow(index, height)));
      fillRow(item, row(index), index);
    }
    sortItems();
    const shown = held < total ? `, of which the first ${count(held)} are listed` : "";
    found.textContent = failed || `${count(total)} episode${total === 1 ? "" : "s"}${shown}`;
    newest.hidden = !params.get("sort") && !params.get("up");
    empty.hidden = total > 0 || asking.size > 0;
    empty.textContent = failed || ([...params].length ? "No episode matches the filters." : "No episodes yet.");
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

  function fillRow(item, one, index) {
    item.setAttribute("aria-posinset", index + 1);
    item.setAttribute("aria-setsize", total);
    const link = item.firstChild;
    if (!one) {
      if (!link) item.append(el("span.wait", { "aria-hidden": "true" }));
      return;
    }
    if (item.dataset.id !== String(one.id) || link?.tagName !== "A") {
      const had = link !== null && document.activeElement === link;
      item.dataset.id = one.id;
      item.replaceChildren(cells(one));
      item.firstChild.addEventListener("focus", () => point(Number(item.dataset.index)));
      if (had) item.firstChild.focus({ preventScroll: true });
    }
    item.firstChild.setAttribute("href", address("episode", one.id, params));
    item.firstChild.tabIndex = index === cursor ? 0 : -1;
    item.firstChild.classList.toggle("cursor", index === cursor);
  }

  // -- keys ------------------------------------------------------------------------

  function point(index) {
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

  function go(index) {
    point(Math.max(0, Math.min(index, total - 1)));
    const height = tall();
    const [from, bar] = [top() + cursor * height, root.querySelector(".stick").getBoundingClientRect().bottom];
    if (from < bar) window.scrollBy(0, from - Math.max(bar, 0));
    else if (from + height > window.innerHeight) window.scrollBy(0, from + height - window.innerHeight + 4);
    draw();
    focus();
  }

  function keys(event) {
    const inSearch = document.activeElement === filters.search;
    const screen = Math.max(1, Math.floor(window.innerHeight / tall()) - 4);
    const onRow = document.activeElement?.closest(".rows a");
    const moves = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1, PageDown: screen, PageUp: -screen };
    if (event.key === "Escape") {
      if (inSearch || params.get("text")) {
        set({ text: "" });
        filters.search.value = "";
        filters.search.blur();
      }
    } else if (event.target.closest("input, select")) return false;
    else if (event.key in moves) go(onRow ? cursor + moves[event.key] : cursor);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(total - 1);
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
    show(asked) {
      const changed = listed(asked).toString() !== params.toString();
      params = listed(asked);
      if (changed || !head.firstChild) restart();
      else draw();
    },
    refresh,
    keys,
    focus,
    search: () => filters.search.focus(),
  };
}
