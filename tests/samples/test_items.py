"""Items of lists, generators, loaders and datasets become samples, whatever holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from onnx_attnround.errors import CalibrationError, ConfigError
from onnx_attnround.records import InputSpec
from onnx_attnround.samples import Samples, open_samples
from onnx_attnround.samples.preprocess import PREPROCESS

X = np.arange(33, dtype=np.float32).reshape(11, 3)
Y = np.arange(11) % 4


def spec(name: str = "x", shape: tuple[int | None, ...] = (None, 3)) -> InputSpec:
    return InputSpec(name=name, dtype=np.dtype(np.float32), shape=shape)


def joined(samples: Samples, name: str = "x") -> np.ndarray:
    return np.concatenate([batch[name] for batch in samples.batches(4)])


class Rows(Dataset[Any]):
    """A dataset of PyTorch: it has items and a length, and cannot be iterated by its type."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor(X[index]), int(Y[index])


def tensors() -> TensorDataset:
    return TensorDataset(torch.tensor(X), torch.tensor(Y))


FORMS: dict[str, Callable[[], object]] = {
    "a list of samples": lambda: list(X),
    "a list of batches": lambda: [X[:4], X[4:]],
    "a generator": lambda: (row for row in X),
    "a tensor": lambda: torch.tensor(X, requires_grad=True),
    "a mapping of tensors": lambda: {"x": torch.tensor(X)},
    "mappings of more than is read": lambda: ({"x": row, "name": "a"} for row in X),
    "tuples of the inputs": lambda: [(row,) for row in X],
    "inputs and labels": lambda: DataLoader(tensors(), batch_size=4),
    "inputs alone": lambda: DataLoader(TensorDataset(torch.tensor(X)), batch_size=4),
    "a dataset": Rows,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples_again_and_again(form: str) -> None:
    samples = open_samples(FORMS[form](), [spec()])
    assert samples.count == 11
    for _ in range(2):
        np.testing.assert_array_equal(joined(samples), X)


@pytest.mark.parametrize("form", ["inputs and labels", "a dataset"])
def test_what_stands_behind_the_inputs_are_labels(form: str) -> None:
    labels = open_samples(FORMS[form](), [spec()]).labels()
    assert labels is not None and labels.dtype == np.int64
    np.testing.assert_array_equal(labels, Y)


def test_labels_of_mappings_have_their_name() -> None:
    items = [{"x": X[:6], "labels": Y[:6]}, {"x": X[6:], "labels": torch.tensor(Y[6:])}]
    np.testing.assert_array_equal(open_samples(iter(items), [spec()]).labels(), Y)
    np.testing.assert_array_equal(open_samples(items, [spec()]).labels(), Y)
    assert open_samples([X], [spec()]).labels() is None
    with pytest.raises(CalibrationError, match="1 of 2 items have labels"):
        open_samples([items[0], {"x": X}], [spec()]).labels()
    with pytest.raises(CalibrationError, match=r"item 0, labels: got float32 \[11, 3\]"):
        open_samples([(X, X)], [spec()]).labels()


def test_a_shuffled_loader_is_drawn_once_so_that_samples_keep_their_places() -> None:
    samples = open_samples(DataLoader(tensors(), batch_size=4, shuffle=True), [spec()])
    first = joined(samples)
    assert sorted(first[:, 0]) == sorted(X[:, 0])
    np.testing.assert_array_equal(joined(samples), first)
    labels = samples.labels()
    assert labels is not None
    np.testing.assert_array_equal(labels, first[:, 0] // 3 % 4)


def test_no_more_items_are_drawn_than_samples_are_used() -> None:
    drawn: list[int] = []

    def items() -> Iterator[np.ndarray]:
        for index, row in enumerate(X):
            drawn.append(index)
            yield row

    samples = open_samples(items(), [spec()], limit=5)
    np.testing.assert_array_equal(joined(samples), X[:5])
    np.testing.assert_array_equal(joined(samples), X[:5])
    assert drawn == [0, 1, 2, 3, 4]


def test_workers_of_a_loader_end_when_the_samples_are_drawn() -> None:
    loader = DataLoader(tensors(), batch_size=1, num_workers=1)
    samples = open_samples(loader, [spec()], limit=2)
    assert torch.multiprocessing.active_children() == []
    np.testing.assert_array_equal(joined(samples), X[:2])


def test_a_function_makes_inputs_of_an_item_once() -> None:
    calls: list[Any] = []

    def transform(item: Any) -> dict[str, torch.Tensor]:
        calls.append(item)
        return {"x": item["pixels"] / 2 + len(calls)}

    items = [{"pixels": torch.tensor(row)} for row in X]
    samples = open_samples(items, [spec()], preprocess=transform)
    np.testing.assert_array_equal(joined(samples), X / 2 + np.arange(1, 12)[:, None])
    assert len(joined(samples)) == len(calls) == 11
    with pytest.raises(ConfigError, match="is a function, which is for the items of an iterable"):
        open_samples(X, [spec()], preprocess=transform)


def test_images_and_files_are_items_too(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    wanted = PREPROCESS["unit"].apply_batch(pixels)
    shape = (None, 3, 5, 6)
    for items in (images, paths, iter(images), [(image, 0) for image in images]):
        samples = open_samples(items, [spec(shape=shape)], preprocess="unit")
        np.testing.assert_array_equal(joined(samples), wanted)


def test_two_inputs_come_by_place_or_name_and_empty_or_flat_ones_too() -> None:
    specs = [spec("a"), spec("n", ())]
    for items in ([(X, np.float32(2))], iter([{"a": X, "n": np.float32(2)}])):
        (batch,) = open_samples(items, specs).batches(16)
        np.testing.assert_array_equal(batch["a"], X)
        assert batch["n"].shape == () and batch["n"] == 2
    samples = open_samples(iter([X[:0], X]), [spec()])
    np.testing.assert_array_equal(joined(samples), X)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([(X, Y, Y)], "item 0: got 3 entries, expected the model's 1 inputs 'x', or these and"),
        ([X, None], "item 1: got NoneType, expected an array or a tensor"),
        ([torch.zeros(3, dtype=torch.bfloat16)], "item 0: got Tensor, expected an array"),
        ([{"x": [[1.0], [2.0, 3.0]]}], r"item 0\['x'\]: got list, expected an array"),
        (iter([]), "no calibration samples found"),
        (iter([{"y": X}]), "'item 0' holds 'y', expected the model's input 'x'"),
    ],
)
def test_what_no_model_takes_is_one_line_that_names_the_item(items: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        open_samples(items, [spec()])
    assert "\n" not in str(caught.value)


def test_kept_samples_leave_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    samples = open_samples((row for row in X), [spec()])
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(joined(samples), X)
