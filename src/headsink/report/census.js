"use strict";
// The page of a census. `state` is the current choice; `show` draws it. Numbers come from views.py through page.py.

const AROUND = 5; // tokens of context on either side of a top key
const MOST_KEYS = 10;

let data, state, rows, statistics, layers, heads, group; // layers: their numbers in the model, one for each row of the arrays
const panes = []; // of texts; the second one is made when the reader asks for it
const sorted = {by: "sink", down: true, all: false}; // the table of all heads; `all`: with more than its first rows
const shaded = {}; // text -> data of its token view, unpacked when first shown

const array = name => data.arrays[name]?.data;
const rowOf = layer => layers.indexOf(layer);
const placeOf = (layer = state.layer, head = state.head) => rowOf(layer) * heads + head;
const ofHead = (name, per) => array(name).subarray(placeOf() * per, (placeOf() + 1) * per);
const key = (length = state.length, domain = state.domain) => `${length}.${domain}`;
const word = (text, position) => data.words[array(`ids.${text}`)[position]];
const titleOf = ({title}) => title.replace("the near window", `a window of ${data.near[state.length]}`);
const statistic = name => statistics.find(one => one.name === name);

// Numbers

function viewRows() {
  const [value, half, uniform, roles] = ["value", "half", "uniform", "roles"].map(name => array(`${key()}.${name}`));
  const found = [];
  for (const layer of layers)
    for (let head = 0; head < heads; head++) {
      const own = placeOf(layer, head), row = {layer, head, role: data.roles[roles[own]], halves: {}, uniforms: {}};
      data.names.forEach((name, n) => {
        const place = n * layers.length * heads + own;
        row[name] = number(value[place]);
        row.halves[name] = number(half[place]);
        row.uniforms[name] = number(uniform[place]);
      });
      found.push(row);
    }
  return found;
}

// Flat attention to each key and within each distance, in the selected layer, which may have a sliding window.
function flatOf(length) {
  const [keys, profile] = ["keys", "profile"].map(name => array(`flat.${length}.${data.sliding[rowOf(state.layer)] ?? 0}.${name}`));
  return {keys, profile};
}

// The map and its menus

function limitDomains() {
  const there = data.has[state.length];
  if (!there.includes(state.domain)) state.domain = 0;
  [...$("domain").options].forEach((option, n) => { option.disabled = !there.includes(n); });
}

function showMap() {
  const chosen = statistic(state.statistic), selected = [{layer: state.layer, head: state.head}];
  $("map-title").textContent = chosen ? titleOf(chosen)[0].toUpperCase() + titleOf(chosen).slice(1) : "Role";
  if (!chosen) return draw("map", "map-role", {heads: rows, selected}, {}, choose);
  const shown = rows.map(row => ({...row, value: row[chosen.name], half: row.halves[chosen.name], uniform: row.uniforms[chosen.name]}));
  const params = {low: chosen.low, high: data.highs[state.length][chosen.name]};
  return draw("map", `map-${chosen.scale}`, {heads: shown, selected}, params, choose);
}

function showCounts() {
  data.roles.forEach((role, n) => { $("counts").children[n].firstChild.textContent = rows.filter(row => row.role === role).length; });
}

// One head

function showHead() {
  const row = rows[placeOf()], texts = textsOf(state.length, state.domain).length;
  const kv = Math.floor(state.head / group), same = Math.round(row.agreement * texts);
  $("head-title").textContent = `Layer ${state.layer}, head ${state.head} (KV head ${kv})`;
  const badge = element("span", {class: `badge ${row.role}`}, row.role);
  $("head-role").replaceChildren(badge, texts > 1 ? ` in ${same} of ${texts} texts on their own` : " (one text)",
    ` · median distance ${figures(row.distance)} · window needed ${figures(Math.round(row.window))}, with initial tokens only ${figures(Math.round(row.window_first))}`);
  const chosen = statistic(state.statistic);
  const half = chosen && row.halves[chosen.name] !== null ? ` ± ${figures(row.halves[chosen.name], 2)}` : "";
  const uniform = chosen && row.uniforms[chosen.name] !== null ? `, flat attention ${figures(row.uniforms[chosen.name])}` : "";
  $("said").textContent = `Layer ${state.layer}, head ${state.head}: ${row.role}. ` +
    (chosen ? `${titleOf(chosen)} ${figures(row[chosen.name])}${half}${uniform}.` : "");
  showScores(row);
  showKeys();
  return Promise.all([showProfile(), showWindows()]);
}

