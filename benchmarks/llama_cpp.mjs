// llama.cpp on one text: TTFT and the time of each later token, a JSON line for each context. See llama_cpp.py.
import fs from "fs";
import { createRequire } from "module";
import { pathToFileURL } from "url";

const [folder, modelPath, textPath, contexts, tokens, threads] = process.argv.slice(2);
const { getLlama } = await import(pathToFileURL(createRequire(`${folder}/`).resolve("node-llama-cpp")));
const llama = await getLlama({ gpu: false, build: "never", maxThreads: +threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const text = model.tokenize(fs.readFileSync(textPath, "utf8"));
for (const size of contexts.split(",").map(Number)) {
  const context = await model.createContext({ contextSize: 8192, threads: +threads, batchSize: 512, flashAttention: true });
  const steps = [];
  let first = 0, last = performance.now();
  for await (const _ of context.getSequence().evaluate(text.slice(0, size), { temperature: 0 })) {
    const now = performance.now();
    if (first) steps.push(now - last); else first = now - last;
    last = now;
    if (steps.length >= +tokens - 1) break;
  }
  steps.sort((a, b) => a - b);
  console.log(JSON.stringify({ context: size, prefill_s: first / 1000, decode_s: steps[steps.length >> 1] / 1000 }));
  await context.dispose();
}
process.exit(0);
