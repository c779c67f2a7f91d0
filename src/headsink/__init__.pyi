from headsink.calibration.calibrate import calibrate
from headsink.calibration.method import Method
from headsink.census.attention_weights import AttentionWeights, attention_weights
from headsink.census.compare import Comparison, compare
from headsink.census.results import Census
from headsink.census.run import analyze
from headsink.errors import HeadsinkError
from headsink.evaluation.ablation import Ablation, ablate
from headsink.eviction.pattern import Pattern
from headsink.generation.lossless import generate_lossless
from headsink.models.loading import load
from headsink.plan.packaged import packaged_plan
from headsink.plan.plan import Plan
from headsink.report.attention import AttentionMaps, attention_maps
from headsink.report.page import write_report
from headsink.runtime.apply import apply, new_cache
from headsink.runtime.compress import compress
from headsink.runtime.prefix import load_prefix, save_prefix

__all__ = [
    "Ablation",
    "AttentionMaps",
    "AttentionWeights",
    "Census",
    "Comparison",
    "HeadsinkError",
    "Method",
    "Pattern",
    "Plan",
    "ablate",
    "analyze",
    "apply",
    "attention_maps",
    "attention_weights",
    "calibrate",
    "compare",
    "compress",
    "generate_lossless",
    "load",
    "load_prefix",
    "new_cache",
    "packaged_plan",
    "save_prefix",
    "write_report",
]
