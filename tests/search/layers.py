"""Levels by layer of tiny models, priced for a phone."""

from __future__ import annotations

from collections.abc import Sequence

from autolite import contracts
from autolite.architecture import ModelShape
from autolite.hardware.predict import predict_all
from autolite.hardware.profile_files import load_profile
from autolite.measure import Workload
from autolite.techniques.base import Context

PROFILE = load_profile("hardware_profiles/pixel8.yaml")
SPACE = """
name: layers
description: Levels by layer.
steps:
  - share: {part: [none, ffn], groups: 2}
  - prune: {heads: [by-layer, 1.0, 0.5], ffn: [by-layer, 1.0, 0.5, 0.25], depth: [1.0, 0.67], round_to: 8}
  - distill: {batch_size: 16}
  - quantize: {attention: [by-layer, int8, int4], ffn: [by-layer, int8], embedding: [int8, int4]}
stages:
  screen: {trials: 6, effort: 2}
  recover: {trials: 3, effort: 4, max_effort: 20}
  confirm: {trials: 4, effort: 6, max_effort: 40}
start:
  - {prune.heads: 1.0, prune.ffn: 1.0, quantize.attention: int8, quantize.ffn: int8}
"""


def context_of(family: str = "bert") -> Context:
    return contracts.tiny_context(family, contracts.tiny_task(family))


def price(shapes: Sequence[ModelShape]) -> list[tuple[float, float]]:
    found = predict_all(shapes, PROFILE, Workload(tokens=16))
    return [(each["latency_ms"].value, each["size_bytes"].value) for each in found]
