"""Importing, the build's versions, and the command line through Python."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

import ferry
from ferry import _build_info, _C
from ferry.__main__ import main

PACKAGE = Path(ferry.__file__).parent


def run_python(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if path:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


def test_versions_agree(root: Path) -> None:
    written = re.search(r'^version = "(.+)"', (root / "pyproject.toml").read_text(), re.M)
    assert written and ferry.__version__ == written.group(1)
    assert _C.torch_version == _build_info.torch_version
    assert torch.__version__.startswith(_C.torch_version.rsplit(".", 1)[0] + ".")


def test_imports_no_package_but_torch() -> None:
    blocked = ["torchao", "bitsandbytes", "peft", "diffusers", "transformers", "accelerate", "gguf",
               "optimum", "PIL"]  # fmt: skip
    result = run_python(
        "import sys\n"
        f"blocked = {blocked}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError(name + ' is not installed')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import ferry\n"
        "print(ferry.__version__)\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ferry.__version__


def test_another_torch_is_refused_by_name() -> None:
    result = run_python("import torch; torch.__version__ = '2.10.1+cpu'; import ferry")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ferry"), result.stderr
    for part in (f"built for torch {_C.torch_version}", "torch 2.10.1+cpu is installed",
                 "pip install 'torch==2.11.*'"):  # fmt: skip
        assert part in last


def test_a_patch_release_of_torch_is_taken() -> None:
    version = ".".join(torch.__version__.split(".")[:2]) + ".99"
    result = run_python(f"import torch; torch.__version__ = {version!r}; import ferry")
    assert result.returncode == 0, result.stderr


def test_an_extension_that_does_not_load_is_explained(tmp_path: Path) -> None:
    copy = tmp_path / "ferry"
    copy.mkdir()
    for file in PACKAGE.glob("*.py"):
        shutil.copy(file, copy / file.name)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (copy / f"_C{suffix}").write_bytes(b"\x7fELF")
    result = run_python("import ferry", tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ferry"), result.stderr
    assert "file too short" in last and f"torch {torch.__version__}" in last
    assert "build ferry again" in last


def test_sources_without_a_build_say_so(root: Path) -> None:
    result = run_python("import ferry", root / "python")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ferry: the extension is not built"), result.stderr
    assert "pip install ." in last


def test_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    stubs = (PACKAGE / "_C.pyi").read_text()
    for name in ("Pipeline", "Picture", "Model", "load_model", "Error", "run_command_line"):
        assert hasattr(_C, name)
        assert re.search(rf"^(class|def) {name}\b", stubs, re.M), name


@pytest.mark.parametrize(
    "name",
    ["Pipeline", "Picture", "Model", "Client", "Engine", "File", "Lease", "StoredTensor", "Trace"],
)
def test_stubs_have_what_the_class_has(name: str) -> None:
    stubs = (PACKAGE / "_C.pyi").read_text()
    body = re.search(rf"^class {name}[:(].*?(?=^\S|\Z)", stubs, re.M | re.S)
    assert body
    declared = set(re.findall(r"^    def (\w+)", body.group(0), re.M))
    declared -= {"__init__", "__enter__", "__exit__", "__len__", "__buffer__", "__getattr__"}
    public = {
        attribute
        for attribute in vars(getattr(_C, name))
        if not attribute.startswith("_") or attribute in ("__call__", "_repr_png_")
    }
    assert public == declared


def test_errors_are_of_their_kinds() -> None:
    for name in ("ArgumentError", "BudgetError", "Cancelled", "DeviceError", "FormatError", "IoError"):
        kind = getattr(ferry, name)
        assert issubclass(kind, ferry.Error)
        assert kind.__module__ == "ferry" and kind.__name__ == name
    assert issubclass(ferry.Error, RuntimeError)
    assert issubclass(ferry.ArgumentError, ValueError)
    with pytest.raises(ValueError, match="nonsense"):
        ferry.set_log_level("nonsense")


# ---- the command line ----


def both(cli: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    commands = [[str(cli)], [sys.executable, "-m", "ferry"]]
    return [
        subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
        for command in commands
    ]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["generate", "--help"], 0),
        (["inspect", "models/shapes"], 0),
        (["tokenize", "models/shapes/tokenizer", "a red circle"], None),
        (["inspect", "no/such/folder"], None),
        (["generate", "--steps", "none"], 2),
        ([], 2),
    ],
)
def test_says_what_the_program_says(
    ferry_cli: Path, root: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    status: int | None,
) -> None:  # fmt: skip
    monkeypatch.chdir(root)
    program, module = both(ferry_cli, *arguments)
    assert (module.returncode, module.stdout, module.stderr) == (
        program.returncode,
        program.stdout,
        program.stderr,
    )
    assert program.stdout + program.stderr != ""
    if status is not None:
        assert module.returncode == status


def test_ctrl_c_ends_the_command_with_130(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "picture.png"
    command = subprocess.Popen(
        [sys.executable, "-m", "ferry", "generate", "-m", str(shapes), "-p", "a red circle",
         "--steps", "100000", "-o", str(output)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert command.stderr
    for line in command.stderr:  # the first step's
        if line.startswith("denoising"):
            break
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=60) == 130
    assert "stopped" in command.stderr.read()
    assert not output.exists()


def test_a_command_leaves_the_interpreter_its_handlers(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a stop of the first must not stop the second
        assert main(["inspect", "no/such/folder"]) != 0
        assert "no/such/folder" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


# ---- building ----


@pytest.fixture
def build_backend(root: Path):
    pytest.importorskip("scikit_build_core")
    spec = importlib.util.spec_from_file_location("backend", root / "python/build_backend.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_torch(site_packages: Path, version: str) -> Path:
    torch_folder = site_packages / "torch"
    (torch_folder / "lib").mkdir(parents=True)
    (torch_folder / "lib/libtorch_python.so").touch()
    (torch_folder / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\n")
    return torch_folder


def hide_torch(build_backend, monkeypatch: pytest.MonkeyPatch, site_packages: Path) -> None:
    """As in pip's build environment: torch does not import, sysconfig names the venv's folders."""
    monkeypatch.delenv("TORCH_DIR", raising=False)
    monkeypatch.setattr(build_backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build_backend.sysconfig, "get_paths",
                        lambda: {"platlib": str(site_packages), "purelib": str(site_packages)})  # fmt: skip


def test_builds_for_the_torch_of_the_environment(
    build_backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch_folder = make_torch(tmp_path, "2.11.0+cpu")
    hide_torch(build_backend, monkeypatch, tmp_path)
    assert build_backend.find_torch() == torch_folder
    assert not any("torch" in r for r in build_backend.get_requires_for_build_wheel())


@pytest.mark.parametrize("version", [None, "2.10.0", "2.110.0"])
def test_asks_for_torch_where_there_is_none_that_fits(
    build_backend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None
) -> None:
    if version:
        make_torch(tmp_path, version)
    hide_torch(build_backend, monkeypatch, tmp_path)
    assert build_backend.find_torch() is None
    assert build_backend.TORCH_REQUIREMENT in build_backend.get_requires_for_build_wheel()
    # The same torch as the wheel's own requirement.
    text = (Path(build_backend.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'dependencies = ["{build_backend.TORCH_REQUIREMENT}"]' in text
