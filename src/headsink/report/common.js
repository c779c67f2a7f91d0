"use strict";
// Shared by all pages: unpack the numbers, draw charts, keyboard control of the map, the choice in the address.

const $ = id => document.getElementById(id);
const TYPES = {f4: Float32Array, i4: Int32Array, u2: Uint16Array, u1: Uint8Array};

// Text of tokens and prompts is only inserted as text, never as markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// float32 numbers whose first bytes come first, then their second bytes, ... (utils/pack.py).
function joined(buffer, from, count) {
  const apart = new Uint8Array(buffer, from, 4 * count), bytes = new Uint8Array(4 * count);
  for (let n = 0; n < 4 * count; n++) bytes[4 * (n % count) + Math.floor(n / count)] = apart[n];
  return new Float32Array(bytes.buffer);
}

// Unpack what utils/pack.py wrote into the script element `id`: the header, with `arrays` as {data, shape}.
async function unpack(id) {
  const packed = Uint8Array.from(atob($(id).textContent), letter => letter.charCodeAt(0));
  const buffer = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, size)));
  for (const [name, [type, offset, shape]] of Object.entries(header.arrays)) {
    const count = shape.reduce((a, b) => a * b, 1);
    header.arrays[name] = {data: type === "f4" ? joined(buffer, 4 + size + offset, count) : new TYPES[type](buffer, 4 + size + offset, count), shape};
  }
  return header;
}

const number = value => Number.isFinite(value) ? value : null; // charts leave out null but draw NaN

const drawn = {}; // id of the element -> {name, view}; `queue` has its last requested drawing
const queue = {};

// Vega numbers the rows that it is given and removes rows by number, so a row must not keep an old number.
const unnumbered = rows => rows.map(row => Object.fromEntries(Object.entries(row)));

// Draw the chart SPECS[name] in the element `id`; if it is already drawn there, only change its data and params.
function draw(id, name, datasets = {}, params = {}, onClick = null) {
  datasets = Object.fromEntries(Object.entries(datasets).map(([key, rows]) => [key, unnumbered(rows)]));
  queue[id] = (queue[id] ?? Promise.resolve()).then(async () => {
    if (drawn[id]?.name === name) {
      const {view} = drawn[id];
      for (const [key, rows] of Object.entries(datasets)) view.data(key, rows);
      for (const [key, value] of Object.entries(params)) view.signal(key, value);
      return view.runAsync();
    }
    const spec = structuredClone(SPECS[name]);
    spec.datasets = {...spec.datasets, ...datasets};
    for (const param of spec.params ?? []) if (param.name in params) param.value = params[param.name];
    const place = element("div"); // the old chart stays until the new one is complete
    const {view} = await vegaEmbed(place, spec, {
      renderer: "svg",
      actions: false, // its links save nothing when they are chosen by the keyboard
    });
    if (onClick) view.addEventListener("click", (_, item) => item?.datum?.layer !== undefined && onClick(item.datum));
    drawn[id]?.view.finalize();
    $(id).replaceChildren(place);
    drawn[id] = {name, view};
  });
  return queue[id];
}

// Offer a file to save. content: a Blob.
function saveFile(content, name) {
  const url = URL.createObjectURL(content);
  element("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // when the browser has read it
}

let figureName = id => id; // a page whose figures follow its menus adds the choice

// The buttons of figure.html.j2. A chart is saved in the colours of light ground, its styles in the file, PNG at 300 dpi.
document.addEventListener("click", async event => {
  const {save, of} = event.target.dataset;
  if (!(of in drawn)) return;
  const {view} = drawn[of], name = `figure-${figureName(of)}.${save}`;
  try {
    if (save === "svg") saveFile(new Blob([await view.toSVG()], {type: "image/svg+xml"}), name);
    else (await view.toCanvas(3)).toBlob(image => saveFile(image, name));
  } catch (error) {
    fail(error);
  }
});

// Draw the charts that do not follow the menus one by one, after the others.
async function drawRest(names) {
  for (const name of names.filter(name => name in SPECS && $(name))) {
    await new Promise(resolve => setTimeout(resolve));
    await draw(name, name);
  }
}

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", {value}, text)));
}

// Arrow keys on the map call move(layers, heads).
function arrows(target, move) {
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  target.addEventListener("keydown", event => {
    if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    move(...steps[event.key]);
  });
}

// The head of the map so many rows below and columns to the right of the chosen one; at an edge, the last one.
function besides(down, right) {
  const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
  return {layer: layers[clamp(layers.indexOf(state.layer) + down, layers.length)], head: clamp(state.head + right, heads)};
}

// The choice is stored in the address after "#?", so that a view can be linked; "#name" is a link to a section.
const fromAddress = () => location.hash.startsWith("#?") ? Object.fromEntries(new URLSearchParams(location.hash.slice(2))) : {};
// entry: a new entry of the browser's history, to which its back button returns.
const toAddress = (state, entry = false) => history[entry ? "pushState" : "replaceState"](null, "", "#?" + new URLSearchParams(state));

const within = (value, low, high, otherwise) => {
  const found = Math.trunc(Number(value));
  return value !== undefined && value !== "" && found >= low && found <= high ? found : otherwise;
};

function figures(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en-US");
  return Number(value.toPrecision(digits)).toString().replace(/^(-?\d)\.?(\d*)e(.*)$/, (all, a, b, c) => `${a}${b ? "." + b : ""}e${c}`);
}

const visible = token => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function fail(error) {
  console.error(error);
  document.body.prepend(element("p", {role: "alert"}, `This report could not be drawn: ${error.message}`));
}

const ready = () => { document.documentElement.dataset.ready = Math.round(performance.now()); };
