"use strict";
// The script of a gallery (labkit/plots/gallery.py): it draws what `data` holds. Text of a record becomes text nodes and attributes of
// the page and nothing else: nothing here makes elements of it.

const {columns, rows, shown} = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const NS = byId("front").namespaceURI;
const settings = columns.filter(column => column.kind === "setting");
const results = columns.filter(column => column.kind === "result");
const numeric = columns.filter(column => column.numeric);
const MOST_CHOICES = 12, MOST_AXES = 10, LOG = 50;
const LESS = /loss|second|_s$|time|bytes|size|error|stale|wait|load|send|param|cost|flops|memory/i, MORE = /per_s|score|accuracy|auc/i;

for (const column of columns) {
  const there = column.values.filter(value => value !== null);
  if (column.numeric) {
    [column.low, column.high] = [Math.min(...there), Math.max(...there)];
    column.log = column.low > 0 && column.high / column.low >= LOG;
  }
  column.choices = [...new Set(column.values.map(label))].sort((a, b) => a.localeCompare(b, undefined, {numeric: true}));
  if (column.numeric) column.setRange = (low, high) => { low === null ? ranges.delete(column) : ranges.set(column, [low, high]); update(); };
  column.reset = () => ranges.delete(column);
  column.less = column.less ?? (LESS.test(column.name) && !MORE.test(column.name));
}

function label(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);
}

function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  return fill(element, attributes, inside);
}

function draw(tag, attributes = {}, ...inside) {
  return fill(document.createElementNS(NS, tag), attributes, inside);
}

function fill(element, attributes, inside) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}

// Where a number of a column lies, from 0 to 1; of a text its place among the others.
function place(column, value) {
  if (!column.numeric) return column.choices.length > 1 ? column.choices.indexOf(label(value)) / (column.choices.length - 1) : 0.5;
  if (value === null) return null;
  if (column.high === column.low) return 0.5;
  return column.log ? Math.log(value / column.low) / Math.log(column.high / column.low) : (value - column.low) / (column.high - column.low);
}

function valueAt(column, at) {
  return column.log ? column.low * (column.high / column.low) ** at : column.low + at * (column.high - column.low);
}

// -- filters ------------------------------------------------------------------------------------------------------------

const picked = new Map();  // column: the texts that are let through
const ranges = new Map();  // column: [lowest, highest]
const states = {name: "state", values: rows.map(row => row.state), numeric: false};
states.choices = [...new Set(states.values)].sort();
let text = "", visible = rows.map((_, at) => at);
const searched = rows.map((row, at) => [row.name, row.state, row.error, ...columns.map(column => `${column.name}=${label(column.values[at])}`)].join("\n").toLowerCase());

function passes(at) {
  if (text && !text.split(/\s+/).every(word => searched[at].includes(word))) return false;
  for (const [column, choices] of picked) if (!choices.has(label(column.values[at]))) return false;
  for (const [column, [low, high]] of ranges) {
    const value = column.values[at];
    if (value === null || value < low || value > high) return false;
  }
  return true;
}

function makeFilters() {
  const search = make("input", {type: "search", "aria-label": "Text in name, settings or results", placeholder: "name, lr=0.1, ..."});
  search.addEventListener("input", () => { text = search.value.trim().toLowerCase(); update(); });
  byId("filters").append(search);
  for (const column of [states, ...settings, ...results]) {
    if (column.choices.length < 2) continue;
    if (column.choices.length <= MOST_CHOICES && column.kind !== "result") byId("filters").append(choicesOf(column));
    else if (column.numeric) byId("filters").append(rangeOf(column));
  }
}

function choicesOf(column) {
  const boxes = column.choices.map(choice => make("input", {type: "checkbox", checked: true, value: choice}));
  const change = () => {
    const chosen = new Set(boxes.filter(box => box.checked).map(box => box.value));
    chosen.size === boxes.length ? picked.delete(column) : picked.set(column, chosen);
    update();
  };
  column.reset = () => { for (const box of boxes) box.checked = true; picked.delete(column); ranges.delete(column); };
  const labels = boxes.map(box => make("label", {change}, box, ` ${box.value}`));
  return make("fieldset", {}, make("legend", {}, column.name), ...labels);
}

