"use strict";
// Words, colours and small builders. Text always goes in as text: a model's name is no markup.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const RAMPS = {
  light: ["#f0f4ef", "#c7e4d5", "#7fc7c2", "#3a99b4", "#21679b", "#1c3a74", "#0e163c"],
  dark: ["#1b2430", "#20405c", "#1f6486", "#2b8fa0", "#63b9a4", "#b3dca4", "#fbf7c6"],
};
const byId = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const number = (value) => (value === null ? "–" : whole.format(Math.round(value)));
const percent = (value) => (value === null ? "–" : `${Math.round(value * 100)} %`);
const times = (value) => (value === null ? "–" : `${value.toFixed(value >= 10 ? 0 : 2)}×`);
const share = (value) => (value === null ? "–" : value.toFixed(3));
function bytes(value) {
  if (value === null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}
// Not Math.max(...values): that passes each value as an argument, and browsers take 65,536 at most.
function largest(values, least) {
  let most = least;
  for (const value of values) if (value > most) most = value;
  return most;
}
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "rect", "g", "title"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const fill = (id, ...children) => byId(id).replaceChildren(...children);

function stops() {
  return RAMPS[dark.matches ? "dark" : "light"].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
}
function shade(part, ramp) {
  const place = Math.min(Math.max(part, 0), 1) * (ramp.length - 1);
  const below = Math.min(Math.floor(place), ramp.length - 2);
  const mixed = ramp[below].map((low, i) => Math.round(low + (ramp[below + 1][i] - low) * (place - below)));
  return `rgb(${mixed.join(" ")})`;
}

// Each placement has a colour and a mark of its own: colour is never the only difference.
const MARKS = { none: "triangle", recorded: "circle", plan: "square" };
const DASHES = { none: "2 4", recorded: null, plan: "7 4" };
function mark(key, x, y, size) {
  const color = `fill:var(--${key})`;
  if (MARKS[key] === "circle") return make("circle", { cx: x, cy: y, r: size, style: color });
  if (MARKS[key] === "square") {
    return make("rect", { x: x - size * 0.9, y: y - size * 0.9, width: size * 1.8, height: size * 1.8, style: color });
  }
  const path = `M${x} ${y - size * 1.1}L${x + size * 1.1} ${y + size * 0.9}L${x - size * 1.1} ${y + size * 0.9}Z`;
  return make("path", { d: path, style: color });
}
function key(name) {
  const svg = make("svg", { class: "dot", viewBox: "0 0 12 12", "aria-hidden": "true" });
  svg.append(mark(name, 6, 6, 5));
  return svg;
}
function meter(part, color) {
  const inner = make("i", { style: `width:${Math.min(100, Math.max(0, part * 100))}%;background:var(--${color})` });
  return make("div", { class: "meter", "aria-hidden": "true" }, inner);
}
function table(head, rows, label) {
  const cell = (tag, value, number) => make(tag, { class: number ? "num" : null, scope: tag === "th" ? "col" : null }, value);
  const top = make("tr", {}, ...head.map(([name, number]) => cell("th", name, number)));
  const body = rows.map((row) => make("tr", {}, ...row.map((value, i) => cell("td", value, head[i][1]))));
  const built = make("table", {}, make("thead", {}, top), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, built);
}
function tip(text, x, y) {
  const box = byId("tip");
  box.hidden = text === null;
  if (text === null) return;
  box.textContent = text;
  const left = x + 16 + box.offsetWidth > innerWidth ? x - 14 - box.offsetWidth : x + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.min(y + 16, innerHeight - box.offsetHeight - 6)}px`;
}
