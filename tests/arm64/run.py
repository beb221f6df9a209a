"""Run models in ONNX Runtime alone, on whichever processor this is: needs numpy and onnxruntime only.

python run.py FOLDER...: each has a model (model.onnx or model.ort) and inputs.npz, and gets outputs.npz and, of an ONNX
model, loaded.onnx, the graph that the runtime made of it.
"""

import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime

for folder in map(Path, sys.argv[1:]):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    file = next(f for f in (folder / "model.onnx", folder / "model.ort") if f.is_file())
    if file.suffix == ".onnx":
        options.optimized_model_filepath = str(folder / "loaded.onnx")
    session = onnxruntime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
    )
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, dict(np.load(folder / "inputs.npz"))), strict=True))
    np.savez(folder / "outputs.npz", machine=np.array(platform.machine()), **found)
