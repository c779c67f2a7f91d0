"use strict";
// The page of a comparison. The menus choose a group: a run, a pair of lengths, a pair of kinds of text.

let data, state, layers, heads, groups; // layers: their numbers in the model, one for each row of the arrays

const both = ([a, b]) => a === b ? String(a) : `${a} → ${b}`;
const groupName = ({run, lengths, domains}) => JSON.stringify([run, both(lengths), both(domains)]);
const group = () => groups.get(JSON.stringify([state.run, state.length, state.domain]));
const viewOf = score => group().find(view => view.score === score);
const signed = value => (value > 0 ? "+" : "") + figures(value);
const value = (view, name, layer = state.layer, head = state.head) => data.arrays[`${view.n}.${name}`].data[layers.indexOf(layer) * heads + head];

function rowsOf(view) {
  const found = [];
  for (const layer of layers)
    for (let head = 0; head < heads; head++) {
      const [before, after, change, half] = ["before", "after", "change", "half"].map(name => value(view, name, layer, head));
      found.push({layer, head, before, after, value: change, half: number(half), beyond: Math.abs(change) > half});
    }
  return found;
}

function table(id, columns, lines) { // a line: [cells, attributes]; the first cell is the row header
  const header = element("thead", {}, element("tr", {}, ...columns.map(title => element("th", {scope: "col"}, title))));
  $(id).replaceChildren(header, element("tbody", {}, ...lines.map(([[first, ...cells], attributes = {}]) =>
    element("tr", attributes, element("th", {scope: "row"}, first), ...cells.map(cell => element("td", {class: "n"}, cell))))));
}

// Each menu offers what exists for the choices in the menus before it.
function limitMenus() {
  const there = data.views.filter(view => view.run === state.run);
  const lengths = [...new Set(there.map(view => both(view.lengths)))];
  if (!lengths.includes(state.length)) state.length = lengths.at(-1);
  const domains = [...new Set(there.filter(view => both(view.lengths) === state.length).map(view => both(view.domains)))];
  if (!domains.includes(state.domain)) state.domain = domains[0];
  options($("length"), lengths.map(length => [length, `${length} tokens`]));
  options($("domain"), domains.map(domain => [domain, domain]));
  for (const name of ["run", "length", "domain", "score", "layer", "head"]) $(name).value = state[name];
}

function showMap() {
  const view = viewOf(state.score), {title, high} = data.scores.find(score => score.name === state.score);
  $("map-title").textContent = `Change of: ${title[0].toLowerCase()}${title.slice(1)}`;
  $("paired").textContent = view.paired ? "Both runs use the same texts, so changes are paired by text." : "The runs use different texts.";
  return draw("map", "map", {heads: rowsOf(view), selected: [{layer: state.layer, head: state.head}]}, {high}, choose);
}

const changedHere = () => data.changed.filter(head => groupName(head) === groupName(group()[0]));

function showHead() {
  $("head-title").textContent = `Layer ${state.layer}, head ${state.head}`;
  const changed = changedHere().find(head => head.layer === state.layer && head.head === state.head);
  $("head-role").textContent = changed ? `Role: ${changed.before} → ${changed.after}` : "Role: the same in both";
  table("head-scores", ["score", "before", "after", "change ± 95 %"], group().map(view => {
    const [before, after, change, half] = ["before", "after", "change", "half"].map(name => value(view, name));
    return [[data.scores.find(score => score.name === view.score).title, figures(before), figures(after),
      signed(change) + (number(half) === null ? "" : ` ± ${figures(half, 2)}`)], view.score === state.score ? {class: "shown"} : {}];
  }));
  const view = viewOf(state.score);
  $("said").textContent = `Layer ${state.layer}, head ${state.head}: ${figures(value(view, "before"))} to ${figures(value(view, "after"))}.`;
  table("moved", ["head", "change ± 95 %"], view.most_moved.map(({layer, head, change, half}) => {
    const button = element("button", {type: "button"}, `layer ${layer}, head ${head}`);
    button.addEventListener("click", () => choose({layer, head}));
    return [[button, signed(change) + (half === null ? "" : ` ± ${figures(half, 2)}`)]];
  }));
}

function showScores() {
  table("scores", ["score", "mean before", "mean after", "mean |change|", "largest |change|", "at", "rank correlation", "beyond chance"], group().map(view => [[
    data.scores.find(score => score.name === view.score).title, figures(view.mean_a), figures(view.mean_b), figures(view.mean_difference),
    figures(view.largest_difference), `layer ${view.largest_at[0]}, head ${view.largest_at[1]}`,
    figures(view.rank_correlation ?? NaN), view.beyond_chance === null ? "–" : `${Math.round(100 * view.beyond_chance)}%`,
  ], view.score === state.score ? {class: "shown"} : {}]));
  const changed = changedHere();
  $("roles-said").textContent = `${changed.length} of ${layers.length * heads} heads have another role (${state.length} tokens, ${state.domain}). Rows: before; columns: after.`;
  table("flow", ["", ...data.roles], data.roles.map(before => [[before, ...data.roles.map(after => before === after ? "·" :
    String(changed.filter(head => head.before === before && head.after === after).length || ""))]]));
}

function show(whole) {
  limitMenus();
  showHead();
  if (whole) showScores();
  return showMap().catch(fail);
}

function choose(change) {
  for (const name of ["run", "length", "domain", "score", "layer", "head"]) if (name in change) state[name] = change[name];
  const shown = show(!("layer" in change || "head" in change));
  toAddress(state);
  return shown;
}

function readState() {
  const asked = fromAddress(), first = data.views[0];
  const has = (list, value, otherwise) => list.includes(value) ? value : otherwise;
  state = {
    run: has(data.names.slice(1), asked.run, first.run), length: asked.length, domain: asked.domain,
    score: has(data.scores.map(score => score.name), asked.score, first.score), layer: 0, head: 0,
  };
  limitMenus();
  const [layer, head] = viewOf(state.score).largest_at;
  state.layer = layers.includes(Number(asked.layer)) ? Number(asked.layer) : layer;
  state.head = within(asked.head, 0, heads - 1, head);
}

figureName = () => `change-${[state.score, state.length, state.domain].join("-")}`.replaceAll(/[^\w.-]+/g, "-");

async function start() {
  data = await unpack("data");
  [layers, heads] = data.grid;
  groups = new Map();
  data.views.forEach((view, n) => {
    view.n = n;
    groups.set(groupName(view), [...groups.get(groupName(view)) ?? [], view]);
  });
  options($("run"), [...new Set(data.views.map(view => view.run))].map(run => [run, run]));
  options($("score"), data.scores.map(score => [score.name, score.title]));
  readState();
  for (const name of ["run", "length", "domain", "score"]) $(name).addEventListener("change", () => choose({[name]: $(name).value}));
  $("layer").addEventListener("change", () => choose({layer: Number($("layer").value)}));
  $("head").addEventListener("change", () => choose({head: within($("head").value, 0, heads - 1, state.head)}));
  arrows($("map-focus"), (down, right) => choose(besides(down, right)));
  window.addEventListener("hashchange", () => { if (location.hash.startsWith("#?")) readState(), show(true); });
  const shown = show(true);
  $(location.hash.slice(1))?.scrollIntoView(); // the tables above it were empty when the browser scrolled
  await shown;
  ready();
  document.documentElement.dataset.complete = "";
}

start().catch(fail);