function showScores(row) {
  const place = share => `${100 * Math.min(1, Math.max(0, share))}%`;
  for (const line of $("scores").tBodies[0].rows) {
    const {name} = line.dataset, numbers = [[row[name], 3], [row.halves[name], 2], [row.uniforms[name], 3]];
    line.className = name === state.statistic ? "shown" : "";
    line.cells[0].textContent = titleOf(statistic(name)).replace(/^attention to (the )?/, "");
    numbers.forEach(([figure, digits], n) => { line.cells[line.cells.length - 3 + n].textContent = figures(figure ?? NaN, digits); });
    if (line.querySelector(".bar")) {
      line.querySelector("i").style.width = place(row[name]);
      line.querySelector("b").style.left = place(row.uniforms[name]);
    }
  }
}

const lengthsOf = domain => data.lengths.filter(length => data.has[length].includes(domain));

function showProfile() {
  const found = [];
  for (const length of lengthsOf(state.domain)) {
    const steps = data.distances[length], within = ofHead(`${key(length)}.profile`, steps.length), chosen = length === state.length;
    steps.forEach((distance, n) => {
      found.push({distance, within: within[n], line: "this head", length, chosen});
      if (chosen) found.push({distance, within: flatOf(length).profile[n], line: "flat attention", length, chosen});
    });
  }
  return draw("profile", "profile", {profile: found});
}

function showWindows() {
  const found = [], kept = ["initial tokens", "with secondary sinks"];
  for (const length of lengthsOf(state.domain)) {
    const steps = data.windows[length], errors = ofHead(`${key(length)}.errors`, 2 * steps.length);
    kept.forEach((name, k) => steps.forEach((window, n) =>
      found.push({window, error: Math.max(errors[k * steps.length + n], 1e-6), kept: name, length, chosen: length === state.length})));
  }
  return draw("window", "window", {errors: found});
}

const textsOf = (length, domain) => data.texts.map((text, n) => ({...text, n}))
  .filter(text => text.lengths.includes(length) && (domain === 0 || text.domain === data.domains[domain]));

function showKeys() {
  const found = [];
  for (const text of textsOf(state.length, state.domain)) {
    const name = `${text.n}.${state.length}`, per = data.arrays[`${name}.top`].shape[2];
    const [top, drawn, sink] = ["top", "drawn", "sink"].map(part => ofHead(`${name}.${part}`, per));
    top.forEach((position, n) => { if (position >= 0) found.push({text, position, attention: drawn[n], sink: sink[n]}); });
  }
  found.sort((a, b) => b.attention - a.attention);
  const {first} = data.limits[state.length];
  const [body] = $("keys").tBodies;
  while (body.rows.length < Math.min(found.length, MOST_KEYS)) body.append(body.rows[0].cloneNode(true));
  [...body.rows].forEach((line, n) => {
    line.hidden = n >= found.length;
    if (line.hidden) return;
    const {text, position, attention, sink} = found[n], [context, token, ...cells] = line.cells;
    const around = (from, to) => {
      let said = "";
      for (let at = Math.max(0, from); at < Math.min(to, state.length); at++) said += word(text.n, at);
      return visible(said);
    };
    const [name, said] = sink ? ["secondary-sink", "secondary sink"] : position < first ? ["first-token", "initial token"] : ["", ""];
    context.replaceChildren(around(position - AROUND, position), element("b", {}, visible(word(text.n, position))), around(position + 1, position + 1 + AROUND));
    token.firstChild.textContent = visible(word(text.n, position)).replaceAll(" ", "␣");
    [text.name, position, figures(attention), figures(attention / flatOf(state.length).keys[position])].forEach((one, c) => { cells[c].textContent = one; });
    cells[4].replaceChildren(element("span", {class: name}, said));
  });
}

