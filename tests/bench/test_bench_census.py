"""benchmarks/census.py on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "census.py"


def test_time_and_memory_of_a_census(tiny_folder, tmp_path):
    file = tmp_path / "census.json"
    words = (
        "--model",
        tiny_folder,
        "--tokens",
        512,
        "--rounds",
        2,
        "--long-tokens",
        0,
        "--device",
        "cpu",
        "--out",
        file,
    )
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert [len(found["seconds"][method]["all"]) for method in ("plain", "census")] == [2, 2]
    assert found["ratio"]["min"] > 0
    assert [row["tokens"] for row in found["eager"]] == [512]
    above = found["peak_bytes"].pop("census_above_plain")
    assert all(size > 10**8 for size in found["peak_bytes"].values())
    assert above == found["peak_bytes"]["census"] - found["peak_bytes"]["plain"]
