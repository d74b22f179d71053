"""Which of upstream's tests run.py runs, and what it changes in its copy of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# In the name of every test of group offloading, and in no marker ("group_offload" is one, and sits
# on whole classes).
KEYWORD = "group_offloading"

_TRANSFORMERS = """flux sd3 wan ltx hunyuan_video cogvideox sana aura_flow lumina2 flux2 qwenimage
z_image mochi chroma cogview4 allegro""".split()

# Every kind of block structure, and the classes that people stream: paths below the checkout.
DEFAULT: dict[str, list[str]] = {
    "hooks": ["tests/hooks/test_group_offloading.py"],
    "models": [
        *(f"tests/models/transformers/test_models_transformer_{name}.py" for name in _TRANSFORMERS),
        "tests/models/transformers/test_models_pixart_transformer2d.py",
        "tests/models/transformers/test_models_dit_transformer2d.py",
        "tests/models/unets/test_models_unet_2d_condition.py",
        "tests/models/autoencoders/test_models_autoencoder_kl.py",
        "tests/models/autoencoders/test_models_autoencoder_wan.py",
        "tests/models/autoencoders/test_models_autoencoder_ltx_video.py",
        "tests/models/autoencoders/test_models_autoencoder_dc.py",
    ],
    "lora": [
        f"tests/lora/test_lora_layers_{name}.py"
        for name in ("sd", "sdxl", "flux", "sd3", "ltx_video", "cogvideox")
    ],
    "pipelines": [
        "tests/pipelines/flux/test_pipeline_flux.py",
        "tests/pipelines/stable_diffusion/test_stable_diffusion.py",
    ],
}
ALL: dict[str, list[str]] = {
    "hooks": ["tests/hooks/test_group_offloading.py"],
    "models": ["tests/models/**/test_*.py"],
    "lora": ["tests/lora/test_*.py"],
    "pipelines": ["tests/pipelines/**/test_*.py", "tests/modular_pipelines/**/test_*.py"],
}


# Not run, and said so: more than two minutes a test.
LARGE = {
    "tests/models/autoencoders/test_models_autoencoder_vidtok.py": "needs 9 GB and minutes a test"
}


@dataclass(frozen=True)
class Rewrite:
    """A change to the copied tests. `replacement` has DEVICE where the device's name goes."""

    what: str
    pattern: re.Pattern[str]
    replacement: str
    only: str = ""  # a device; empty: for each

    def apply(self, text: str, device: str) -> tuple[str, int]:
        return self.pattern.subn(self.replacement.replace("DEVICE", device), text)


# In this order: the second finds what the first left.
REWRITES = [
    Rewrite(
        "the device counts where cuda and xpu do",
        re.compile(r'(torch_device\)?(?:\.type)? (?:not )?in \["cuda", "xpu")\]'),
        r'\1, "DEVICE"]',
    ),
    Rewrite(
        "a silent return on other devices is a skip",
        re.compile(
            r"^( +)(if torch\.device\(torch_device\)\.type not in \[[^\]]*\]:)\n +return$", re.M
        ),
        r'\1\2\n\1    pytest.skip("not for this device")',
    ),
    Rewrite(
        "a silent return of a pipeline that opts out is a skip",
        re.compile(r"^( +)if not self\.test_group_offloading:\n +return$", re.M),
        r"\1if not self.test_group_offloading:\n"
        r'\1    pytest.skip("the pipeline\'s test opts out (test_group_offloading = False)")',
    ),
    Rewrite(
        "a silent return of an overridden LoRA test is a skip",
        re.compile(r"^( +)(# Skip this test if it is overwritten(?:.*\n +#)*.*)\n +return$", re.M),
        r'\1\2\n\1pytest.skip("a subclass has its own")',
    ),
    Rewrite(
        "tests that ask for an accelerator run on the CPU",
        re.compile(
            r'torch_device == "cpu", reason="(test requires (?:accelerator\+PyTorch|a hardware accelerator))"'
        ),
        r'False, reason="\1"',
        only="cpu",
    ),
]


def rewrite(tests: Path, device: str) -> dict[str, int]:
    """Changes the copy in `tests`; gives how often each rewrite was made."""
    counts = {}
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(tests.rglob("*.py"))}
    for each in REWRITES:
        counts[each.what] = 0
        if each.only not in ("", device):
            continue
        for path, text in texts.items():
            texts[path], made = each.apply(text, device)
            counts[each.what] += made
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return counts


def files(checkout: Path, patterns: list[str]) -> list[str]:
    """Files below `checkout`, in the order of the patterns. Those that the checkout lacks are left
    out."""
    found: list[str] = []
    for pattern in patterns:
        for path in sorted(checkout.glob(pattern)):
            name = path.relative_to(checkout).as_posix()
            if name not in found:
                found.append(name)
    return found
