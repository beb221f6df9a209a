"""The tokens that a language model is given for a prompt: of a text, or of a chat by the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autolite.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, str]]  # of {"role", "content"}


def is_message(value: Any) -> bool:
    """Whether it is a part of a chat, {"role", "content"}."""
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Chat) -> list[int]:
    """Return the tokens that `transformers.pipeline("text-generation")` gives a model for a text or a chat.

    Raises:
        InputError: if it is neither, has no tokens, or is a chat that the tokenizer has no template for, or refuses.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif not isinstance(prompt, list | tuple) or not all(is_message(each) for each in prompt):
        raise InputError(f'give a text, or a chat as a list of {{"role": ..., "content": ...}}, not {prompt!r:.80}')
    elif tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template, so the model was not made for chats; give a text")
    else:
        ids = chat_ids(tokenizer, prompt, add_generation_prompt=True)
    if not ids:
        raise InputError(f"{prompt!r:.80} has no tokens; give a text that is not empty")
    return list(ids)


def chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, *, add_generation_prompt: bool) -> list[int]:
    """Return the tokens of a chat by the tokenizer's template, with what an answer begins with behind it if asked for.

    Raises:
        InputError: if the template refuses the chat.
    """
    try:
        template: Any = tokenizer.apply_chat_template  # its type has every form of its answer
        return list(template(list(chat), add_generation_prompt=add_generation_prompt, return_dict=True)["input_ids"])
    except Exception as error:  # jinja2's, and whatever a template raises, as of roles that it does not know
        raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error
