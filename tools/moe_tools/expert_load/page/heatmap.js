// A heat map on a canvas, for the mouse and the arrow keys. Values are read by function, so nothing is copied.
// options: id, rows, columns, value(row, column), most, say(row, column), title, scale: [low, high], caption: nodes, square
function heatmap(options) {
  const { rows, columns } = options;
  const canvas = make("canvas", { tabindex: "0", role: "img", "aria-label": `${options.title} Move with the arrow keys.` });
  const said = make("span", { "aria-live": "polite" }, options.hint || "");
  const legend = make("canvas", { width: "132", height: "10", "aria-hidden": "true" });
  const scale = make("span", { class: "scale" }, options.scale[0], legend, options.scale[1]);
  const caption = options.caption ? make("div", { class: "caption" }, ...options.caption) : null;
  const box = make("div", { class: "map" }, caption, canvas, make("div", { class: "foot" }, said, scale));
  byId(options.id).replaceChildren(box);
  const left = options.square ? 0 : 58, below = options.square ? 0 : 22;
  let at = null;

  function size() {
    const width = canvas.clientWidth - left;
    const each = options.square ? width / columns : Math.min(Math.max(280 / rows, rows > 40 ? 9 : 14), 44);
    return { width, each, height: Math.round(each * rows) };
  }
  const column = (x, width) => Math.round(left + (x * width) / columns);

  function draw() {
    const { width, each, height } = size();
    if (width <= 0) return;
    const ratio = devicePixelRatio || 1, ramp = stops(), style = getComputedStyle(document.body);
    canvas.style.height = `${height + below}px`;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round((height + below) * ratio);
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const gap = width / columns > 6 && each > 6 ? 1 : 0, between = each > 9 ? 1 : 0;
    for (let row = 0; row < rows; row += 1) {
      const top = Math.round(row * each), bottom = Math.round((row + 1) * each) - between;
      for (let x = 0; x < columns; x += 1) {
        const start = column(x, width);
        pen.fillStyle = shade(options.most ? options.value(row, x) / options.most : 0, ramp);
        pen.fillRect(start, top, column(x + 1, width) - start - gap, bottom - top);
      }
    }
    pen.fillStyle = style.getPropertyValue("--quiet");
    pen.font = `12px ${style.fontFamily}`;
    if (!options.square) labels(pen, width, each, height);
    if (at) {
      const start = column(at[1], width);
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.lineWidth = 2;
      pen.strokeRect(start - 1, Math.round(at[0] * each) - 1 + (at[0] ? 0 : 2), Math.max(4, column(at[1] + 1, width) - start + 1), each - (at[0] ? 0 : 2));
    }
    const paint = legend.getContext("2d");
    for (let x = 0; x < 132; x += 1) { paint.fillStyle = shade(x / 131, ramp); paint.fillRect(x, 0, 1, 10); }
  }
  function labels(pen, width, each, height) {
    const every = Math.ceil(16 / each);
    pen.textBaseline = "middle";
    for (let row = 0; row < rows; row += every) pen.fillText(`layer ${row}`, 0, Math.max(7, (row + 0.5) * each - 0.5)); // 7: half of a line
    if (options.ticks === false) return;
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((n) => (n * width) / columns >= 34) || 128;
    pen.textBaseline = "top";
    pen.textAlign = "center";
    for (let x = 0; x < columns; x += step) pen.fillText(String(x), left + ((x + 0.5) * width) / columns, height + 7);
    pen.textAlign = "left";
  }
  function place(row, x, mouse) {
    at = [Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(x, 0), columns - 1)];
    const text = options.say(...at);
    said.textContent = text;
    if (mouse) tip(text, mouse.clientX, mouse.clientY);
    draw();
  }
  canvas.addEventListener("mousemove", (mouse) => {
    const { width, each, height } = size();
    if (mouse.offsetX < left || mouse.offsetY >= height) return tip(null);
    place(Math.floor(mouse.offsetY / each), Math.floor(((mouse.offsetX - left) * columns) / width), mouse);
  });
  const leave = () => { at = null; tip(null); draw(); };
  canvas.addEventListener("mouseleave", leave);
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const ends = { Home: 0, End: columns - 1 }[event.key];
    if (!steps && ends === undefined) return;
    event.preventDefault();
    const [row, x] = at || [0, steps && steps[1] > 0 ? -1 : 0];
    if (steps) place(row + steps[0], x + steps[1]);
    else place(row, ends);
  });
  new ResizeObserver(draw).observe(canvas);
  dark.addEventListener("change", draw);
  draw();
}
