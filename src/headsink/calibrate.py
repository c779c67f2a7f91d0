"""Make a plan: read documents, search for patterns under a budget, run the result as it will be used, measure what it costs.

Documents of the calibration half, ordinary text with facts strewn in, are read once at the context that the plan is for
(replay.py); the search (search.py) tries patterns on what follows them. Then the plan runs through its own cache over the same
documents, which the search did not do, and over documents that calibration never saw (quality.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headsink import corpus, probes
from headsink.architecture import Architecture, check_plannable, describe
from headsink.errors import HeadsinkError
from headsink.files import write_text
from headsink.models import dtype_name
from headsink.plan import Fingerprint, Plan
from headsink.probes import Document
from headsink.progress import bar
from headsink.quality import branch_log_probs, measure, read
from headsink.replay import Replay
from headsink.search import TAU, Method, Search, Step

KINDS: tuple[tuple[corpus.Domain, ...], ...] = (("prose", "code"), ("maths", "chat"))  # of text, in each document
CONTINUATION = 128  # tokens of text after a document
QUESTION = 128  # tokens that a branch may have at most, so that it fits into the model's longest context
LEAST_CONTEXT = probes.LEAST_LENGTH + QUESTION


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    budget: float,
    context: int | tuple[int, int],
    method: Method | None = None,
    quality_contexts: Sequence[int] | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Plan:
    """Make a plan that keeps at most `budget` of the KV entries at `context` tokens.

    Parameters
    ----------
    budget : fraction of the full KV cache, over the heads that do not slide by themselves; above 0, at most 1.
    context : tokens of context that the plan is for. Of a range (shortest, longest) the budget holds at the shortest, and so at all of
        them, since windows are constant; errors are measured at both ends.
    method : how patterns are chosen; ours if not given. `Method(policy="streaming-llm")` and others are there to compare with.
    quality_contexts : lengths at which the plan is measured on held-out text; the context and a shorter one if not given, () to
        leave that out.
    checkpoint : a file that keeps the steps done; an interrupted search goes on from there, given the same arguments.
    progress : show bars on standard error.

    Returns
    -------
    Plan, with its measured quality.
    """
    shape, method = describe(model), method or Method()
    check_plannable(shape)
    shortest, longest = (context, context) if isinstance(context, int) else context
    _check(budget, shortest, longest, shape)
    documents = _documents(tokenizer, shortest, longest, seed)
    replays = []
    with bar("reading", len(documents), progress) as shown:
        for document in documents:
            replays.append(Replay(model, document))
            shown.advance(shown.task_ids[0])
    value_norms = torch.stack([replay.value_norms for replay in replays]).mean(0)
    for replay in replays:
        replay.set_thresholds(TAU * value_norms)
    key = {"budget": budget, "context": [shortest, longest], "seed": seed, "method": asdict(method)}
    last = _search(replays, budget, shortest, method, seed, checkpoint, key | _identity(model), progress)
    plan = Plan.of(model, last.plan(), value_norms.tolist(), tau=TAU)
    with bar("verifying", len(documents), progress) as shown:
        verified = 0.0
        for replay, document in zip(replays, documents, strict=True):
            verified += float(replay.loss(_log_probs(model, plan, document), method.retrieval_weight)) / len(replays)
            shown.advance(shown.task_ids[0])
    made = key | {
        "kept": round(plan.kept(shortest), 4),
        "dtype": dtype_name(model.dtype),
        "documents": [{"text": list(kinds), "tokens": len(d.ids)} for kinds, d in zip(KINDS, documents, strict=False)],
        "forms": list(probes.FORMS["calibration"]),
        "loss": {"replayed": round(last.loss, 5), "verified": round(verified, 5)},
    }
    plan = plan.model_copy(update={"calibration": made})
    if quality_contexts is None:
        quality_contexts = default_quality_contexts(longest)
    quality = [measure(model, tokenizer, plan, n, seed=seed, progress=progress) for n in quality_contexts]
    return plan.model_copy(update={"quality": tuple(quality)})


def default_quality_contexts(longest: int) -> tuple[int, ...]:
    """The context, and a shorter one if there is room for it."""
    return tuple(n for n in dict.fromkeys((min(2048, longest // 2), longest)) if n >= 512)


def _check(budget: float, shortest: int, longest: int, shape: Architecture) -> None:
    if not 0 < budget <= 1:
        raise HeadsinkError(f"budget: {budget} is outside (0, 1]; 0.25 keeps a quarter of the KV cache")
    if not LEAST_CONTEXT <= shortest <= longest <= shape.max_context:
        given = shortest if shortest == longest else f"{shortest} to {longest}"
        raise HeadsinkError(f"context: {given} is outside {LEAST_CONTEXT} to {shape.max_context}, the model's maximum")
    if all(shape.windows):
        raise HeadsinkError("every layer of this model slides by itself: there is nothing to plan")


def _documents(tokenizer: PreTrainedTokenizerBase, shortest: int, longest: int, seed: int) -> list[Document]:
    """Documents that fit the context with what follows them, at both ends of a range."""
    return [
        probes.document(
            tokenizer, length - QUESTION, split="calibration", seed=seed, domains=kinds, continuation=CONTINUATION
        )
        for kinds, length in zip(KINDS, (longest, shortest), strict=True)
    ]


def _log_probs(model: PreTrainedModel, plan: Plan, document: Document) -> torch.Tensor:
    """Of all scored tokens of a document's branches, run under the plan: float32 [scored tokens, vocabulary]."""
    cache = read(model, plan, document.ids)
    branches = [(document.continuation, len(document.continuation) - 1)]
    branches += [(question.ids, question.answer_tokens) for question in document.questions]
    return torch.cat([branch_log_probs(model, cache, ids, scored) for ids, scored in branches])


def _identity(model: PreTrainedModel) -> dict[str, Any]:
    return {"model": Fingerprint.of(model).weights, "dtype": dtype_name(model.dtype)}


def _search(
    replays: Sequence[Replay],
    budget: float,
    context: int,
    method: Method,
    seed: int,
    checkpoint: Path | None,
    key: dict[str, Any],
    progress: bool,
) -> Step:
    """Run the search, keeping its steps in the checkpoint."""
    search = Search(replays, context, method, seed)
    done = [] if checkpoint is None else _read_checkpoint(checkpoint, key)
    with bar("searching", 100, progress) as shown:
        task = shown.task_ids[0]

        def report(step: Step) -> None:
            share = 100 if step.phase == "done" else 90 if step.phase == "refined" else 85 * step.kept / budget
            shown.update(task, completed=share, description=f"searching: keeps {step.kept:.1%}, loss {step.loss:.4f}")
            done.append(step)
            if checkpoint is not None:
                write_text(checkpoint, json.dumps({"key": key, "steps": [asdict(step) for step in done]}))

        return search.run(budget, done, report)


def _read_checkpoint(path: Path, key: dict[str, Any]) -> list[Step]:
    """The steps of an interrupted run with the same arguments; none if there was no such run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [Step(**step) for step in found["steps"]] if found["key"] == json.loads(json.dumps(key)) else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HeadsinkError(f"{path}: not a checkpoint of headsink; remove it") from error
