"""Random calls never crash the process, and all errors are one line (random_calls.py).

import pytest
HEADSINK_RANDOM_CALLS: how many calls, 240 if it is not set; 10000 takes a quarter of an hour of two idle cores.
HEADSINK_RANDOM_SEED: the seed of the first game, 0 if it is not set. Run a game alone: python tests/random_calls.py SEED 1.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import random_calls
from random_calls import CALLS

pytestmark = pytest.mark.slow

GAMES = 200  # per process
SCRIPT = Path(random_calls.__file__)


def test_random_calls_give_a_result_or_one_line():
    first = int(os.environ.get("HEADSINK_RANDOM_SEED", "0"))
    end = first + -(-int(os.environ.get("HEADSINK_RANDOM_CALLS", "240")) // CALLS)
    counts: Counter[str] = Counter()
    wrong, seed = [], first
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    while seed < end:
        command = [sys.executable, str(SCRIPT), str(seed), str(min(GAMES, end - seed))]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in ended.stdout.splitlines()]
        for line in lines:
            counts.update(line.get("counts", {}))
            wrong += line.get("wrong", [])
        assert lines, ended.stderr
        seed = lines[-1]["seed"] + 1
        if ended.returncode:
            wrong.append(f"seed {seed - 1}: the process ended with {ended.returncode}: {ended.stderr[-2000:]}")
    sys.stdout.write(f"seeds {first} to {end - 1}, {counts.total()} calls: {dict(sorted(counts.items()))}\n")
    assert not wrong, "\n".join(wrong)
    assert counts["forward: ok"] > counts.total() / 10
