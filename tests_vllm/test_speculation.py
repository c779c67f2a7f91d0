"""Speculative decoding is refused at startup. The last file of all: after the modules of speculative decoding are imported, no
engine starts in the process (a bug in vLLM's triton_utils/dispatcher.py)."""

import pytest

from headsink import HeadsinkError


def test_speculative_decoding_is_refused(engine, served):
    _, plan, folder = served
    with pytest.raises(HeadsinkError, match="speculative decoding cannot be used together with a plan"):
        engine(folder, plan, speculative_config={"method": "ngram", "num_speculative_tokens": 2})
