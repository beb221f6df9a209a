"""Where the time of a model goes, operator by operator, from ONNX Runtime's own trace."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from autolite.measure import Inputs, Runner, Timing, Workload, time_interleaved
from autolite.runtime.flops import Tensor, flops, kernel_class, needs_weight
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.runtime.trace import Event, read_trace

OTHER = "other"  # the layer of nodes whose names say none
_LAYER = re.compile(r"(?:^|[ /])(embedding|head|layer\.\d+)/(?:(attention|ffn)/)?")
_NOISE = 0.15  # of a call's time, above which the machine was not quiet
_CHAINS = (2, 64)  # operators that do next to nothing
_CHAIN_INPUT = "autolite_chain"


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the graph that the runtime made of the model, in one call.

    Attributes:
        name: as the runtime has it.
        operator: its type.
        layer: "embedding", "layer.3", "head", or "other" if the name does not say.
        part: "attention", "ffn" or "".
        calls: how often it runs in a call, 1 outside of loops.
        microseconds: median over the calls, less what recording it costs.
        flops: operations, None for what is no product.
        kernel: the kernel class whose peak it is compared with, if any.
        inputs: shapes of the inputs, without those that the runtime packed.
        outputs: shapes of the outputs.
    """

    name: str
    operator: str
    layer: str
    part: str
    calls: int
    microseconds: float
    flops: int | None
    kernel: str | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Several nodes together. `gflops` and `peak_share` are those of the products among them, None without any."""

    name: str
    calls: int
    microseconds: float
    share: float
    gflops: float | None
    peak_share: float | None


@dataclass(frozen=True)
class OperatorProfile:
    """What a call of a model consists of.

    Attributes:
        model: the file.
        runtime: name of the runtime.
        version: of the runtime.
        workload: the call.
        inputs: of the call, by name.
        call: times of calls that nothing recorded.
        traced: times of the recorded calls, interleaved with those.
        empty: milliseconds of a call of a model that does next to nothing: what the runtime itself takes.
        recording: microseconds that recording adds to the time of each node.
        peaks: GFLOP/s of each kernel class on this machine.
        nodes: in the order they ran.
    """

    model: str
    runtime: str
    version: str
    workload: Workload
    inputs: dict[str, Tensor]
    call: Timing
    traced: Timing
    empty: float
    recording: float
    peaks: Mapping[str, float]
    nodes: tuple[Node, ...]

    @property
    def microseconds(self) -> float:
        """Sum over the nodes."""
        return sum(node.microseconds for node in self.nodes)

    @property
    def disturbed(self) -> bool:
        """Whether other programs slowed the calls: their times differ, or are not those of the nodes."""
        low, high = self.call.median_interval()
        missing = self.call.median - self.empty - self.microseconds / 1e3
        return max(high - low, missing) > _NOISE * self.call.median

    def row(self, name: str, nodes: Sequence[Node]) -> Row:
        """Add nodes up. Against its peak, a group is the time that its products need at best over the one they took."""
        micros = sum(node.microseconds for node in nodes)
        products = [(node, node.flops) for node in nodes if node.flops is not None]
        known = [(n, count / self.peaks[n.kernel]) for n, count in products if n.kernel and n.kernel in self.peaks]
        rate = _ratio(sum(count for _, count in products), sum(n.microseconds for n, _ in products))
        best = _ratio(sum(ideal for _, ideal in known), sum(n.microseconds for n, _ in known))
        return Row(
            name,
            sum(node.calls for node in nodes),
            micros,
            micros / self.microseconds if self.microseconds else 0.0,
            None if rate is None else rate / 1e3,  # operations a microsecond
            None if best is None else best / 1e3,
        )

    def operators(self) -> list[Row]:
        """Return a row for each type of operator, the one that takes longest first."""
        rows = [self.row(name, nodes) for name, nodes in _grouped(self.nodes, lambda n: n.operator).items()]
        return sorted(rows, key=lambda row: -row.microseconds)

    def layers(self) -> list[tuple[Row, dict[str, float]]]:
        """Return a row for each layer in the model's order, with the microseconds of its attention and ffn."""
        groups = _grouped(self.nodes, lambda n: n.layer)
        found = []
        for name in sorted(groups, key=_order):
            parts = {part: 0.0 for part in ("attention", "ffn") if any(n.part == part for n in groups[name])}
            for node in groups[name]:
                if node.part:
                    parts[node.part] += node.microseconds
            found.append((self.row(name, groups[name]), parts))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the profile as plain JSON types, in the form of docs/profile.schema.json."""
        low, high = self.call.median_interval()
        workload = {part: getattr(self.workload, part) for part in ("batch", "tokens", "threads")}
        return {
            "model": self.model,
            "runtime": self.runtime,
            "version": self.version,
            "workload": workload,
            "inputs": {name: str(value) for name, value in self.inputs.items()},
            "call_ms": {
                "median": self.call.median,
                "low": low,
                "high": high,
                "operators": self.microseconds / 1e3,
                "empty": self.empty,
                "recorded": self.traced.median,
            },
            "disturbed": self.disturbed,
            "recording_us": self.recording,
            "peaks": dict(self.peaks),
            "operators": [_json("operator", row) for row in self.operators()],
            "layers": [{**_json("layer", row), "parts": parts} for row, parts in self.layers()],
            "nodes": [
                {
                    **_json("node", self.row(node.name, [node])),
                    "operator": node.operator,
                    "layer": node.layer,
                    "inputs": [str(value) for value in node.inputs],
                    "outputs": [str(value) for value in node.outputs],
                }
                for node in self.nodes
            ],
        }


def collect(
    file: Path,
    runner: Runner,
    inputs: Inputs,
    workload: Workload,
    peaks: Mapping[str, float],
    seconds: float = 3.0,
    waiting: Callable[[str], None] | None = None,
) -> OperatorProfile:
    """Run a model with and without recording, in turn, and say what its nodes take.

    ONNX Runtime's recording costs microseconds for every node, part of which its trace counts as the node's own: more
    than a small node takes itself. How much is measured in the same rounds, on a chain of nodes that do next to
    nothing, recorded and not, and subtracted. In a model it costs more, because the matrices push what it needs out of
    the caches: the nodes cannot take longer than the call does, and what they do is taken off all of them alike.

    Args:
        file: the model.
        runner: the model, loaded by ONNX Runtime with the workload's threads.
        inputs: of the call.
        workload: its threads are what the model runs on.
        peaks: GFLOP/s of each kernel class.
        seconds: wall time of the calls.
        waiting: see `autolite.measure.time_interleaved`.

    Raises:
        ModelError: if the model cannot be loaded or does not run on the inputs.
    """
    runtime = OnnxRuntime()
    with tempfile.TemporaryDirectory(prefix="autolite-profile-") as name:
        folder = Path(name)
        traced = runtime.load(file, workload.threads, trace=folder)
        chains = {length: _chain(folder / f"chain-{length}.onnx", length) for length in _CHAINS}
        (folder / "chain").mkdir()  # the name of a trace is the time it began: two could be the same
        chain = runtime.load(chains[_CHAINS[1]], workload.threads, trace=folder / "chain")
        runners: dict[str, Runner] = {"model": runner, "traced": traced, "chain": chain}
        runners |= {f"chain {length}": runtime.load(path, workload.threads) for length, path in chains.items()}
        feed = {**inputs, _CHAIN_INPUT: np.zeros((1, 16), np.float32)}
        timings = time_interleaved(runners, feed, seconds, waiting=waiting)
        calls = _timed(read_trace(traced.end_trace()), timings["traced"])
        idle = _timed(read_trace(chain.end_trace()), timings["chain"])
    few, many = _CHAINS
    empty = timings[f"chain {few}"].median
    plain = 1e3 * (timings[f"chain {many}"].median - empty) / (many - few)
    in_trace = statistics.fmean(_median([call[i].microseconds for call in idle]) for i in range(len(idle[0])))
    recording = max(0.0, in_trace - plain)
    recording, nodes = within(1e3 * (timings["model"].median - empty), recording, nodes_of(calls, recording, file))
    return OperatorProfile(
        model=str(file),
        runtime=runtime.name,
        version=runtime.version,
        workload=workload,
        inputs={name: Tensor(str(array.dtype), array.shape) for name, array in inputs.items()},
        call=timings["model"],
        traced=timings["traced"],
        empty=empty,
        recording=recording,
        peaks=peaks,
        nodes=nodes,
    )


def _timed(calls: list[list[Event]], timing: Timing) -> list[list[Event]]:
    """The calls that `timing` has: without the warm-up, and the first call of each round."""
    first = len(calls) - sum(1 + len(burst) for burst in timing.rounds)
    found: list[list[Event]] = []
    for burst in timing.rounds:
        found += calls[max(0, first + 1) : max(0, first + 1 + len(burst))]
        first += 1 + len(burst)
    return found or calls


def within(microseconds: float, recording: float, nodes: Iterable[Node]) -> tuple[float, tuple[Node, ...]]:
    """Take off each run of each node what they have too much together.

    Args:
        microseconds: that they can take at most.
        recording: microseconds that were taken off each run before.
        nodes: of a call.

    Returns:
        `recording` with what was taken off now, and the nodes.
    """
    found = tuple(nodes)
    excess = sum(node.microseconds for node in found) - microseconds
    extra = max(0.0, excess / max(1, sum(node.calls for node in found)))
    less = (replace(node, microseconds=max(0.0, node.microseconds - extra * node.calls)) for node in found)
    return recording + extra, tuple(less)


def nodes_of(calls: Sequence[Sequence[Event]], recording: float, file: Path) -> Iterator[Node]:
    """Give each node its median over the calls, in the order that nodes began in the last one.

    Args:
        calls: of `read_trace`.
        recording: microseconds to take off each event.
        file: the model, in which weights are looked up that the trace does not show.
    """
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for call in calls:
        sums: dict[tuple[str, str], int] = defaultdict(int)
        for event in call:
            sums[event.name, event.kernel.operator] += event.microseconds
        for key, micros in sums.items():
            times[key].append(micros)
    stored = cache(lambda: _stored(file))  # read only where it is needed
    runs = _grouped(sorted(calls[-1], key=lambda e: e.start), lambda e: (e.name, e.kernel.operator))
    for (name, operator), events in runs.items():
        bits = stored()[1].get(name) if operator == "MatMulNBits" else None
        total: int | None = 0
        for event in events:
            weight = stored()[0].get(_original(name)) if needs_weight(operator, event.kernel.inputs) else None
            count = flops(operator, event.kernel.inputs, event.kernel.outputs, weight)
            total = None if count is None or total is None else total + count
        first = events[0].kernel
        place = _LAYER.search(name)
        yield Node(
            name=name,
            operator=operator,
            layer=place[1] if place else OTHER,
            part=(place[2] or "") if place else "",
            calls=len(events),
            microseconds=max(0.0, _median(times[name, operator], len(events)) - recording * len(events)),
            flops=total,
            kernel=None if total is None else kernel_class(operator, first.inputs, bits),
            inputs=first.inputs,
            outputs=first.outputs,
        )


def _stored(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes of the weights of the model's nodes, and widths of their codes; the weights themselves are not read."""
    import onnx

    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception:  # .ort is no protobuf; then these products have no rate
        return {}, {}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    weights: dict[str, tuple[int, ...]] = {}
    bits: dict[str, int] = {}
    for node in graph.node:
        known = [shapes[name] for name in node.input[1:] if len(shapes.get(name, ())) >= 2]
        if known:
            weights[node.name] = known[0]
        if node.op_type == "MatMulNBits":
            bits[node.name] = next((a.i for a in node.attribute if a.name == "bits"), 4)
    return weights, bits


