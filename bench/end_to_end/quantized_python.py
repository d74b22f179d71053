"""A TorchAO-quantized FluxTransformer2DModel of 2 GB streamed from disk by the Python package: equal to
resident, bit for bit, with how much memory and time. diffusers' own group offloading is tried on it too.

  PYTHONPATH=build/release/python quantized_python.py FLUX_2GB_FOLDER [--schemes int8wo int8da8w fp8wo]
"""
import argparse
import json
import tempfile
import time

import torch
import ferry
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from torchao import quantization as ao

SCHEMES = {
    "int8wo": lambda: ao.Int8WeightOnlyConfig(version=2),
    "int8da8w": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
    "fp8wo": lambda: ao.Float8WeightOnlyConfig(),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
parser.add_argument("--weights-memory", default="256MiB")
parser.add_argument("--repeat", type=int, default=4)
args = parser.parse_args()
torch.set_grad_enabled(False)
torch.manual_seed(0)
side = 16
ids = torch.zeros(side, side, 3)
ids[..., 1] += torch.arange(side)[:, None]
ids[..., 2] += torch.arange(side)[None, :]
inputs = dict(hidden_states=torch.randn(1, 256, 64, dtype=torch.bfloat16),
              encoder_hidden_states=torch.randn(1, 64, 4096, dtype=torch.bfloat16),
              pooled_projections=torch.randn(1, 768, dtype=torch.bfloat16), timestep=torch.full((1,), 0.5),
              img_ids=ids.reshape(-1, 3), txt_ids=torch.zeros(64, 3), return_dict=False)


def timed(model):
    start = time.perf_counter()
    out = model(**inputs)[0]
    return out, time.perf_counter() - start


for scheme in args.schemes:
    model = FluxTransformer2DModel.from_pretrained(args.folder, torch_dtype=torch.bfloat16)
    ao.quantize_(model, SCHEMES[scheme]())
    with tempfile.TemporaryDirectory() as folder:
        expected, _ = timed(model)
        expected, resident = timed(model)
        offloading = ferry.apply_group_offloading(model, "cpu", offload_type="leaf_level", use_stream=True,
                                                  weights_memory=args.weights_memory, offload_to_disk_path=folder)
        ferry._C.reset_peak_rss()
        runs = [timed(model) for _ in range(args.repeat)]
        report = offloading.report()
        figures = {"scheme": scheme, "equal": all(torch.equal(out, expected) for out, _ in runs),
                   "resident_seconds": resident, "seconds": [seconds for _, seconds in runs],
                   "weight_bytes": offloading.client.total_bytes, "held_bytes": report["peak_bytes"],
                   "read_bytes": report["bytes_read"]}
        offloading.remove()
        figures["equal_after_remove"] = torch.equal(timed(model)[0], expected)
        try:
            apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="leaf_level",
                                   offload_to_disk_path=folder + "/theirs")
            figures["diffusers"] = "ran"
        except ValueError as error:
            figures["diffusers"] = f"ValueError: {error}"
    print(json.dumps(figures), flush=True)
    del model