function rangeOf(column) {
  const inputs = ["lowest", "highest"].map(end => make("input", {type: "number", step: "any", "aria-label": `${end} ${column.name}`}));
  [inputs[0].placeholder, inputs[1].placeholder] = [label(column.low), label(column.high)];
  const change = () => {
    const [low, high] = inputs.map((input, at) => input.value === "" ? [-Infinity, Infinity][at] : Number(input.value));
    low === -Infinity && high === Infinity ? ranges.delete(column) : ranges.set(column, [low, high]);
    update();
  };
  column.setRange = (low, high) => {
    [inputs[0].value, inputs[1].value] = low === null ? ["", ""] : [label(low), label(high)];
    low === null ? ranges.delete(column) : ranges.set(column, [low, high]);
    update();
  };
  column.reset = () => { inputs.forEach(input => { input.value = ""; }); ranges.delete(column); };
  const bounds = inputs.map((input, at) => make("label", {class: "bound", input: change}, ["from ", "to "][at], input));
  return make("fieldset", {}, make("legend", {}, column.name), ...bounds);
}

// -- colour, highlight, detail --------------------------------------------------------------------------------------------

const tinted = results.find(column => column.numeric) ?? numeric[0];

function coloured(at, element) {
  const where = tinted ? place(tinted, tinted.values[at]) : null;
  if (where !== null) element.style.setProperty("--share", `${(100 * where).toFixed(0)}%`);
  element.classList.add(where === null ? "plain" : "tinted");
  return element;
}

const drawn = rows.map(() => new Set());  // of each run its elements, wherever they are
let lit = null;

function light(at) {
  if (lit !== null) for (const element of drawn[lit]) element.classList.remove("lit");
  lit = at;
  if (at !== null) for (const element of drawn[at]) element.classList.add("lit");
}

function belongs(at, element) {
  drawn[at].add(element);
  element.addEventListener("pointerenter", () => light(at));
  element.addEventListener("focusin", () => light(at));
  element.addEventListener("click", () => detail(at));
  return element;
}

function forget(elements) {
  for (const own of drawn) for (const element of own) if (elements.contains(element)) own.delete(element);
  elements.replaceChildren();
}

function linksOf(row) {
  return row.links.map(({text, href}) => make("a", {href, click: event => event.stopPropagation()}, text)).flatMap(link => [link, " "]);
}

function detail(at) {
  const row = rows[at];
  const table = make("table", {}, make("tbody", {}, ...columns.map(column => make("tr", {}, make("th", {scope: "row"}, column.name), make("td", {}, label(column.values[at]))))));
  const said = [make("h2", {}, row.name), make("p", {}, row.state, " ", ...linksOf(row))];
  if (row.error) said.push(make("p", {class: "failed"}, row.error));
  byId("detail").hidden = false;
  said.unshift(make("button", {type: "button", click: () => { byId("detail").hidden = true; }}, "Close"));
  byId("detail").replaceChildren(...said, make("div", {class: "wide"}, table));
  light(at);
}

// -- parallel coordinates ---------------------------------------------------------------------------------------------------

function makeParallel() {
  const svg = byId("parallel"), axes = [...settings.filter(column => column.choices.length > 1).slice(0, MOST_AXES - 3), ...results.filter(column => column.numeric).slice(0, 3)];
  const width = Math.max(700, 110 * axes.length), height = 300, top = 40, bottom = 20, side = 60;
  if (axes.length < 2) { byId("parallel-part").hidden = true; return; }
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const x = at => side + at * (width - 2 * side) / (axes.length - 1), y = where => height - bottom - where * (height - top - bottom);
  const lines = draw("g");
  rows.forEach((row, at) => {
    const where = axes.map(column => place(column, column.values[at]));
    const points = where.map((own, axis) => own === null ? null : `${x(axis).toFixed(1)},${y(own).toFixed(1)}`);
    const parts = points.map((point, axis) => point === null ? "" : `${axis === 0 || points[axis - 1] === null ? "M" : "L"}${point}`);
    lines.append(belongs(at, coloured(at, draw("path", {class: "line", d: parts.join("")}, draw("title", {}, row.name)))));
  });
  svg.append(lines);
  axes.forEach((column, axis) => svg.append(axisOf(svg, column, x(axis), y, top)));
  if (tinted) byId("tint").textContent = `Colours go from blue, ${tinted.name} ${label(tinted.low)}, to orange, ${label(tinted.high)}.`;
  svg.setAttribute("aria-label", `Parallel coordinates: a line for each run over ${axes.map(column => column.name).join(", ")}. The table below has the same numbers.`);
}

