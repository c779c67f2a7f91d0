// NLL of cases by llama.cpp with a KV cache of one type: a JSON line for each case. See llama_cpp_quality.py.
import fs from "fs";
import { createRequire } from "module";
import { pathToFileURL } from "url";

const [folder, modelPath, casesPath, type, threads] = process.argv.slice(2);
const { getLlama } = await import(pathToFileURL(createRequire(`${folder}/`).resolve("node-llama-cpp")));
let log = "";
const logger = (level, message) => (log += message);
const llama = await getLlama({ gpu: false, build: "never", maxThreads: +threads, logLevel: "info", logger });
const model = await llama.loadModel({ modelPath });
for (const { ids, continuations } of JSON.parse(fs.readFileSync(casesPath, "utf8"))) {
  const longest = Math.max(...continuations.map((part) => part.ids.length));
  log = "";
  const context = await model.createContext({
    contextSize: ids.length + longest,
    threads: +threads,
    batchSize: 512,
    flashAttention: true,
    experimentalKvCacheKeyType: type,
    experimentalKvCacheValueType: type,
  });
  const sizes = log.split("\n").filter((line) => /kv_cache/.test(line));
  const sequence = context.getSequence();
  await sequence.evaluateWithoutGeneratingNewTokens(ids);
  const parts = [];
  for (const part of continuations) {
    parts.push({ form: part.form, ...(await score(sequence, part)) });
    await sequence.eraseContextTokenRanges([{ start: ids.length, end: sequence.nextTokenIndex }]);
    if (sequence.nextTokenIndex !== ids.length) throw new Error(`${sequence.nextTokenIndex} tokens left of ${ids.length}`);
  }
  console.log(JSON.stringify({ parts, sizes }));
  await context.dispose();
}
process.exit(0);

// Mean NLL of the last `scored` tokens, and whether each is the most likely one.
async function score(sequence, { ids, scored }) {
  const first = ids.length - scored - 1;
  const input = ids.slice(0, -1).map((token, n) => {
    const logits = { filter: { tokens: [ids[n + 1]], includeTop: 1 } }; // includeMax leaves it out in version 3.22.1
    return n < first ? token : [token, { generateNext: { logits, totalLogitWeight: true } }];
  });
  const found = (await sequence.controlledEvaluate(input)).slice(first);
  let nll = 0, right = true;
  found.forEach(({ next: { logits, totalLogitWeight } }, n) => {
    const most = Math.max(...logits.values()), logit = logits.get(ids[first + n + 1]);
    nll += Math.log(totalLogitWeight) + most - logit;
    right &&= logit === most;
  });
  return { nll: nll / scored, right };
}
