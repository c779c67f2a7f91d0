"""What a plan costs: the model under the plan beside the model itself, on text that calibration never saw.

The plan runs as it will be used, through its own cache. Natural text is scored at its last tokens, where the cache has
let go of most; retrieval probes are scored at their answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from headsink import corpus, probes
from headsink.architecture import describe
from headsink.cache import nbytes
from headsink.errors import HeadsinkError
from headsink.plan import Plan, Quality, Retrieval
from headsink.progress import bar
from headsink.runtime import apply, new_cache

SCORED = 256  # last tokens of each natural text that are scored
DEPTHS = (0.2, 0.7)  # where the facts lie in the probes of each form


@dataclass(frozen=True)
class Scored:
    """Two runs over one text. log_probs_*: float32 [scored, vocabulary]; targets: int64 [scored]; bytes of both caches."""

    full: Tensor
    plan: Tensor
    targets: Tensor
    bytes_full: int
    bytes_plan: int

    def nll(self, which: Tensor) -> float:
        return float(-which.gather(1, self.targets[:, None]).mean())

    def right(self, which: Tensor) -> bool:
        """Whether greedy decoding would have given the targets."""
        return bool((which.argmax(-1) == self.targets).all())


def score(model: PreTrainedModel, plan: Plan, ids: list[int], scored: int) -> Scored:
    """Run the model and the model under `plan` over `ids` and compare their predictions of the last `scored` tokens."""
    text = torch.tensor([ids], device=model.device)
    caches = DynamicCache(config=model.config.get_text_config(decoder=True)), new_cache(model, plan)
    keep = {"logits_to_keep": scored + 1, "use_cache": True}
    with torch.no_grad():
        full = model(text, past_key_values=caches[0], **keep).logits
        with apply(model, plan):
            lossy = model(text, past_key_values=caches[1], **keep).logits
    log_probs = [logits[0, :-1].float().log_softmax(-1) for logits in (full, lossy)]
    return Scored(log_probs[0], log_probs[1], text[0, -scored:], nbytes(caches[0]), caches[1].nbytes())


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    context: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Quality:
    """Measure a plan at one context length: one held-out text of each domain, and probes of each form at several depths."""
    if not 2 * SCORED <= context <= describe(model).max_context:
        raise HeadsinkError(
            f"context: {context} is outside {2 * SCORED} to {describe(model).max_context} for measuring quality"
        )
    kl, agree, nll_full, nll_plan = 0.0, 0.0, 0.0, 0.0
    found: list[Retrieval] = []
    with bar(f"quality at {context}", len(corpus.DOMAINS) + len(probes.FORMS) * len(DEPTHS), progress) as shown:
        for domain in corpus.DOMAINS:
            ids = corpus.tokens(domain, tokenizer, context, seed=seed, split="heldout")
            run = score(model, plan, ids, SCORED)
            kl += float((run.full.exp() * (run.full - run.plan)).sum(-1).mean())
            agree += float((run.full.argmax(-1) == run.plan.argmax(-1)).float().mean())
            nll_full += run.nll(run.full)
            nll_plan += run.nll(run.plan)
            shown.advance(shown.task_ids[0])
        for form in probes.FORMS:
            runs = []
            for depth in DEPTHS:
                probe = probes.probe(form, tokenizer, context, depth=depth, seed=seed, split="heldout")
                runs.append(score(model, plan, probe.ids, probe.answer_tokens))
                shown.advance(shown.task_ids[0])
            found.append(
                Retrieval(
                    form=form,
                    probes=len(runs),
                    full=sum(r.right(r.full) for r in runs),
                    plan=sum(r.right(r.plan) for r in runs),
                    nll_full=sum(r.nll(r.full) for r in runs) / len(runs),
                    nll_plan=sum(r.nll(r.plan) for r in runs) / len(runs),
                )
            )
    texts = len(corpus.DOMAINS)
    return Quality(
        context=context,
        positions=texts * SCORED,
        kl=max(kl / texts, 0.0),
        top1=agree / texts,
        nll_full=nll_full / texts,
        nll_plan=nll_plan / texts,
        retrieval=tuple(found),
        kv_bytes=run.bytes_plan,
        kv_bytes_full=run.bytes_full,
    )
