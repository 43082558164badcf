"""A run that was cut off goes on from its work dir, to the bytes of an unbroken run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layered_models import LAYERED
from small_models import build_proto

from onnx_attnround import QuantConfig, graph, quantize, trade_off
from onnx_attnround.calibrate import Calibration
from onnx_attnround.checkpoint import Checkpoint, check_work_dir, open_checkpoint
from onnx_attnround.errors import GateError, OutputError
from onnx_attnround.records import (
    BlockRounding,
    Event,
    LayerRounding,
    QuantParams,
    QuantSpec,
    TensorStats,
)
from onnx_attnround.samples import Samples, open_samples

pytestmark = pytest.mark.slow

resource = pytest.importorskip("resource")

ROOT = Path(__file__).resolve().parent.parent
RESNET = ROOT / "models" / "digits_resnet.onnx"
CALIB = ROOT / "models" / "digits_calib.npz"
COUNT = 32  # samples of a run

SPEC = QuantSpec(bits=4, signed=True, symmetric=True, axis=0, fixed_range=(-0.1, 2.0))
ROUNDING = LayerRounding(
    weight="w",
    spec=SPEC,
    codes=np.arange(-8, 4, dtype=np.int8).reshape(2, 3, 2),
    scale=np.float32([0.1, 1e-45]),
    zero_point=np.zeros(2, np.int8),
    bias=None,
    mse_nearest=float("inf"),
    mse_final=0.1 + 0.2,
    changed=0.25,
)
PARAMS = QuantParams(
    spec=SPEC, scale=np.asarray(0.3, np.float32), zero_point=np.asarray(128, np.uint8)
)


class Stop(Exception):
    """What a test ends a run with."""


def samples() -> np.ndarray:
    return np.load(CALIB)["input"][:COUNT]


def config(folder: Path | None = None, **options: Any) -> QuantConfig:
    return QuantConfig(
        threads=1, steps=4, observer="minmax", work_dir=folder, weight_bits=3, **options
    )


def run(
    out: Path, folder: Path | None, stop_at: tuple[str, int] | None = None, **options: Any
) -> tuple[bytes, list[Event]]:
    """The output's bytes and the events of a run, which may end behind an event."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if (event.stage, event.done) == stop_at:
            raise Stop

    quantize(RESNET, samples(), config(folder, **options), output=out, on_event=on_event)
    return out.read_bytes(), events


def taken(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.stage, event.done) for event in events if "from the work dir" in event.detail]


def same(first: object, second: object) -> bool:
    """Equal in type and value, bit by bit."""
    if type(first) is not type(second):
        return False
    if is_dataclass(first):
        return all(
            same(getattr(first, field.name), getattr(second, field.name))
            for field in fields(first)
        )
    if isinstance(first, np.ndarray | np.generic):
        assert isinstance(second, np.ndarray | np.generic)
        key = (first.dtype, first.shape, first.tobytes())
        return key == (second.dtype, second.shape, second.tobytes())
    if isinstance(first, Mapping):
        assert isinstance(second, Mapping)
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        assert isinstance(second, tuple)
        return len(first) == len(second) and all(map(same, first, second))
    return repr(first) == repr(second)


# --- one result -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result",
    [
        ROUNDING,
        replace(ROUNDING, bias=np.float32([np.nan, -0.0]), changed=float("nan")),
        (BlockRounding(nodes=("a", "b"), skipped="why"), {"a": ROUNDING}, {"x": PARAMS}),
        (BlockRounding(nodes=("a",), error_before=0.5, error_after=1e-300), {}, {}),
        Calibration(
            stats={"x": TensorStats(name="x", count=9, lo=-1.0, hi=2.5, hist=np.arange(5))},
            params={"x": PARAMS},
        ),
        {2: 0.1, 8: 1e-9},
        np.float32(1.5),
    ],
    ids=["rounding", "no numbers", "block left", "block", "calibration", "errors", "scalar"],
)
def test_gives_back_what_was_put(result: object, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run")
    assert checkpoint.get("round", 3) is None
    checkpoint.put(result, "round", 3)
    assert same(Checkpoint(tmp_path / "run").get("round", 3), result)
    assert checkpoint.get("round", 4) is None
    assert checkpoint.get("refine", 3) is None
    assert checkpoint.part("w4").get("round", 3) is None


def test_counts_what_it_gave_and_forgets_all(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run")
    for unit in (0, 1):
        checkpoint.put(ROUNDING, "round", unit)
        checkpoint.part("w4").put(ROUNDING, "round", unit)
        checkpoint.get("round", unit)
    checkpoint.get("round", 2)
    assert checkpoint.taken == {"round": 2}
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    checkpoint.remove()


def test_without_a_folder_nothing_is_kept() -> None:
    checkpoint = Checkpoint()
    checkpoint.part("w4").put(ROUNDING, "round")
    checkpoint.put(ROUNDING, "round")
    assert checkpoint.get("round") is None
    checkpoint.remove()


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a .*Path cannot be kept"):
        Checkpoint(tmp_path / "run").put({"x": tmp_path}, "round")
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_damaged_file_counts_as_absent(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("work")
    checkpoint = Checkpoint(folder)
    checkpoint.put(ROUNDING, "round")
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans(), label="cut short"):
        path.write_bytes(whole[:at])
    else:
        other = data.draw(st.integers(1, 255))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :])
    assert checkpoint.get("round") is None
    checkpoint.put(ROUNDING, "round")
    assert same(checkpoint.get("round"), ROUNDING)