def _original(name: str) -> str:
    """The name that a node had before the runtime moved it to another memory layout."""
    return re.sub(r"_token_\d+$", "", name)


def _median(values: Sequence[int], runs: int = 1) -> float:
    """Median of sums of `runs` times each, all of which were rounded down to whole microseconds."""
    return statistics.median_grouped(values) + 0.5 * runs


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _ratio(count: float, microseconds: float) -> float | None:
    return count / microseconds if count and microseconds else None


def _order(layer: str) -> tuple[int, int]:
    """Embedding, layers by number, head, others."""
    kind, _, index = layer.partition(".")
    return ("embedding", "layer", "head", OTHER).index(kind), int(index or 0)


def _json(kind: str, row: Row) -> dict[str, Any]:
    fields = asdict(row)
    return {kind: fields.pop("name"), **fields}


def _chain(file: Path, length: int) -> Path:
    """Write a model of so many operators that do next to nothing, behind each other."""
    from onnx import TensorProto, helper

    nodes, x = [], _CHAIN_INPUT
    for i in range(0, length, 2):
        halves, y = [f"first{i}", f"second{i}"], f"y{i}" if i < length - 2 else "y"
        nodes.append(helper.make_node("Split", [x], halves, f"Split_{i}", axis=1, num_outputs=2))
        nodes.append(helper.make_node("Concat", halves[::-1], [y], f"Concat_{i + 1}", axis=1))
        x = y
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in (_CHAIN_INPUT, "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file.write_bytes(model.SerializeToString())
    return file
