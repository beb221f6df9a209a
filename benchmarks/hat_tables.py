"""The tables of measured latencies of HAT (Wang et al. 2020, "HAT: Hardware-Aware Transformers for Efficient Natural
Language Processing"): 2000 encoder-decoder transformers on each of two devices, as samples to calibrate by.

They are of fairseq in eager PyTorch, on one sentence: the encoder reads 30 tokens, and the decoder makes 30 steps, each
for all hypotheses of a beam (latency_dataset.py in mit-han-lab/hardware-aware-transformers). A row has the means of a
model's layers, which are put back into layers here. A workload has no beams: the steps are described as if one
hypothesis were followed, for all of them multiply with the same weights together.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from autolite.architecture import CrossAttention, LayerShape, ModelShape, Stack
from autolite.families import ENCODER_DECODER
from autolite.hardware.calibration import Sample
from autolite.hardware.predict import predict_all
from autolite.hardware.profile import Profile
from autolite.hardware.profile_files import load_profile
from autolite.hardware.table import calibrated_by_table
from autolite.measure import Workload

# The device, its table and the profile to start from.
TABLES = (
    ("Xeon E5-2640 v4", "hat_wmt14ende_cpu_xeon.csv.gz", "x86-avx2"),
    ("Titan Xp", "hat_wmt14ende_gpu_titanxp.csv.gz", str(Path(__file__).parent / "data" / "titan-xp-pytorch.yaml")),
)
WIDTH = 512  # of queries, keys and values, however many heads they are cut into
HEADS = (2, 4, 8)
VOCABULARY = 32768
TOKENS = 30
ROWS = 30  # to calibrate by
NORMAL = {"95 %": 1.96, "90 %": 1.645}


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Return Kendall's tau-b of two sequences [n]."""
    x, y = (np.sign(each[:, None] - each[None, :], dtype=np.float64).ravel() for each in (a, b))
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def samples(file: Path, threads: int) -> list[Sample]:
    """Read a table: what each model is, and the milliseconds of its encoder and its decoder together."""
    with gzip.open(file, "rt", encoding="utf-8", newline="") as lines:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(lines)]
    workload = Workload(1, TOKENS, threads, TOKENS)
    return [
        Sample(shape_of_row(row), workload, row["latency_mean_encoder"] + row["latency_mean_decoder"], str(i % 10))
        for i, row in enumerate(rows)
    ]


def shape_of_row(row: Mapping[str, float]) -> ModelShape:
    """Return the shape of a row's model."""
    depths = {side: round(row[f"{side}_layer_num"]) for side in ("encoder", "decoder")}

    def total(side: str, what: str) -> int:
        return round(row[f"{side}_{what}_avg"] * depths[side])

    heads = [_heads(total(side, "self_attention_heads"), depth) for side, depth in depths.items()]
    ffn = [_even(total(side, "ffn_embed_dim"), depth) for side, depth in depths.items()]
    cross = zip(
        _heads(total("decoder", "ende_attention_heads"), depths["decoder"]),
        _even(total("decoder", "arbitrary_ende_attn"), depths["decoder"]),
        strict=True,
    )
    encoder = tuple(
        LayerShape(h, h, WIDTH // h, f, i, i) for i, (h, f) in enumerate(zip(heads[0], ffn[0], strict=True))
    )
    decoder = tuple(
        LayerShape(h, h, WIDTH // h, f, i, i, cross=CrossAttention(x, WIDTH // x, sources))
        for i, (h, f, (x, sources)) in enumerate(zip(heads[1], ffn[1], cross, strict=True))
    )
    widths = [round(row[f"{side}_embed_dim"]) for side in depths]
    stacks = Stack("encoder", widths[0], encoder), Stack("decoder", widths[1], decoder, causal=True)
    return ModelShape(ENCODER_DECODER.name, stacks, VOCABULARY, widths[1], 0, VOCABULARY, tied=True)


def _even(total: int, layers: int) -> list[int]:
    """Layers that add up to this, as equal as they can be."""
    return [(total + i) // layers for i in range(layers)]


def _heads(total: int, layers: int) -> list[int]:
    """Layers of `HEADS` that add up to this."""
    counts = (each for each in product(range(layers + 1), repeat=len(HEADS)) if sum(each) == layers)
    few, some, many = next(each for each in counts if sum(n * h for n, h in zip(each, HEADS, strict=True)) == total)
    return few * [HEADS[0]] + some * [HEADS[1]] + many * [HEADS[2]]


def splits(found: Sequence[Sample], profile: Profile, count: int) -> list[dict[str, float]]:
    """Calibrate by `ROWS` rows drawn at random and predict the others; return what came out each time."""
    found_each = []
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(found))
        known, new = ([found[i] for i in part] for part in (order[:ROWS], order[ROWS:]))
        calibrated = calibrated_by_table(profile, known, "HAT")
        prices = [
            each["latency_ms"]
            for each in predict_all([each.shape for each in new], calibrated.profile, known[0].workload)
        ]
        measured = np.array([each.milliseconds for each in new])
        predicted, high = (np.array([getattr(each, name) for each in prices]) for name in ("value", "high"))
        off, sigmas = np.log(predicted / measured), np.log(high / predicted) / NORMAL["95 %"]
        sizes = np.abs(predicted / measured - 1)
        found_each.append(
            {
                "before": float(np.abs(calibrated.before).mean()),
                "held out": float(np.abs(calibrated.errors).mean()),
                "off": float(sizes.mean()),
                "within": float((sizes <= 0.1).mean()),
                "kendall": kendall(predicted, measured),
                "inside": float((np.abs(off) <= NORMAL["90 %"] * sigmas).mean()),
            }
        )
    return found_each


def report(folder: Path, count: int) -> Iterator[str]:
    """Yield a line for each table; the reason where there is none."""
    for device, name, start in TABLES:
        if not (folder / name).is_file():
            yield f"{device}: skipped, for {folder / name} is not there"
            continue
        profile = load_profile(start)
        each = splits(samples(folder / name, profile.threads), profile, count)
        mean = {key: float(np.mean([found[key] for found in each])) for key in each[0]}
        yield (
            f"{device}, from {profile.name}, {ROWS} rows, {count} splits: {mean['before']:.0%} off before; "
            f"{mean['off']:.2%} off after in the mean, {max(found['off'] for found in each):.2%} in the worst split "
            f"(held out it says {mean['held out']:.2%}), {mean['within']:.0%} within 10 %, Kendall's tau "
            f"{mean['kendall']:.3f}, {mean['inside']:.0%} in the intervals of 90 %"
        )
