"""Shapes of well-known sizes, for tests that need no weights."""

from __future__ import annotations

from autolite.architecture import CrossAttention, LayerShape, ModelShape, Stack
from autolite.families import ENCODER_DECODER


def bert_shape(layers: int = 6, hidden: int = 384, heads: int = 12, ffn: int = 1536) -> ModelShape:
    """MiniLM-L6's shape, with two labels."""
    every = tuple(LayerShape(heads, heads, hidden // heads, ffn, i, i) for i in range(layers))
    return ModelShape("bert", (Stack("encoder", hidden, every),), 30522, hidden, 512, 2)


def llama_shape(layers: int = 5, hidden: int = 64, heads: int = 8, kv_heads: int = 4, ffn: int = 172) -> ModelShape:
    """The stories260K Llama's shape."""
    every = tuple(LayerShape(heads, kv_heads, hidden // heads, ffn, i, i) for i in range(layers))
    stack = Stack("decoder", hidden, every, gated=True, causal=True)
    return ModelShape("llama", (stack,), 512, hidden, 512, 512, tied=True)


def encoder_decoder_shape(
    encoder: int = 3, decoder: int = 2, source: int = 96, hidden: int = 64, heads: int = 4, ffn: int = 160
) -> ModelShape:
    """A small transformer that reads with one stack, `source` wide, and writes with another."""
    reading = tuple(LayerShape(heads, heads, source // heads, ffn, i, i) for i in range(encoder))
    cross = CrossAttention(heads, 24)
    writing = tuple(LayerShape(heads, heads, hidden // heads, ffn, i, i, cross=cross) for i in range(decoder))
    stacks = Stack("encoder", source, reading), Stack("decoder", hidden, writing, causal=True)
    return ModelShape(ENCODER_DECODER.name, stacks, 1000, hidden, 0, 1000, tied=True)
