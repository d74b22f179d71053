"""ferry.Pipeline, ferry.Picture and ferry.generate, with the small model in models/shapes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch

import ferry

PROMPT = "a red circle and a blue square"
STEPS = 4


@pytest.fixture(scope="module")
def pipeline(shapes: Path) -> ferry.Pipeline:
    return ferry.Pipeline.load(shapes)


def draw(pipeline: ferry.Pipeline, **options: object) -> list[ferry.Picture]:
    return pipeline.generate(PROMPT, **{"steps": STEPS, "seed": 7, "on_progress": False, **options})


@pytest.fixture(scope="module")
def expected(
    ferry_cli: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[numpy.ndarray]:
    """The program's pictures for the same seed: uint8 [height, width, 3] each."""
    images = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("cli")
    subprocess.run(
        [ferry_cli, "generate", "--quiet", "-m", shapes, "-p", PROMPT, "--seed", "7", "-n", "2",
         "--steps", str(STEPS), "-o", folder / "picture.png"],
        check=True,
    )  # fmt: skip
    return [numpy.array(images.open(folder / f"picture-{index}.png")) for index in range(2)]


def test_equals_the_programs_picture(
    pipeline: ferry.Pipeline, shapes: Path, expected: list[numpy.ndarray]
) -> None:
    assert not numpy.array_equal(*expected)
    loaded = draw(pipeline, num_images=2)
    at_once = ferry.generate(shapes, PROMPT, steps=STEPS, seed=7, num_images=2, on_progress=False)
    for pictures in (loaded, at_once):
        assert len(pictures) == 2
        for picture, bytes_expected in zip(pictures, expected):
            assert numpy.array_equal(numpy.asarray(picture), bytes_expected)


@pytest.mark.parametrize("budget", [{"weights_memory": "3MB"}, {"weights_memory": 3_000_000}])
def test_streams_under_a_budget_and_gives_the_same(
    shapes: Path, expected: list[numpy.ndarray], budget: dict[str, int | str]
) -> None:
    streamed = ferry.Pipeline.load(shapes, **budget)
    pictures = draw(streamed, num_images=2)
    assert streamed.bytes_streamed > 0
    for picture, bytes_expected in zip(pictures, expected):
        assert numpy.array_equal(numpy.asarray(picture), bytes_expected)


def test_a_budget_for_everything_is_taken_as_text_and_number(
    shapes: Path, expected: list[numpy.ndarray]
) -> None:
    for memory in ("2GiB", 2 << 30, "auto"):
        picture = draw(ferry.Pipeline.load(shapes, memory=memory, reserve="1MB"), num_images=2)[0]
        assert numpy.array_equal(numpy.asarray(picture), expected[0])


def test_a_picture_is_a_buffer_without_a_copy(pipeline: ferry.Pipeline) -> None:
    (picture,) = draw(pipeline)
    array = numpy.asarray(picture)
    assert array.dtype == numpy.uint8
    assert array.shape == (picture.height, picture.width, 3) == (64, 64, 3)
    assert array.ctypes.data == picture.numpy().ctypes.data
    array[0, 0] = (1, 2, 3)
    assert memoryview(picture).tobytes()[:3] == bytes((1, 2, 3))
    kept = array.copy()
    del picture  # the array keeps it
    assert numpy.array_equal(array, kept)


def test_a_picture_is_saved_shown_and_given_to_pillow(
    pipeline: ferry.Pipeline, tmp_path: Path
) -> None:
    images = pytest.importorskip("PIL.Image")
    (picture,) = draw(pipeline)
    path = tmp_path / "picture.png"
    picture.save(path)
    saved = images.open(path)
    assert saved.text["prompt"] == PROMPT == picture.text["prompt"]
    assert saved.text["seed"] == "7"
    assert numpy.array_equal(numpy.array(saved), numpy.asarray(picture))
    assert numpy.array_equal(numpy.array(picture.to_pil()), numpy.asarray(picture))
    assert picture._repr_png_() == path.read_bytes()
    with pytest.raises(ferry.ArgumentError, match="picture.xyz"):
        picture.save(tmp_path / "picture.xyz")
    with pytest.raises(ferry.IoError, match="nowhere"):
        picture.save(tmp_path / "nowhere" / "picture.png")


def test_dtypes_are_torchs_or_names_and_by_component(pipeline: ferry.Pipeline, shapes: Path) -> None:
    as_stored = numpy.asarray(draw(pipeline)[0])
    by_name, by_torch, by_component = (
        numpy.asarray(draw(ferry.Pipeline.load(shapes, dtype=dtype))[0])
        for dtype in (
            "fp32",
            torch.float32,
            {"transformer": torch.float32, "vae": "fp32", "text_encoder": "fp32",
             "text_encoder_2": torch.float32},
        )
    )  # fmt: skip
    assert numpy.array_equal(by_name, by_torch)
    assert numpy.array_equal(by_name, by_component)
    assert not numpy.array_equal(by_name, as_stored)  # which is bfloat16


