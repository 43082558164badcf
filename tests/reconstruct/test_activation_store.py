"""The store keeps activations within a budget of memory, and the rest in files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onnx_attnround.errors import OutputError
from onnx_attnround.reconstruct.activation_store import ActivationStore
from onnx_attnround.runtime.device import fetched


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store spills to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def array(size: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return torch.from_numpy(values)


def test_stays_in_memory_up_to_the_budget_and_spills_the_rest(folder: Path) -> None:
    with ActivationStore(100) as store:
        store.put("x", 0, array(60))
        store.put("x", 1, array(40))
        assert files(folder) == []
        store.put("x", 2, array(1))
        assert [path.stat().st_size for path in files(folder)] == [1]


def test_released_memory_is_used_again_and_spilled_files_vanish(folder: Path) -> None:
    with ActivationStore(100) as store:
        for name in ("a", "b"):
            for batch in range(2):
                store.put(name, batch, array(50))
        assert len(files(folder)) == 2
        store.release("b")
        assert files(folder) == []
        store.put("c", 0, array(50))
        assert len(files(folder)) == 1
        store.release("a")
        store.put("d", 0, array(100))
        assert len(files(folder)) == 1
        with pytest.raises(KeyError):
            store.get("a", 0)


def test_release_of_an_unknown_name_does_nothing(folder: Path) -> None:
    with ActivationStore(10) as store:
        store.put("ab", 0, array(4))
        store.release("a")
        np.testing.assert_array_equal(store.get("ab", 0), array(4))


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize(
    "values",
    [
        np.float32([[np.nan, np.inf, -0.0], [1e-45, 3.4e38, 1.0]]),
        np.arange(24, dtype=np.uint16).reshape(2, 3, 4),
        np.int8([-128, 127]),
        np.array([True, False]),
        np.asarray(3.5),
        np.zeros((0, 3), np.float32),
    ],
    ids=lambda values: f"{values.dtype}{list(values.shape)}",
)
def test_gives_back_the_very_bytes(folder: Path, budget: int, values: np.ndarray) -> None:
    with ActivationStore(budget) as store:
        store.put("x", 3, torch.from_numpy(values))
        got = fetched(store.get("x", 3))
        again = fetched(store.get("x", 3))
    assert (got.dtype, got.shape) == (values.dtype, values.shape)
    assert got.tobytes() == again.tobytes() == values.tobytes()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=20))
def test_any_order_of_puts_and_releases_keeps_to_the_budget(
    steps: list[tuple[str, int]],
) -> None:
    held: dict[tuple[str, int], torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        with ActivationStore(64) as store:
            for number, (name, size) in enumerate(steps):
                if size == 0:
                    store.release(name)
                    held = {key: value for key, value in held.items() if key[0] != name}
                else:
                    held[name, number] = array(size, number)
                    store.put(name, number, held[name, number])
                on_disk = sum(path.stat().st_size for path in files(Path(folder)))
                total = sum(value.nbytes for value in held.values())
                assert 0 <= total - on_disk <= 64
                for (key, batch), value in held.items():
                    np.testing.assert_array_equal(store.get(key, batch), value)
        assert list(Path(folder).iterdir()) == []


def test_what_torch_has_no_type_for_stays_in_memory(folder: Path) -> None:
    words = np.array([["a", "bc"]], object)
    with ActivationStore(0) as store:
        store.put("x", 0, words)
        np.testing.assert_array_equal(store.get("x", 0), words)
        assert files(folder) == []
        store.release("x")
        store.put("y", 0, array(1))
        assert len(files(folder)) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaves_no_file_behind_when_the_walk_fails(
    folder: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), ActivationStore(0) as store:
        store.put("x", 0, array(10))
        assert len(files(folder)) == 1
        raise error
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    with (
        pytest.raises(OutputError, match="cannot keep activations on disk: .*TMPDIR") as caught,
        ActivationStore(0) as store,
    ):
        store.put("x", 0, array(10))
    assert "\n" not in str(caught.value)
