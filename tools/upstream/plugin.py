"""pytest plugin of tools/upstream/run.py: installs the device and the engine before any test module
is imported, and writes every result to a file as it comes, so that a crash loses one test only.

Told by environment variables (run.py sets them): FERRY_UPSTREAM_ENGINE, FERRY_UPSTREAM_DEVICE,
FERRY_UPSTREAM_RESULTS (a file of JSON lines; tests that have a line in it are not run again),
FERRY_UPSTREAM_FAKE (options of the fake accelerator, JSON).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("FERRY_UPSTREAM_DEVICE", "cpu")
ENGINE = os.environ.get("FERRY_UPSTREAM_ENGINE", "diffusers")
RESULTS = Path(os.environ["FERRY_UPSTREAM_RESULTS"])

if DEVICE == "fake":
    import ferry_fake  # before anything asks torch for accelerators

    ferry_fake.set_options(**json.loads(os.environ.get("FERRY_UPSTREAM_FAKE", "{}")))
    ferry_fake.patch_safetensors()
    # Inductor writes kernels for devices that it knows; the graphs of torch.compile run eagerly.
    torch._TorchCompileInductorWrapper.__call__ = lambda self, graph, inputs: graph.forward

if ENGINE == "ferry":
    importlib.import_module("ferry.diffusers_hooks").install()

# Imported at the top of test modules by tests that are not selected.
STAND_INS = ("datasets", "requests_mock")

# What huggingface_hub, transformers and diffusers say where they would download.
_HUB_TYPES = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "HfHubHTTPError"}
_HUB_TEXT = re.compile(
    r"couldn't connect to 'https://huggingface\.co'|HF_HUB_OFFLINE"
    r"|outgoing traffic has been disabled"
    r"|cannot find the requested files in the (disk|local) cache|offline mode is enabled"
    r"|is not the path to a directory containing|Can't load .* for '[\w./-]+'"
    r"|Can't load tokenizer for|does not appear to have a file named"
    r"|is not a local folder and is not a valid model identifier"
    r"|Unable to load vocabulary|Failed to resolve|Max retries exceeded",
    re.I,
)
# Failures that say that this machine or device lacks something: pattern, module whose absence is
# the cause (empty: whatever is installed), reason.
_LACKS = (
    (r"^ModuleNotFoundError: No module named '((?!ferry)[\w.]+)'", "", r"needs the package \1"),
    (r"^ImportError: \s*\w+ requires the (\w+) library", "", r"needs the package \1"),
    (
        r"^NameError: name 'transforms' is not defined",
        "torchvision",
        "needs the package torchvision",
    ),
    (r"^ValueError: (FlexAttention is only supported on [\w, ]+ devices)", "", r"torch: \1"),
)

# Locals and arguments of their functions that hold the repository's name.
_HUB_LOCALS = (
    "pretrained_model_name_or_path", "pretrained_model_or_path", "path_or_repo_id", "repo_id",
)  # fmt: skip


def _refuse_empty_tokenizers() -> None:
    """transformers makes an empty tokenizer of a repository that it cannot reach, and what follows
    fails for reasons of all kinds."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import PreTrainedTokenizerBase

    load = PreTrainedTokenizerBase.from_pretrained.__func__

    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        if not os.path.exists(name):
            file = "tokenizer_config.json"
            if kwargs.get("subfolder"):
                file = f"{kwargs['subfolder']}/{file}"
            if not isinstance(try_to_load_from_cache(str(name), file), str):
                repo_id = str(name)  # noqa: F841  (for the reason)
                raise LocalEntryNotFoundError(f"{name} is not in the cache")
        return load(cls, name, *args, **kwargs)

    PreTrainedTokenizerBase.from_pretrained = classmethod(from_pretrained)


def _install_stand_ins() -> None:
    missing = [name for name in STAND_INS if importlib.util.find_spec(name) is None]
    for name in missing:
        module = types.ModuleType(name)

        def absent(attribute: str, name: str = name) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return lambda *args, **kwargs: pytest.skip(f"needs the package {name}")

        module.__getattr__ = absent  # type: ignore[method-assign]
        sys.modules[name] = module


def _write(entry: dict[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _done() -> set[str]:
    if not RESULTS.is_file():
        return set()
    lines = (json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines())
    return {entry["id"] for entry in lines if entry["kind"] == "result"}


def _chain(error: BaseException | None) -> list[BaseException]:
    errors: list[BaseException] = []
    while error is not None and error not in errors:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def _hub_reason(call: pytest.CallInfo) -> str | None:
    """Why this is a download that was refused; None if it is something else."""
    error = call.excinfo.value
    if not any(
        type(each).__name__ in _HUB_TYPES or _HUB_TEXT.search(str(each)) for each in _chain(error)
    ):
        return None
    for entry in call.excinfo.traceback:
        for name in _HUB_LOCALS:
            value = entry.frame.f_locals.get(name)
            if isinstance(value, str) and "/" in value and not os.path.exists(value):
                return f"needs a download from the hub: {value}"
    return "needs a download from the hub"


def _lacks_reason(error: BaseException) -> str | None:
    text = f"{type(error).__name__}: {error}"
    for pattern, module, reason in _LACKS:
        match = re.match(pattern, text)
        if match and not (module and importlib.util.find_spec(module)):
            return match.expand(reason)
    return None


def _last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "?"
    # Collection errors end with the exception; assertion messages begin with it.
    last = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (last[-1] if last else lines[0])[:300]


class Recorder:
    def __init__(self) -> None:
        self.hub: dict[str, str] = {}
        self.began = 0.0

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        done = _done()
        skipped = [item for item in items if item.nodeid in done]
        if skipped:
            config.hook.pytest_deselected(items=skipped)
            items[:] = [item for item in items if item.nodeid not in done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in _done():
            reason = "cannot be imported: " + _last_line(report)
            _write(
                {"kind": "result", "id": report.nodeid, "outcome": "not collected",
                 "reason": reason, "seconds": 0.0}
            )  # fmt: skip

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began = time.monotonic()
        _write({"kind": "start", "id": nodeid})

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        outcome = yield
        report = outcome.get_result()
        if report.failed and call.excinfo is not None:
            reason = _hub_reason(call) or _lacks_reason(call.excinfo.value)
            if reason:
                report.outcome = "skipped"
                report.longrepr = (str(item.path), 0, reason)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        interesting = report.when == "call" or not report.passed
        if not interesting:
            return
        if report.when == "teardown" and report.nodeid in _done():
            return
        reason = ""
        if report.skipped:
            longrepr = report.longrepr
            reason = longrepr[2] if isinstance(longrepr, tuple) else _last_line(report)
            reason = getattr(report, "wasxfail", "") or reason.removeprefix("Skipped: ")
        elif report.failed:
            reason = _last_line(report)
        _write(
            {"kind": "result", "id": report.nodeid, "outcome": report.outcome, "reason": reason,
             "seconds": round(time.monotonic() - self.began, 2)}
        )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    _install_stand_ins()
    _refuse_empty_tokenizers()
    config.pluginmanager.register(Recorder(), "ferry_upstream_recorder")
