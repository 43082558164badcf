from __future__ import annotations

import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from onnx_attnround.errors import CalibrationError
from onnx_attnround.records import InputSpec
from onnx_attnround.samples import open_samples, read_labels
from onnx_attnround.samples.preprocess import PREPROCESS, Preprocess


def spec(name: str = "x", shape=(None, 3), dtype: object = np.float32) -> InputSpec:
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def table(rows: int, columns: int = 3, dtype: object = np.float32) -> np.ndarray:
    return np.arange(rows * columns).reshape(rows, columns).astype(dtype)


def joined(samples, batch_size: int = 4, name: str = "x") -> np.ndarray:
    return np.concatenate([batch[name] for batch in samples.batches(batch_size)])


def write_set(folder: Path, *tensors: tuple[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for index, (name, array) in enumerate(tensors):
        proto = numpy_helper.from_array(array, name)
        (folder / f"input_{index}.pb").write_bytes(proto.SerializeToString())


# --- forms -------------------------------------------------------------------------------


def sources(tmp_path: Path, x: np.ndarray) -> dict[str, object]:
    np.savez(tmp_path / "plain.npz", x=x, labels=np.arange(len(x)))
    np.savez_compressed(tmp_path / "packed.npz", labels=np.arange(len(x)), x=x)
    np.save(tmp_path / "x.npy", x)
    for name in ("npy", "npz", "rows"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "npy" / "b2.npy", x[:4])
    np.save(tmp_path / "npy" / "b10.npy", x[4:])
    np.savez(tmp_path / "npz" / "1.npz", x=x[:1])
    np.savez(tmp_path / "npz" / "2.npz", x=x[1:])
    for index, row in enumerate(x):
        np.save(tmp_path / "rows" / f"{index}.npy", row)
        write_set(tmp_path / "sets" / f"test_data_set_{index}", ("x", row[None]))
    return {
        **{"npz": tmp_path / "plain.npz", "packed": tmp_path / "packed.npz"},
        **{"npy": tmp_path / "x.npy", "str": str(tmp_path / "x.npy")},
        **{"npy folder": tmp_path / "npy", "npz folder": tmp_path / "npz"},
        **{"sample per file": tmp_path / "rows", "data sets": tmp_path / "sets"},
        **{"array": x, "mapping": {"x": x}, "list": [{"x": x[:2]}, {"x": x[2]}, {"x": x[3:]}]},
    }


def test_every_form_gives_the_same_batches(tmp_path: Path) -> None:
    x = table(11)
    for form, source in sources(tmp_path, x).items():
        samples = open_samples(source, [spec()])
        assert samples.count == 11, form
        for _ in range(2):
            batches = list(samples.batches(4))
            assert [len(batch["x"]) for batch in batches] == [4, 4, 3], form
            assert all(batch["x"].dtype == np.float32 for batch in batches)
            np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), x)
        limited = open_samples(source, [spec()], limit=6)
        assert limited.count == 6, form
        np.testing.assert_array_equal(joined(limited), x[:6])


def test_one_data_set_folder_matches_by_name_else_by_number(tmp_path: Path) -> None:
    a, b = table(2), table(2) + 100
    write_set(tmp_path / "named", ("b", b), ("a", a))
    write_set(tmp_path / "numbered", ("", a), ("", b))
    for folder in ("named", "numbered"):
        (batch,) = open_samples(tmp_path / folder, [spec("a"), spec("b")]).batches(8)
        np.testing.assert_array_equal(batch["a"], a)
        np.testing.assert_array_equal(batch["b"], b)


def test_data_sets_that_do_not_stack_are_fed_as_they_are(tmp_path: Path) -> None:
    specs = [spec("a"), spec("b", (None, 2)), spec("n", (), np.int64)]
    for index in range(2):
        write_set(
            tmp_path / f"test_data_set_{index}",
            ("a", table(1)),
            ("b", table(4, 2)),
            ("n", np.array(index)),
        )
    samples = open_samples(tmp_path, specs)
    batches = list(samples.batches(8))
    assert samples.count == len(batches) == 2
    assert [batch["n"].item() for batch in batches] == [0, 1]
    assert batches[0]["a"].shape == (1, 3)
    assert batches[0]["b"].shape == (4, 2)


def test_inputs_without_a_batch_axis_go_into_every_batch(tmp_path: Path) -> None:
    specs = [spec("x"), spec("table", (4, 2)), spec("n", (), np.int64)]
    np.savez(tmp_path / "s.npz", x=table(5), table=table(4, 2), n=np.array(7))
    samples = open_samples(tmp_path / "s.npz", specs)
    assert samples.count == 5
    for batch, size in zip(samples.batches(3), (3, 2), strict=True):
        assert [batch[key].shape for key in ("x", "table", "n")] == [(size, 3), (4, 2), ()]


