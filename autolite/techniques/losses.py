"""What a student can be compared with its teacher by: pure functions of tensors, each a mean over real tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

SMALL = 1e-6  # the least variance that is divided by
NEVER = -1e9  # the score of a key that is not attended to


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over rows [m, classes], in nats.

    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network"; T^2 keeps the gradient's
    size the same for every T.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def hidden_loss(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    mask: torch.Tensor,
    kind: Literal["mse", "cosine"] = "mse",
) -> torch.Tensor:
    """Return the mean over layers of MSE(student, teacher) / variance(teacher), or of 1 - cos(student, teacher).

    States are [batch, tokens, width], paired by position in the sequences; `mask` is [batch, tokens], non-zero where a
    token is no padding. The variance is over all elements of the layer's state, so that 1 means "no better than the
    mean" in every layer. Sources: Jiao et al. 2020, "TinyBERT" (MSE; the normalisation is ours); Sanh et al. 2019,
    "DistilBERT" (cosine).
    """
    tokens = mask.bool()
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        own, target = ours[tokens].float(), theirs[tokens].float()
        if kind == "cosine":
            losses.append(1 - F.cosine_similarity(own, target, dim=-1).mean())
        else:
            losses.append(F.mse_loss(own, target) / target.var(correction=0).clamp_min(SMALL))
    return torch.stack(losses).mean()


def attention_scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Return scale * Q K^T [batch, heads, tokens, tokens] in float32.

    `query` is [batch, heads, tokens, dim]; `key` may have fewer heads, each for a group of query heads.
    """
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.float() @ key.transpose(2, 3) * scale


def attention_loss(
    student: torch.Tensor, teacher: torch.Tensor, allowed: torch.Tensor, kind: Literal["mse", "kl"]
) -> torch.Tensor:
    """Return how far two layers' attention maps are apart.

    "mse": MSE of the scores / variance of the teacher's, so that 1 means "no better than the mean"; "kl": KL(teacher ||
    student) of the probabilities in nats, the mean over heads and queries. Maps of different numbers of heads are
    compared by their means over the heads (of the scores or of the probabilities).

    Args:
        student: scores before the softmax, [batch, heads, tokens, tokens].
        teacher: the same of the teacher's.
        allowed: bool [batch, 1, tokens, tokens], true where a real query may attend to a key.
        kind: of the comparison. Sources: Jiao et al. 2020, "TinyBERT" (mse); Sun et al. 2020, "MobileBERT" (kl).
    """
    averaged = student.shape[1] != teacher.shape[1]
    if kind == "mse":
        if averaged:
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        chosen = allowed.expand_as(student)
        own, target = student[chosen], teacher[chosen]
        return F.mse_loss(own, target) / target.var(correction=0).clamp_min(SMALL)
    own, target = (F.log_softmax(scores.masked_fill(~allowed, NEVER), dim=-1) for scores in (student, teacher))
    if averaged:
        own, target = (torch.logsumexp(logs, 1, keepdim=True) - math.log(logs.shape[1]) for logs in (own, target))
    terms = F.kl_div(own, target, reduction="none", log_target=True).masked_fill(~allowed, 0.0)
    rows = allowed.any(-1, keepdim=True).expand(-1, own.shape[1], -1, -1).sum()
    return terms.sum() / rows


def relation_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, heads: int) -> torch.Tensor:
    """Return KL(teacher || student) of the relations softmax(X X^T / sqrt(d)) between tokens, the mean over relation
    heads and tokens, in nats.

    X are queries, keys or values, [batch, heads, tokens, dim] of any number of heads and any dim: all channels are
    dealt out anew to `heads` relation heads of d channels each. Source: Wang et al. 2020, "MiniLMv2: Multi-Head
    Self-Attention Relation Distillation for Compressing Pretrained Transformers".

    Args:
        student: the student's X.
        teacher: the teacher's.
        mask: [batch, tokens], non-zero where a token is no padding.
        heads: relation heads; both numbers of channels must be multiples of it.
    """
    real = mask.bool()
    allowed = real[:, None, None, :] & real[:, None, :, None]
    scores = []
    for values in (student, teacher):
        channels = values.transpose(1, 2).flatten(2)
        dealt = channels.reshape(*channels.shape[:2], heads, -1).transpose(1, 2)
        scores.append(attention_scores(dealt, dealt, dealt.shape[-1] ** -0.5))
    return attention_loss(scores[0], scores[1], allowed, "kl")
