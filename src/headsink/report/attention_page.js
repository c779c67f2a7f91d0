"use strict";
// A page of attention maps alone: one pane, and a menu of heads.

async function start() {
  const data = await unpack("data"), {tiles, mean, keys, weights, kept} = data.arrays, length = data.words.length;
  const [, rows] = tiles.shape, top = keys.shape[2];
  let query = null;
  const pane = new TextPane($("pane"), chosen => { query = chosen; show(); });
  function show() {
    const n = Number($("head").value), [layer, head] = data.heads[n];
    const part = (array, size) => array.data.subarray(n * size, (n + 1) * size);
    pane.show({
      text: 0, name: `${layer}.${head}`, length, tile: data.tile, rows, top, kv: Math.floor(head / data.group),
      tiles: part(tiles, rows * rows), mean: part(mean, length), keys: part(keys, length * top), weights: part(weights, length * top),
      kept: kept ? part(kept, length) : null, flat: data.arrays[`flat.${data.sliding[layer] ?? 0}`].data,
      words: position => data.words[position], marks: () => "",
    }, query);
  }
  $("head").addEventListener("change", show);
  show();
  ready();
  document.documentElement.dataset.complete = "";
}

start().catch(fail);
