"""What the parity tools share: one thread, quiet libraries, file layout, running ferry."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FERRY = ROOT / "build/release/apps/ferry/ferry"


def quiet():
    """Turns off the progress bars and warnings of diffusers and transformers."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()


def find_class(name):
    """The diffusers or transformers class of that name."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        if hasattr(library, name):
            return getattr(library, name)
    raise SystemExit(f"no class {name} in diffusers {diffusers.__version__} or transformers {transformers.__version__}")


def is_diffusers(cls):
    return cls.__module__.startswith("diffusers")


def versions():
    import diffusers
    import transformers

    return {
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
    }


def flatten(outputs):
    """Named tensors of an output object; the members of a tuple `hidden_states` are `hidden_states.N`."""
    named = {}
    for name, value in outputs.items():
        if torch.is_tensor(value):
            named[name] = value
        elif isinstance(value, (tuple, list)):
            named.update({f"{name}.{i}": v for i, v in enumerate(value) if torch.is_tensor(v)})
    return named


def save_tensors(tensors, path):
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, str(path), metadata={"format": "pt"})


def load_tensors(path):
    return load_file(str(path))


def save_json(value, path):
    Path(path).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def load_json(path):
    return json.loads(Path(path).read_text())


class FerryError(Exception):
    """ferry ended with an error; the text is what it printed last."""


def run_ferry(ferry, *arguments, timeout=600):
    """Runs one ferry subcommand with one compute thread; raises FerryError with its message."""
    command = [str(Path(ferry).resolve()), *map(str, arguments)]
    if not Path(ferry).exists():
        raise FerryError(f"no ferry binary at {ferry}")
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        message = lines[-1] if lines else f"exit status {done.returncode} without a message"
        if done.returncode < 0:
            message = f"killed by signal {-done.returncode}; {message}"
        raise FerryError(f"ferry {arguments[0]}: {message}")
    return done.stdout


def subcommands(ferry):
    """The subcommands that this ferry binary has, from its --help."""
    if not Path(ferry).exists():
        return set()
    text = subprocess.run([str(Path(ferry).resolve()), "--help"], capture_output=True, text=True).stdout
    known = ("forward", "schedule", "tokenize", "generate", "inspect", "random", "doctor", "quantize")
    return {name for name in known if any(line.strip().startswith(name) for line in text.splitlines())}


def flags(args):
    """`--arg name=value` for each entry, with JSON spelling of booleans and numbers."""
    spelled = []
    for name, value in args.items():
        text = value if isinstance(value, str) else json.dumps(value)
        spelled += ["--arg", f"{name}={text}"]
    return spelled


def die(message):
    print(message, file=sys.stderr)
    raise SystemExit(2)
