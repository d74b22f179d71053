"""One forward mode of Python diffusers on one component folder, timed: a peer of `ferry forward`,
or diffusers' model on ferry's engine (the Python package).

Modes: resident (disable_mmap), hook (accelerate's AlignDevicesHook wired by hand onto the original
shards: the best route that Python has), disk_offload (accelerate's own, to files that it writes), ferry (the
Python package under --weights-memory, from the mapped shards; needs PYTHONPATH), group_disk (diffusers' group offloading, block level, to disk),
block and leaf (its group offloading from host memory; --stream, --record-stream, --low-cpu-mem are its
options of these names), model (the whole model goes to the device before a forward and back after it, as
enable_model_cpu_offload does). Prints one JSON object: load seconds, seconds of each forward, peak
resident memory and, on an accelerator, peak device memory in bytes.
"""
import argparse
import glob
import json
import os
import resource
import shutil
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("mode", choices=["resident", "hook", "disk_offload", "ferry", "group_disk", "block", "leaf", "model"])
parser.add_argument("folder")
parser.add_argument("inputs")
parser.add_argument("--output")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--repeat", type=int, default=3)
parser.add_argument("--weights-memory", default="512MiB")
parser.add_argument("--device", default="cpu")
parser.add_argument("--stream", action="store_true")
parser.add_argument("--record-stream", action="store_true")
parser.add_argument("--low-cpu-mem", action="store_true")
parser.add_argument("--cold", action="store_true", help="drop the files' pages before each forward")
parser.add_argument("--mmap", action="store_true", help="load by mapping, as from_pretrained does if not told otherwise")
args = parser.parse_args()

os.environ["OMP_NUM_THREADS"] = str(args.threads)
import torch  # noqa: E402
from diffusers import FluxTransformer2DModel  # noqa: E402
from diffusers.hooks import apply_group_offloading  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(args.threads)
torch.set_grad_enabled(False)


def drop(paths):
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


shards = sorted(glob.glob(os.path.join(args.folder, "*.safetensors")))
inputs = load_file(args.inputs)
exact = ("img_ids", "txt_ids", "timestep", "guidance")
device = torch.device(args.device)
inputs = {k: (v if k in exact else v.to(torch.bfloat16)).to(device) for k, v in inputs.items()}
files = shards
scratch = None
start = time.perf_counter()
if args.mode == "hook":
    # Every leaf reads its tensors from the shards before its forward and forgets them after.
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from accelerate.utils import OffloadedWeightsLoader
    index = {}
    for shard in shards:
        with safe_open(shard, "pt") as handle:
            for key in handle.keys():
                index[key] = {"safetensors_file": shard, "weight_name": key, "dtype": "bfloat16"}
    from accelerate import init_empty_weights
    with init_empty_weights():
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(args.folder)).to(torch.bfloat16)
    loader = OffloadedWeightsLoader(state_dict={}, index=index, save_folder=None)

    class Prefixed(dict):
        def __init__(self, prefix):
            self.prefix = prefix

        def __getitem__(self, key):
            return loader[self.prefix + key]

        def keys(self):
            return [k[len(self.prefix):] for k in index if k.startswith(self.prefix)]

    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=Prefixed(name + "."),
                                    place_submodules=False)
            add_hook_to_module(module, hook)
else:
    model = FluxTransformer2DModel.from_pretrained(args.folder, torch_dtype=torch.bfloat16, disable_mmap=not args.mmap)
    if args.mode == "ferry":
        import ferry
        offloading = ferry.apply_group_offloading(model, device, offload_type="leaf_level", use_stream=True,
                                                  weights_memory=args.weights_memory)
        assert offloading.client.bound_bytes == offloading.client.total_bytes, "something would be written"
    elif args.mode == "disk_offload":
        from accelerate import disk_offload
        scratch = tempfile.mkdtemp(prefix="disk_offload.", dir=os.environ.get("TMPDIR", "/tmp"))
        disk_offload(model, scratch, execution_device=device)
        files = glob.glob(os.path.join(scratch, "*"))
    elif args.mode == "group_disk":
        scratch = tempfile.mkdtemp(prefix="group_disk.", dir=os.environ.get("TMPDIR", "/tmp"))
        apply_group_offloading(model, onload_device=device, offload_device=torch.device("cpu"),
                               offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=scratch,
                               use_stream=args.stream, record_stream=args.record_stream)
        files = glob.glob(os.path.join(scratch, "*"))
    elif args.mode in ("block", "leaf"):
        apply_group_offloading(model, onload_device=device, offload_device=torch.device("cpu"),
                               offload_type=args.mode + "_level", num_blocks_per_group=1 if args.mode == "block" else None,
                               use_stream=args.stream, record_stream=args.record_stream,
                               low_cpu_mem_usage=args.low_cpu_mem)
    elif args.mode == "resident":
        model.to(device)
model.eval()
load_seconds = time.perf_counter() - start

seconds = []
try:
    for _ in range(args.repeat):
        if args.cold:
            drop(files)
        start = time.perf_counter()
        if args.mode == "model":
            model.to(device)
        out = model(**inputs, return_dict=False)[0]
        if args.mode == "model":
            model.to("cpu")
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    if args.output:
        save_file({"sample": out.cpu().contiguous()}, args.output)
finally:
    if scratch:
        shutil.rmtree(scratch)
figures = {"load_seconds": load_seconds, "forward_seconds": seconds,
           "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
if device.type == "cuda":
    figures["peak_device_bytes"] = torch.cuda.max_memory_allocated()
print(json.dumps(figures))
