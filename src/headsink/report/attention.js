"use strict";
// The attention map of one head on one text (census/attention_maps.py), and the text shaded by it. `shown` is a source:
//   length, tile, rows, tiles: the pooled map, rows x rows, in bytes on a logarithmic scale (utils/pack.py)
//   top, keys, weights: the keys with most attention of every query, length x top; top is 0 for a head without them
//   mean: attention to each key, mean over the queries, in bytes; it may be shorter than the text
//   kept: 1 for tokens whose key the head keeps under a plan, else 0; null without a plan
//   words: position -> text; marks: position -> class of a sink token; flat: flat attention of the mean to each key

const FAINT = 10; // the colour scale begins at 2 ** -FAINT
const STEPS = 254, OCTAVES = 20; // of the scale of the bytes
const LISTED = 8; // keys that are listed
const SHADES = 10; // steps of the shaded text: 2, 4, ... 1024 times flat attention
const LEAST_SPAN = 16; // tokens that are seen at the largest zoom
const PICTURE = 1200; // pixels of a side of a saved map, about
const MOST_DRAWN = 4096; // tokens of a saved map in which single keys are drawn
const YELLOW_TO_BLUE = ["ffffd9", "edf8b1", "c7e9b4", "7fcdbb", "41b6c4", "1d91c0", "225ea8", "253494", "081d58"];
const GROUND = {light: [255, 255, 255], dark: [18, 23, 30]};

const dark = matchMedia("(prefers-color-scheme: dark)");
const attentionOf = byte => byte ? 2 ** (-OCTAVES * (1 - (byte - 1) / STEPS)) : 0;
const shadeOf = times => Math.min(SHADES, Math.max(0, Math.round(Math.log2(times))));

// Colour of each byte: the darkest colour, or the lightest on dark ground, is an attention of 1.
function palette(night = dark.matches) {
  const stops = YELLOW_TO_BLUE.map(hex => [0, 2, 4].map(at => parseInt(hex.slice(at, at + 2), 16)));
  const ground = GROUND[night ? "dark" : "light"], colours = [ground, ...night ? stops.reverse() : stops];
  return Uint32Array.from({length: 256}, (_, byte) => {
    const place = byte ? Math.max(0, 1 - (1 - (byte - 1) / STEPS) * OCTAVES / FAINT) * (colours.length - 1) : 0;
    const low = Math.min(colours.length - 2, Math.floor(place)), share = place - low;
    const [red, green, blue] = colours[low].map((value, n) => Math.round(value + share * (colours[low + 1][n] - value)));
    return 0xff000000 | blue << 16 | green << 8 | red; // as the bytes of a pixel
  });
}

