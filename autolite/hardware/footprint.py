"""What a shape takes up: bytes of its file, of its matrices as the kernels read them, and of its activations."""

from __future__ import annotations

from collections.abc import Mapping

from autolite import formats
from autolite.architecture import ModelShape, factor_format, matmuls
from autolite.errors import TargetError
from autolite.families import FAMILIES, Head
from autolite.hardware import without_map
from autolite.measure import Workload
from autolite.packing import PLANES

BYTES = 4  # activations, norms and biases are fp32
# Names, shapes and attributes of the operators in the file. Of those that make a matrix in floating point of its codes,
# and then 8-bit codes of it; and that unpack codes in two planes, or zero points.
_GRAPH_BYTES = {"layer": 2500, "around": 2300, "decoding": 700, "coding": 800, "plane": 900, "zeros": 550}
# A "thin" product is one of a low-rank difference, "codes" what decodes its 8-bit factor; "factor" is the second one of
# an embedding table.
_GRAPH_BYTES |= {"thin": 110, "codes": 140, "factor": 250}


def head_of_shape(shape: ModelShape) -> Head | None:
    """Return the head that a model of this shape has, None if it is a bare encoder."""
    family = FAMILIES[shape.family]
    if not shape.outputs:
        return None
    generates = family.causal and shape.outputs == shape.vocab
    return next((head for head in family.heads if (head.pooling == "none") == generates), None)


def square_layers(head: Head | None) -> int:
    """Return the number of [hidden, hidden] matrices between the last layer and the head's own (BERT's pooler)."""
    return len(head.dense) - 1 if head else 0


