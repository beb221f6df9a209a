"""The rows of benchmarks/techniques.py: (name, plan, number of seeds), by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Steps = list[tuple[str, Mapping[str, Any]]]
Rows = list[tuple[str, Steps, int]]

HALF = {"heads": 0.5, "ffn": 0.5}
CURVE = (25, 75, 225)  # steps of 32 examples
SEEDS = 3


def everywhere(form: str, table: str = "fp32", **settings: Any) -> tuple[str, Mapping[str, Any]]:
    """Return a step that puts all layers in one format."""
    return "quantize", {"attention": form, "ffn": form, "embedding": table, **settings}


def prune() -> Rows:
    """Cuts without any training."""
    kinds = ("magnitude", "activation", "wanda", "taylor", "fisher", "second-order")
    rows: Rows = [(f"half of heads and FFN, {kind}", [("prune", {**HALF, "importance": kind})], 1) for kind in kinds]
    rows += [
        (f"the same, {kind}, rest re-fitted", [("prune", {**HALF, "importance": kind, "reconstruct": True})], 1)
        for kind in kinds[:-1]
    ]
    for allocation in ("global", "isomorphic"):
        for kind in ("taylor", "second-order"):
            settings = {**HALF, "importance": kind, "allocation": allocation}
            rows.append((f"the same, {kind}, {allocation} allocation", [("prune", settings)], 1))
    for fraction, name in ((0.84, "one layer of six fewer"), (0.67, "two layers fewer")):
        ways = ("spaced", "similarity", "damage", "second-order")
        rows += [(f"{name}, {how}", [("prune", {"depth": fraction, "layers": how})], 1) for how in ways]
        settings = {"depth": fraction, "layers": "damage", "reconstruct": True}
        rows.append((f"{name}, damage, rest re-fitted", [("prune", settings)], 1))
    for fraction, name, ways in (
        (0.75, "three quarters of the hidden width", ("magnitude", "taylor", "fisher", "second-order")),
        (0.5, "half of the hidden width", ("taylor", "second-order")),
    ):
        rows += [(f"{name}, {kind}", [("prune", {"hidden": fraction, "importance": kind})], 1) for kind in ways]
        settings = {"hidden": fraction, "importance": "taylor", "reconstruct": True}
        rows.append((f"{name}, taylor, rest re-fitted", [("prune", settings)], 1))
    rows += [
        (f"{pattern} of the weights zero, {kind}", [("prune", {"sparsity": pattern, "mask": kind})], 1)
        for pattern in ("50%", "2:4")
        for kind in ("magnitude", "wanda")
    ]
    return rows


def share() -> Rows:
    """Layers that share weights, without any training."""
    rows: Rows = []
    for part in ("attention", "ffn", "all"):
        for init in ("first", "mean", "best"):
            rows.append((f"{part} in 3 sets, {init}", [("share", {"part": part, "groups": 3, "init": init})], 1))
    for pattern in ("cycle", "cycle-reversed"):
        rows.append((f"ffn in 3 sets, {pattern}", [("share", {"part": "ffn", "groups": 3, "pattern": pattern})], 1))
    ends = {"part": "ffn", "groups": 2, "unshared_first": 1, "unshared_last": 1}
    rows.append(("ffn in 2 sets between unshared ends", [("share", ends)], 1))
    rows += [
        (f"all in 3 sets, mean, differences of rank {rank}", [("share", {**DELTA, "rank": rank})], 1)
        for rank in (8, 32, 64)
    ]
    return rows


DELTA = {"part": "all", "groups": 3, "init": "mean"}


def quantize() -> Rows:
    """Number formats of the layers, nothing trained."""
    forms = (
        "int8",
        "int8-static",
        "int7",
        "int8-tensor",
        "int8-asym",
        "kmeans8",
        "int6",
        "kmeans6",
        "int4",
        "int4-g64",
    )
    forms += ("int4-g128", "int4-asym", "kmeans4", "nf4", "int3-g64", "int3-g128")
    forms += ("kmeans4-g64", "kmeans3-g64", "kmeans2-g64")
    forms += ("pot4", "int3", "int3-asym", "kmeans3", "pot3", "int2", "int2-asym", "kmeans2")
    rows: Rows = [(form, [everywhere(form)], 1) for form in forms]
    for form in ("int4", "int3", "kmeans3", "int2-asym", "kmeans2"):
        for rounding in ("weighted", "gptq", "hqq"):
            if rounding != "hqq" or not form.startswith("kmeans"):
                rows.append((f"{form}, {rounding}", [everywhere(form, rounding=rounding)], 1))
    rows += [
        (f"{bits} bits on average, of int2 to int8", [everywhere("fp32", average_bits=bits, levels=LEVELS)], 1)
        for bits in (3.5, 4.5)
    ]
    rows += [
        (f"int8-static, {how} ranges", [everywhere("int8-static", calibration=how)], 1)
        for how in ("minmax", "percentile", "entropy")
    ]
    rows.append(("int8-static, smooth", [everywhere("int8-static", scaling="smooth")], 1))
    rows += [
        (f"embedding in {form}", [("quantize", {"embedding": form})], 1)
        for form in ("int8", "int4", "int3", "kmeans3", "int2")
    ]
    return rows


LEVELS = ("int2", "int3", "int4", "int6", "int8")


def equal_bytes() -> Rows:
    """Linear and non-linear levels of a language model's layers, one scale for each 64 inputs in all of them."""
    return [
        (f"{form}, {rounding}", [everywhere(form, rounding=rounding)], 1)
        for form in ("int4-g64", "nf4", "kmeans4-g64", "int3-g64", "kmeans3-g64", "kmeans2-g64")
        for rounding in ("nearest", "weighted", "gptq")
    ]