class AttentionMap {
  // box: the element of attention.html.j2. onQuery(position or null): the reader chose a query.
  constructor(box, onQuery) {
    [this.box, this.canvas, this.said, this.onQuery] = [box, box.querySelector("canvas"), box.querySelector(".map-said"), onQuery];
    [this.cursor, this.fingers] = [null, new Map()]; // fingers: id of the pointer -> its last event
    this.canvas.addEventListener("keydown", event => this.press(event));
    for (const button of box.querySelectorAll("button[data-do]")) button.addEventListener("click", () => this.act(button.dataset.do));
    this.canvas.addEventListener("pointerdown", event => this.grab(event));
    this.canvas.addEventListener("pointermove", event => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, event => { this.held = null; this.fingers.delete(event.pointerId); });
    this.canvas.addEventListener("pointerleave", () => { if (!this.held) this.point(null); });
    this.canvas.addEventListener("click", event => { if (!this.dragged) this.choose(this.place(event).query); });
    this.canvas.addEventListener("wheel", event => {
      if (!event.ctrlKey && document.activeElement !== this.canvas) return; // otherwise the wheel scrolls the page
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 2 : 0.5, this.place(event));
    }, {passive: false});
    this.canvas.addEventListener("dblclick", event => this.zoom(0.5, this.place(event)));
    new ResizeObserver(() => this.shown && this.draw()).observe(this.canvas);
    dark.addEventListener("change", () => this.shown && this.draw());
  }

  show(shown, query) {
    if (this.shown?.length !== shown.length || this.shown.text !== shown.text) [this.left, this.above, this.span, this.cursor] = [0, 0, shown.length, null];
    [this.shown, this.query] = [shown, query];
    this.draw();
    this.list();
  }

  // Attention of a query to a key: exact for a top key, otherwise the mean over its tile.
  attention(query, key) {
    if (key > query) return {value: 0, exact: true};
    const {top, keys, weights, tile, rows, tiles} = this.shown;
    for (let n = query * top; n < (query + 1) * top; n++) if (keys[n] === key && weights[n]) return {value: attentionOf(weights[n]), exact: true};
    const [row, column] = [query, key].map(at => Math.floor(at / tile));
    return {value: attentionOf(tiles[row * rows + column]) / tile, exact: tile === 1};
  }

  draw() {
    const side = Math.round(this.canvas.clientWidth * devicePixelRatio);
    if (!side) return;
    if (this.canvas.width !== side) this.canvas.width = this.canvas.height = side;
    const {length, tile, top} = this.shown, context = this.canvas.getContext("2d"), per = side / this.span;
    const {image, near} = this.image(side, this.left, this.above, this.span, palette());
    context.putImageData(image, 0, 0);
    context.strokeStyle = "#D55E00";
    context.lineWidth = 2 * devicePixelRatio;
    const middle = (at, begin) => (at + 0.5 - begin) * per;
    if (this.query !== null) line(context, 0, middle(this.query, this.above), side, middle(this.query, this.above));
    if (this.cursor) {
      const {query, key} = this.cursor;
      context.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      line(context, 0, middle(query, this.above), side, middle(query, this.above));
      line(context, middle(key, this.left), 0, middle(key, this.left), side);
      context.setLineDash([]);
    }
    this.box.querySelector(".map-range").textContent = this.span === length ? `all ${figures(length)} tokens` :
      `queries ${Math.floor(this.above)}–${Math.ceil(this.above + this.span) - 1}, keys ${Math.floor(this.left)}–${Math.ceil(this.left + this.span) - 1}`;
    this.box.querySelector(".map-cell").textContent = near ? (tile === 1 ? "every query and key" : `the ${top} top keys of every query; other keys: mean of a tile of ${tile} × ${tile}`) :
      tile === 1 ? "every query and key" : `tiles of ${tile} × ${tile} tokens: mean over the queries, sum over the keys`;
    this.canvas.style.touchAction = this.span === length ? "pan-y" : "none";
  }

  // A square of side x side pixels of the map, from a key and a query on, `span` tokens wide. near: single keys are drawn.
  image(side, left, above, span, colours) {
    const {length, tile, rows, tiles, top, keys, weights} = this.shown, image = new ImageData(side, side), per = side / span;
    const pixels = new Uint32Array(image.data.buffer), near = per >= 1 && (top > 0 || tile === 1);
    const less = near ? Math.round(STEPS * Math.log2(tile) / OCTAVES) : 0; // from a tile's attention to that of one of its keys
    const columns = Int32Array.from({length: side}, (_, x) => Math.floor(left + (x + 0.5) / per));
    for (let y = 0; y < side; y++) {
      const query = Math.floor(above + (y + 0.5) / per), row = Math.floor(query / tile) * rows;
      for (let x = 0; x < side; x++) {
        const key = columns[x];
        const byte = key > query || query >= length ? 0 : tiles[row + Math.floor(key / tile)];
        pixels[y * side + x] = colours[byte && Math.max(1, byte - less)];
      }
      if (!near) continue;
      for (let n = query * top; n < (query + 1) * top && query < length; n++) {
        const from = Math.max(0, Math.round((keys[n] - left) * per)), to = Math.min(side, Math.round((keys[n] + 1 - left) * per));
        for (let x = from; weights[n] && x < to; x++) pixels[y * side + x] = colours[weights[n]];
      }
    }
    return {image, near};
  }

  // What is shown as a picture on light ground, without the lines of the query: a token, or a tile of a head that was read in tiles
  // only or of a very long text, is a whole number of pixels wide.
  picture() {
    const {length, tile, top} = this.shown, unit = top > 0 && this.span <= MOST_DRAWN ? 1 : tile, every = Math.ceil(length / unit);
    const [left, above] = [this.left, this.above].map(at => at / unit), last = Math.ceil(Math.max(left % 1, above % 1) + this.span / unit);
    const cells = Math.min(every, last), [key, query] = [left, above].map(at => unit * Math.min(every - cells, Math.floor(at)));
    const side = cells * Math.max(1, Math.round(PICTURE / cells)), canvas = element("canvas", {width: side, height: side});
    canvas.getContext("2d").putImageData(this.image(side, key, query, cells * unit, palette(false)).image, 0, 0);
    return canvas;
  }

  // What a query attends to, or all queries on average.
  list() {
    const {top, keys, weights, mean, kept} = this.shown, found = [];
    if (this.query === null) mean.forEach((byte, key) => found.push([key, byte]));
    else for (let n = this.query * top; n < (this.query + 1) * top; n++) if (weights[n]) found.push([keys[n], weights[n]]);
    found.sort((a, b) => b[1] - a[1]);
    const title = this.box.querySelector(".list-title"), body = this.box.querySelector(".map-keys");
    title.replaceChildren(this.query === null ? "All queries on average attend to" : element("span", {}, "Query ", this.word(this.query), ` ${this.query} attends to`));
    body.replaceChildren(...found.slice(0, LISTED).map(([key, byte]) => {
      const share = attentionOf(byte), line = element("li", {});
      const bar = element("i", {"aria-hidden": "true", style: `width: ${100 * Math.min(1, share)}%`});
      line.append(this.word(key), element("span", {class: "soft"}, ` ${key}${kept && !kept[key] ? " evicted" : ""} `), element("b", {}, figures(share, 2)), element("span", {class: "line"}, bar));
      return line;
    }));
    if (!found.length) body.append(element("li", {class: "soft"}, "This head was read in tiles only."));
  }

  word(position) {
    return element("code", {class: "token"}, visible(this.shown.words(position)).replaceAll(" ", "␣"));
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect(), at = (value, begin) => Math.floor(begin + value / box.width * this.span);
    const limit = value => Math.min(this.shown.length - 1, Math.max(0, value));
    return {query: limit(at(event.clientY - box.top, this.above)), key: limit(at(event.clientX - box.left, this.left))};
  }

  point(cursor) {
    this.cursor = cursor;
    if (this.shown) this.draw();
    if (!cursor) return;
    const {query, key} = cursor, {value, exact} = this.attention(query, key), said = at => `${at} ${JSON.stringify(this.shown.words(at))}`;
    this.said.textContent = key > query ? `query ${said(query)} comes before key ${said(key)}` :
      `query ${said(query)} → key ${said(key)}: ${exact ? "" : "about "}${figures(value, 2)}`;
  }

  grab(event) {
    if (event.button) return;
    this.held = {x: event.clientX, y: event.clientY, left: this.left, above: this.above};
    this.dragged = false;
    this.fingers.set(event.pointerId, event);
    this.canvas.setPointerCapture(event.pointerId);
  }

  move(event) {
    if (this.fingers.size === 2 && this.fingers.has(event.pointerId)) return this.pinch(event);
    if (!this.held) return this.point(this.place(event));
    const scale = this.span / this.canvas.clientWidth, [x, y] = [event.clientX - this.held.x, event.clientY - this.held.y];
    this.dragged = Math.hypot(x, y) > 4;
    if (!this.dragged) return;
    [this.left, this.above] = [this.held.left - x * scale, this.held.above - y * scale];
    this.limit();
    this.draw();
  }

  // Two fingers: zoom by the change of their distance, around the point between them.
  pinch(event) {
    const apart = () => {
      const [one, two] = this.fingers.values();
      return Math.hypot(one.clientX - two.clientX, one.clientY - two.clientY);
    };
    const before = apart();
    this.fingers.set(event.pointerId, event);
    const [one, two] = this.fingers.values(), middle = {clientX: (one.clientX + two.clientX) / 2, clientY: (one.clientY + two.clientY) / 2};
    this.dragged = true;
    if (apart() > 0) this.zoom(before / apart(), this.place(middle));
  }

  limit() {
    const {length} = this.shown;
    this.span = Math.min(length, Math.max(Math.min(LEAST_SPAN, length), this.span));
    [this.left, this.above] = [this.left, this.above].map(value => Math.min(length - this.span, Math.max(0, value)));
  }

  zoom(times, {query, key}) {
    const before = this.span;
    this.span *= times;
    this.limit();
    const change = this.span / before;
    [this.left, this.above] = [key + 0.5 - (key + 0.5 - this.left) * change, query + 0.5 - (query + 0.5 - this.above) * change];
    this.limit();
    this.draw();
  }

  choose(query) {
    this.onQuery(query === this.query ? null : query);
  }

  act(name) {
    const middle = this.cursor ?? {query: Math.floor(this.above + this.span / 2), key: Math.floor(this.left + this.span / 2)};
    if (name === "in") this.zoom(0.5, middle);
    else if (name === "out") this.zoom(2, middle);
    else if (name === "whole") this.zoom(this.shown.length, middle);
    else if (name === "save") this.picture().toBlob(image => saveFile(image, `figure-attention-${this.shown.name}.png`));
    else this.onQuery(null);
  }

  press(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    const act = {"+": "in", "=": "in", "-": "out", "0": "whole", Escape: "mean"}[event.key];
    if (!steps && !act && event.key !== "Enter") return;
    event.preventDefault();
    if (act) return this.act(act);
    const at = this.cursor ?? {query: Math.floor(this.above + this.span / 2), key: Math.floor(this.left)};
    if (event.key === "Enter") return this.choose(at.query);
    const step = Math.max(1, Math.round(this.span / 64)), limit = value => Math.min(this.shown.length - 1, Math.max(0, value));
    const [query, key] = [limit(at.query + steps[0] * step), limit(at.key + steps[1] * step)];
    const follow = (value, begin) => value < begin ? value : value >= begin + this.span ? value - this.span + 1 : begin;
    [this.above, this.left] = [follow(query, this.above), follow(key, this.left)];
    this.point({query, key});
  }
}