def test_samples_of_different_length_never_share_a_batch() -> None:
    items = [{"x": np.zeros((1, n), np.float32)} for n in (5, 5, 7, 7, 7, 5)]
    samples = open_samples(items, [spec(shape=(None, None))])
    shapes = [batch["x"].shape for batch in samples.batches(2)]
    assert shapes == [(2, 5), (2, 7), (1, 7), (1, 5)]
    assert samples.count == 6


@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    size=st.integers(1, 9),
    limit=st.none() | st.integers(1, 20),
    static=st.none() | st.integers(1, 4),
)
def test_rechunking_keeps_order_and_count(lengths, size, limit, static) -> None:
    x = table(sum(lengths))
    items = [{"x": part} for part in np.split(x, np.cumsum(lengths)[:-1])]
    expected = x if limit is None else x[: max(limit, static or 0)]
    expected = expected[: len(expected) - len(expected) % (static or 1)]
    if not len(expected):
        with pytest.raises(CalibrationError):
            open_samples(items, [spec(shape=(static, 3))], limit=limit)
        return
    samples = open_samples(items, [spec(shape=(static, 3))], limit=limit)
    batches = [batch["x"] for batch in samples.batches(size)]
    assert samples.count == len(expected)
    assert all(len(batch) == (static or size) for batch in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_files_beyond_the_limit_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", table(4))
    (tmp_path / "2.npy").write_bytes(b"damaged")
    np.testing.assert_array_equal(joined(open_samples(tmp_path, [spec()], limit=4)), table(4))


def test_fewer_samples_than_the_static_batch() -> None:
    with pytest.raises(CalibrationError, match="got 5 samples, expected at least one batch of 8"):
        open_samples(table(5), [spec(shape=(8, 3))])


# --- images ------------------------------------------------------------------------------


def test_image_folder(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
    (tmp_path / "more").mkdir()
    for name, image in zip(("2.png", "10.bmp", "more/1.PNG"), images, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / ".hidden.png").write_bytes(b"")
    model = [spec(shape=(None, 3, 6, 5))]
    samples = open_samples(tmp_path, model, preprocess=PREPROCESS["unit"])
    expected = PREPROCESS["unit"].apply_batch(images)
    np.testing.assert_array_equal(joined(samples, 2), expected)
    single = open_samples(tmp_path / "2.png", model, preprocess=PREPROCESS["unit"])
    np.testing.assert_array_equal(joined(single), expected[:1])
    with pytest.raises(CalibrationError, match=r"2\.png: got uint8 images.*one of imagenet"):
        open_samples(tmp_path, model)
    with pytest.raises(CalibrationError, match=r"2\.png: crop 224 x 224 is larger"):
        open_samples(tmp_path, model, preprocess=Preprocess(crop=224))
    with pytest.raises(CalibrationError, match=r"\[1, 3, 6, 5\], expected \[\?, 3, 8, 8\]"):
        open_samples(tmp_path, [spec(shape=(1, 3, 8, 8))], preprocess=PREPROCESS["unit"])


def test_uint8_image_arrays(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "i.npz", images=images, labels=np.arange(5))
    model = [spec(shape=(None, 3, 6, 4))]
    expected = PREPROCESS["cifar10"].apply_batch(images)
    for source in (tmp_path / "i.npz", images, {"x": images}, [{"x": image} for image in images]):
        samples = open_samples(source, model, preprocess="cifar10")
        np.testing.assert_array_equal(joined(samples, 2), expected)
    raw = open_samples(tmp_path / "i.npz", [spec(shape=(None, 6, 4, 3), dtype=np.uint8)])
    np.testing.assert_array_equal(joined(raw), images)
    with pytest.raises(CalibrationError, match=r"'images'\]: got uint8 images, expected float32"):
        open_samples(tmp_path / "i.npz", model)
    np.testing.assert_array_equal(read_labels(tmp_path / "i.npz"), np.arange(5))


def test_preprocessing_of_what_is_no_image_is_refused() -> None:
    with pytest.raises(CalibrationError, match="leave the preprocessing out"):
        open_samples(table(4), [spec()], preprocess=PREPROCESS["unit"])


# --- types -------------------------------------------------------------------------------


@pytest.mark.parametrize("given_type", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_cast(given_type: object) -> None:
    samples = open_samples(table(3, dtype=given_type), [spec()])
    (batch,) = samples.batches(8)
    assert batch["x"].dtype == np.float32
    np.testing.assert_array_equal(batch["x"], table(3))


@pytest.mark.parametrize("given_type", [np.uint8, np.int32, np.uint64])
def test_integers_are_cast_if_they_fit(given_type: object) -> None:
    (batch,) = open_samples(table(3, dtype=given_type), [spec(dtype=np.int64)]).batches(8)
    assert batch["x"].dtype == np.int64
    samples = open_samples(table(300, dtype=given_type), [spec(dtype=np.int8)])
    with pytest.raises(CalibrationError, match="array: sample 42 holds a value beyond int8"):
        list(samples.batches(7))


@pytest.mark.parametrize(
    ("given_type", "wanted"), [(np.int32, np.float32), (np.float32, np.int64), (bool, np.int64)]
)
def test_other_types_are_refused(given_type: object, wanted: object) -> None:
    with pytest.raises(CalibrationError, match=f"got .*, expected {np.dtype(wanted)} for input"):
        open_samples(table(3, dtype=given_type), [spec(dtype=wanted)])


def test_inputs_of_text_take_arrays_of_text(tmp_path: Path) -> None:
    words = np.array(["a", "bc", "d"])
    np.savez(tmp_path / "x.npz", x=words)
    for source in ({"x": words}, tmp_path / "x.npz"):
        read = joined(open_samples(source, [spec(shape=(None,), dtype=object)]))
        assert read.dtype == object and read.tolist() == words.tolist()
    with pytest.raises(CalibrationError, match="got float32, expected text for input 'x'"):
        open_samples({"x": table(3, 1)[:, 0]}, [spec(shape=(None,), dtype=object)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e60])
def test_values_that_are_not_finite_name_file_and_sample(tmp_path: Path, bad: float) -> None:
    x = table(9, dtype=np.float64)
    x[6, 1] = bad
    np.savez(tmp_path / "s.npz", x=x)
    samples = open_samples(tmp_path / "s.npz", [spec()])
    with pytest.raises(CalibrationError, match=r"s\.npz\['x'\]: sample 6 holds NaN, Inf"):
        list(samples.batches(4))


# --- errors ------------------------------------------------------------------------------


def test_wrong_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", data=table(3))
    with pytest.raises(CalibrationError, match="holds 'data', expected the model's input 'x'"):
        open_samples(tmp_path / "one.npz", [spec()])
    np.savez(tmp_path / "two.npz", inputs=table(3), mask=table(3))
    message = "no array for input 'input': expected 'input', 'mask', found 'inputs', 'mask': "
    with pytest.raises(CalibrationError, match=message + "rename 'inputs' to 'input'"):
        open_samples(tmp_path / "two.npz", [spec("input"), spec("mask")])
    np.save(tmp_path / "x.npy", table(3))
    with pytest.raises(CalibrationError, match="holds one array, the model has 2 inputs, 'a', 'b'"):
        open_samples(tmp_path / "x.npy", [spec("a"), spec("b")])
    write_set(tmp_path / "set", ("x", table(1)))
    with pytest.raises(CalibrationError, match=r"holds 1 files input_.*model's 2 inputs: 'a', 'b'"):
        open_samples(tmp_path / "set", [spec("a"), spec("b")])


@pytest.mark.parametrize(
    ("shape", "wanted", "message"),
    [
        ((5, 4), (None, 3), r"got shape \[5, 4\], expected \[\?, 3\] for input 'x'"),
        ((5, 3, 1, 1), (None, 3), r"expected \[\?, 3\]"),
        ((2, 8, 8, 3), (None, 3, 8, 8), "transpose it from NHWC to NCHW"),
        ((0, 3), (None, 3), "no calibration samples found"),
        ((5,), (), r"got shape \[5\], expected \[\] for"),
    ],
)
def test_wrong_shapes(shape, wanted, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        open_samples(np.zeros(shape, np.float32), [spec(shape=wanted)])


def test_differing_first_dimensions_are_refused_outside_feeds() -> None:
    source = {"a": table(4), "b": table(5)}
    with pytest.raises(CalibrationError, match=r"first dimensions differ: 'a' \[4, 3\], 'b' \[5"):
        open_samples(source, [spec("a"), spec("b")])
    with pytest.raises(CalibrationError, match=r"input 'b' got \[5, 3\], expected \[2, 3\]"):
        open_samples([source], [spec("a"), spec("b", (2, 3))])


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"'nowhere' not found: expected \.npz"):
        open_samples("nowhere", [spec()])
    with pytest.raises(CalibrationError, match=r"holds no samples: expected \.npz"):
        open_samples(tmp_path, [spec()])
    (tmp_path / "x.csv").write_text("1,2,3")
    with pytest.raises(CalibrationError, match="unknown form"):
        open_samples(tmp_path / "x.csv", [spec()])
    with pytest.raises(CalibrationError, match=r"of type int, expected a path, .* DataLoader"):
        open_samples(3, [spec()])
    with pytest.raises(CalibrationError, match="no calibration samples found"):
        open_samples([], [spec()])


def test_pickles_and_fortran_order_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}, None], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match=r"o\.npy: holds Python objects"):
        open_samples(tmp_path / "o.npy", [spec()])
    np.save(tmp_path / "f.npy", np.asfortranarray(table(4)))
    with pytest.raises(CalibrationError, match="Fortran order"):
        open_samples(tmp_path / "f.npy", [spec()])


