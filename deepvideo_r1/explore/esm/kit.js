// What the explorers share: labelled sliders, buttons, a line of text for screen readers, and small charts in SVG.
// No dependency. Colours follow the page: text and axes take the colour of the text around them.

const STYLE = `
.dvr { container-type: inline-size; max-width: 46em; margin: .5em 0; font: 14px/1.4 system-ui, sans-serif;
  --dvr-a: #3b82f6; --dvr-b: #d9730d; --dvr-a-strong: #1d4ed8;
  color: var(--jp-content-font-color1, var(--color-foreground-primary, inherit)); }
.dvr * { box-sizing: border-box; }
.dvr-title { font-weight: 600; margin-bottom: .3em; }
.dvr-row { display: grid; grid-template-columns: 13em minmax(6em, 1fr) 3.5em; gap: 0 .6em;
  align-items: center; min-height: 36px; margin: 0; }
@container (max-width: 30em) {
  .dvr-row { grid-template-columns: minmax(6em, 1fr) 3.5em; }
  .dvr-row > :first-child { grid-column: 1 / -1; margin-top: .3em; }
  .dvr-row.short { grid-template-columns: 9.6em minmax(6em, 1fr) 3.5em; }
  .dvr-row.short > :first-child { grid-column: auto; margin: 0; }
}
.dvr-row input[type=range] { width: 100%; height: 28px; margin: 0; accent-color: var(--dvr-a); touch-action: pan-y; }
.dvr-row output { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.dvr-charts { display: flex; flex-wrap: wrap; gap: .5em 1em; margin: .3em 0; }
.dvr-chart { flex: 1 1 18em; max-width: 28em; min-width: 0; margin: 0; }
.dvr-chart svg { display: block; width: 100%; height: auto; overflow: visible; }
.dvr-chart text { fill: currentColor; font: 12px system-ui, sans-serif; }
.dvr-buttons { display: flex; flex-wrap: wrap; gap: .5em; margin: .4em 0; }
.dvr button, .dvr select { font: inherit; color: inherit; background: transparent; border: 1px solid currentColor;
  border-radius: 6px; min-height: 34px; padding: .2em .8em; cursor: pointer; }
.dvr select { padding: .2em .3em; } .dvr option { color: black; background: white; }
.dvr button:hover { border-color: var(--dvr-a); }
.dvr :focus-visible { outline: 2px solid var(--dvr-a); outline-offset: 2px; }
.dvr-legend { display: flex; flex-wrap: wrap; gap: .2em 1.4em; } .dvr-legend svg { margin-right: .4em; }
.dvr-says { min-height: 2.8em; margin: .3em 0; }
.dvr .axis { stroke: currentColor; stroke-opacity: .45; fill: none; }
.dvr .grid { stroke: currentColor; stroke-opacity: .15; fill: none; }
.dvr .faint { stroke: currentColor; stroke-opacity: .3; fill: none; }
.dvr .zone { fill: currentColor; fill-opacity: .09; }
.dvr .a { stroke: var(--dvr-a); stroke-width: 2; fill: none; }
.dvr .b { stroke: var(--dvr-b); stroke-width: 2; stroke-dasharray: 6 3; fill: none; }
.dvr .solid { stroke-dasharray: none; }
.dvr .dot-a { fill: var(--dvr-a); } .dvr .dot-b { fill: var(--dvr-b); }
.dvr .here { stroke: currentColor; stroke-dasharray: 2 3; }
`;
const SVG = new Set(["svg", "g", "path", "line", "circle", "rect", "text", "title"]);