def test_progress_is_reported_by_stage(pipeline: ferry.Pipeline) -> None:
    seen: list[tuple[str, int, int]] = []
    draw(pipeline, on_progress=lambda *progress: seen.append(progress))
    assert [step for stage, step, total in seen if stage == "denoise"][-STEPS:] == [1, 2, 3, 4]
    assert {total for stage, step, total in seen if stage == "denoise"} == {STEPS}
    assert list(dict.fromkeys(stage for stage, *_ in seen))[-2:] == ["denoise", "decode"]


def test_bars_unless_told_otherwise(
    pipeline: ferry.Pipeline, capfd: pytest.CaptureFixture[str]
) -> None:
    draw(pipeline, on_progress=None)
    assert "denoising: 4/4" in capfd.readouterr().err
    draw(pipeline, on_progress=False)
    draw(pipeline, on_progress=lambda *progress: None)
    assert capfd.readouterr().err == ""


def test_what_a_callback_raises_stops_and_is_raised(pipeline: ferry.Pipeline) -> None:
    class Enough(Exception):
        pass

    steps = []

    def stop_after_two(stage: str, step: int, total: int) -> None:
        if stage == "denoise" and step > 0:
            steps.append(step)
            if step == 2:
                raise Enough("two are enough")

    with pytest.raises(Enough, match="two are enough"):
        draw(pipeline, steps=50, on_progress=stop_after_two)
    assert steps == [1, 2]
    with pytest.raises(ferry.ArgumentError, match="own on_progress"):
        draw(pipeline, on_progress=lambda *progress: draw(pipeline))
    assert numpy.array_equal(draw(pipeline)[0], draw(pipeline)[0])  # it goes on


def test_ctrl_c_stops_and_raises(pipeline: ferry.Pipeline) -> None:
    before = numpy.asarray(draw(pipeline)[0])
    seen: list[int] = []

    def interrupt(stage: str, step: int, total: int) -> None:
        if stage == "denoise" and step > 0:
            seen.append(step)
            if step == 3:  # as a terminal sends it, while the model computes
                threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, steps=100000, on_progress=interrupt)
    assert 3 <= len(seen) < 1000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert numpy.array_equal(draw(pipeline)[0], before)


def test_a_programs_own_handler_is_called_and_decides(pipeline: ferry.Pipeline) -> None:
    called: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:

        def interrupt(stage: str, step: int, total: int) -> None:
            if stage == "denoise" and step == 1:
                os.kill(os.getpid(), signal.SIGINT)

        assert len(draw(pipeline, on_progress=interrupt)) == 1  # it did not ask to stop
    finally:
        signal.signal(signal.SIGINT, previous)
    assert called == [signal.SIGINT]


def test_threads_take_turns_and_python_runs_meanwhile(pipeline: ferry.Pipeline) -> None:
    alone = {seed: numpy.asarray(draw(pipeline, seed=seed)[0]) for seed in (1, 2, 3)}
    together: dict[int, numpy.ndarray] = {}

    def work(seed: int) -> None:
        # A callback that wants the GIL while others wait for the pipeline.
        pictures = draw(pipeline, seed=seed, on_progress=lambda *progress: None)
        together[seed] = numpy.asarray(pictures[0])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    for seed, picture in alone.items():
        assert numpy.array_equal(together[seed], picture)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"memory": "much"}, ferry.ArgumentError, "much"),
        ({"weights_memory": 1.5}, ferry.ArgumentError, "weights_memory: expected bytes"),
        ({"weights_memory": "3MB", "memory": "1GB"}, ferry.ArgumentError, "exclude each other"),
        ({"weights_memory": 1000}, ferry.BudgetError, "at least"),
        ({"dtype": "float3"}, ferry.ArgumentError, "float3"),
        ({"device": "gpu of the neighbours"}, ferry.ArgumentError, "neighbours"),
        ({"quantize": "int99"}, ferry.ArgumentError, "int99"),
    ],
)
def test_wrong_options_are_told(
    shapes: Path, options: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        draw(ferry.Pipeline.load(shapes, **options))


def test_wrong_folders_and_arguments_are_told(
    pipeline: ferry.Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(ferry.IoError, match="none"):
        ferry.Pipeline.load(tmp_path / "none")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ferry.FormatError, match="model_index.json"):
        ferry.Pipeline.load(tmp_path)
    with pytest.raises(ferry.ArgumentError, match="seed: expected"):
        draw(pipeline, seed=-1)
    with pytest.raises(ferry.ArgumentError, match="on_progress"):
        draw(pipeline, on_progress="yes")
    with pytest.raises(ferry.ArgumentError, match="steps|num_inference_steps"):
        draw(pipeline, steps=0)


def test_a_seed_is_drawn_and_told(pipeline: ferry.Pipeline) -> None:
    (first,), (second,) = draw(pipeline, seed=None), draw(pipeline, seed=None)
    assert first.text["seed"] != second.text["seed"]
    (again,) = draw(pipeline, seed=int(first.text["seed"]))
    assert numpy.array_equal(again, first)


def test_pillow_is_not_needed(shapes: Path) -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "import ferry\n"
        f"picture, = ferry.generate({str(shapes)!r}, 'x', steps=1, on_progress=False)\n"
        "assert picture._repr_png_().startswith(b'\\x89PNG')\n"
        "try: picture.to_pil()\n"
        "except ferry.Error as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "needs Pillow" in result.stdout, result.stderr