// All heads, sorted and filtered

function showEvery() {
  const number = id => $(id).value === "" ? null : Number($(id).value), [least, most] = ["least", "most"].map(number), filter = $("filter").value;
  const inside = row => (least === null || row[filter] >= least) && (most === null || row[filter] <= most);
  const found = rows.filter(row => (!$("role").value || row.role === $("role").value) && inside(row));
  const value = row => sorted.by === "head" ? row.layer * heads + row.head : sorted.by === "role" ? data.roles.indexOf(row.role) : row[sorted.by] ?? -Infinity;
  found.sort((a, b) => (sorted.down ? value(b) - value(a) : value(a) - value(b)) || a.layer - b.layer || a.head - b.head);
  const columns = [["head", "layer, head"], ["role", "role"], ...data.columns];
  if (!columns.some(([name]) => name === sorted.by)) columns.push([sorted.by, titleOf(statistic(sorted.by))]);
  const styleOf = name => name === "role" ? "text" : ["head", "sink", "first", sorted.by].includes(name) ? "" : "more"; // more: not on a phone
  const heading = ([name, title]) => {
    const button = element("button", {type: "button", "data-by": name}, title, sorted.by === name ? sorted.down ? " ↓" : " ↑" : "");
    return element("th", {scope: "col", class: styleOf(name), ...sorted.by === name ? {"aria-sort": sorted.down ? "descending" : "ascending"} : {}}, button);
  };
  const line = row => {
    const button = element("button", {type: "button", "data-layer": row.layer, "data-head": row.head}, `${row.layer}, ${row.head}`);
    const cells = columns.slice(2).map(([name]) => element("td", {class: `n ${styleOf(name)}`}, figures(row[name] ?? NaN, 2)));
    return element("tr", row.layer === state.layer && row.head === state.head ? {class: "shown"} : {}, element("th", {scope: "row"}, button),
      element("td", {}, element("span", {class: `badge ${row.role}`}, row.role)), ...cells);
  };
  const focused = document.activeElement?.dataset?.by; // the header is made anew
  $("every").replaceChildren(element("thead", {}, element("tr", {}, ...columns.map(heading))), element("tbody", {}, ...found.slice(0, sorted.all ? found.length : data.most_heads).map(line)));
  if (focused) $("every").querySelector(`button[data-by="${focused}"]`)?.focus();
  $("every-said").textContent = `${found.length} of ${rows.length} heads, ${state.length} tokens, ${data.domains[state.domain]}. Click a column to sort by it, a head to see it; the browser's back button returns here.`;
  $("more").hidden = sorted.all || found.length <= data.most_heads;
}

function sortBy(name) {
  sorted.down = sorted.by === name ? !sorted.down : name !== "head" && name !== "role";
  sorted.by = name;
  showEvery();
}

function startEvery() {
  for (const id of ["role", "least", "most"]) $(id).addEventListener("input", showEvery);
  $("filter").addEventListener("change", () => { [sorted.by, sorted.down] = [$("filter").value, true]; showEvery(); });
  $("more").addEventListener("click", () => { sorted.all = true; showEvery(); });
  $("every").addEventListener("click", event => {
    const button = event.target.closest("button");
    if (button?.dataset.by) return sortBy(button.dataset.by);
    if (!button) return;
    choose({layer: Number(button.dataset.layer), head: Number(button.dataset.head)});
    $("head-title").scrollIntoView();
    $("head-title").focus({preventScroll: true});
  });
}

// Texts: the attention map and the shaded text of the head, of one text or of two side by side

