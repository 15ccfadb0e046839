// Line and dot charts as SVG: a frame with 0..1 (or more) upwards, marks that differ in shape, a line that reads out.
const FRAME = { width: 640, height: 300, left: 40, right: 12, top: 12, bottom: 34 };

function frame(box, low, high, ticks, label) {
  FRAME.width = Math.max(320, byId(box).clientWidth); // a unit is a pixel, so that words keep their size
  const { width, height, left, right, top, bottom } = FRAME;
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const value of ticks) {
    svg.append(make("line", { class: value === low ? "axis" : "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  return { svg, y, x: (part) => left + part * (width - left - right) };
}
function word(svg, x, text, anchor) {
  svg.append(make("text", { x, y: FRAME.height - 10, "text-anchor": anchor || "middle" }, text));
}
function path(points) {
  let line = "", pen = false;
  for (const [x, y] of points) {
    if (y === null) { pen = false; continue; }
    line += `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = true;
  }
  return line;
}
// A chart whose columns are read out under it, by mouse or arrow keys. place(i): x of column i.
function readout(box, chart, count, place, say, hint) {
  const said = make("div", { class: "said", "aria-live": "polite" }, hint);
  const rule = make("line", { class: "axis", y1: FRAME.top, y2: FRAME.height - FRAME.bottom, visibility: "hidden" });
  chart.svg.append(rule);
  chart.svg.setAttribute("tabindex", "0");
  let at = -1;
  const show = (index) => {
    at = Math.min(Math.max(index, 0), count - 1);
    rule.setAttribute("visibility", "visible");
    for (const end of ["x1", "x2"]) rule.setAttribute(end, place(at));
    said.textContent = say(at);
  };
  const hide = () => { at = -1; rule.setAttribute("visibility", "hidden"); said.textContent = hint; };
  chart.svg.addEventListener("mousemove", (mouse) => {
    const { left } = chart.svg.getBoundingClientRect();
    const x = mouse.clientX - left;
    let best = 0;
    for (let i = 1; i < count; i += 1) if (Math.abs(place(i) - x) < Math.abs(place(best) - x)) best = i;
    show(best);
  });
  chart.svg.addEventListener("mouseleave", hide);
  chart.svg.addEventListener("blur", hide);
  chart.svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
  byId(box).replaceChildren(chart.svg, said);
}
const each = (say) => data.placements.map((own) => `${own.name} ${say(own)}`).join(" · ");
const UNITS = [0, 0.25, 0.5, 0.75, 1];

function byLayer(chosen) {
  const chart = frame("by-layer", 0, 1, UNITS, "Balancedness of each layer, for each placement");
  const place = (layer) => chart.x((layer + 0.5) / data.layers);
  for (let layer = 0; layer < data.layers; layer += 1) {
    const values = data.placements.map((own) => own.balance[layer]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const x = place(layer), faint = chosen === null || chosen === layer ? 1 : 0.25;
    const group = make("g", { opacity: faint });
    group.append(make("line", { class: "grid", x1: x, x2: x, y1: chart.y(low), y2: chart.y(high) }));
    for (const own of data.placements) {
      group.append(mark(own.key, x, chart.y(own.balance[layer]), data.layers > 32 ? 3.6 : 5.5));
    }
    chart.svg.append(group);
  }
  const every = Math.ceil(data.layers / 12);
  for (let layer = 0; layer < data.layers; layer += every) word(chart.svg, place(layer), data.layers > 6 ? layer : `layer ${layer}`);
  const say = (layer) => `Layer ${layer}: ${each((own) => share(own.balance[layer]))}`;
  readout("by-layer", chart, data.layers, place, say, data.layers > 6 ? "MoE layer →" : "");
}

function overTime(chosen) {
  const time = data.time, count = time.first.length;
  const chart = frame("over-time", 0, 1, UNITS, "Balancedness over time, for each placement");
  const place = (i) => chart.x((i + 0.5) / count);
  const most = largest(time.tokens, 1);
  time.tokens.forEach((tokens, i) => {
    const top = chart.y((0.22 * tokens) / most), wide = Math.min(46, Math.max(1, (FRAME.width * 0.6) / count));
    chart.svg.append(make("rect", { x: place(i) - wide / 2, width: wide, y: top, height: chart.y(0) - top, style: "fill:var(--track)" }));
  });
  for (const own of data.placements) {
    const line = chosen === null ? time.lines[own.key].all : time.lines[own.key].layers[chosen];
    const points = line.map((value, i) => [place(i), value === null ? null : chart.y(value)]);
    chart.svg.append(make("path", { class: "line", d: path(points), "stroke-dasharray": DASHES[own.key], style: `stroke:var(--${own.key})` }));
    if (count <= 40) for (const [x, y] of points) if (y !== null) chart.svg.append(mark(own.key, x, y, 3.6));
  }
  word(chart.svg, FRAME.left, `step ${time.first[0] ?? 0}`, "start");
  word(chart.svg, FRAME.width - FRAME.right, `step ${time.last[count - 1] ?? 0}`, "end");
  const value = (own, i) => share((chosen === null ? time.lines[own.key].all : time.lines[own.key].layers[chosen])[i]);
  const say = (i) => `Steps ${time.first[i]} to ${time.last[i]} (${time.phases[i]}, ${plural(time.tokens[i], "token")}): ${each((own) => value(own, i))}`;
  readout("over-time", chart, count, place, say, "Bars: tokens of each window.");
  byId("time-note").textContent = chosen === null ? "all layers, window by window" : `layer ${chosen}, window by window`;
}

function rankCurve(chosen) {
  const lines = data.placements.map((own) => {
    const rows = own.rank_load[0].map((_, rank) => (chosen === null ? own.rank_load.reduce((sum, layer) => sum + layer[rank], 0) : own.rank_load[chosen][rank]));
    const mean = rows.reduce((sum, value) => sum + value, 0) / rows.length || 1;
    return { own, values: rows.map((value) => value / mean).sort((a, b) => b - a) };
  });
  const high = Math.max(2, Math.ceil(Math.max(...lines.map((line) => line.values[0])) * 1.02));
  const step = high > 12 ? Math.ceil(high / 6) : high > 4 ? 2 : high > 2 ? 1 : 0.5;
  const ticks = [];
  for (let value = 0; value <= high; value += step) ticks.push(value);
  const chart = frame("curve", 0, high, ticks, "Load of the ranks in descending order, over their mean, for each placement");
  const count = Math.max(...lines.map((line) => line.values.length));
  const place = (i) => chart.x(0.01 + (count > 1 ? (0.98 * i) / (count - 1) : 0.5));
  chart.svg.append(make("line", { class: "axis", x1: chart.x(0), x2: chart.x(1), y1: chart.y(1), y2: chart.y(1), "stroke-dasharray": "2 3" }));
  for (const { own, values } of lines) {
    const wide = values.length > 1 ? (count - 1) / (values.length - 1) : 1;
    const points = values.map((value, i) => [place(i * wide), chart.y(value)]);
    chart.svg.append(make("path", { class: "line", d: path(points), "stroke-dasharray": DASHES[own.key], style: `stroke:var(--${own.key})` }));
    chart.svg.append(mark(own.key, ...points[0], 5));
  }
  word(chart.svg, FRAME.left, "busiest rank", "start");
  word(chart.svg, FRAME.width - FRAME.right, "least busy", "end");
  const at = (values, i) => (count > 1 ? Math.round((i * (values.length - 1)) / (count - 1)) : 0);
  const say = (i) => `${lines.map(({ own, values }) => `${own.name} ${times(values[at(values, i)])} (rank ${at(values, i) + 1} of ${values.length} from the busiest)`).join(" · ")}`;
  readout("curve", chart, count, place, say, "× the mean over ranks; 1 is an even share.");
  byId("curve-note").textContent = chosen === null ? "all layers" : `layer ${chosen}`;
}
