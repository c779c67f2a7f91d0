"""A model for EleutherAI's lm-evaluation-harness, which scores any of its tasks under a plan.

    python -m headsink.integrations.lm_eval --model headsink --model_args pretrained=smollm2,plan=plan.json --tasks ...

That is the harness's own command, once it knows the model "headsink"; versions of it that look for models in other packages
(after 0.4.13) need no more than `lm_eval --model headsink`. The model is the harness's own for transformers, loaded by headsink
and called under the plan: a text is one pass, in which every query sees what its head's pattern says, so a continuation is
scored as if its context had been read before. With a plan that compresses once, the context is: it is read in full,
compressed, and what follows runs over that, one text at a time.
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
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from headsink.errors import HeadsinkError
from headsink.models import loading
from headsink.models.transformers_names import cache_argument
from headsink.plan.plan import Plan
from headsink.runtime.apply import apply
from headsink.runtime.prefill import prefill
from headsink.runtime.scoring import branch_log_probs
from headsink.utils.progress import bar

OPTIONS = (  # of the harness's own model that mean the same here
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "add_bos_token", "prefix_token_id"),
    *("softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args"),
)


@register_model("headsink")
class HeadsinkLM(HFLM):
    """A model under a plan, or the model itself.

    Parameters
    ----------
    pretrained : what `headsink.load` loads: smollm2, gemma3-270m, a folder, a .gguf file, a Hugging Face id.
    plan : the plan's file (JSON); the model itself if not given.
    dtype, device : as for `headsink.load`; "auto" is the checkpoint's own.
    options : of the harness's own model for transformers (`OPTIONS`).

    Raises HeadsinkError for another option, and for a plan of another model.
    """

    def __init__(
        self,
        pretrained: str = "smollm2",
        plan: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ):
        if unknown := [name for name in options if name not in OPTIONS]:
            known = ", ".join(("pretrained", "plan", "dtype", "device", *OPTIONS))
            raise HeadsinkError(f"model_args: {unknown[0]} is not an option of the model headsink, which has {known}")
        self.measured = None if plan is None else Plan.load(plan)
        self.plan = self.measured and self.measured.model_copy(update={"quality": ()})  # `_warn` does it
        model, tokenizer = loading.load(pretrained, dtype=None if dtype == "auto" else dtype, device=device)
        if self.plan is not None:
            self.plan.check(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        plan = self.plan and {"patterns": self.plan.counts(), "calibration": self.plan.calibration}
        return super().get_model_info() | {"plan": plan}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self.plan is not None and self.plan.prefill_compression:
            raise HeadsinkError(
                "plan: it compresses a context once, and whole texts (loglikelihood_rolling) have none; use a plan "
                "without --prefill-compression"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        if self.plan is None or not self.plan.prefill_compression:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, **options))
        found: list[tuple[float, bool]] = []
        before: list[int] | None = None
        with bar("loglikelihood", len(requests), not disable_tqdm) as shown:
            for request, context, continuation in requests:
                *context, last = [*context, *continuation][-self.max_length - 1 : -len(continuation)]
                if context != before:  # the choices of a question come one after the other
                    before, cache = context, self._prefill(context)
                    cache.activate_past_recording()
                with self._applied(len(context) + len(continuation)):
                    log_probs = branch_log_probs(self.model, cache, [last, *continuation], len(continuation))
                targets = torch.tensor(continuation, device=self.device)
                likelihood = float(log_probs.gather(1, targets[:, None]).sum())
                found.append((likelihood, bool((log_probs.argmax(-1) == targets).all())))
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, found[-1])
                shown.advance(shown.task_ids[0])
        return found

    def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
        with self._applied(inps.shape[1]):
            return super()._model_call(inps, **options)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self.plan is None or not self.plan.prefill_compression:
            with self._applied(max_length):
                return super()._model_generate(context, max_length, stop, **options)
        rows = []
        for row, mask in zip(context, options.pop("attention_mask"), strict=True):
            text = row[mask.bool()]
            cache, longest = self._prefill(text[:-1].tolist()), max_length - len(row) + len(text)
            with self._applied(longest):
                whole = super()._model_generate(text[None], longest, stop, **cache_argument(cache), **options)
            rows.append(torch.cat([row, whole[0, len(text) :]]))
        return pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)

    def _prefill(self, ids: list[int]) -> Cache:
        return prefill(self.model, self.plan, torch.tensor([ids], device=self.device))

    @contextmanager
    def _applied(self, tokens: int) -> Iterator[None]:
        """The model under the plan, if there is one, for texts of so many tokens."""
        if self.plan is None:
            yield
            return
        self._warn(tokens)
        with apply(self.model, self.plan):
            yield

    def _warn(self, tokens: int) -> None:
        """Say once that texts are longer than those that the plan's quality was measured on."""
        if self.measured is not None and self.measured.warn_beyond_verified(tokens):
            self.measured = None


def main() -> None:
    """The harness's command; an error of the user's about our model is one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except HeadsinkError as error:
        sys.exit(f"headsink: {error}")


if __name__ == "__main__":
    main()
