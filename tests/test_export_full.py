"""The `full` decoder with random weights: stock ONNX Runtime needs less memory than the packed weights take."""

import json
import subprocess
import sys

import pytest

from microvlm.exporters import contract
from microvlm.exporters.bundle_manifest import bits_per_weight
from microvlm.exporters.external_data import WeightStore, save_graph
from microvlm.exporters.tracing import trace
from microvlm.formats.weight_format import WeightFormat
from microvlm.model.lowering import lower, set_traced
from microvlm.model.microvlm import MicroVLM
from microvlm.presets import preset

pytestmark = pytest.mark.slow

_MEASURE = """
import json, sys, time
import numpy as np, onnxruntime

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

path, layers, heads, width, hidden = sys.argv[1], *map(int, sys.argv[2:])
before = anonymous_bytes()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
loaded = anonymous_bytes()
rng = np.random.default_rng(0)
past = [np.zeros((1, heads, 1, width), np.float32)] * (2 * layers)
names = [value.name for value in session.get_inputs()]
for length, step in ((8, 0), (1, 1), (1, 2)):
    total = past[0].shape[2] + length
    values = [
        rng.normal(size=(1, length, hidden)).astype(np.float32),
        np.ones((1, total), np.int64),
        np.arange(total - length, total)[None],
        np.array(1),
        *past,
    ]
    began = time.perf_counter()
    logits, *past = session.run(None, dict(zip(names, values)))
    seconds = time.perf_counter() - began
print(json.dumps({
    "loaded": loaded - before, "running": anonymous_bytes() - before, "decode_seconds": seconds,
    "finite": bool(np.isfinite(logits).all()),
}))
"""


@pytest.fixture(scope="module")
def latent():
    return MicroVLM(preset("full"))


@pytest.mark.parametrize(("packing", "nominal"), [("2bit", 2.0), ("base3", 1.6)])
def test_full_runs_in_less_anonymous_memory_than_its_packed_weights(latent, packing, nominal, tmp_path):
    lowered = lower(latent, WeightFormat(packing=packing))
    bits = bits_per_weight(lowered)["ternary"]
    assert abs(bits / nominal - 1) < 0.02
    set_traced(lowered, True)
    text = lowered.config.text
    spec = contract.graph(lowered.config, "decoder_model_merged")
    save_graph(trace(lowered, spec), spec.name, WeightStore(tmp_path))
    packed_bytes = sum(
        module.packed.nbytes for module in lowered.decoder.modules() if hasattr(module, "packed")
    )
    numbers = (text.num_hidden_layers, text.num_key_value_heads, text.head_dim, text.hidden_size)
    arguments = [str(tmp_path / "decoder_model_merged.onnx"), *map(str, numbers)]
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    figures = json.loads(result.stdout)
    print(f"\n{packing}: {bits:.4f} bits per weight, {packed_bytes / 1e6:.1f} MB packed, {figures}")
    assert figures["finite"]
    assert max(figures["loaded"], figures["running"]) < packed_bytes
