"""A model for EleutherAI's lm-evaluation-harness that runs any of its tasks under a plan.

    python -m headsink.integrations.lm_eval --model headsink --model_args pretrained=smollm2,plan=plan.json --tasks ...

This is the harness's command with the model "headsink" registered. Versions that find models in other packages (after 0.4.13)
also accept `lm_eval --model headsink`. The model is the harness's `HFLM`, loaded by headsink and called under the plan. A
sequence is scored in one forward pass in which every query attends to the keys of its head's pattern; the scores are those of
reading the context first. With a plan for prefill compression, the context is read in full attention and compressed, and the
continuation runs on the compressed cache, one sequence at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import Cache

from headsink.attention.formats import KVDtype
from headsink.errors import HeadsinkError
from headsink.models import loading
from headsink.plan.plan import Plan
from headsink.runtime.apply import Prefill, apply, new_cache
from headsink.runtime.options import check_kv_dtype
from headsink.runtime.prefill import empty_cache, prefill
from headsink.runtime.scoring import forward
from headsink.utils.progress import bar

OPTIONS = (  # options of HFLM that have the same meaning here
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "add_bos_token", "prefix_token_id"),
    *("softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args"),
)


@register_model("headsink")
class HeadsinkLM(HFLM):
    """A harness model that runs with a plan, or with the full cache.

    Parameters
    ----------
    pretrained : a model for `headsink.load`: smollm2, gemma3-270m, a folder, a .gguf file, a Hugging Face id.
    plan : the plan's file (JSON); without it the model runs with the full cache.
    dtype, device : as for `headsink.load`; dtype "auto" is the checkpoint's.
    kv_dtype : as for `headsink.new_cache`; "int8" and "k8v4" without a plan keep every key.
    options : options of the harness's HFLM (`OPTIONS`).

    Raises HeadsinkError for another option, an unknown kv_dtype, and for a plan of another model.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        plan: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        kv_dtype: KVDtype = "auto",
        **options: Any,
    ):
        check_kv_dtype(kv_dtype)
        if unknown := [name for name in options if name not in OPTIONS]:
            known = ", ".join(("pretrained", "plan", "dtype", "device", "kv_dtype", *OPTIONS))
            raise HeadsinkError(f"model_args: {unknown[0]} is not an option of the model headsink, which has {known}")
        self.measured = None if plan is None else Plan.load(plan)
        # `_warn` warns instead of `apply`
        self.plan = self.measured and self.measured.model_copy(update={"quality": ()})
        model, tokenizer = loading.load(pretrained, dtype=None if dtype == "auto" else dtype, device=device)
        self.kv_dtype = kv_dtype
        if self.plan is None and kv_dtype != "auto":
            self.plan = Plan.full(model)
        if self.plan is not None:
            self.plan.check(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes into its results about the model."""
        plan = self.plan and {"patterns": self.plan.counts(), "calibration": self.plan.calibration}
        return super().get_model_info() | {"plan": plan}

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        if self.plan is None or not any(context for _, context, _ in requests):
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, **options))
        found: list[tuple[float, bool]] = []
        before: list[int] | None = None
        with bar("loglikelihood", len(requests), not disable_tqdm) as shown:
            for request, context, continuation in requests:
                *context, last = [*context, *continuation][-self.max_length - 1 : -len(continuation)]
                if context != before:  # the choices of a question come one after the other
                    before, cache = context, self._prefill(context)
                    cache.activate_past_recording()
                with self._plan_applied(len(context) + len(continuation)):
                    logits = forward(self.model, cache, [last, *continuation[:-1]], len(continuation))
                cache.crop(-len(continuation))
                log_probs = logits.float().log_softmax(-1)
                targets = torch.tensor(continuation, device=self.device)
                likelihood = float(log_probs.gather(1, targets[:, None]).sum())
                found.append((likelihood, bool((log_probs.argmax(-1) == targets).all())))
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, found[-1])
                shown.advance(shown.task_ids[0])
        return found

    def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
        with self._plan_applied(inps.shape[1], "sparse"):  # a text without a prompt, in one pass
            return super()._model_call(inps, **options)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        with self._plan_applied(max_length):
            return super()._model_generate(context, max_length, stop, **options)

    def _prefill(self, ids: list[int]) -> Cache:
        if not ids and self.plan is not None:  # the whole text is a continuation
            return new_cache(self.model, self.plan, prefill="sparse", kv_dtype=self.kv_dtype)
        cache = empty_cache(self.model, self.plan, kv_dtype=self.kv_dtype)
        return prefill(self.model, self.plan, torch.tensor([ids], device=self.device), cache=cache)

    @contextmanager
    def _plan_applied(self, tokens: int, prefill: Prefill = "dense") -> Iterator[None]:
        """Apply the plan, if there is one, for sequences of `tokens` tokens."""
        if self.plan is None:
            yield
            return
        self._warn(tokens)
        with apply(self.model, self.plan, prefill=prefill, kv_dtype=self.kv_dtype):
            yield

    def _warn(self, tokens: int) -> None:
        """Warn once if sequences are longer than the contexts that the plan's quality was measured at."""
        if self.measured is not None and self.measured.warn_beyond_verified(tokens):
            self.measured = None


def main() -> None:
    """Run the harness's command line; a HeadsinkError is printed as one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except HeadsinkError as error:
        sys.exit(f"headsink: {error}")


if __name__ == "__main__":
    main()