function source(text) {
  const {arrays, length, shown, coarse, detailed, heads: read = []} = shaded[text], place = placeOf();
  const part = (name, n, size) => arrays[name].data.subarray(n * size, (n + 1) * size), kv = Math.floor(state.head / group);
  const [, kvHeads, most] = arrays.secondary.shape, {first} = data.limits[length], ofKv = rowOf(state.layer) * kvHeads + kv;
  const secondary = new Set(part("secondary", ofKv, most));
  const found = {
    text, name: `${state.layer}.${state.head}-${data.texts[text].name.replaceAll(/[^\w.-]+/g, "-")}`, length, kv, top: 0, mean: part("attention", place, shown), flat: flatOf(length).keys, words: position => word(text, position),
    marks: position => secondary.has(position) ? "secondary-sink" : position < first ? "first-token" : "",
    kept: arrays.kept ? part("kept", ofKv, length) : null,
  };
  const n = read.findIndex(([layer, head]) => layer === state.layer && head === state.head);
  if (n >= 0) {
    const rows = arrays["detailed.tiles"].shape[1], top = arrays["detailed.keys"].shape[2];
    const whole = shown < length ? {mean: part("detailed.mean", n, length)} : {};
    return {...found, ...whole, tile: detailed, rows, tiles: part("detailed.tiles", n, rows * rows), top,
      keys: part("detailed.keys", n, length * top), weights: part("detailed.weights", n, length * top)};
  }
  if (!arrays.coarse) return found;
  const rows = arrays.coarse.shape[1];
  return {...found, tile: coarse, rows, tiles: part("coarse", place, rows * rows)};
}

const TEXTS = ["text", "text2"], QUERIES = ["query", "query2"]; // in `state`, of each pane

function addPane(box) {
  const n = panes.length;
  panes.push(new TextPane(box, query => choose({[QUERIES[n]]: query})));
  box.querySelector(".shaded").addEventListener("change", event => choose({[TEXTS[n]]: Number(event.target.value), [QUERIES[n]]: null}));
}

async function showTexts() {
  if (state.text2 !== null && panes.length < 2) {
    const box = $("pane").cloneNode(true);
    for (const part of [box, ...box.querySelectorAll("[id]")]) part.removeAttribute("id");
    box.querySelector(".tokens").removeAttribute("aria-describedby");
    $("panes").append(box);
    addPane(box);
  }
  if (panes[1]) panes[1].box.hidden = state.text2 === null;
  $("panes").classList.toggle("two", state.text2 !== null);
  $("beside").textContent = state.text2 === null ? "another text beside it" : "one text only";
  const chosen = TEXTS.map(name => state[name]);
  for (const [n, text] of chosen.entries()) {
    if (text === null) continue;
    shaded[text] ??= await unpack(`text-${text}`);
    if (state[TEXTS[n]] !== text) return; // another text was chosen meanwhile
    const {box} = panes[n], {length} = shaded[text], there = source(text);
    box.querySelector(".shaded").value = text;
    box.querySelector(".text-head").textContent = `first ${figures(there.mean.length)} tokens, as layer ${state.layer}, head ${state.head} attends to them at ${figures(length)} tokens`;
    panes[n].show(there, state[QUERIES[n]]);
  }
}

// Other charts that follow the menus

function showPairs() {
  const pairs = array(`${key()}.pairs`), rate = array(`${key()}.rate`), count = layers.length, found = [];
  for (let a = 0; a < count; a++)
    for (let b = a + 1; b < count; b++)
      if (rate[a] > 0) found.push({a: layers[a], b: layers[b], found: pairs[a * count + b], base: rate[b], lift: pairs[a * count + b] - rate[b]});
  return draw("pairs", "pairs", {pairs: found});
}

function showLayers() {
  const where = `${state.length} tokens, ${data.domains[state.domain]}`;
  $("errors-title").dataset.title = `Error of a window of ${data.near[state.length]}`;
  for (const title of document.querySelectorAll(".of-view")) title.textContent = `${title.dataset.title} (${where})`;
  return Promise.all([draw("layers", "layers", {heads: rows}), draw("errors", "errors", {heads: rows})]);
}

// The current choice

// The text of a kind that has a token view.
const textOf = domain => [...$("shaded").options].find(option => data.texts[option.value].domain === data.domains[domain])?.value;

