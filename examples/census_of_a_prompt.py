"""Measure what every attention head looks at in a prompt of your own, and print the strongest sinks.

python examples/census_of_a_prompt.py --file my_prompt.txt --out runs/mine
"""

import argparse
from pathlib import Path

import headsink

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--file", type=Path, required=True, help="the prompt")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--out", type=Path, help="write the census with its report here")
arguments = parser.parse_args()

model, tokenizer = headsink.load(arguments.model)
census = headsink.analyze(model, tokenizer, texts=[arguments.file.read_text(encoding="utf-8")])
length = census.lengths[-1]
sink, roles = census.score("sink", length), census.roles(length)
for layer, head in census.strongest("sink", 10):
    row = census.layers.index(layer)
    print(f"layer {layer}, head {head}: {roles[row][head]}, {sink[row, head]:.0%} of its attention goes to sink tokens")
if arguments.out:
    print(headsink.write_report(census, arguments.out) / "report.html")
