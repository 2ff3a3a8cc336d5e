/**
 * Create DOM elements. Text always becomes a text node, never markup.
 *
 *   el("a.class.other", { href: "#", onclick: go, "aria-label": "Go" }, "text", el("b", {}, "more"))
 *
 * Attributes that are null, undefined or false are left out; `on...` are event listeners.
 * Children that are null, undefined or false are left out; arrays are spread.
 */
const SVG_NAMESPACE = "http://www.w3.org/2000/svg";

function fill(node, classes, attributes, children) {
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element. */
export function el(selector, attributes = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  return fill(document.createElement(tag), classes, attributes, children);
}

/** An SVG element. */
export function svg(selector, attributes = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  return fill(document.createElementNS(SVG_NAMESPACE, tag), classes, attributes, children);
}

/** Format seconds as `1:15.5`; tenths are shown if they are not zero. */
export function clock(seconds) {
  if (seconds < 0) return `-${clock(-seconds)}`; // refused zooms may have negative times
  const tenths = Math.round(seconds * 10);
  const [hours, minutes, secs] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, (tenths % 600) / 10];
  const formatted = secs.toFixed(1).padStart(4, "0").replace(".0", "");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${formatted}` : `${minutes}:${formatted}`;
}