def test_damaged_files_are_one_clear_line(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", table(4))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-5])
    with pytest.raises(CalibrationError, match=r"got 43 bytes of data, expected 48.*cut short"):
        open_samples(tmp_path / "x.npy", [spec()])
    for name in ("a.npz", "a.npy", "a.png", "set/input_0.pb"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\xffnot what it says")
        with pytest.raises(CalibrationError, match=rf"cannot read '.*{file.name}'") as caught:
            open_samples(file.parent if name.startswith("set") else file, [spec()])
        assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(
    position=st.integers(0, 400),
    value=st.integers(0, 255),
    packed=st.booleans(),
)
def test_a_flipped_byte_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, packed: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / ("x.npz" if packed else "x.npy")
    if packed:
        np.savez_compressed(path, x=table(20))
    else:
        np.save(path, table(20))
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(bytes(data))
    try:
        samples = open_samples(path, [spec()])
        assert len(joined(samples, 3)) == samples.count
    except CalibrationError as error:
        assert "\n" not in str(error)


def test_labels_must_be_integers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=table(3))
    with pytest.raises(CalibrationError, match="has no 'labels', found 'x'"):
        read_labels(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", labels=table(3))
    with pytest.raises(CalibrationError, match=r"'labels'\]: got float32 \[3, 3\]"):
        read_labels(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", labels=np.array([1, 2], np.uint8))
    assert read_labels(tmp_path / "c.npz").dtype == np.int64
    with pytest.raises(CalibrationError, match="not found"):
        read_labels(tmp_path / "none.npz")


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    x = np.zeros((4096, 1024), np.float32)
    np.savez_compressed(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "x.npy", x)
    del x
    for name in ("x.npz", "x.npy"):
        tracemalloc.start()
        samples = open_samples(tmp_path / name, [spec(shape=(None, 1024))])
        assert sum(len(batch["x"]) for batch in samples.batches(16)) == 4096
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, name


def test_members_are_read_from_any_zip_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", y=table(9) + 1, x=table(9))
    samples = open_samples(tmp_path / "x.npz", [spec("x"), spec("y")])
    for batch in samples.batches(2):
        np.testing.assert_array_equal(batch["x"] + 1, batch["y"])
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.namelist() == ["y.npy", "x.npy"]


def test_data_set_of_external_type_is_judged_by_type(tmp_path: Path) -> None:
    write_set(tmp_path / "set", ("x", np.array([["a", "b", "c"]], object)))
    assert onnx.load_tensor(str(tmp_path / "set" / "input_0.pb")).name == "x"
    with pytest.raises(CalibrationError, match="expected float32 for input 'x'"):
        open_samples(tmp_path / "set", [spec()])


@pytest.mark.data
def test_cifar_calibration_set() -> None:
    if "ATTNROUND_DATA" not in os.environ:
        pytest.skip("ATTNROUND_DATA is not set")
    path = Path(os.environ["ATTNROUND_DATA"]) / "cifar10" / "calib.npz"
    model = [spec("input", (None, 3, 32, 32))]
    samples = open_samples(path, model, limit=100, preprocess=PREPROCESS["cifar10"])
    assert samples.count == 100
    with np.load(path) as file:
        images = file["images"][:100]
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    result = joined(samples, 32, "input")
    np.testing.assert_allclose(result, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_a_static_batch_above_the_limit_is_one_sample_set() -> None:
    """As where a wave form of 16,000 values is all that the model is fed."""
    spec = InputSpec(name="x", dtype=np.dtype(np.float32), shape=(16,))
    samples = open_samples({"x": np.zeros(32, np.float32)}, [spec], limit=10)
    assert samples.count == 16
    assert [len(feed["x"]) for feed in samples.batches(4)] == [16]


def test_an_empty_tensor_beside_others_is_fed_as_it_is() -> None:
    specs = [
        InputSpec(name="x", dtype=np.dtype(np.float32), shape=(2, 3)),
        InputSpec(name="none", dtype=np.dtype(np.float32), shape=(None,)),
    ]
    feed = {"x": np.ones((2, 3), np.float32), "none": np.zeros(0, np.float32)}
    samples = open_samples([feed], specs)
    assert samples.count == 1
    assert [len(batch["none"]) for batch in samples.batches(4)] == [0]