function line(context, ...[x, y, toX, toY]) {
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(toX, toY);
  context.stroke();
}

// The text, shaded by attention: of one query, or of all queries on average. A click on a token chooses it as the query.
class ShadedText {
  constructor(box, said, onQuery) {
    [this.box, this.status, this.onQuery] = [box, said, onQuery];
    box.addEventListener("mouseover", event => event.target !== box && this.say(this.spans().indexOf(event.target)));
    box.addEventListener("click", event => event.target !== box && this.onQuery(this.spans().indexOf(event.target)));
    arrows(box, (down, right) => {
      this.say(Number(box.dataset.at) + right + 10 * down);
      this.spans()[box.dataset.at].scrollIntoView({block: "nearest"});
    });
    box.addEventListener("keydown", event => {
      if (event.key === "Enter") this.onQuery(Number(box.dataset.at));
      if (event.key === "Escape") this.onQuery(null);
    });
  }

  spans() {
    return [...this.box.children];
  }

  show(shown, query) {
    const {mean, words, marks, flat, kept, top, keys, weights} = shown, other = query !== this.query;
    [this.shown, this.query] = [shown, query];
    if (this.box.dataset.text !== String(shown.text) || this.box.children.length !== mean.length) {
      this.box.dataset.text = shown.text;
      this.box.dataset.at = -1;
      this.box.scrollTop = 0;
      this.box.replaceChildren(...Array.from({length: mean.length}, (_, n) => element("span", {}, words(n).replaceAll("\n", "⏎\n"))));
    }
    const own = new Map(); // of the query
    for (let n = (query ?? 0) * top; query !== null && n < (query + 1) * top; n++) if (weights[n]) own.set(keys[n], attentionOf(weights[n]));
    this.spans().forEach((span, n) => {
      const attention = query === null ? attentionOf(mean[n]) : own.get(n) ?? 0, level = query === null ? flat[n] : 1 / (query + 1);
      const times = level ? attention / level : 0, marked = marks(n);
      span.className = [`s${shadeOf(times)}`, marked, kept && (kept[n] ? "kept" : "evicted"), n === query && "query", query !== null && n > query && "later"].filter(Boolean).join(" ");
      span.said = () => `${JSON.stringify(words(n))}, position ${n}: ` +
        (query === null || own.has(n) ? `attention ${figures(attention, 2)}, ${figures(times, 2)} × flat` : n > query ? "after the query" : "not among the query's top keys") +
        ({"secondary-sink": "; secondary sink", "first-token": "; initial token"}[marked] ?? "") + (kept ? kept[n] ? "; kept" : "; evicted" : "");
    });
    if (Number(this.box.dataset.at) >= 0) this.say(Number(this.box.dataset.at));
    const chosen = query !== null && this.spans()[query];
    if (chosen && other && (chosen.offsetTop < this.box.scrollTop || chosen.offsetTop > this.box.scrollTop + this.box.clientHeight - 40))
      this.box.scrollTop = chosen.offsetTop - this.box.clientHeight / 2;
  }