@contextmanager
def files_limited(size: int) -> Iterator[None]:
    """Writes to a file end with an error after ``size`` bytes, as on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_is_told_and_leaves_the_earlier_result(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run")
    checkpoint.put(PARAMS, "round")
    large = replace(ROUNDING, codes=np.zeros(1 << 20, np.int8))
    with (
        pytest.raises(OutputError, match=r"round-00000.*; free some space") as caught,
        files_limited(1 << 19),
    ):
        checkpoint.put(large, "round")
    assert "\n" not in str(caught.value)
    assert same(checkpoint.get("round"), PARAMS)
    assert len(list((tmp_path / "run").iterdir())) == 1


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_work_dir_that_cannot_be_used_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="another `work_dir`"):
        check_work_dir(tmp_path / name)


# --- what the results depend on ---------------------------------------------------------


def checkpoint_of(
    folder: Path,
    proto: onnx.ModelProto | None = None,
    feeds: dict[str, np.ndarray] | None = None,
    **options: Any,
) -> str:
    model = ir.from_proto(proto or small())
    given = open_samples(feeds or small_feeds(), graph.input_specs(model))
    opened = open_checkpoint(folder, model, given, QuantConfig(**options))
    opened.put(ROUNDING, "round")
    (made,) = folder.iterdir()
    opened.remove()
    return made.name


def small() -> onnx.ModelProto:
    return build_proto(LAYERED["chain"])


def small_feeds() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)}


def test_other_settings_samples_or_weights_are_another_run(tmp_path: Path) -> None:
    other = small()
    weight = other.graph.initializer[0]
    raw = bytearray(weight.raw_data)
    raw[-1] ^= 1
    weight.raw_data = bytes(raw)
    node = small()
    node.graph.node[-1].name += "x"
    feeds = small_feeds()
    feeds["x"][-1, -1, -1, -1] += 1e-6
    runs = [
        checkpoint_of(tmp_path),
        checkpoint_of(tmp_path, other),
        checkpoint_of(tmp_path, node),
        checkpoint_of(tmp_path, feeds=feeds),
        checkpoint_of(tmp_path, feeds={"x": small_feeds()["x"][:7]}),
        *(
            checkpoint_of(tmp_path, **options)
            for options in ({"seed": 1}, {"steps": 3}, {"batch_size": 5}, {"mean_bits": 4})
        ),
    ]
    assert len(set(runs)) == len(runs)


def test_what_does_not_matter_to_the_results_is_no_other_run(tmp_path: Path) -> None:
    runs = {
        checkpoint_of(tmp_path, **options)
        for options in (
            {}, {"min_sqnr": 9.0}, {"max_drop": 1.0}, {"activation_memory_mb": 1},
            {"weight_storage": "int8"}, {"work_dir": tmp_path},
        )
    }  # fmt: skip
    assert len(runs) == 1


def test_external_data_are_content_too(tmp_path: Path) -> None:
    """The same weights are the same run wherever they lie; others under the same name are not."""
    opened, inline = [], graph.load(RESNET)
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        model = graph.load(RESNET)
        (name, value), *_ = model.graph.initializers.items()
        assert value.const_value is not None
        if weight:
            changed = value.const_value.numpy() + np.float32(weight)
            value.const_value = ir.tensor(changed, name=name)
        ir.save(model, folder / "in.onnx", external_data="in.data")
        opened.append(_name(tmp_path / "work", graph.load(folder / "in.onnx")))
    assert opened[0] == _name(tmp_path / "work", inline)
    assert opened[0] != opened[1]


def _name(folder: Path, model: ir.Model) -> str:
    given: Samples = open_samples({"input": samples()}, graph.input_specs(model))
    opened = open_checkpoint(folder, model, given, config())
    opened.put(ROUNDING, "round")
    (made,) = folder.iterdir()
    opened.remove()
    return made.name


# --- runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(tmp_path_factory.mktemp("whole") / "out.onnx", None)[0]


@pytest.mark.parametrize("done", [1, 4, 8, 9])
def test_goes_on_behind_the_layer_that_it_was_stopped_at(
    done: int, tmp_path: Path, unbroken: bytes
) -> None:
    out, work = tmp_path / "out.onnx", tmp_path / "work"
    with pytest.raises(Stop):
        run(out, work, ("round", done))
    assert not out.exists()
    got, events = run(out, work)
    assert got == unbroken
    assert taken(events) == [("calibrate", COUNT), *(("round", n + 1) for n in range(done))]
    assert list(work.iterdir()) == []


def test_a_work_dir_alone_changes_nothing(tmp_path: Path, unbroken: bytes) -> None:
    got, events = run(tmp_path / "out.onnx", tmp_path / "deep" / "work")
    assert got == unbroken
    assert taken(events) == []


def test_damaged_and_missing_results_are_made_anew(tmp_path: Path, unbroken: bytes) -> None:
    out, work = tmp_path / "out.onnx", tmp_path / "work"
    with pytest.raises(Stop):
        run(out, work, ("round", 9))
    (folder,) = work.iterdir()
    (folder / "round-00002").write_bytes((folder / "round-00002").read_bytes()[:-1])
    (folder / "round-00005").unlink()
    (folder / "calibrate-00000").write_bytes(b"")
    got, events = run(out, work)
    assert got == unbroken
    assert taken(events) == [("round", n + 1) for n in range(9) if n not in (2, 5)]


def test_runs_of_other_settings_share_a_work_dir(tmp_path: Path, unbroken: bytes) -> None:
    out, work = tmp_path / "out.onnx", tmp_path / "work"
    with pytest.raises(Stop):
        run(out, work, ("round", 4))
    (kept,) = work.iterdir()
    _, events = run(tmp_path / "other.onnx", work, seed=1)
    assert taken(events) == []
    assert list(work.iterdir()) == [kept]
    assert run(out, work)[0] == unbroken


def test_a_missed_gate_keeps_the_results_for_another_gate(tmp_path: Path, unbroken: bytes) -> None:
    out, work = tmp_path / "out.onnx", tmp_path / "work"
    with pytest.raises(GateError):
        run(out, work, min_sqnr=90.0)
    result = quantize(RESNET, samples(), config(work), output=out)
    assert out.read_bytes() == unbroken
    counts = "smooth 1, calibrate 1, float 1, pace 1, round 9"
    assert f"results taken from '{work}': {counts}" in result.notes


@pytest.mark.parametrize("stop_at", [("measure", 4), ("refine", 2)])
def test_measured_layers_and_refined_blocks_are_kept_too(
    stop_at: tuple[str, int], tmp_path: Path, refined: bytes
) -> None:
    out, work = tmp_path / "out.onnx", tmp_path / "work"
    with pytest.raises(Stop):
        run(out, work, stop_at, **REFINED)
    got, events = run(out, work, **REFINED)
    assert got == refined
    assert taken(events)[-1] == stop_at


REFINED = {
    "reconstruct": "block", "act_bits": 4, "allocator": "gram", "mean_bits": 4.0,
    "first_last_bits": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return run(tmp_path_factory.mktemp("refined") / "out.onnx", None, **REFINED)[0]


def test_several_sizes_go_on_too(tmp_path: Path) -> None:
    def sizes(folder: Path, work: Path | None, stop_at: tuple[str, int] | None = None) -> list[str]:
        stages: list[Event] = []

        def on_event(event: Event) -> None:
            stages.append(event)
            if (event.stage, event.done) == stop_at:
                raise Stop

        folder.mkdir(exist_ok=True)
        trade_off(
            RESNET, samples(), config(work), mean_bits=[3, 5], output=folder / "out.onnx",
            on_event=on_event,
        )  # fmt: skip
        return [event.stage for event in stages if "from the work dir" in event.detail]

    whole, broken, work = tmp_path / "whole", tmp_path / "broken", tmp_path / "work"
    assert sizes(whole, None) == []
    with pytest.raises(Stop):
        sizes(broken, work, ("round w5", 3))
    assert sizes(broken, work) == ["calibrate", *["round w3"] * 9, *["round w5"] * 3]
    for name in ("out.w3.onnx", "out.w5.onnx"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert list(work.iterdir()) == []


DRIVER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from onnx_attnround import QuantConfig, quantize

model, calib, work, count, done = sys.argv[1:]
def on_event(event):
    if (event.stage, event.done) == ("round", int(done)):
        os.kill(os.getpid(), signal.SIGKILL)
config = QuantConfig(
    threads=1, steps=4, observer="minmax", work_dir=Path(work), weight_bits=3
)
quantize(model, np.load(calib)["input"][:int(count)], config, output="out.onnx", on_event=on_event)
"""


def test_killed_again_and_again_it_comes_to_the_same_bytes(
    tmp_path: Path, unbroken: bytes
) -> None:
    for done in (2, 5, 99):
        ended = subprocess.run(
            [sys.executable, "-c", DRIVER, RESNET, CALIB, "work", str(COUNT), str(done)],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert ended.returncode == (-signal.SIGKILL if done < 99 else 0)
        assert (tmp_path / "out.onnx").exists() == (done == 99)
    assert (tmp_path / "out.onnx").read_bytes() == unbroken
    assert list((tmp_path / "work").iterdir()) == []
