"""Plans that come with the package."""

import pytest

from headsink import HeadsinkError, Plan, packaged_plan
from headsink.plan.packaged import FOLDER, packaged_file

FILES = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_packaged_plan_is_what_its_name_says(file, smollm2):
    model, context, budget = file.stem.rsplit("-", 2)
    plan = Plan.load(file)
    assert model == "smollm2"
    plan.check(smollm2[0])
    assert float(budget) - 0.01 <= plan.kv_budget(int(context)) <= float(budget)
    assert [quality.context for quality in plan.quality] == [int(context)]
    assert plan.calibration["context"] == [int(context), int(context)]


@pytest.mark.parametrize("budget", [0.125, 0.25, 0.5])
def test_a_packaged_plan_has_its_budget_at_any_context(budget):
    for context in (700, 2000, 3000, 8000):
        plan = packaged_plan("SmolLM2-135M-Instruct", budget, context)
        assert budget - 0.01 <= plan.kv_budget(context) <= budget


@pytest.mark.parametrize(
    ("context", "calibrated"),
    [(700, 2000), (2000, 2000), (2048, 2000), (3464, 2000), (3465, 6000), (6000, 6000), (8192, 6000)],
)
def test_the_packaged_plan_is_the_one_whose_context_is_nearest_in_ratio(context, calibrated):
    plan = packaged_plan("smollm2", 0.25, context)
    assert plan == Plan.load(packaged_file("smollm2", calibrated, 0.25)).scale(context)
    assert plan.calibration.get("scaled_from", context) == calibrated


@pytest.mark.parametrize(
    ("model", "budget", "reason"),
    [
        ("smollm2", 0.3, "budget: 0.3 is not packaged for smollm2; one of 0.125, 0.25, 0.5, or make a plan with"),
        ("smollm2", 2.0, "one of 0.125, 0.25, 0.5"),
        ("gemma3-270m", 0.25, "budget: the package has plans for smollm2 only; make one for gemma3-270m with"),
    ],
)
def test_a_plan_that_is_not_packaged_is_refused(model, budget, reason):
    with pytest.raises(HeadsinkError, match=reason):
        packaged_plan(model, budget, 1000)


@pytest.mark.parametrize("context", [0, -5])
def test_a_context_below_one_is_refused(context):
    with pytest.raises(HeadsinkError, match=f"context: {context} is below 1"):
        packaged_plan("smollm2", 0.25, context)
