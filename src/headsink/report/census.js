"use strict";
// The page of a census. `state` is the current choice; `show` draws it. Numbers come from views.py through page.py.

const SHADES = 10; // steps of the token view: 2, 4, ... 1024 times flat attention
const AROUND = 5; // tokens of context on either side of a top key
const MOST_KEYS = 10;

let data, state, rows, statistics, layers, heads, group;
const shaded = {}; // text -> data of its token view, unpacked when first shown

const array = name => data.arrays[name]?.data;
const ofHead = (name, per, layer = state.layer, head = state.head) => array(name).subarray((layer * heads + head) * per, (layer * heads + head + 1) * per);
const key = (length = state.length, domain = state.domain) => `${length}.${domain}`;
const word = (text, position) => data.words[array(`ids.${text}`)[position]];
const titleOf = ({title}) => title.replace("the near window", `a window of ${data.near[state.length]}`);
const statistic = name => statistics.find(one => one.name === name);

// Numbers

function viewRows() {
  const [value, half, uniform, roles] = ["value", "half", "uniform", "roles"].map(name => array(`${key()}.${name}`));
  const found = [];
  for (let layer = 0; layer < layers; layer++)
    for (let head = 0; head < heads; head++) {
      const row = {layer, head, role: data.roles[roles[layer * heads + head]], halves: {}, uniforms: {}};
      data.names.forEach((name, n) => {
        const place = (n * layers + layer) * heads + head;
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
  const [keys, profile] = ["keys", "profile"].map(name => array(`flat.${length}.${data.sliding[state.layer] ?? 0}.${name}`));
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
  const row = rows[state.layer * heads + state.head], texts = textsOf(state.length, state.domain).length;
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

// The token view

async function showText() {
  const text = state.text;
  const {arrays, length, shown} = shaded[text] ??= await unpack(`text-${text}`);
  if (text !== state.text) return; // another text was chosen meanwhile
  $("text-head").textContent = `first ${figures(shown)} tokens, as layer ${state.layer}, head ${state.head} attends to them at ${figures(length)} tokens`;
  const box = $("tokens");
  if (box.dataset.text !== String(text)) {
    box.dataset.text = text;
    box.dataset.at = -1;
    box.scrollTop = 0;
    box.replaceChildren(...Array.from({length: shown}, (_, n) => element("span", {}, word(text, n).replaceAll("\n", "⏎\n"))));
  }
  const kv = Math.floor(state.head / group), [, kvHeads, most] = arrays.secondary.shape, {first} = data.limits[length];
  const secondary = new Set(arrays.secondary.data.subarray((state.layer * kvHeads + kv) * most, (state.layer * kvHeads + kv + 1) * most));
  const shades = arrays.attention.data.subarray((state.layer * heads + state.head) * shown, (state.layer * heads + state.head + 1) * shown);
  const flatly = flatOf(length).keys;
  [...box.children].forEach((span, n) => {
    const attention = shades[n] ? data.faintest ** (1 - (shades[n] - 1) / data.steps) : 0, times = flatly[n] ? attention / flatly[n] : 0;
    const step = Math.min(SHADES, Math.max(0, Math.round(Math.log2(times)))), mark = secondary.has(n) ? " secondary-sink" : n < first ? " first-token" : "";
    span.className = `s${step}${mark}`;
    span.said = () => `${JSON.stringify(word(text, n))}, position ${n}: attention ${figures(attention, 2)}, ${figures(times, 2)} × flat` +
      (secondary.has(n) ? `; secondary sink of KV head ${kv}` : n < first ? "; initial token" : "");
  });
  if (Number(box.dataset.at) >= 0) say(Number(box.dataset.at));
}

function say(place) {
  const box = $("tokens"), spans = box.children;
  place = Math.min(spans.length - 1, Math.max(0, place));
  spans[box.dataset.at]?.classList.remove("at");
  spans[place].classList.add("at");
  box.dataset.at = place;
  $("token-said").textContent = spans[place].said();
}

// Other charts that follow the menus

function showPairs() {
  const pairs = array(`${key()}.pairs`), rate = array(`${key()}.rate`), found = [];
  for (let a = 0; a < layers; a++)
    for (let b = a + 1; b < layers; b++)
      if (rate[a] > 0) found.push({a, b, found: pairs[a * layers + b], base: rate[b], lift: pairs[a * layers + b] - rate[b]});
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

function readState() {
  const asked = fromAddress(), last = data.lengths.at(-1);
  const length = data.lengths.includes(Number(asked.length)) ? Number(asked.length) : last;
  const domain = Math.max(0, data.domains.indexOf(asked.domain));
  const name = asked.statistic === "role" || statistic(asked.statistic) ? asked.statistic : "sink";
  const texts = [...$("shaded").options].map(option => option.value);
  state = {length, domain, statistic: name, text: Number(texts.includes(asked.text) ? asked.text : textOf(domain) ?? texts[0])};
  limitDomains();
  rows = viewRows();
  state.layer = within(asked.layer, 0, layers - 1, Number($("layer").defaultValue));
  state.head = within(asked.head, 0, heads - 1, Number($("head").defaultValue));
}

function showMenus() {
  for (const name of ["length", "domain", "statistic", "layer", "head"]) $(name).value = state[name];
  $("shaded").value = state.text;
}

function show(wholeView) {
  showMenus();
  const asked = [showMap(), showHead(), showText()];
  if (wholeView) showCounts(), asked.push(showLayers(), showPairs());
  return Promise.all(asked).catch(fail);
}

// Apply a choice by the reader: draw it and write it to the address.
function choose(change) {
  const before = key();
  for (const name of ["layer", "head", "length", "domain", "statistic", "text"]) if (name in change) state[name] = change[name];
  if (change.domain > 0) { // the token view shows a text of that kind
    state.text = Number(textOf(state.domain));
  }
  limitDomains();
  if (key() !== before) rows = viewRows();
  toAddress({...state, domain: data.domains[state.domain]});
  return show(key() !== before);
}

const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));

async function start() {
  data = await unpack("data");
  ({statistics} = data);
  [layers, heads] = data.shape;
  group = heads / data.shape[2];
  readState();
  for (const name of ["length", "domain", "statistic"])
    $(name).addEventListener("change", () => choose({[name]: name === "statistic" ? $(name).value : Number($(name).value)}));
  $("shaded").addEventListener("change", () => choose({text: Number($("shaded").value)}));
  for (const [name, count] of [["layer", layers], ["head", heads]])
    $(name).addEventListener("change", () => choose({[name]: within($(name).value, 0, count - 1, state[name])}));
  arrows($("map-focus"), (down, right) => choose({layer: clamp(state.layer + down, layers), head: clamp(state.head + right, heads)}));
  arrows($("tokens"), (down, right) => {
    say(Number($("tokens").dataset.at) + right + 10 * down);
    $("tokens").children[$("tokens").dataset.at].scrollIntoView({block: "nearest"});
  });
  $("tokens").addEventListener("mouseover", event => event.target.said && say([...$("tokens").children].indexOf(event.target)));
  window.addEventListener("hashchange", () => { if (location.hash.startsWith("#?")) readState(), show(true); });
  await show(true);
  ready();
  await drawRest(["windows", "law", "norms", "tau", "lengths", "roles-by-text", "same-roles"]);
  document.documentElement.dataset.complete = "";
}

start().catch(fail);