/** An HTML or SVG element; attributes that are functions become listeners. */
export function make(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** An empty explorer inside `el`. Keys stay with its controls: JupyterLab would take arrows and Enter as shortcuts. */
export function open(el, title) {
  const root = make("div", { class: "dvr", role: "group", "aria-label": title, "data-lm-suppress-shortcuts": "true" },
    make("style", {}, STYLE), make("div", { class: "dvr-title" }, title));
  root.addEventListener("keydown", (event) => event.stopPropagation());
  el.replaceChildren(root);
  return root;
}

/** Draw now, and again when one of the named values of the model changes; returns how to stop. */
export function follow(model, names, draw) {
  for (const name of names) model.on(`change:${name}`, draw);
  draw();
  return () => names.forEach((name) => model.off(`change:${name}`, draw));
}

export function change(model, values) {
  for (const [name, value] of Object.entries(values)) model.set(name, value);
  model.save_changes();
}

/** A row of label, slider and value. `read` and `write` say where the number lives. */
export function slider({ label, min, max, step, digits = 2, read, write }) {
  const value = make("output");
  const input = make("input", { type: "range", min, max, step, "aria-label": label });
  input.addEventListener("input", () => write(Number(input.value)));
  const row = make("div", { class: "dvr-row" }, make("span", {}, label), input, value);
  row.update = () => {
    if (Number(input.value) !== read()) input.value = read();
    value.textContent = number(read(), digits);
  };
  return row;
}

/** A slider for one number of the model. */
export function modelSlider(model, name, options) {
  return slider({ ...options, read: () => model.get(name), write: (value) => change(model, { [name]: value }) });
}

/** A number as text, with a minus sign that is as wide as a plus. */
export function number(value, digits = 2) {
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
}

/** About `count` round numbers from `low` to `high`. */
export function ticks(low, high, count = 4) {
  const raw = (high - low) / count, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find((factor) => size * factor >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

const LEFT = 46, RIGHT = 12, TOP = 24, BOTTOM = 40;

/** Axes in an SVG of this size, with functions that draw into them. `label` is read out instead of the picture. */
export function chart({ x, y, xLabel, yLabel, label, xTicks = ticks(...x), width = 340, height = 210 }) {
  const X = (value) => LEFT + ((value - x[0]) / (x[1] - x[0])) * (width - LEFT - RIGHT);
  const Y = (value) => height - BOTTOM - ((inside(value) - y[0]) / (y[1] - y[0])) * (height - TOP - BOTTOM);
  const inside = (value) => Math.min(Math.max(value, y[0]), y[1]);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const add = (tag, attributes, ...children) => svg.appendChild(make(tag, attributes, ...children));
  const text = (place, words, anchor = "middle") => add("text", { ...place, "text-anchor": anchor }, words);
  const yTicks = ticks(...y);
  for (const tick of yTicks) {
    add("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(tick), y2: Y(tick) });
    text({ x: LEFT - 6, y: Y(tick) + 4 }, number(tick, digitsOf(yTicks)), "end");
  }
  for (const tick of xTicks) text({ x: X(tick), y: height - BOTTOM + 16 }, number(tick, digitsOf(xTicks)));
  add("path", { class: "axis", d: `M${LEFT} ${TOP}V${height - BOTTOM}H${width - RIGHT}` });
  text({ x: (LEFT + width - RIGHT) / 2, y: height - 6 }, xLabel);
  text({ x: 2, y: 12 }, yLabel, "start");
  const path = (points) => points.map(([a, b], k) => `${k ? "L" : "M"}${X(a).toFixed(1)} ${Y(b).toFixed(1)}`).join("");
  return {
    svg, add, X, Y,
    line: (points, name) => add("path", { class: name, d: path(points) }),
    dot: (a, b, name) => add("circle", { class: name, cx: X(a), cy: Y(b), r: 5 }),
    zone: (a, b) => add("rect", { class: "zone", x: X(a), y: TOP, width: X(b) - X(a), height: height - TOP - BOTTOM }),
    here: (a) => add("line", { class: "here", x1: X(a), x2: X(a), y1: TOP, y2: height - BOTTOM }),
  };
}

const digitsOf = (values) => (values.every(Number.isInteger) ? 0 : Math.abs(values[1] - values[0]) >= 0.1 ? 1 : 2);

/** `count` + 1 numbers from `low` to `high`. */
export function range(low, high, count) {
  return Array.from({ length: count + 1 }, (_, k) => low + ((high - low) * k) / count);
}