def decoder() -> Rows:
    """Number formats and roundings of a language model's layers."""
    rows: Rows = []
    for form in (
        "int8",
        "int4",
        "int3",
        "int2",
        "int4-asym",
        "int3-asym",
        "kmeans4",
        "kmeans3",
        "kmeans2",
        "nf4",
        "pot4",
    ):
        roundings = ("nearest",) if form == "int8" else ("nearest", "weighted", "gptq")
        roundings += ("hqq",) if form in ("int4-asym", "int3-asym") else ()
        rows += [(f"{form}, {rounding}", [everywhere(form, rounding=rounding)], 1) for rounding in roundings]
    rows += [
        (f"{form}, awq, {how}", [everywhere(form, scaling="awq", rounding=how)], 1)
        for form in ("int4", "int3")
        for how in ("nearest", "gptq")
    ]
    rows += [
        (f"{bits} bits on average, gptq", [everywhere("fp32", average_bits=bits, levels=LEVELS, rounding="gptq")], 1)
        for bits in (3.6, 4.6)
    ]
    return rows


def distill() -> Rows:
    """Accuracy against steps of each loss, from the same cut student."""
    plain = {"alpha": 0.2, "hidden": 0.0}
    losses: dict[str, dict[str, Any]] = {
        "labels only": {"alpha": 1.0, "hidden": 0.0},
        "logits only": {"alpha": 0.0, "hidden": 0.0},
        "labels and logits": plain,
        "and hidden states, MSE": {**plain, "hidden": 1.0},
        "and hidden states, cosine": {**plain, "hidden": 1.0, "hidden_kind": "cosine"},
        "and attention maps, KL": {**plain, "attention": 0.5},
        "and attention maps, MSE": {**plain, "attention": 0.1, "attention_kind": "mse"},
        "and value relations": {**plain, "values": 1.0},
        "and query, key, value relations": {**plain, "queries": 1.0, "keys": 1.0, "values": 1.0},
    }
    return [
        (f"{name}, {steps} steps", [("prune", {**QUARTER}), ("distill", {**settings, "steps": steps})], SEEDS)
        for name, settings in losses.items()
        for steps in CURVE
    ]


def embedding() -> Rows:
    """Smaller tables, without any training."""
    rows: Rows = [
        (f"factors of rank {rank}, tokens by {weighting}", [("embedding", {"rank": rank, "weighting": weighting})], 1)
        for rank in (64.0, 96.0, 192.0)
        for weighting in ("frequency", "none")
    ]
    rows += [
        (f"tokens used {count} times or more", [("embedding", {"vocabulary": "used", "min_count": count})], 1)
        for count in (1, 5)
    ]
    rows.append(("6000 tokens", [("embedding", {"vocabulary": 6000.0})], 1))
    return rows


def recipe(heads: float, ffn: float, rank: float, form: str, table: str) -> tuple[Steps, Steps, Steps, Steps]:
    """Return the steps of a recipe for about a 25th of the bytes: cut, and distilled, and rounded, and recovered."""
    cut: Steps = [
        ("embedding", {"vocabulary": "used", "min_count": 5, "rank": rank}),
        ("prune", {"heads": heads, "ffn": ffn, "importance": "wanda", "reconstruct": True}),
    ]
    trained: Steps = [*cut, ("distill", {"steps": 1500, "embeddings": True, "learning_rate": 3e-4})]
    rounded: Steps = [*trained, everywhere(form, table, head="int8", rounding="gptq")]
    return cut, trained, rounded, [*rounded, ("recover", {"steps": 150, "learning_rate": 1e-4})]


# To choose among with --split selection.
RECIPES: dict[str, tuple[float, float, float, str, str]] = {
    "1024 neurons, int3-g64": (0.5, 0.667, 96.0, "int3-g64", "int3"),
    "1024 neurons, kmeans3-g64": (0.5, 0.667, 96.0, "kmeans3-g64", "int3"),
    "672 neurons, int4-g64": (0.5, 0.4375, 96.0, "int4-g64", "int3"),
}


def recipes() -> Rows:
    """Ways to a 25th of the teacher's bytes."""
    return [(name, recipe(*settings)[2], 1) for name, settings in RECIPES.items()]


