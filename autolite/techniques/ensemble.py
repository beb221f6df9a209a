"""Further teachers beside the model that is compressed: loaded once, checked, and combined."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from autolite.architecture import shape_of
from autolite.errors import ModelError
from autolite.reload import load_model
from autolite.tasks.base import IGNORED
from autolite.techniques.base import Context
from autolite.unmapped import positions_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

# Differs between tokenizers of one vocabulary that treat case, accents, spaces or special tokens differently.
PROBE = "Don't  the CAFÉ's prices (2.50€) rise?\nNaïve résumé; x_1 != y-2, e.g. 北京."


def further_teacher(source: str, context: Context) -> PreTrainedModel:
    """Load a teacher from a folder or the hub, from `context.memory` if it was loaded before.

    Raises:
        ModelError: if it cannot be loaded, or does not answer the same question: other labels, another tokenizer, or
            fewer tokens than the training data's longest example.
    """
    key = f"further teacher {source}"
    if key not in context.memory:
        model, tokenizer = load_model(source, context.task.auto_class)
        _check(source, model, tokenizer, context)
        context.memory[key] = model
    found: PreTrainedModel = context.memory[key]
    return found


def _check(source: str, model: Any, tokenizer: Any, context: Context) -> None:
    ours: Any = context.teacher.model
    what = f"distill.teachers: '{source}'"
    language_model = context.task.auto_class == "AutoModelForCausalLM"
    names, theirs = (
        [str(m.config.vocab_size)]
        if language_model
        else [str(m.config.id2label[i]) for i in range(m.config.num_labels)]
        for m in (ours, model)
    )
    if names != theirs:
        named = "outputs" if language_model else "labels"
        raise ModelError(
            f"{what} has the {named} {', '.join(theirs)[:200]}, but the model that is compressed has "
            f"{', '.join(names)[:200]}: teachers must have the same, in the same order"
        )
    if context.tokenizer is not None:
        known, other = (t.get_vocab() for t in (context.tokenizer, tokenizer))
        if known != other:
            differing = len(set(known.items()) ^ set(other.items()))
            raise ModelError(f"{what} has another vocabulary ({differing} entries differ): teachers must share one")
        if context.tokenizer(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
            raise ModelError(f"{what} has a tokenizer that cuts texts differently: teachers must share one")
    elif (rows := shape_of(model).vocab) != context.teacher.shape.vocab:
        raise ModelError(
            f"{what} has a vocabulary of {rows} tokens, the model that is compressed {context.teacher.shape.vocab}: "
            "teachers must share one"
        )
    longest = max((len(ids) for ids in context.train.input_ids), default=0)
    if model.main_input_name == "input_ids" and positions_of(model) < longest:
        raise ModelError(
            f"{what} takes {positions_of(model)} tokens, but the longest example has {longest}: cut them with "
            "--max-length"
        )


def combined(
    teachers: Sequence[torch.Tensor], labels: torch.Tensor, temperature: float, how: Literal["mean", "best"]
) -> torch.Tensor:
    """Return logits [m, classes] that stand for all teachers' at this temperature.

    "mean": softmax(result / T) is the mean of the teachers' softmax(logits / T). "best": each row is that of the
    teacher with the least cross-entropy against the label, or, without a label, with the largest probability. Sources:
    Hinton, Vinyals & Dean 2015 (the mean of an ensemble); the choice of one teacher a sample follows You et al. 2017,
    "Learning from Multiple Teacher Networks", reduced to the loss.

    Args:
        teachers: each teacher's logits [m, classes].
        labels: int64 [m], `IGNORED` where unknown.
        temperature: T.
        how: they are combined.
    """
    logits = torch.stack([each.float() for each in teachers])
    if how == "mean":
        return temperature * torch.logsumexp(F.log_softmax(logits / temperature, -1), 0)
    chances = F.log_softmax(logits, -1)
    known = labels != IGNORED
    asked = labels.masked_fill(~known, 0)[None, :, None].expand(len(logits), -1, 1)
    trust = torch.where(known, chances.gather(-1, asked).squeeze(-1), chances.amax(-1))
    return logits[trust.argmax(0), torch.arange(logits.shape[1], device=logits.device)]