  say(place) {
    const spans = this.spans();
    place = Math.min(spans.length - 1, Math.max(0, place));
    spans[this.box.dataset.at]?.classList.remove("at");
    spans[place].classList.add("at");
    this.box.dataset.at = place;
    this.status.textContent = spans[place].said();
  }
}

// A map and a text that show the same source. The query is chosen on either of them.
class TextPane {
  // box: an element with .attention-map (or none) and .tokens. onQuery(query): the reader chose it; the owner calls show.
  constructor(box, onQuery) {
    this.box = box;
    const choose = query => {
      if (query !== null && !this.shown.top) return; // this head was not read token by token
      onQuery(query);
    };
    const map = box.querySelector(".attention-map");
    this.map = map && new AttentionMap(map, choose);
    this.text = new ShadedText(box.querySelector(".tokens"), box.querySelector(".token-said"), query => choose(query === this.query ? null : query));
  }

  show(shown, query) {
    this.shown = shown;
    this.query = shown.top && query < shown.length ? query : null;
    if (shown.tiles) this.map?.show(shown, this.query);
    this.text.show(shown, this.query);
    const kept = this.box.querySelector(".kept-said");
    if (kept) kept.textContent = shown.kept ? `Kept: ${figures(shown.kept.reduce((a, b) => a + b, 0))} of ${figures(shown.length)} tokens (KV head ${shown.kv}).` : "";
  }
}
