"""Running a census: texts of many lengths, resuming, rerunning, comparing, files."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from architectures import make
from families import tiny
from small_census import OPTIONS, Letters, same
from small_tokenizer import Small
from transformers import AutoModelForCausalLM, LlamaConfig

import headsink
from headsink import HeadsinkError
from headsink.census import run
from headsink.census.head_statistics import SCORES, distance_within
from headsink.census.results import Census
from headsink.census.roles import ROLES
from headsink.census.run import analyze_again
from headsink.census.sink_tokens import drawing_tokens, secondary_tokens, stability, suggested_tau, tau_evidence


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def census(model):
    return headsink.analyze(model, Letters(), **OPTIONS)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gpt-oss"])
def test_a_prefix_equals_the_short_text(family):
    both = headsink.analyze(tiny(family), Letters(), **OPTIONS)
    short = headsink.analyze(tiny(family), Letters(), **{**OPTIONS, "lengths": (16,)})
    for name in ("0.16.scores", "0.16.errors", "3.16.profile", "3.16.tokens"):
        torch.testing.assert_close(both.arrays[name], short.arrays[name], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_positions_need_a_pass_per_length(kind, monkeypatch):
    """A text beyond the trained length changes the rotation of its first tokens, so its prefix differs from the short text."""
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    shape = {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, max_position_embeddings=128, rope_parameters=scaling)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    passes = []
    monkeypatch.setattr(run, "_read", lambda *words, read=run._read: passes.append(words[3]) or read(*words))
    both = headsink.analyze(model, Letters(), lengths=(16, 100), domains=("prose",), texts_per_domain=1, progress=False)
    assert passes == [[16], [100]]
    short = headsink.analyze(model, Letters(), lengths=(16,), domains=("prose",), texts_per_domain=1, progress=False)
    torch.testing.assert_close(both.arrays["0.16.scores"], short.arrays["0.16.scores"])


def test_texts_count_only_at_lengths_they_reach(model):
    texts = {"short": ["a" * 20, "bc" * 10], "long": ["some longer text " * 10]}
    census = headsink.analyze(model, Letters(), texts=texts, progress=False)
    assert census.lengths == [20, 32, 64, 128]
    assert census.domains == ["short", "long"]
    assert len(census.texts(20)) == 3
    assert census.texts(64) == [2]
    assert not census.has(64, "short")
    assert census.score("sink", 20, "short").shape == (3, 4)
    with pytest.raises(HeadsinkError, match="nothing at length 64 on short"):
        census.score("sink", 64, "short")
    with pytest.raises(HeadsinkError, match="number 0 of short has 20 tokens, fewer than the shortest length, 32"):
        headsink.analyze(model, Letters(), texts=texts, lengths=(32, 64), progress=False)


def test_a_stopped_census_resumes(model, census, tmp_path, monkeypatch):
    done = []

    def stop_after_two(*words, read=run._read):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(words)
        return read(*words)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_read", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            headsink.analyze(model, Letters(), **OPTIONS, checkpoint=tmp_path / "kept")
    (tmp_path / "kept" / "0001.safetensors").write_bytes(b"cut off by a kill")
    (tmp_path / "kept" / "0002.part").write_bytes(b"cut off by a kill")
    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(run, "_read", lambda *words, read=run._read: counted.append(words) or read(*words))
        again = headsink.analyze(model, Letters(), **OPTIONS, checkpoint=tmp_path / "kept")
    assert len(counted) == 3  # of four texts, one was finished
    assert same(again, census)
    other = headsink.analyze(model, Letters(), **{**OPTIONS, "seed": 1}, checkpoint=tmp_path / "kept")
    assert not same(other, census)  # a census with other settings does not reuse the checkpoint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(HeadsinkError, match="not a checkpoint of a census"):
        headsink.analyze(model, Letters(), **OPTIONS, checkpoint=tmp_path / "mine")


def test_a_census_can_be_repeated_from_its_settings(model, census):
    settings = json.loads(json.dumps(census.settings))
    assert same(analyze_again(model, Letters(), settings, progress=False), census)
    with pytest.raises(HeadsinkError, match="the weights are not those"):
        analyze_again(tiny("llama", seed=1), Letters(), settings, progress=False)
    settings["texts"][0]["sha256"] = "0"
    with pytest.raises(HeadsinkError, match="the texts are not those"):
        analyze_again(model, Letters(), settings, progress=False)


def test_loading_returns_what_was_saved(census, tmp_path):
    loaded = Census.load(census.save(tmp_path / "a"))
    assert same(loaded, census)
    assert (loaded.settings, loaded.vocabulary) == (json.loads(json.dumps(census.settings)), census.vocabulary)
    table = pq.read_table(tmp_path / "a" / "heads.parquet")
    assert table.num_rows == 4 * 2 * 3 * 4
    row = next(r for r in table.to_pylist() if (r["text"], r["domain"], r["length"]) == (1, "random", 100))
    assert row["sink"] == pytest.approx(float(census.samples("sink", 100, "random")[1, row["layer"], row["head"]]))
    assert set(SCORES) < set(table.column_names)
    profile = census.samples("profile", 100, "random")[1, row["layer"], row["head"]]
    assert row["distance_50"] == pytest.approx(float(distance_within(profile, 0.5, 100)))
    assert row["role"] == ROLES[int(census.text_roles(100, "random")[1, row["layer"], row["head"]])]


def test_means_and_intervals_are_over_texts(census):
    texts = census.samples("local", 100)
    torch.testing.assert_close(census.score("local", 100), texts.mean(0))
    assert texts.shape == (4, 3, 4)
    assert (census.interval("local", 100).half > 0).all()
    assert census.interval("local", 100, "prose").mean.shape == (3, 4)
    assert torch.equal(census.role_agreement(100), census.role_agreement(100).clamp(0, 1))


def test_distances_are_quantiles_of_the_attention(census):
    near, middle, far = (census.distance(q, 100) for q in (0.1, 0.5, 0.9))
    assert (near <= middle).all()
    assert (middle <= far).all()
    assert (near >= 1).all()
    assert (far <= 100).all()


def test_secondary_sinks_match_their_definition(census):
    drawn = drawing_tokens(census, 100)
    assert all(0 < row["share"] <= 1 for row in drawn)
    assert sum(row["share"] for row in drawn) <= 1 + 1e-3
    for row in secondary_tokens(census, 100):
        assert 0 < row["taken"] <= 1
        assert row["value"] < 1  # their value norm is small by definition
    found = stability(census, 100)
    assert found["texts"] == 4
    keys = [row["keys"] for row in tau_evidence(census, 100)]
    assert keys == sorted(keys)


def test_tau_is_where_keys_attract_no_more_than_chance(census, monkeypatch):
    steps = [(0.1, None), (0.2, 60.0), (0.3, 9.0), (0.4, 2.5), (0.5, 1.1), (0.6, 5.0)]
    evidence = [{"tau": tau, "keys": 1.0, "attention": 0.1, "density": density} for tau, density in steps]
    monkeypatch.setattr("headsink.census.sink_tokens.tau_evidence", lambda *_: evidence)
    assert suggested_tau(census, 100) == 0.4
    evidence[1:] = [{**row, "density": 0.5} for row in evidence[1:]]
    assert suggested_tau(census, 100) is None


def test_comparing_parts_of_one_run(census, tmp_path):
    folder = census.save(tmp_path / "a")
    found = headsink.compare(f"{folder}@16", f"{folder}@100")
    assert {view.lengths for view in found.views} == {(16, 100)}
    assert all(view.paired for view in found.views)  # the same texts, one longer
    found = headsink.compare(f"{folder}@100:prose", f"{folder}:random")
    assert {(view.lengths, view.domains) for view in found.views} == {((100, 100), ("prose", "random"))}
    assert not any(view.paired for view in found.views)
    with pytest.raises(HeadsinkError, match="the run has lengths 16, 100 and texts prose, random"):
        headsink.compare(f"{folder}@64", folder)


def test_comparing_models_head_by_head(census):
    """The same texts with other weights: paired, every head with its interval; a run does not differ from itself."""
    other = headsink.analyze(tiny("llama", seed=1), Letters(), **OPTIONS)
    found = headsink.compare(census, other, census)
    assert set(found.settings) == {"model"}
    moved, still = ([view for view in found.views if view.run.endswith(f"({n})")] for n in (2, 3))
    assert all(view.paired for view in found.views)
    assert max(view.to_dict()["beyond_chance"] for view in moved) > 0.3
    assert all(float(view.change.mean.abs().max()) == 0 for view in still)
    assert {view.domains[0] for view in moved} == {None, "prose", "random"}
    with pytest.raises(HeadsinkError, match=r"query_heads is 4 in .* and 3 in"):
        headsink.compare(census, three_heads())
    with pytest.raises(HeadsinkError, match="two runs or more"):
        headsink.compare(census)


def three_heads():
    config = LlamaConfig(**{**tiny("llama").config.to_dict(), "num_attention_heads": 3, "num_key_value_heads": 3})
    return headsink.analyze(AutoModelForCausalLM.from_config(config), Letters(), **OPTIONS)


def test_attention_to_learned_sinks_is_recorded_where_they_exist():
    for family in ("gemma2", "gpt-oss"):
        model = tiny(family)
        census = headsink.analyze(model, Letters(), **{**OPTIONS, "domains": ("random",)})
        assert (float(census.score("learned", 100).max()) > 0) == (family == "gpt-oss")


def test_a_layer_with_fewer_kv_heads_repeats_its_own(tokenizer):
    options = {"lengths": (64,), "texts": ["The quick brown fox. " * 20], "progress": False}
    census = headsink.analyze(make("Gemma 4"), Small(tokenizer), **options)
    assert census.layers == [0, 1, 2, 3]
    errors = census.samples("group_errors", 64)  # [texts, layers, KV heads, ...]; layers 1 and 3 have one KV head
    assert torch.equal(errors[:, 1, 0], errors[:, 1, 1])
    assert not torch.equal(errors[:, 0, 0], errors[:, 0, 1])