function axisOf(svg, column, x, y, top) {
  const ticks = column.numeric ? [0, 0.5, 1].map(at => [at, label(valueAt(column, at))]) : column.choices.length <= MOST_CHOICES ? column.choices.map(choice => [place(column, choice), choice]) : [];
  const name = draw("text", {x, y: top - 22, "text-anchor": "middle", "font-weight": 600}, column.name.slice(0, 20), draw("title", {}, column.name));
  const marks = ticks.map(([at, said]) => draw("text", {x: x + 4, y: y(at) + 4}, said.slice(0, 16)));
  const brush = draw("rect", {class: "brush", x: x - 8, width: 16, hidden: true});
  const group = draw("g", {}, draw("line", {class: "axis", x1: x, x2: x, y1: y(0), y2: y(1)}), name, ...marks, brush);
  if (!column.setRange) return group;
  column.brush = () => {
    const range = ranges.get(column);
    brush.toggleAttribute("hidden", !range);
    if (!range) return;
    const [low, high] = range.map(end => y(Math.min(1, Math.max(0, place(column, Math.min(column.high, Math.max(column.low, end)))))));
    brush.setAttribute("y", high);
    brush.setAttribute("height", Math.max(1, low - high));
  };
  const reach = draw("rect", {class: "reach", x: x - 10, width: 20, y: y(1) - 6, height: y(0) - y(1) + 12}, draw("title", {}, `Drag to filter by ${column.name}; a click takes the filter away.`));
  let from = null;
  const at = event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return Math.min(1, Math.max(0, (y(0) - point.y) / (y(0) - y(1))));
  };
  reach.addEventListener("pointerdown", event => { from = at(event); reach.setPointerCapture(event.pointerId); });
  reach.addEventListener("pointermove", event => {
    if (from === null || Math.abs(at(event) - from) < 0.01) return;
    const ends = [from, at(event)].sort((a, b) => a - b);
    column.setRange(valueAt(column, ends[0]), valueAt(column, ends[1]));
  });
  reach.addEventListener("pointerup", event => {
    if (from !== null && Math.abs(at(event) - from) < 0.01) column.setRange(null, null);
    from = null;
  });
  group.append(reach);
  return group;
}

// -- Pareto front -----------------------------------------------------------------------------------------------------------

const chosen = {};  // x and y: the columns of the front

function chooser(name, column) {
  const select = make("select", {id: `front-${name}`}, ...numeric.map((own, at) => make("option", {value: at, selected: own === column}, own.name)));
  const less = make("input", {type: "checkbox"});
  const take = () => { chosen[name] = numeric[select.value]; less.checked = chosen[name].less; drawFront(); };
  select.addEventListener("change", take);
  less.addEventListener("change", () => { chosen[name].less = less.checked; drawFront(); });
  byId("front-choices").append(make("label", {}, `${name} `, select), make("label", {}, less, " less is better"));
  chosen[name] = column;
  less.checked = column.less;
}

function makeFront() {
  const best = results.filter(column => column.numeric);
  if (numeric.length < 2) { byId("front-part").hidden = true; return; }
  const cost = best.find(column => column.name === "seconds") ?? best[1] ?? numeric.find(column => column !== best[0]);
  chooser("x", cost);
  chooser("y", best.find(column => column !== cost) ?? numeric.find(column => column !== cost));
  drawFront();
}

function frontOf(among) {
  const {x, y} = chosen, sign = column => column.less ? -1 : 1;
  const points = among.filter(at => x.values[at] !== null && y.values[at] !== null).map(at => ({at, x: sign(x) * x.values[at], y: sign(y) * y.values[at]}));
  points.sort((a, b) => b.x - a.x || b.y - a.y);
  const found = [];
  let best = -Infinity, last = null;
  for (const point of points) {
    if (point.y > best) found.push(point.at);
    else if (point.y === best && last !== null && point.x === last) found.push(point.at);  // equal in both
    if (point.y > best) { best = point.y; last = point.x; }
  }
  return found;
}