// The next text in the menu, to be shown beside the first.
function otherText() {
  const texts = [...$("shaded").options].map(option => Number(option.value));
  return texts[(texts.indexOf(state.text) + 1) % texts.length];
}

function readState() {
  const asked = fromAddress(), last = data.lengths.at(-1);
  const length = data.lengths.includes(Number(asked.length)) ? Number(asked.length) : last;
  const domain = Math.max(0, data.domains.indexOf(asked.domain));
  const name = asked.statistic === "role" || statistic(asked.statistic) ? asked.statistic : "sink";
  const texts = [...$("shaded").options].map(option => option.value);
  const query = value => within(value, 0, data.lengths.at(-1) - 1, null);
  state = {
    length, domain, statistic: name, text: Number(texts.includes(asked.text) ? asked.text : textOf(domain) ?? texts[0]), query: query(asked.query),
    text2: texts.includes(asked.text2) ? Number(asked.text2) : null, query2: query(asked.query2),
  };
  limitDomains();
  rows = viewRows();
  state.layer = layers.includes(Number(asked.layer)) ? Number(asked.layer) : Number([...$("layer").options].find(one => one.defaultSelected).value);
  state.head = within(asked.head, 0, heads - 1, Number($("head").defaultValue));
}

function showMenus() {
  for (const name of ["length", "domain", "statistic", "layer", "head"]) $(name).value = state[name];
}

function show(wholeView) {
  showMenus();
  const asked = [showMap(), showHead(), showTexts()];
  showEvery();
  if (wholeView) showCounts(), asked.push(showLayers(), showPairs());
  return Promise.all(asked).catch(fail);
}

// Apply a choice by the reader: draw it and write it to the address. Another head is a new entry of the browser's history.
function choose(change, turning = false) {
  const before = key(), {layer, head} = state;
  for (const name of ["layer", "head", "length", "domain", "statistic", ...TEXTS, ...QUERIES]) if (name in change) state[name] = change[name];
  if (change.domain > 0) { // the first pane shows a text of that kind
    [state.text, state.query] = [Number(textOf(state.domain)), null];
  }
  limitDomains();
  if (key() !== before) rows = viewRows();
  const there = Object.entries({...state, domain: data.domains[state.domain]}).filter(([, value]) => value !== null);
  toAddress(Object.fromEntries(there), !turning && (state.layer !== layer || state.head !== head));
  return show(key() !== before);
}

// Names of files: what a figure shows, as in figure-sink-4096-code.svg.
figureName = id => {
  const choice = {map: [state.statistic, state.length], layers: [id, state.length], errors: [id, state.length], pairs: [id, state.length],
    profile: [id, `${state.layer}.${state.head}`], window: [id, `${state.layer}.${state.head}`]}[id];
  return choice ? [...choice, ...state.domain ? [data.domains[state.domain]] : []].join("-").replaceAll(/[^\w.-]+/g, "-") : id;
};

async function start() {
  data = await unpack("data");
  ({statistics, layers} = data);
  [heads] = data.heads;
  group = heads / data.heads[1];
  readState();
  for (const name of ["length", "domain", "statistic"])
    $(name).addEventListener("change", () => choose({[name]: name === "statistic" ? $(name).value : Number($(name).value)}));
  addPane($("pane"));
  startEvery();
  $("beside").addEventListener("click", () => choose({text2: state.text2 === null ? otherText() : null, query2: null}));
  $("layer").addEventListener("change", () => choose({layer: Number($("layer").value)}));
  $("head").addEventListener("change", () => choose({head: within($("head").value, 0, heads - 1, state.head)}));
  arrows($("map-focus"), (down, right) => choose(besides(down, right), true));
  window.addEventListener("hashchange", () => { if (location.hash === "" || location.hash.startsWith("#?")) readState(), show(true); });
  await show(true);
  ready();
  await drawRest(["windows", "law", "norms", "tau", "lengths", "roles-by-text", "same-roles"]);
  document.documentElement.dataset.complete = "";
}

start().catch(fail);
