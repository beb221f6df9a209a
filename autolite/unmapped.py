"""Models whose architecture the map does not have: what can be found out about them by looking at their modules and by
running them once on a few tokens."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autolite import families
from autolite.errors import ModelError, first_line

BATCH, TOKENS = 2, 8  # of the run that shows what is used: 2 rows are the sequences', 16 the tokens'
_ATTENTION = frozenset(
    {"self", "query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj", "qkv", "query_key_value"}
)


@dataclass(frozen=True, eq=False)
class Found:
    """A weight matrix that the model multiplies with or, for its token embedding, looks rows up in.

    `key` is the parameter's name in `state_dict()`; `group` is "attention", "ffn", "embedding" or "head"; `calls` says
    how often one pass multiplies with it (0 for the embedding), and `pooled` that it does so once a sequence instead of
    for every token.
    """

    key: str
    group: str
    module: Any
    calls: int
    pooled: bool = False


@dataclass(frozen=True, eq=False)
class Look:
    """What one pass showed: the matrices in use, the logits' width, and whether every token has its own.

    `tied` says that the head multiplies with the token embedding; `floats` counts the values of all other parameters.
    """

    matrices: tuple[Found, ...]
    outputs: int
    every_token: bool
    tied: bool
    floats: int


def look(model: PreTrainedModel) -> Look:
    """Run the model once on a few tokens and return what it uses.

    A matrix that such a pass does not use (heads for other tasks, projections for other inputs) is not listed.

    Raises:
        ModelError: if it cannot be run on token ids alone, or gives no logits.
    """
    linears = _linears(model)
    with ExitStack() as hooks:
        for linear in linears:
            hooks.callback(linear.module.register_forward_pre_hook(linear.note).remove)
        logits = _run(model)
    table = word_table(model)
    names = _names(model)
    tables = [] if table is None else [Found(names[id(table.weight)], "embedding", table, 0)]
    matrices: dict[str, Found] = {}
    for linear in linears:
        if linear.rows:
            found = linear.found()
            first = matrices.get(found.key)  # several modules can have one weight
            matrices[found.key] = found if first is None else replace(first, calls=first.calls + found.calls)
    idle = {id(parameter) for linear in linears if not linear.rows for parameter in linear.module.parameters()}
    used = {found.key for found in (*tables, *matrices.values())}
    others = (p for name, p in model.named_parameters() if name not in used and id(p) not in idle)
    return Look(
        matrices=(*tables, *matrices.values()),
        outputs=int(logits.shape[-1]),
        every_token=logits.ndim == 3,
        tied=bool(tables) and tables[0].key in matrices,
        floats=sum(parameter.numel() for parameter in others),
    )


@dataclass(eq=False)
class _Linear:
    """A module that multiplies with a matrix, and the rows of its inputs in each of its calls."""

    key: str
    group: str
    module: Any
    rows: list[int] = field(default_factory=list)

    def note(self, called: Any, given: tuple[Any, ...]) -> None:
        if given and isinstance(given[0], Tensor):
            self.rows.append(given[0].numel() // given[0].shape[-1])

    def found(self) -> Found:
        pooled = BATCH in self.rows and BATCH * TOKENS not in self.rows
        # Products of other sizes are with what does not depend on the input, and are computed at loading.
        calls = self.rows.count(BATCH if pooled else BATCH * TOKENS) or len(self.rows)
        # What is read once a sequence belongs to the head: poolers stand inside some base models.
        return Found(self.key, "head" if pooled else self.group, self.module, calls, pooled)


def _linears(model: PreTrainedModel) -> list[_Linear]:
    whole: Any = model
    names, output = _names(model), whole.get_output_embeddings()
    inside = {id(module) for module in whole.base_model.modules()}
    linears = []
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and id(module.weight) in names:
            head = module is output or id(module) not in inside
            linears.append(_Linear(names[id(module.weight)], "head" if head else group_of(name), module))
    return linears


def _names(model: PreTrainedModel) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def inputs_of(model: PreTrainedModel) -> list[str]:
    """Return the names of the inputs that the model takes, of those that text tasks have."""
    taken = inspect.signature(model.forward).parameters
    typed = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    wanted = ("input_ids", "attention_mask", *(("token_type_ids",) if typed else ()))
    return [name for name in wanted if name in taken]


def sample(model: PreTrainedModel, batch: int = BATCH, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs for the model: random ordinary tokens, the sequences shorter from one to the next and padded on
    the right. Each ends with the token that ends sequences, which some encoder-decoders look for."""
    config = model.config.get_text_config()
    table = word_table(model)
    vocab = int(table.weight.shape[0] if table is not None else config.vocab_size)
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "decoder_start")
    special = {getattr(config, f"{kind}_token_id", None) for kind in kinds if _integer(config, kind) is not None}
    ordinary = torch.tensor([i for i in range(min(vocab, 1000)) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    ids = ordinary[torch.randint(len(ordinary), (batch, tokens), generator=generator)]
    lengths = torch.linspace(tokens, max(1, tokens // 2), batch).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    if (end := _integer(config, "eos")) is not None:
        ids[torch.arange(batch), lengths - 1] = end
    padding = _integer(config, "pad")
    arrays = {
        "input_ids": torch.where(mask.bool(), ids, 0 if padding is None else padding),
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(ids),
    }
    return {name: arrays[name].to(model.device) for name in inputs_of(model)}


def positions_of(model: PreTrainedModel) -> int:
    """Return how many tokens the model takes at once, 10**9 if it sets no limit.

    As RoBERTa's, a position table that knows which row is padding's counts from the row after that one.
    """
    rows = families.usable_positions(model.config)
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            rows = min(rows, module.num_embeddings - module.padding_idx - 1)
    return rows


def word_table(model: PreTrainedModel) -> Any:
    """Return the module of the token embedding, None if there is none that rows are looked up in."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D: a Linear with its weight stored [in, out]."""
    return type(module).__name__ == "Conv1D"


def group_of(name: str) -> str:
    """Return which of "attention", "ffn" and "embedding" a module belongs to, by its dotted name."""
    parts = name.lower().split(".")
    if any("attn" in part or "attention" in part or part in _ATTENTION for part in parts):
        return "attention"
    return "embedding" if any("embed" in part for part in parts) else "ffn"


def _integer(config: Any, kind: str) -> int | None:
    value = getattr(config, f"{kind}_token_id", None)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and value >= 0 else None


def _run(model: PreTrainedModel) -> Tensor:
    kind = type(model).__name__
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ModelError(
            f"{kind} takes {model.main_input_name}, and the architecture map has no '{model.config.model_type}'; "
            "without the map only models that take input_ids can be compressed"
        )
    try:
        with torch.no_grad():
            logits = getattr(model(**sample(model)), "logits", None)
    except Exception as error:  # whatever foreign code makes of these inputs
        raise ModelError(f"{kind} cannot be run on a batch of token ids alone: {first_line(error)}") from error
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise ModelError(f"{kind} gives no logits [batch, classes] or [batch, tokens, vocabulary] to be judged by")
    return logits
