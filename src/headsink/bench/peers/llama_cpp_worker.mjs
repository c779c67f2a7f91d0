// The llama.cpp worker process (process.py): one line of JSON per request, {ids: [[...], ...], tokens}, and per answer.
// Arguments: the folder whose node_modules holds node-llama-cpp, the .gguf file, number of threads.
import { createRequire } from "module";
import readline from "readline";
import { pathToFileURL } from "url";

const [folder, modelPath, threads] = process.argv.slice(2);
const { getLlama } = await import(pathToFileURL(createRequire(`${folder}/`).resolve("node-llama-cpp")));
let log = "";
const logger = (level, message) => (log += message);
const llama = await getLlama({ gpu: false, build: "never", maxThreads: +threads, logLevel: "info", logger });
const model = await llama.loadModel({ modelPath });

const answer = (found) => process.stdout.write(`${JSON.stringify(found)}\n`);
answer({ ready: true });
for await (const line of readline.createInterface({ input: process.stdin })) {
  const { ids, tokens } = JSON.parse(line);
  log = "";
  const context = await model.createContext({
    contextSize: Math.max(...ids.map((text) => text.length)) + tokens,
    sequences: ids.length,
    threads: +threads,
    batchSize: 512,
    flashAttention: true,
  });
  const start = performance.now();
  const times = await Promise.all(ids.map((text) => read(context.getSequence(), text, tokens)));
  const megabytes = [...log.matchAll(/kv_cache\w*:\s+size =\s+([\d.]+) MiB/g)].reduce((sum, found) => sum + +found[1], 0);
  await context.dispose();
  answer({ times: times.map((text) => text.map((time) => (time - start) / 1000)), kv_bytes: megabytes * 2 ** 20 || null });
}

async function read(sequence, text, tokens) {
  const times = [];
  for await (const _ of sequence.evaluate(text, { temperature: 0, yieldEogToken: true })) {
    times.push(performance.now());
    if (times.length >= tokens) break;
  }
  return times;
}