def smallest() -> Rows:
    """All techniques but sharing, to a 25th of the teacher's bytes: what was best of `recipes`."""
    names = ("cut, nothing trained, fp32", "and distilled, fp32", "and rounded, GPTQ", "and recovered in these formats")
    return [(name, steps, SEEDS) for name, steps in zip(names, recipe(*RECIPES[CHOSEN]), strict=True)]


CHOSEN = "672 neurons, int4-g64"


def texts() -> Rows:
    """Distillation where few examples have labels."""
    steps = {"steps": CURVE[2], "hidden": 0.0}
    return [
        (f"a quarter, {name}, {CURVE[2]} steps", [("prune", QUARTER), ("distill", {**steps, "alpha": alpha})], SEEDS)
        for name, alpha in (("labels and logits", 0.2), ("logits only", 0.0))
    ]


def batches() -> Rows:
    """Batches of 64 at once and in two parts."""
    return [
        (
            f"a quarter, batches of {size} x {parts}",
            [("prune", QUARTER), ("distill", {"steps": CURVE[1], "batch_size": size, "accumulate": parts})],
            SEEDS,
        )
        for size, parts in ((64, 1), (32, 2))
    ]


def relaxed() -> Rows:
    """Whether low-rank differences of shared layers pay once they are trained."""
    return [
        (
            f"all in 3 sets, {init}, {f'differences of rank {rank}' if rank else 'none'}, {CURVE[1]} steps",
            [
                ("share", {"part": "all", "groups": 3, "init": init, "rank": rank}),
                ("distill", {"steps": CURVE[1]}),
            ],
            SEEDS,
        )
        for init, rank in (("best", 0), ("mean", 0), ("mean", 32))
    ]


def recover() -> Rows:
    """Training in few bits, of the whole teacher."""
    return [
        (
            f"{form}, {rounding}, {steps} steps of recovery",
            [everywhere(form, rounding=rounding), ("recover", {"steps": steps, "learning_rate": 1e-4})],
            1,
        )
        for form, rounding, steps in (("int2", "nearest", 100), ("int2", "gptq", 0), ("int2", "gptq", 100))
    ]


def second() -> Rows:
    """A few rows of each group, for a second data set."""
    half: Rows = [(f"half of heads and FFN, {kind}", [("prune", {**HALF, "importance": kind})], 1) for kind in KINDS]
    half.append(
        ("the same, wanda, rest re-fitted", [("prune", {**HALF, "importance": "wanda", "reconstruct": True})], 1)
    )
    shared: Rows = [
        (f"all in 3 sets, {init}", [("share", {"part": "all", "groups": 3, "init": init})], 1)
        for init in ("first", "mean", "best")
    ]
    rounded: Rows = [
        (f"{form}, {rounding}", [everywhere(form, rounding=rounding)], 1)
        for form in ("int4", "int3", "int2", "kmeans2")
        for rounding in ("nearest", "gptq")
    ]
    return [*half, *shared, *rounded, ("factors of rank 96", [("embedding", {"rank": 96.0})], 1)]


KINDS = ("magnitude", "wanda", "taylor", "second-order")


def guidance() -> Rows:
    """Layer maps and schedules, at the middle of the curve."""
    steps = {"steps": CURVE[1]}
    rows: Rows = [
        (
            f"half of the layers, imitating: {layers}",
            [("prune", {"depth": 0.5}), ("distill", {**steps, "layers": layers})],
            SEEDS,
        )
        for layers in ("source", "uniform", "last")
    ]
    ends = {"hidden": 0.0, "temperature_end": 1.0, "alpha_end": 0.5}
    rows += [
        (
            f"temperature 4 to 1, alpha 0.2 to 0.5, {kind}",
            [("prune", QUARTER), ("distill", {**steps, **ends, "schedule": kind})],
            SEEDS,
        )
        for kind in ("constant", "linear", "cosine")
    ]
    return rows


def two_teachers(second: str) -> Rows:
    """A second teacher from the folder `second` beside the first."""
    settings = {"steps": CURVE[1], "hidden": 0.0, "teachers": second}
    return [
        (f"two teachers, {how}", [("prune", QUARTER), ("distill", {**settings, "combine": how})], SEEDS)
        for how in ("mean", "best")
    ]


QUARTER = {"heads": 0.25, "ffn": 0.25}
SHORT = ("labels only", "logits only", "labels and logits", "and hidden states, MSE", "and query")
GROUPS: dict[str, Rows] = {
    "prune": prune(),
    "share": share(),
    "quantize": quantize(),
    "decoder": decoder(),
    "equal-bytes": equal_bytes(),
    "distill": distill(),
    "guidance": guidance(),
    "embedding": embedding(),
    "relaxed": relaxed(),
    "recover": recover(),
    "second": second(),
    "recipes": recipes(),
    "smallest": smallest(),
    "texts": texts(),
    "batches": batches(),
    "short-curve": [row for row in distill() if row[0].startswith(SHORT)],
}