def matrices(shape: ModelShape, kernels: Mapping[str, str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of each product's matrix by the name of its weights: in the file, and as the kernel reads it.

    Args:
        shape: of the model.
        kernels: the number formats the target runs, and the kernel class that computes with each.

    Raises:
        TargetError: if the target cannot run one of the model's number formats.
    """
    stored, read = {}, {}
    for product in matmuls(shape):
        if product.format not in kernels:
            known = ", ".join(kernels)
            raise TargetError(f"the target cannot run the number format '{product.format}'; it runs {known}")
        stored[product.weights] = formats.nbytes(product.format, product.n, product.k)
        # A format that another one's kernel computes with is decoded to it when the model is loaded (kmeans4 to int8);
        # the kernel of int4 reads codes in groups as they are stored.
        kernel = kernels[product.format]
        kernel = kernel if kernel in formats.FORMATS and kernel != "int4" else product.format
        read[product.weights] = formats.nbytes(kernel, product.n, product.k)
    return stored, read


def file_size(shape: ModelShape, stored: Mapping[str, int]) -> int:
    """Return the bytes of the artifact: matrices and tables in their formats, everything else in fp32, the graph.

    `stored` are the bytes of the products' matrices, as `matrices` gives them first.
    """
    if shape.unmapped is not None:
        return without_map.file_size(shape, stored)
    family = FAMILIES[shape.family]
    hidden = shape.stacks[0].hidden
    norm = 1 if family.rms_norm else 2
    total = sum(stored.values())
    floats = 0
    if family.patch:
        floats += shape.positions * hidden
    elif family.position:
        total += formats.nbytes(shape.embedding_format, shape.positions, shape.embedding)
    if family.token_type:
        floats += (1 if family.positions_after_padding else 2) * shape.embedding
    if family.embedding_norm:
        floats += norm * shape.embedding
    if family.embedding_projection or family.patch:
        total += formats.nbytes(shape.embedding_format, hidden, shape.embedding)
        floats += hidden * (2 if family.class_token else 1)
    if shape.vocab and "embedding" not in stored:
        total += formats.nbytes(shape.embedding_format, shape.vocab, shape.embedding_rank or shape.embedding)
    if shape.embedding_rank:
        form = factor_format(shape.embedding_format)
        total += formats.nbytes(form, shape.embedding, shape.embedding_rank) + _GRAPH_BYTES["factor"]
    seen: set[tuple[str, str, int]] = set()
    for stack in shape.stacks:
        norms = 2 * norm * stack.hidden + (2 * stack.layers[0].head_dim if family.query_norm else 0)
        floats += norms * (1 if family.repeated else len(stack.layers))
        for layer in stack.layers:
            # With low-rank differences each layer has its own biases.
            if (name := (stack.name, "attention", layer.attention)) not in seen or layer.attention_rank:
                seen.add(name)
                qkv = (layer.heads + 2 * layer.kv_heads) * layer.head_dim
                floats += qkv if not family.rms_norm or family.name == "qwen2" else 0
                floats += 0 if family.rms_norm else stack.hidden
            if (name := (stack.name, "ffn", layer.feed_forward)) not in seen or layer.ffn_rank:
                seen.add(name)
                floats += 0 if family.rms_norm else layer.ffn + stack.hidden
    hidden = shape.stacks[-1].hidden
    floats += norm * hidden if family.final_norm else 0
    square = square_layers(head_of_shape(shape))
    total += square * formats.nbytes(shape.head_format, hidden, hidden)
    floats += square * hidden + (shape.outputs if not family.causal else 0)
    layers = sum(len(stack.layers) for stack in shape.stacks)
    products = {product.weights: product.format for product in matmuls(shape)}
    looked_up = (bool(shape.vocab) and "embedding" not in products) + bool(family.position and not family.patch)
    dense = [shape.embedding_format] * bool(family.embedding_projection or family.patch)
    graph = layers * _GRAPH_BYTES["layer"] + _GRAPH_BYTES["around"]
    graph += sum(_decoding(form) for form in [*products.values(), *dense])
    graph += looked_up * _decoding(shape.embedding_format, coded=False)
    return total + BYTES * floats + graph + _graph_of_deltas(shape)


def _graph_of_deltas(shape: ModelShape) -> int:
    """Two thin products for each matrix of a block with low-rank differences. Matrices that are else merged into one
    product stand apart there, and are decoded one by one."""
    total = 0
    decoded: set[tuple[str, int]] = set()
    for stack in shape.stacks:
        inputs, gates = 1 if FAMILIES[shape.family].fused_qkv else 3, 2 if stack.gated else 1
        for layer in stack.layers:
            attention = (f"{stack.name}.attention", layer.attention, layer.attention_rank, layer.attention_format)
            ffn = (f"{stack.name}.ffn", layer.feed_forward, layer.ffn_rank, layer.ffn_format)
            for (name, number, rank, form), merged in ((attention, inputs), (ffn, gates)):
                if not rank:
                    continue
                codes = 0 if factor_format(form) in ("fp32", "bf16") else _GRAPH_BYTES["codes"]
                total += 2 * (merged + 1) * (_GRAPH_BYTES["thin"] + codes)
                if (name, number) not in decoded:
                    decoded.add((name, number))
                    total += (merged - 1) * _decoding(form)
    return total


def _decoding(form: str, coded: bool = True) -> int:
    """Return the bytes of the operators that decode a matrix in this format; `coded` if to 8 bits where it can be
    multiplied so, which tables are not."""
    layout, activations = formats.get(form).layout, formats.get(form).activations
    if isinstance(layout, formats.Float) or (layout.linear and layout.bits == 8):
        return 0
    planes = len(PLANES[layout.bits]) - 1
    total = _GRAPH_BYTES["decoding"] + planes * _GRAPH_BYTES["plane"]
    total += _GRAPH_BYTES["coding"] if coded and activations == "any" else 0
    return total + (0 if getattr(layout, "symmetric", True) else _GRAPH_BYTES["zeros"] + planes * _GRAPH_BYTES["plane"])


def activations(shape: ModelShape, workload: Workload) -> float:
    """Return the most bytes of activations alive at once, and the keys and values of a language model's context."""
    if shape.unmapped is not None:
        return without_map.activations(shape, workload)
    rows = workload.batch * workload.tokens
    context = workload.tokens + workload.generated
    alive = cached = 0
    for stack in shape.stacks:
        for layer in stack.layers:
            width, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
            scores = workload.batch * layer.heads * workload.tokens**2
            inner = max(rows * (width + 2 * kv) + 2 * scores, 2 * rows * layer.ffn)
            alive = max(alive, 2 * rows * stack.hidden + inner)
            cached += 2 * kv * workload.batch * context if stack.causal else 0
    logits = rows * shape.outputs if shape.stacks[-1].causal else 0
    return BYTES * (max(alive, logits) + cached)
