"""Continue several prompts of different lengths in one batch under a plan.

python examples/batch.py "Once upon a time" "The capital of France is"
"""

import argparse
from pathlib import Path

import headsink

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+")
parser.add_argument("--model", default="smollm2")
parser.add_argument(
    "--plan", type=Path, help="a plan file; without one, 4 sink tokens and a window of 252 for every head"
)
parser.add_argument("--tokens", type=int, default=40)
arguments = parser.parse_args()

model, tokenizer = headsink.load(arguments.model)
plan = (
    headsink.Plan.load(arguments.plan)
    if arguments.plan
    else headsink.Plan.uniform(model, headsink.Pattern(sink=4, window=252))
)
tokenizer.padding_side = "left"  # the cache counts positions from each row's first token
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
inputs = tokenizer(arguments.prompts, return_tensors="pt", padding=True).to(model.device)
with headsink.apply(model, plan):
    output = model.generate(
        **inputs, max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
for text in tokenizer.batch_decode(output, skip_special_tokens=True):
    print(f"{text}\n")