const FRONT = {width: 700, height: 320, side: 65, edge: 30};

function drawFront() {
  const svg = byId("front"), {width, height, side, edge} = FRONT, {x, y} = chosen;
  forget(svg);
  const px = value => side + place(x, value) * (width - side - edge), py = value => height - 40 - place(y, value) * (height - 40 - edge);
  svg.append(draw("line", {class: "axis", x1: side, x2: width - edge, y1: height - 40, y2: height - 40}), draw("line", {class: "axis", x1: side, x2: side, y1: edge, y2: height - 40}));
  for (const at of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(draw("text", {x: side + at * (width - side - edge), y: height - 25, "text-anchor": "middle"}, label(valueAt(x, at))));
    svg.append(draw("text", {x: side - 6, y: height - 36 - at * (height - 40 - edge), "text-anchor": "end"}, label(valueAt(y, at))));
  }
  svg.append(draw("text", {x: (width + side) / 2, y: height - 6, "text-anchor": "middle"}, x.name + (x.log ? " (logarithmic)" : "")));
  svg.append(draw("text", {x: 8, y: 16}, y.name + (y.log ? " (logarithmic)" : "")));
  svg.append(draw("path", {id: "frontier"}));
  rows.forEach((row, at) => {
    if (x.values[at] === null || y.values[at] === null) return;
    const said = `${row.name}: ${x.name} ${label(x.values[at])}, ${y.name} ${label(y.values[at])}`;
    svg.append(belongs(at, coloured(at, draw("circle", {class: "point", cx: px(x.values[at]), cy: py(y.values[at]), r: 4.5, "data-run": at}, draw("title", {}, said)))));
  });
  showFront();
}

function showFront() {
  if (!chosen.x) return;
  const svg = byId("front"), {x, y} = chosen, among = new Set(visible);
  for (const point of svg.querySelectorAll("circle")) point.classList.toggle("off", !among.has(Number(point.dataset.run)));
  const front = frontOf(visible), circle = at => svg.querySelector(`circle[data-run="${at}"]`);
  const points = front.map(at => [circle(at).getAttribute("cx"), circle(at).getAttribute("cy")]);
  const steps = points.map(([px, py], at) => at === 0 ? `M${px},${py}` : `L${px},${points[at - 1][1]}L${px},${py}`);
  byId("frontier").setAttribute("d", steps.join(""));
  const names = front.slice(0, 8).map(at => `${rows[at].name} (${label(x.values[at])}, ${label(y.values[at])})`);
  const said = front.length ? `On the front of ${x.name} and ${y.name}: ${names.join("; ")}${front.length > 8 ? `; and ${front.length - 8} more` : ""}.` : "Nothing is on the front.";
  byId("front-said").textContent = said;
  svg.setAttribute("aria-label", said);
}

// -- small multiples --------------------------------------------------------------------------------------------------------

const CARD = {width: 160, height: 80};
const cards = rows.map((row, at) => {
  const picture = draw("svg", {viewBox: `0 0 ${CARD.width} ${CARD.height}`, "aria-hidden": "true"});
  const result = tinted ? `${tinted.name} ${label(tinted.values[at])}` : row.state;
  return {picture, item: make("li", {}, belongs(at, make("button", {type: "button", title: row.name}, make("span", {class: "name"}, row.name), picture, result)))};
});
let more = false;

function makeCards() {
  if (!rows.some(row => row.curves.length)) { byId("cards-part").hidden = true; return; }
  byId("cards").append(...cards.map(card => card.item));
  const has = name => rows.some(row => row.curves.some(curve => curve[name].some(value => value !== null)));
  for (const [id, names] of [["curve-y", ["score", "loss"]], ["curve-x", ["seconds", "samples"]]]) {
    byId(id).append(...names.filter(has).map(name => make("option", {}, name)));
    byId(id).addEventListener("change", drawCurves);
  }
  byId("more").addEventListener("click", () => { more = true; update(); });
  drawCurves();
}

