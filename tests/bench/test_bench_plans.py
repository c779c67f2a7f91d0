"""Plans of budgets for benchmarks: the packaged plan where there is one, and a calibrated one otherwise."""

import pytest

import headsink
from headsink import Plan, packaged_plan
from headsink.bench import plans
from headsink.bench.options import Options
from headsink.bench.suite import records
from headsink.bench.suite import run as everything
from headsink.utils.files import sha256


@pytest.mark.slow
def test_packaged_plans_are_used_and_other_budgets_are_calibrated_once(tiny_folder, tmp_path, monkeypatch):
    model, tokenizer = headsink.load(str(tiny_folder), device="cpu")
    files = {budget: tmp_path / f"{budget}.json" for budget in (0.5, 0.4, 0.25)}  # 0.4 is not packaged
    settings = {"context": 420, "seed": 0, "checkpoint": tmp_path / "calibration.partial"}

    found = plans.plans_of_budgets("smollm2", model, tokenizer, files, **settings)
    assert list(found) == [0.5, 0.4, 0.25]
    for budget in (0.5, 0.25):
        assert found[budget] == packaged_plan("smollm2", budget, 420)
    found[0.4].check(model)
    assert found[0.4].calibration["budget"] == 0.4
    assert {budget: Plan.load(file) for budget, file in files.items()} == found

    monkeypatch.setattr(plans, "Calibration", None)  # nothing is calibrated again
    assert plans.plans_of_budgets("smollm2", model, tokenizer, files, **settings) == found


def test_rows_name_the_hashes_of_packaged_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "Calibration", None)
    options = Options(models=("smollm2",), context=2000, device="cpu")
    assert everything.run(options, tmp_path, ["plan/*"]) == {"plan/smollm2": "measured"}
    row = records.read_rows(tmp_path)["plan/smollm2"]
    files = {str(budget): tmp_path / "plans" / f"smollm2-2000-{budget}.json" for budget in options.budgets}
    hashes = {budget: sha256(file)[:12] for budget, file in files.items()}
    assert row["settings"]["packaged"] == hashes
    speed = next(row for row in everything.rows_of(options, tmp_path) if row.name == "speed/smollm2/512x1")
    assert speed.settings["plans"] == hashes
    for one in row["found"]["plans"]:
        made = packaged_plan("smollm2", one["budget"], 2000)
        assert one["kept"] == made.calibration["kept"]
        assert one["verified"] == made.calibration["verified"]
        assert (one["dtype"], one["calibrated_for"]) == ("float32", 2000)
        assert one["patterns"] == made.counts()
    assert everything.states(options, tmp_path, ["plan/*"]) == {"plan/smollm2": "measured"}
    row["settings"]["packaged"]["0.5"] = "0123456789ab"  # another release packaged another plan
    records.save(tmp_path, row)
    assert everything.states(options, tmp_path, ["plan/*"]) == {"plan/smollm2": "measured with other settings"}
