"""The loss of a batch in distillation: what the student is compared by, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn

from autolite.architecture import ModelShape
from autolite.parts import layers_of
from autolite.tasks.base import IGNORED
from autolite.techniques.base import Context, Student
from autolite.techniques.ensemble import combined
from autolite.techniques.losses import attention_loss, attention_scores, hidden_loss, relation_loss, soft_loss
from autolite.techniques.schedules import scheduled
from autolite.techniques.teacher import Features, TeacherOutputs, observe, own_inputs, to_tensors

if TYPE_CHECKING:
    from autolite.techniques.distill import DistillConfig

LayerMap = Literal["source", "uniform", "last"] | tuple[int, ...]


class Item(NamedTuple):
    """A step of training: what each teacher says about the batches, the number of one, and of those that are next."""

    teachers: tuple[TeacherOutputs, ...]
    batch: int
    ahead: Sequence[int] = ()


def layer_map(student: ModelShape, teacher: ModelShape, layers: LayerMap = "source") -> tuple[int, ...]:
    """Return for each layer of the student's last stack the teacher's layer that it imitates.

    "source" is the layer it came from, if the shape knows, else "uniform": layer l of L_s imitates
    round((l + 1) * L_t / L_s) - 1. With both, the last imitates the last, whose state the head reads. "last" is
    L_t - L_s + l. A model without an architecture map keeps all of its layers: nothing is said of them.
    """
    if student.unmapped is not None:
        return ()
    if isinstance(layers, tuple):
        return layers
    own, total = len(student.stacks[-1].layers), len(teacher.stacks[-1].layers)
    if layers == "last":
        return tuple(range(total - own, total))
    if layers == "source" and student.source_layers:
        source = student.source_layers[-1]
    else:
        source = tuple(math.floor((layer + 1) * total / own + 0.5) - 1 for layer in range(own))
    return (*source[:-1], total - 1)


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a batch at a step, of a student in training. `layers` says which teacher's layer each of its own
    imitates; `projections` map its hidden states to the teacher's width, where that differs."""

    student: Student
    config: DistillConfig
    context: Context
    layers: tuple[int, ...]
    projections: nn.ModuleList
    scales: tuple[tuple[float, ...], tuple[float, ...]]  # of the attention scores, of the student and the teacher

    @classmethod
    def of(cls, student: Student, config: DistillConfig, context: Context) -> Objective:
        """Return the objective of a student whose model is the one to be trained."""
        shape, teacher = student.shape, context.teacher
        layers = layer_map(shape, teacher.shape, config.layers)
        ours, theirs = shape.stacks[-1].hidden, teacher.shape.stacks[-1].hidden
        projections = nn.ModuleList()
        if config.hidden and ours != theirs:
            generator = torch.Generator().manual_seed(context.seed)
            for _ in layers:
                projection = nn.Linear(ours, theirs, bias=False)
                nn.init.orthogonal_(projection.weight, generator=generator)
                projections.append(projection.to(context.device))
        models = (student.model, teacher.model) if config.attention else ()
        scales = [tuple(layer.scale for layer in layers_of(each)) for each in models] or [(), ()]
        return cls(student, config, context, layers, projections, (scales[0], scales[1]))

    def __call__(self, item: Item, step: int) -> torch.Tensor:
        """Return the loss of a batch."""
        teachers, index, ahead = item
        config, device, task = self.config, self.context.device, self.context.task
        progress = step / max(1, config.steps - 1)
        temperature = scheduled(config.temperature, config.temperature_end, config.schedule, progress)
        alpha = scheduled(config.alpha, config.alpha_end, config.schedule, progress)
        matching = scheduled(1.0, config.matching_end, config.schedule, progress)
        inputs, labels = to_tensors(teachers[0].batches[index], device)
        theirs = teachers[0].of(index, config.hidden > 0, self._teacher_layers(), ahead)
        own = own_inputs(inputs, self.student.vocabulary)
        ours = observe(self.student.model, own, config.hidden > 0, self._own_layers())
        logits = ours["logits"]
        loss = torch.zeros((), device=device)
        if alpha > 0:
            # A label a token asks for itself; of examples without a label only the others see the hard loss.
            known = labels != IGNORED if labels.ndim == 1 else torch.ones_like(labels[:, 0], dtype=torch.bool)
            if known.all():
                loss = loss + alpha * task.loss(logits.float(), labels)
            elif known.any():
                loss = loss + alpha * task.loss(logits[known].float(), labels[known])
        if alpha < 1:
            said = [theirs["logits"], *(other.of(index, hidden=False, ahead=ahead)["logits"] for other in teachers[1:])]
            targets = [task.soft_targets(each, labels) for each in said]
            if len(targets) > 1:
                asked = task.soft_targets(labels.unsqueeze(-1), labels).squeeze(-1)
                targets = [combined(targets, asked, temperature, config.combine)]
            loss = loss + (1 - alpha) * soft_loss(task.soft_targets(logits, labels), targets[0], temperature)
        if matching > 0:
            loss = loss + matching * self._matching(ours, theirs, inputs)
        # A batch without any label may have nothing to say, and yet takes its turn.
        return loss if loss.requires_grad else loss + 0.0 * logits.float().sum()

    def _own_layers(self) -> tuple[int, ...]:
        """The student's layers whose attention is looked at."""
        if self.config.attention:
            return tuple(range(len(self.layers)))
        return (len(self.layers) - 1,) if self.config.relations else ()

    def _teacher_layers(self) -> tuple[int, ...]:
        return tuple(sorted({self.layers[layer] for layer in self._own_layers()}))

    def _matching(self, ours: Features, theirs: Features, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted losses between what is inside the models."""
        config, loss = self.config, torch.zeros((), device=self.context.device)
        logits = ours["logits"]
        if config.hidden > 0 and (count := int(ours["states"])):
            own = [ours[f"state.{layer}"] for layer in range(count)]
            if self.projections:
                own = [project(state.float()) for project, state in zip(self.projections, own, strict=True)]
            wanted = [theirs[f"state.{layer}"] for layer in self.layers or range(count)]
            loss = loss + config.hidden * hidden_loss(own, wanted, _tokens(inputs, own[0]), config.hidden_kind)
        if config.attention > 0:
            parts = [self._attention(layer, ours, theirs, inputs) for layer in range(len(self.layers))]
            loss = loss + config.attention * torch.stack(parts).mean()
        for name, weight in config.relations.items():
            own_last, last = ours[f"{name}.{len(self.layers) - 1}"], theirs[f"{name}.{self.layers[-1]}"]
            tokens = _tokens(inputs, own_last.transpose(1, 2))
            loss = loss + weight * relation_loss(own_last, last, tokens, config.relation_heads)
        return loss.to(logits.device)

    def _attention(self, layer: int, ours: Features, theirs: Features, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        other = self.layers[layer]
        own = attention_scores(ours[f"query.{layer}"], ours[f"key.{layer}"], self.scales[0][layer])
        target = attention_scores(theirs[f"query.{other}"], theirs[f"key.{other}"], self.scales[1][other])
        real = _tokens(inputs, ours[f"query.{layer}"].transpose(1, 2)).bool()
        return attention_loss(
            own, target, ours[f"allowed.{layer}"] & real[:, None, :, None], self.config.attention_kind
        )


def _tokens(inputs: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """Return the mask of real tokens [batch, tokens]; where nothing is padded (images), all of the states'."""
    return inputs.get("attention_mask", torch.ones(states.shape[:2], device=states.device))
