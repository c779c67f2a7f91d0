"""Compile the GPU kernels for an H100 without a GPU: registers, shared memory and instructions of their loops.

python benchmarks/gpu_code.py --out benchmarks/results/gpu-code.json

Launches have the shapes of Llama-3.1-8B and 3.2-1B in bfloat16. Nothing is run or timed. The results show the occupancy of a
multiprocessor and the number of instructions besides matrix products and memory accesses.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import offline

from headsink.bench.heading import provenance
from headsink.utils.files import write_text

LAUNCHES = """
import torch
from headsink.attention.cuda.decode import attend
from headsink.attention.cuda.append import append_keys
from headsink.eviction.lifetimes_cuda import better_ones
from headsink.attention.cuda.prefill import attend as attend_many
from headsink.attention.kv_table import KVField
from headsink.attention.backends import KeyVisibility

dim = {dim}
table = torch.zeros(1, 8, len(KVField), dtype=torch.int64)
query = torch.zeros(1, 32, 1, dim, dtype=torch.bfloat16)
attend(query, table, torch.tensor([0]), 1.0, programs=264)
append_keys(query[:, :8].contiguous(), query[:, :8].contiguous(), table, torch.tensor([0]))
query, keys = torch.zeros(1, 32, 300, dim, dtype=torch.bfloat16), torch.zeros(8, 400, dim, dtype=torch.bfloat16)
better_ones(torch.randn(8, 1000), torch.full((8,), 100))
attend_many(query, keys, keys, KeyVisibility(torch.zeros(8, 400), 100, 5, 5, 90, False, 5, 400), 1.0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = provenance("code of the GPU kernels for compute capability 9.0") | {"results": []}
    for dim in (64, 128):
        with TemporaryDirectory() as folder:
            kernels = offline.compiled(LAUNCHES.format(dim=dim), Path(folder))
        for kernel in kernels:
            row = {"dim": dim} | {name: value for name, value in kernel.items() if name != "ptx"}
            found["results"].append(row)
            print(row)
    write_text(arguments.out, json.dumps(found, indent=1))
    print(f"-> {arguments.out}")


if __name__ == "__main__":
    main()