function drawCurves() {
  const [xs, ys] = [byId("curve-x").value, byId("curve-y").value], {width, height} = CARD;
  const all = name => rows.flatMap(row => row.curves.flatMap(curve => curve[name].filter(value => value !== null)));
  const ends = values => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  const [[x0, x1], [y0, y1]] = [ends([0, ...all(xs)]), ends(all(ys))];
  const px = value => 2 + (value - x0) / (x1 - x0 || 1) * (width - 4), py = value => height - 2 - (value - y0) / (y1 - y0 || 1) * (height - 4);
  rows.forEach((row, at) => {
    cards[at].picture.replaceChildren(...row.curves.map(curve => {
      const points = curve[xs].map((value, i) => value === null || curve[ys][i] === null ? null : `${px(value).toFixed(1)},${py(curve[ys][i]).toFixed(1)}`).filter(point => point !== null);
      return coloured(at, draw("polyline", {class: "line", points: points.join(" "), "stroke-dasharray": curve.dashed ? "3 2" : null}));
    }));
  });
  byId("cards-said").textContent = `All with the same axes: ${xs} from ${label(x0)} to ${label(x1)}, ${ys} from ${label(y0)} to ${label(y1)}.` +
    (rows.some(row => row.curves.some(curve => curve.dashed)) ? " Dashed: the test curve was not measured; training loss and held-out score of the workers." : "");
}

// -- table ------------------------------------------------------------------------------------------------------------------

const order = rows.map((_, at) => at);
let sorted = {values: null, down: false};
const lines = rows.map((row, at) => belongs(at, make("tr", {}, make("td", {}, make("a", {href: "#detail", click: event => { event.preventDefault(); detail(at); }}, row.name)),
  make("td", {class: row.state === "failed" || row.state === "damaged" ? "failed" : null, title: row.error || null}, row.state),
  ...columns.map(column => make("td", {}, column.values[at] === null ? "" : label(column.values[at]))), make("td", {}, ...linksOf(row)))));

function makeTable() {
  const heads = [["run", rows.map(row => row.name)], ["state", states.values], ...columns.map(column => [column.name, column.values])];
  const cells = heads.map(([name, values]) => {
    const cell = make("th", {scope: "col"}, make("button", {type: "button", click: () => sortBy(values, cell)}, name));
    return cell;
  });
  byId("table").append(make("thead", {}, make("tr", {}, ...cells, make("th", {scope: "col"}, "notebook"))), make("tbody", {}, ...lines));
}

function sortBy(values, cell) {
  const down = sorted.values === values && !sorted.down, sign = down ? -1 : 1;
  sorted = {values, down};
  order.sort((a, b) => {
    const [one, two] = [values[a], values[b]];
    if (one === null || two === null) return (one === null) - (two === null);
    return sign * (typeof one === "number" && typeof two === "number" ? one - two : label(one).localeCompare(label(two), undefined, {numeric: true}));
  });
  for (const head of byId("table").tHead.rows[0].cells) head.removeAttribute("aria-sort");
  cell.setAttribute("aria-sort", down ? "descending" : "ascending");
  byId("table").tBodies[0].append(...order.map(at => lines[at]));
  byId("cards").append(...order.map(at => cards[at].item));
  update();
}

// -- all of it --------------------------------------------------------------------------------------------------------------

function update() {
  visible = rows.map((_, at) => at).filter(passes);
  const among = new Set(visible);
  rows.forEach((_, at) => {
    lines[at].hidden = !among.has(at);
    for (const element of drawn[at]) if (element.classList.contains("line")) element.classList.toggle("off", !among.has(at));
  });
  let left = more ? Infinity : shown;
  for (const at of order) cards[at].item.hidden = !among.has(at) || left-- <= 0;
  byId("more").hidden = more || visible.length <= shown;
  byId("more").textContent = `Show all ${visible.length}`;
  for (const column of columns) column.brush?.();
  showFront();
  byId("count").textContent = `${visible.length} of ${rows.length} runs`;
}

byId("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
byId("reset").addEventListener("click", () => {
  for (const column of [states, ...columns]) column.reset?.();
  byId("filters").querySelector("input[type=search]").value = text = "";
  update();
});
makeFilters();
makeParallel();
makeFront();
makeCards();
makeTable();
update();
document.body.dataset.ready = "yes";
