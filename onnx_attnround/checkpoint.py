"""Results of finished units, kept in the work dir for the run that goes on where one was cut off.

Everything that a result depends on is hashed into the name of the folder that holds
it, so that runs of other models or settings may share a work dir. A file is one
result: the SHA-256 of the rest, then an .npz (no pickles) of its arrays and of JSON
for what is around them. A file that does not fit its hash counts as absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

import onnx_attnround
from onnx_attnround import records
from onnx_attnround.calibrate import Calibration
from onnx_attnround.calibrate.dynamic_ranges import DynamicRanges
from onnx_attnround.calibrate.float_tensors import FloatTensors
from onnx_attnround.config import QuantConfig
from onnx_attnround.errors import OutputError
from onnx_attnround.graph import digest_of, model_digest, write_atomic
from onnx_attnround.graph.scratch import scratch
from onnx_attnround.records import Array
from onnx_attnround.samples import Samples
from onnx_attnround.version import version

TAKEN = "  (from the work dir)"
# Settings that change no result that is kept.
_FREE = {"work_dir", "min_sqnr", "max_drop", "strict"}
_FREE |= {"activation_memory_mb", "weight_storage", "holdout"}
_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxsim", "torch")
_RECORDS = {
    kind.__name__: kind
    for kind in (*vars(records).values(), Calibration, DynamicRanges, FloatTensors)
    if isinstance(kind, type) and is_dataclass(kind)
}
_DIGEST = hashlib.sha256().digest_size


class Checkpoint:
    """The results of one run, by stage and number of the unit; without a folder, none.

    ``taken`` counts those that were found, by stage.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self.taken: Counter[str] = Counter()

    def part(self, name: str) -> Checkpoint:
        """The results of a run that shares this one's, and goes on from it."""
        return Checkpoint(None if self._folder is None else self._folder / name)

    def get(self, stage: str, unit: int = 0) -> Any:
        """The result, or ``None`` if the unit is not finished; raises ``OutputError``."""
        if self._folder is None:
            return None
        path = self._folder / f"{stage}-{unit:05}"
        try:
            data = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(
                f"cannot read '{path}': {error.strerror or error}; delete it, or give another "
                "`work_dir`"
            ) from error
        if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
            return None
        self.taken[stage] += 1
        return _unpacked(data[_DIGEST:])

    def put(self, result: object, stage: str, unit: int = 0) -> None:
        """Keep what :meth:`get` is to give; raises ``OutputError`` if it cannot be written.

        ``result`` is made of records, mappings, tuples, arrays, and what JSON has.
        """
        if self._folder is None:
            return
        payload = _packed(result)
        _make(self._folder)
        data = hashlib.sha256(payload).digest() + payload
        try:
            write_atomic(self._folder / f"{stage}-{unit:05}", data)
        except OutputError:
            if self._folder.is_dir():  # else the same run, elsewhere, has come to its end
                raise

    def remove(self) -> None:
        """Forget all results of the run, and of those that share them."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def check_work_dir(folder: Path) -> None:
    """Make the folder if it is missing; raises ``OutputError`` if it cannot be written to."""
    _make(folder)
    try:
        with scratch(folder):
            pass
    except OSError as error:
        raise _unusable(folder, error) from error


def open_checkpoint(
    folder: Path, model: ir.Model, samples: Samples, config: QuantConfig
) -> Checkpoint:
    """The results in the work dir ``folder`` of runs with this very model, samples and config.

    Also the code of this package and the versions of the libraries must be the same.
    """
    facts = {
        **_circumstances(config),
        "model": model_digest(model),
        "samples": digest_of(
            named for feeds in samples.batches(config.batch_size) for named in feeds.items()
        ),
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return Checkpoint(folder / name)


def _circumstances(config: QuantConfig) -> dict[str, Any]:
    sources = sorted(Path(onnx_attnround.__file__).parent.rglob("*.py"))
    libraries = [Path(path) for path in config.custom_op_library]
    files = [*sources, *(path for path in libraries if path.is_file())]
    return {
        "config": config.model_dump(mode="json", exclude=_FREE),
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "libraries": [ort.__version__, *map(version, _LIBRARIES)],
    }


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to work dir '{folder}': {error.strerror or error}; give another `work_dir`"
    )


def _packed(value: object) -> bytes:
    arrays: dict[str, Array] = {}
    text = json.dumps(_plain(value, arrays)).encode()
    buffer = io.BytesIO()
    np.savez(buffer, json=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpacked(payload: memoryview) -> Any:
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        return _value(json.loads(archive["json"].tobytes()), archive)


def _plain(value: object, arrays: dict[str, Array]) -> object:
    """``value`` for JSON; its arrays go to ``arrays``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | np.generic):
        name = f"array{len(arrays)}"
        arrays[name] = np.asarray(value)
        return {"scalar" if isinstance(value, np.generic) else "array": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _plain(item, arrays)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, arrays) for item in value]}
    if (name := type(value).__name__) not in _RECORDS or not is_dataclass(value):
        raise TypeError(f"a {name} cannot be kept in a work dir")
    entries = {field.name: getattr(value, field.name) for field in fields(value)}
    return {"record": name, "fields": _plain(entries, arrays)}


def _value(plain: Any, arrays: Mapping[str, Array]) -> Any:
    """What :func:`_plain` was given."""
    if not isinstance(plain, dict):
        return plain
    if "array" in plain:
        return arrays[plain["array"]]
    if "scalar" in plain:
        return arrays[plain["scalar"]][()]
    if "items" in plain:
        return {key: _value(item, arrays) for key, item in plain["items"]}
    if "tuple" in plain:
        return tuple(_value(item, arrays) for item in plain["tuple"])
    return _RECORDS[plain["record"]](**_value(plain["fields"], arrays))
