// The page: what is chosen (layer, placement, order, level), and the sections drawn from it.
const chosen = { layer: null, placement: "recorded", sorted: false, level: data.ep > 64 ? "nodes" : "ranks" };
const placementOf = (name) => data.placements.find((own) => own.key === name);
const relative = (row) => { const mean = row.reduce((a, b) => a + b, 0) / row.length; return row.map((value) => (mean ? value / mean : 0)); };
const KINDS = { measured: "measured", predicted: "predicted", counterfactual: "counterfactual" };
// Placements that can be compared with the plan, or with the recording where there is none: on as many ranks, known as exactly.
const base = placementOf("plan") || placementOf("recorded");
const sameKind = (own, other) => own.ep === other.ep && data.traffic[own.key].exact === data.traffic[other.key].exact;
const otherRanks = base.ep !== data.ep; // names then end with the number of ranks
const shortName = (own) => own.name.split(",")[0];

function head() {
  const recorded = placementOf("recorded"), plan = placementOf("plan"), none = placementOf("none");
  const nodes = Math.ceil(data.ep / data.ranks_per_node);
  document.title = `Expert load of ${data.model} at ep=${data.ep}`;
  byId("headline").textContent = data.ep === 1 ? "One rank holds all experts: nothing to balance"
    : data.measured ? `The busiest rank does ${times(recorded.slowest)} the mean work, and the others wait`
      : `As placed, the busiest rank would do ${times(recorded.slowest)} the mean work`;
  const same = Math.abs(none.slowest - recorded.slowest) < 0.005;
  const unbalanced = data.measured ? "This run was not balanced." : "That is without any balancing; where experts were is assumed, not recorded.";
  const change = plan ? ` ${data.plan.name} would bring that to ${times(plan.slowest)}.` : "";
  const outcome = otherRanks ? `${data.plan.name} is for ${plural(plan.ep, "rank")}, not ${data.ep}: it would bring the busiest one there to ${times(plan.slowest)}, from ${times(none.slowest)} on ${plan.ep} without any balancing. Shares of time on different numbers of ranks cannot be compared.`
    : `${same ? unbalanced : `Without any balancing it would be ${times(none.slowest)}.`}${change}`;
  byId("lead").textContent = data.ep === 1 && !otherRanks ? "" : `In each window of steps and each layer, all ranks wait for the one with most rows. ${outcome}`;
  const shared = data.experts - data.routed ? ` + ${data.experts - data.routed} shared` : "";
  const facts = [
    ["Model", data.model], ["Ranks", `${data.ep} on ${plural(nodes, "node")}`], ["Mesh", `dp ${data.dp} × tp ${data.tp}`],
    ["Experts", `${data.routed}${shared}, ${data.top_k} per token`], ["MoE layers", number(data.layers)],
    ["Tokens", number(data.tokens)], ["Steps", `${number(data.steps)} in ${plural(data.windows, "window")}`], 
    data.measured ? ["Recorded", `${data.created.slice(0, 10)} (${data.mode})`] : ["Record of", `${data.source} (${data.mode})`],
  ];
  if (data.changes) facts.push(["Moved while it ran", plural(data.changes, "layer")]);
  fill("run", ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  fill("cards", ...data.placements.map((own) => make("div", { class: "card" },
    make("h3", {}, key(own.key), shortName(own), make("small", {}, KINDS[own.kind])),
    make("div", { class: "figure" }, percent(own.used)),
    meter(own.used || 0, own.key),
    make("p", {}, `of the experts’ time is used${otherRanks ? ` on ${plural(own.ep, "rank")}` : ""}. Busiest rank ${times(own.slowest)} the mean${own.slots ? `; ${plural(own.slots, "slot")} per rank and layer` : ""}.`))));
  const alike = none.ep === recorded.ep && none.rank_load.every((row, layer) => row.every((rows, rank) => rows === recorded.rank_load[layer][rank]));
  fill("keys", ...data.placements.map((own) => make("span", {}, key(own.key), own.name + (alike && own.key === "none" ? ": the same, so its marks lie under the others" : ""))));
  byId("footer").textContent = "Made by moe_tools.expert_load. This file holds all its data and asks the network for nothing. Windows count the agreed steps that ran real tokens; padding is never counted."
    + (data.complete ? "" : " The trace is not complete: the run goes on, or it ended early.")
    + (data.dropped_windows ? ` ${plural(data.dropped_windows, "window")} are missing: the trace’s byte cap was reached, or its disk was too slow.` : "");
}

function switches() {
  const options = [make("option", { value: "" }, "all"), ...Array.from({ length: data.layers }, (_, layer) => make("option", { value: layer }, String(layer)))];
  fill("layer", ...options);
  byId("layer").addEventListener("change", (event) => { chosen.layer = event.target.value === "" ? null : Number(event.target.value); layerParts(); });
  byId("sorted").addEventListener("change", (event) => { chosen.sorted = event.target.checked; expertMap(); });
  radios("placement", data.placements.map((own) => [own.key, shortName(own)]), rankMap);
  radios("level", [["ranks", "Between ranks"], ["nodes", "Between nodes"]], trafficMaps);
}
function radios(name, choices, redraw) {
  for (const [value, text] of choices) {
    const input = make("input", { type: "radio", name, value });
    input.checked = chosen[name] === value;
    input.addEventListener("change", () => { chosen[name] = value; redraw(); });
    byId(name).append(make("label", {}, input, make("span", {}, text)));
  }
}

function expertMap() {
  const values = data.expert_load.map(relative);
  const order = values.map((row) => row.map((_, i) => i));
  if (chosen.sorted) order.forEach((row, layer) => row.sort((a, b) => values[layer][b] - values[layer][a] || a - b));
  const most = largest(values.flatMap((row) => row.slice(0, data.routed)), 1);
  heatmap({
    id: "expert-map", rows: data.layers, columns: data.experts, most, ticks: !chosen.sorted, scale: ["0", times(most)],
    value: (layer, i) => values[layer][order[layer][i]],
    say: (layer, i) => { const e = order[layer][i]; return `Layer ${layer}, ${e < data.routed ? "expert" : "shared expert"} ${e}: ${plural(data.expert_load[layer][e], "token")}, ${times(values[layer][e])} the mean`; },
    title: `Tokens of each expert and layer; the hottest has ${times(most)} its layer’s mean.`,
    hint: chosen.sorted ? "Experts of each layer in order of their load" : "Logical expert →",
  });
}
function rankMap() {
  const own = placementOf(chosen.placement), values = own.rank_load.map(relative);
  const most = largest(data.placements.flatMap((other) => other.rank_load.flatMap(relative)), 1);
  heatmap({
    id: "rank-map", rows: data.layers, columns: own.rank_load[0].length, most, scale: ["0", times(most)],
    value: (layer, rank) => values[layer][rank],
    say: (layer, rank) => `Layer ${layer}, rank ${rank} (node ${Math.floor(rank / data.ranks_per_node)}): ${number(own.rank_load[layer][rank])} rows, ${times(values[layer][rank])} the mean`,
    title: `Rows that each rank receives in each layer: ${own.name}.`, hint: "Rank →",
  });
  byId("ranks-note").textContent = `Shown: ${own.name.toLowerCase()}, ${KINDS[own.kind]}; the colours mean the same for every placement.`;
}
function tables() {
  const top = data.hot_experts.length ? data.hot_experts[0].times : 1;
  fill("hot-experts", table([["Expert"], ["Layer"], ["", false], ["× mean", true], ["Tokens", true], ["On ranks"]],
    data.hot_experts.map((hot) => [String(hot.expert), String(hot.layer), meter(hot.times / top, "recorded"), times(hot.times), number(hot.tokens), hot.ranks.join(", ") || "–"]), "Hottest experts"));
  const busy = data.hot_ranks.length ? data.hot_ranks[0].times : 1;
  byId("hot-ranks-note").textContent = `${placementOf("recorded").name.toLowerCase()}, all layers`;
  const slow = (layers) => (layers.length > 8 ? `${layers.length} layers` : layers.join(", ") || "–");
  fill("hot-ranks", table([["Rank"], ["Node"], ["", false], ["× mean", true], ["Rows", true], ["Slowest in layer"]],
    data.hot_ranks.map((hot) => [String(hot.rank), String(hot.node), meter(hot.times / busy, "recorded"), times(hot.times), number(hot.rows), slow(hot.slowest_in)]), "Hottest ranks"));
}
function together() {
  const layer = chosen.layer ?? 0, found = data.pairs.layers[layer];
  byId("together-body").hidden = !found;
  if (!found) {
    byId("together-note").textContent = data.pairs.missing || `Pairs are counted for the first ${data.pairs.layers.length} layers.`;
    byId("together-body").style.display = "none";
    return;
  }
  byId("together-body").style.display = "";
  byId("together-note").textContent = `Layer ${layer}, ${plural(found.tokens, "token")}. Lift: how many times as often as by chance a token chooses both. Experts that are often chosen together cost less traffic on one rank or node. Choose another layer above.`;
  const n = found.experts.length, top = 6;
  const lift = (a, b) => (found.together[a][b] * found.tokens) / Math.max(1, found.together[a][a] * found.together[b][b]);
  let most = 2;
  for (let a = 0; a < n; a += 1) for (let b = 0; b < a; b += 1) most = Math.min(top, Math.max(most, lift(a, b)));
  heatmap({
    id: "pair-map", rows: n, columns: n, most, square: true, scale: ["0", `${times(most)}${most === top ? " and more" : ""}`],
    value: (a, b) => (a === b ? 0 : lift(a, b)),
    say: (a, b) => (a === b ? `Expert ${found.experts[a]}: ${plural(found.together[a][a], "token")}` : `Experts ${found.experts[a]} and ${found.experts[b]}: ${plural(found.together[a][b], "token")}, lift ${times(lift(a, b))}`),
    title: `The ${n} busiest experts of layer ${layer} against each other.`, hint: `The ${n} busiest experts, busiest first`,
  });
  const strong = largest(found.top.map((pair) => pair[3]), 1);
  fill("pair-table", table([["Experts"], ["", false], ["Lift", true], ["Tokens", true]],
    found.top.map(([a, b, tokens, lift]) => [`${a} and ${b}`, meter(lift / strong, "recorded"), times(lift), number(tokens)]), "Strongest pairs"));
  if (!found.top.length) fill("pair-table", make("p", { class: "about" }, "None stands out: no two experts are together much more often than chance has it."));
}
const amount = (value) => (data.traffic.unit === "bytes" ? bytes(value) : plural(value, "row"));
function trafficMaps() {
  const level = chosen.level, noun = level === "ranks" ? "Rank" : "Node";
  const scaleOf = (own) => largest(data.placements.filter((other) => sameKind(own, other)).flatMap((other) => data.traffic[other.key][level].map((row) => largest(row, 0))), 1);
  fill("traffic-maps", ...data.placements.map((own) => make("div", { id: `traffic-${own.key}` })));
  for (const own of data.placements) {
    const sent = data.traffic[own.key], matrix = sent[level], most = scaleOf(own);
    heatmap({
      id: `traffic-${own.key}`, rows: matrix.length, columns: matrix.length, most, square: true, scale: ["0", amount(most)],
      caption: [key(own.key), make("b", {}, own.name), make("span", {}, `${amount(level === "ranks" ? sent.off_rank : sent.off_node)} leave their ${noun.toLowerCase()}${sent.exact ? "" : ", estimated"}`)],
      value: (from, to) => matrix[from][to],
      say: (from, to) => `${noun} ${from} to ${to}: ${amount(matrix[from][to])}`,
      title: `Traffic between ${level}, ${own.name.toLowerCase()}: rows are senders, columns receivers.`, hint: "from ↓ to →",
    });
  }
}
function traffic() {
  const sent = data.placements.map((own) => data.traffic[own.key]), exact = data.traffic.recorded.exact;
  byId("traffic-note").textContent = (exact ? "One row per assignment, from a token’s home rank to the rank of its expert: from the recorded routes and the runtime’s own choice of replicas" : "Estimated, because the trace does not tell the way of its tokens, or holds too many steps to follow them: every rank is taken to send alike")
    + (data.traffic.unit === "bytes" ? `; ${number(data.traffic.row_bytes)} bytes a row. The combine sends as much back.` : "; in rows, because the model is not on this machine. The combine sends as many back.")
    + (data.placements.every((own) => sameKind(own, base)) ? " Colours mean the same in every map." : " Colours mean the same in maps on as many ranks that are known as exactly; others have their own scale.");
  const row = (name, of, better) => [name, sent.map((own) => (of(own) === null ? "–" : amount(of(own)) + (own.total && of(own) < own.total ? ` · ${percent(of(own) / own.total)}` : ""))), better ? sent.map((own) => (of(own) === null ? null : -of(own))) : null];
  const rows = [
    row("Rows routed, all layers", (own) => own.total, false),
    row("Rows that leave their rank", (own) => own.off_rank, true),
    row("Rows that leave their node", (own) => own.off_node, true),
    row("Rows into the busiest rank from others", (own) => own.busiest, true),
    row("Once to each rank that a token needs", (own) => own.once_per_rank, true),
    row("Once to each node that it needs", (own) => own.once_per_node, true),
  ];
  comparison("traffic-table", "Traffic in all", rows);
  trafficMaps();
}
function planTable() {
  const plan = data.plan, all = data.placements;
  byId("plan-note").textContent = plan ? `${plan.name}${otherRanks ? `, for ${plural(plan.ep, "rank")}` : ""}, against ${data.measured ? "what was recorded" : "the record as placed"}${otherRanks ? ` on ${plural(data.ep, "rank")}` : ""} and against no balancing at all${otherRanks ? ` on ${plural(plan.ep, "rank")}` : ""} (every rank its even share of experts in order; spare slots only where ranks outnumber experts). ${data.traffic.plan.exact ? "Predicted by sending every recorded token through the plan" : "Predicted from the experts’ loads, spread evenly over their replicas"}. A plan made from these same windows does worse on new traffic; the command compare measures how much.`
    : "No plan was given. Make one: plan trace=… output=plan.json, then report trace=… plan=plan.json.";
  const worst = (own) => -largest(own.balance.map((value) => -value), -Infinity);
  const of = (own, recorded, planned) => (own.key === "recorded" ? recorded : own.key === "plan" ? planned : null);
  const rows = [
    ["Experts’ time used", all.map((own) => percent(own.used)), all.map((own) => own.used)],
    ["Busiest rank over mean", all.map((own) => times(own.slowest)), all.map((own) => -own.slowest)],
    ["Balancedness of the worst layer", all.map((own) => share(worst(own))), all.map(worst)],
    ["Ranks", all.map((own) => number(own.ep)), null],
    ["Expert slots per rank and layer", all.map((own) => number(own.slots)), null],
  ];
  if (plan) {
    rows.push(["Expert weights per rank", all.map((own) => bytes(own.rank_bytes)), null]);
    rows.push(["Slots that change", all.map((own) => of(own, "–", plan.moves === null ? "a new start: other slots or ranks" : number(plan.moves)) ?? "–"), null]);
    rows.push(["Weights that move", all.map((own) => of(own, "–", bytes(plan.move_bytes)) ?? "–"), null]);
  }
  comparison("plan-table", "Before and after", rows);
}
// A row: its name, a text for each placement, and the numbers of which the greatest are best, or null. Best is said among
// placements of a kind alone.
function comparison(id, label, rows) {
  const top = make("tr", {}, make("td", {}), ...data.placements.map((own) => make("th", { scope: "col" }, key(own.key), ` ${own.name}`)));
  const body = rows.filter(([, shown]) => shown.some((text) => text !== "–")).map(([name, shown, values]) => {
    const alike = data.placements.map((own, i) => sameKind(own, base) && shown[i] !== "–" && values !== null && values[i] !== null);
    const best = values && shown[values.indexOf(largest(values.filter((_, i) => alike[i]), -Infinity))];
    const differs = shown.some((text, i) => alike[i] && text !== best);
    return make("tr", {}, make("th", { scope: "row" }, name), ...shown.map((text, i) => make("td", { class: differs && alike[i] && text === best ? "best" : null }, text)));
  });
  fill(id, make("div", { class: "compare", tabindex: "0", role: "region", "aria-label": label }, make("table", {}, make("thead", {}, top), make("tbody", {}, ...body))));
}
function layerParts() {
  byLayer(chosen.layer);
  overTime(chosen.layer);
  rankCurve(chosen.layer);
  together();
}
let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(layerParts, 120); });
head();
switches();
expertMap();
rankMap();
tables();
layerParts();
traffic();
planTable();
