/** Charts above the list: means by step and outcome counts, as plain SVG. */
import { el, svg } from "/web/dom.js";
import { count, number, outcomeLabel, stageLabel } from "./format.js";

const [HEIGHT, LEFT, BOTTOM, TOP, RIGHT] = [132, 38, 20, 8, 10];
const MAX_LINES = 5;

/** Return three or four round numbers that span [low, high]. */
export function ticks(low, high) {
  const span = Math.max(high - low, 1e-9) / 3;
  const unit = 10 ** Math.floor(Math.log10(span));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= span - 1e-12);
  const values = [];
  for (let value = Math.floor(low / step) * step; value < high + step * 0.999; value += step) values.push(value);
  return values;
}

/** A line per stage. `points` are [x, y, episodes]; `pick` receives the clicked x. */
function lines(title, stages, { width: stepsPerPoint, digits, pick }) {
  const readout = el("output", {}, "");
  const figure = el("figure", {}, el("figcaption", {}, el("b", {}, title), readout));
  const plot = el("div.plot");
  figure.append(plot);
  const draw = () => {
    const width = Math.max(plot.clientWidth, 160);
    const points = stages.flatMap((stage) => stage.points);
    const steps = points.map((p) => p[0]);
    const [first, final] = [Math.min(...steps), Math.max(...steps)];
    const yTicks = ticks(Math.min(0, ...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]), 0.01));
    const [low, high] = [yTicks[0], yTicks[yTicks.length - 1]];
    const x = (value) => LEFT + ((width - LEFT - RIGHT) * (value - first)) / Math.max(final - first, 1);
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low));
    const chart = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": summary(title, stages, digits) });
    for (const tick of yTicks)
      chart.append(
        svg("line.grid", { x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
        svg("text.end", { x: LEFT - 6, y: y(tick) + 4 }, String(Number(tick.toFixed(6)))),
      );
    for (const [value, anchor] of first === final ? [[first, ""]] : [[first, ""], [final, "end"]])
      chart.append(svg(`text${anchor ? ".end" : ""}`, { x: x(value), y: HEIGHT - 4 }, `step ${value}`));
    stages.forEach((stage, k) => {
      const path = stage.points.map((p, n) => `${n ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("");
      chart.append(svg(`path.line.s${k + 1}`, { d: path }));
      if (stage.points.length <= 40)
        for (const p of stage.points) chart.append(svg(`circle.dot.s${k + 1}`, { cx: x(p[0]), cy: y(p[1]), r: 2.5 }));
    });
    const cursor = svg("line.cursor", { y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    chart.append(cursor);
    const nearest = (event) => {
      const pointerX = event.clientX - chart.getBoundingClientRect().left;
      let best = null;
      stages.forEach((stage) => stage.points.forEach((p) => {
        if (!best || Math.abs(x(p[0]) - pointerX) < Math.abs(x(best.point[0]) - pointerX)) best = { stage, point: p };
      }));
      return best;
    };
    chart.addEventListener("pointermove", (event) => {
      const { stage, point } = nearest(event);
      const to = stepsPerPoint > 1 ? `–${point[0] + stepsPerPoint - 1}` : "";
      readout.textContent = `${stages.length > 1 ? `${stageLabel(stage.stage)}, ` : ""}step ${point[0]}${to}: ${number(point[1], digits)} of ${count(point[2])}`;
      for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(point[0]));
      cursor.setAttribute("visibility", "visible");
    });
    chart.addEventListener("pointerleave", () => {
      readout.textContent = "";
      cursor.setAttribute("visibility", "hidden");
    });
    chart.addEventListener("click", (event) => {
      const { point } = nearest(event);
      pick(point[0], point[0] + stepsPerPoint - 1);
    });
    plot.replaceChildren(chart);
  };
  return { figure, draw };
}

function summary(title, stages, digits) {
  const trends = stages.map((stage) => {
    const [first, final] = [stage.points[0], stage.points[stage.points.length - 1]];
    return `${stageLabel(stage.stage)} from ${number(first[1], digits)} at step ${first[0]} to ${number(final[1], digits)} at step ${final[0]}`;
  });
  return `${title}: ${trends.join("; ")}`;
}

/** Rows of name, bar and number; each is a filter button. */
function bars(title, rows, { pick, selected }) {
  const maximum = Math.max(...rows.map((row) => row.value), 1e-9);
  return el(
    "figure", {}, el("figcaption", {}, el("b", {}, title)),
    el("ul.bars", {}, rows.map((row) => {
      const fill = el(`i.${row.color}`);
      fill.style.width = `${(100 * Math.max(row.value, 0)) / maximum}%`;
      const attributes = { type: "button", "aria-pressed": String(row.name === selected), onclick: () => pick(row.name === selected ? "" : row.name) };
      return el("li", {}, el("button", attributes, el("span", {}, row.title), el("span.track", { "aria-hidden": "true" }, fill), el("em", {}, row.text)));
    })),
  );
}

const legend = (stages) =>
  el("ul.legend", {}, stages.map((stage, k) => el(`li.s${k + 1}`, {}, el("i"), stageLabel(stage.stage))));

/**
 * Render the charts into `root`.
 *
 * data: `/api/charts`; params: the list's settings; set(changes): update the settings.
 */
export function drawCharts(root, data, params, set) {
  const drawn = [];
  const pickStep = (from, to) => set({ step_from: from, step_to: to });
  const charts = (title, column, digits) => {
    const stages = data.stages
      .map(({ stage, points }) => ({ stage, points: points.filter((p) => p[column] !== null).map((p) => [p[0], p[column], p[4]]) }))
      .filter((stage) => stage.points.length);
    if (!stages.length) return null;
    if (stages.every((stage) => stage.points.length === 1))
      return bars(title, stages.slice(0, 10).map((stage) => ({ name: stage.stage, title: stageLabel(stage.stage), value: stage.points[0][1], text: number(stage.points[0][1], digits), color: "s1" })),
        { pick: (stage) => set({ stage }), selected: params.get("stage") || "" });
    // Evaluations are single points next to the training lines.
    const chart = lines(title, stages.slice(0, MAX_LINES), { width: data.width, digits, pick: pickStep });
    if (stages.length > 1) chart.figure.append(legend(stages.slice(0, MAX_LINES)));
    drawn.push(chart);
    return chart.figure;
  };
  const total = data.outcomes.reduce((sum, outcome) => sum + outcome.count, 0);
  const rows = data.outcomes.map((outcome) => ({
    name: outcome.name, title: outcomeLabel(outcome.name), value: outcome.count, text: `${count(outcome.count)} · ${Math.round((100 * outcome.count) / total)} %`,
    color: outcome.name === "right" ? "right" : ["unjudged", "failed"].includes(outcome.name) ? "unknown" : "wrong",
  }));
  const parts = [
    charts("Reward", 1, 3), charts("Zooms", 2, 2),
    rows.length ? bars("Outcomes", rows, { pick: (outcome) => set({ outcome }), selected: params.get("outcome") || "" }) : null,
  ];
  root.replaceChildren(...parts.filter(Boolean));
  drawn.forEach((chart) => chart.draw());
  return () => drawn.forEach((chart) => chart.draw());
}
