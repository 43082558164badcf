"""Every model that the onnx package ships, through ``quantize``: converted, or refused, why.

    python tools/onnx_cases.py [--every 1] [--only 'node/test_conv*'] [--workers 2] [--seconds 60]

Up to four forms of each: ``as it is``; ``frozen``, the inputs of its weighted ops that hold
weights made constants; ``beside``, a small layer of its own added, which is quantised, so that
what the case computes must come out as it was; and ``between``, layers before and behind it. Each
runs in a worker process with a bound on time and memory, on the data that come with the case,
else on random ones. Prints counts as Markdown, and a line on each case that failed; exits with 1
if there is one.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.loader import load_model_tests

Feeds = dict[str, Any]
WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # op: first input with weights
MOST_ELEMENTS = 1_000_000  # of a random input
MEMORY = 12 << 30  # bytes of address space of a worker
NEWEST_IR = 13  # that ONNX Runtime reads; cases are of the newest that onnx has
FAILURES = ("crashed", "too slow", "does not load", "changed an output")


@dataclass(frozen=True, slots=True)
class Case:
    """One model with its feeds; ``feeds`` is empty where none ship with it."""

    name: str
    form: str
    model: bytes
    feeds: tuple[Feeds, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: ``converted``, ``refused`` or one of ``FAILURES``, and why."""

    case: Case
    kind: str
    why: str = ""


# --- the cases --------------------------------------------------------------------------


def cases(every: int = 1, only: str = "*") -> Iterator[Case]:
    """Each ``every``-th of the cases whose name fits ``only``, in all forms that it has."""
    found = [*_node_cases(), *_stored_cases()]
    for name, model, feeds in [one for one in found if fnmatch(one[0], only)][::every]:
        for form, change in FORMS.items():
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            changed.ir_version = min(changed.ir_version, NEWEST_IR)
            if (changed_feeds := change(changed, feeds)) is not None:
                yield Case(name, form, changed.SerializeToString(), tuple(changed_feeds))


def _node_cases() -> Iterator[tuple[str, onnx.ModelProto, list[Feeds]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        names = [value.name for value in case.model.graph.input]
        feeds = [
            {name: _array(data) for name, data in zip(names, inputs, strict=False)}
            for inputs, _ in case.data_sets or ()
        ]
        yield f"node/{case.name}", case.model, feeds


def _stored_cases() -> Iterator[tuple[str, onnx.ModelProto, list[Feeds]]]:
    for kind in ("simple", "pytorch-operator", "pytorch-converted"):
        for case in load_model_tests(kind=kind):
            folder = Path(case.model_dir)
            model = onnx.load(folder / "model.onnx")
            yield f"{kind}/{case.name}", model, _stored_feeds(folder, model)
    for path in sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx")):
        yield f"light/{path.stem}", onnx.load(path), []


def _stored_feeds(folder: Path, model: onnx.ModelProto) -> list[Feeds]:
    """The data sets beside a model, those of tensors."""
    constants = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in constants]
    feeds = []
    for data in sorted(folder.glob("test_data_set_*")):
        files = [data / f"input_{index}.pb" for index in range(len(names))]
        if all(file.is_file() for file in files):
            tensors = [onnx.TensorProto.FromString(file.read_bytes()) for file in files]
            feeds.append(dict(zip(names, map(_array, tensors), strict=True)))
    return feeds


def _array(data: Any) -> Any:
    """A tensor as an array, NaN and infinities, which are no samples, as zeros."""
    if isinstance(data, onnx.TensorProto):
        data = onnx.numpy_helper.to_array(data)
    if not isinstance(data, np.ndarray | np.generic | float | int):
        return data  # a sequence, or nothing
    array = np.asarray(data)
    return np.where(np.isfinite(array), array, 0) if array.dtype.kind == "f" else array


def _as_it_is(model: onnx.ModelProto, feeds: list[Feeds]) -> list[Feeds]:
    return feeds


def _frozen(model: onnx.ModelProto, feeds: list[Feeds]) -> list[Feeds] | None:
    """Weights that are inputs as constants; ``None`` if there are none."""
    graph = model.graph
    given = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    weights = {
        name
        for node in graph.node
        for name in node.input[WEIGHTED.get(node.op_type, len(node.input)) :]
        if name in given
    }
    if not weights or not feeds or not all(_is_float(feeds[0].get(name)) for name in weights):
        return None
    for name in sorted(weights):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(feeds[0][name]), name))
    if model.ir_version >= 4:  # before, every constant was an input too
        kept = [value for value in graph.input if value.name not in weights]
        del graph.input[:]
        graph.input.extend(kept)
    return [{name: data for name, data in feed.items() if name not in weights} for feed in feeds]


def _is_float(data: object) -> bool:
    return isinstance(data, np.ndarray) and data.dtype.kind == "f"


def _beside(model: onnx.ModelProto, feeds: list[Feeds]) -> list[Feeds] | None:
    """With a layer of its own, ``beside_y = MatMul(beside_x, beside_w)``."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "beside_w"))
    for values, name, size in ((model.graph.input, "x", 4), (model.graph.output, "y", 3)):
        values.append(
            onnx.helper.make_tensor_value_info(f"beside_{name}", onnx.TensorProto.FLOAT, [2, size])
        )
    model.graph.node.append(
        onnx.helper.make_node("MatMul", ["beside_x", "beside_w"], ["beside_y"], "beside")
    )
    if model.ir_version < 4:  # every constant is an input too
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("beside_w", onnx.TensorProto.FLOAT, weight.shape)
        )
    _import_standard(model)
    row = rng.normal(size=(2, 4)).astype(np.float32)
    return [{**feed, "beside_x": row} for feed in feeds]


def _between(model: onnx.ModelProto, feeds: list[Feeds]) -> list[Feeds] | None:
    """With layers of identity before and behind it; ``None`` where there is no place for them."""
    graph = model.graph
    inner = any(a.type == onnx.AttributeProto.GRAPH for node in graph.node for a in node.attribute)
    before = [value for value in graph.input if _may_join(value)]
    behind = [value for value in graph.output if _may_join(value)]
    if inner or model.ir_version < 4 or not before or not behind:
        return None
    nodes = list(graph.node)
    given = {value.name for value in before}
    names = given | {value.name for value in behind}
    for node in nodes:
        for values in (node.input, node.output):
            values[:] = [f"{name}_inner" if name in names else name for name in values]
    del graph.node[:]
    graph.node.extend(_identity(graph, v, v.name, f"{v.name}_inner") for v in before)
    graph.node.extend(nodes)
    late = [value for value in behind if value.name not in given]
    graph.node.extend(_identity(graph, v, f"{v.name}_inner", v.name) for v in late)
    _import_standard(model)
    return feeds


def _import_standard(model: onnx.ModelProto) -> None:
    if all(opset.domain for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("", 17))


def _may_join(value: onnx.ValueInfoProto) -> bool:
    """Whether it is a float tensor of at least two known dimensions."""
    kind = value.type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    return kind.elem_type == onnx.TensorProto.FLOAT and 2 <= len(shape) <= 5 and min(shape) > 0


def _identity(graph: onnx.GraphProto, value: onnx.ValueInfoProto, x: str, y: str) -> onnx.NodeProto:
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    weight = np.eye(shape[1], dtype=np.float32)
    op = "MatMul" if len(shape) == 2 else "Conv"
    weight = weight if op == "MatMul" else weight.reshape(*weight.shape, *(1 for _ in shape[2:]))
    graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{value.name}_weight"))
    return onnx.helper.make_node(op, [x, f"{value.name}_weight"], [y], f"{value.name}_layer")


Change = Callable[[onnx.ModelProto, list[Feeds]], "list[Feeds] | None"]
FORMS: Mapping[str, Change] = {
    "as it is": _as_it_is, "frozen": _frozen, "beside": _beside, "between": _between,
}  # fmt: skip


# --- one case, in a worker --------------------------------------------------------------


def judge(case: Case) -> tuple[str, str]:
    """The kind of outcome, and why."""
    from onnx_attnround import AttnRoundError, QuantConfig, quantize

    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "in.onnx", Path(name) / "out.onnx"
        source.write_bytes(case.model)
        try:
            feeds = case.feeds or random_feeds(source)
            result = quantize(source, list(feeds), QuantConfig(threads=1, steps=5), output=target)
        except AttnRoundError as error:
            return "refused", str(error)
        except Exception:
            return "crashed", traceback.format_exc()
        kind, why = _compare(source, target, feeds, _quantised(result))
        return kind, why or _least_sqnr(result)


def _least_sqnr(result: Any) -> str:
    worst = result.verification.worst_output if result.verification else None
    return "" if worst is None or worst.sqnr_db is None else f"{worst.sqnr_db:.0f} dB"


def _quantised(result: Any) -> set[str]:
    """The names of all outputs that a quantised layer or an activation with Q/DQ leads to.

    Codes become floats in a DequantizeLinear, or in Cast and Mul.
    """
    touched: set[str] = set()
    for node in result.model.graph:
        own = (node.name or "").endswith("/dequantize")
        if own or any(value is not None and value.name in touched for value in _reads(node)):
            touched.update(value.name for value in node.outputs)
    return touched


def _reads(node: Any) -> Iterator[Any]:
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            for inner in attribute.as_graph().all_nodes():
                yield from inner.inputs


def random_feeds(source: Path) -> tuple[Feeds, ...]:
    """Two feeds of noise, integers 0 or 1; of absurd sizes ones."""
    from onnx_attnround.graph import input_specs, load

    rng = np.random.default_rng(0)

    def noise(spec: Any) -> Any:
        shape = [size or 2 for size in spec.shape]
        shape = shape if math.prod(shape) <= MOST_ELEMENTS else [1 for _ in shape]
        values = rng.normal(size=shape) if spec.dtype.kind == "f" else rng.integers(0, 2, shape)
        return np.asarray(values).astype(spec.dtype)

    specs = input_specs(load(source))
    return tuple({spec.name: noise(spec) for spec in specs} for _ in range(2))


def _compare(
    source: Path, target: Path, feeds: Sequence[Feeds], quantised: set[str]
) -> tuple[str, str]:
    from onnx_attnround import AttnRoundError
    from onnx_attnround.runtime.session import open_session

    expected, again = open_session(source, threads=1), open_session(source, threads=1)
    try:
        got = open_session(target, threads=1)
    except AttnRoundError as error:
        return "does not load", str(error)
    names = [output.name for output in expected.get_outputs()]
    for feed in feeds:
        values = [session.run(names, feed) for session in (expected, got, again)]
        for name, old, new, repeated in zip(names, *values, strict=True):
            fixed = _same(old, repeated)  # no random numbers
            if name not in quantised and fixed and not _same(old, new):
                return "changed an output", f"'{name}': {_difference(old, new)}"
    return "converted", ""


def _same(old: Any, new: Any) -> bool:
    if not isinstance(old, np.ndarray) or not isinstance(new, np.ndarray):
        return str(old) == str(new)
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    if old.dtype.kind not in "fc":
        return bool((old == new).all())
    finite = np.abs(old[np.isfinite(old)])
    slack = 4 * float(np.finfo(old.dtype).eps) * float(finite.max(initial=0))
    return bool(np.allclose(old, new, rtol=0, atol=slack, equal_nan=True))


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray) and old.shape == new.shape:
        return f"{old.dtype} {old.reshape(-1)[:4]} became {new.dtype} {new.reshape(-1)[:4]}"
    return f"{str(old)[:80]} became {str(new)[:80]}"


# --- workers ----------------------------------------------------------------------------


def _serve(connection: Connection) -> None:
    """Judge the cases that come down the line."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"  # cases are of the newest opset
    warnings.simplefilter("ignore")
    while True:
        connection.send(judge(connection.recv()))


class Worker:
    """A process that judges cases; a new one when it dies or takes too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: Any = None
        self._line: Any = None

    def run(self, case: Case) -> Outcome:
        if self._process is None:
            self._start()
        self._line.send(case)
        try:
            if self._line.poll(self._seconds):
                return Outcome(case, *self._line.recv())
            kind, why = "too slow", f"more than {self._seconds:g} s"
        except EOFError:
            self._process.join()
            kind, why = "crashed", f"the process ended with {self._process.exitcode}"
        self.stop()
        return Outcome(case, kind, why)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def judge_all(
    wanted: Sequence[Case], workers: int, seconds: float, told: Callable[[Outcome], None]
) -> list[Outcome]:
    """The outcomes of all cases, each told when it is there."""
    queue: SimpleQueue[Case] = SimpleQueue()
    for case in wanted:
        queue.put(case)
    outcomes: list[Outcome] = []

    def work() -> None:
        worker = Worker(seconds)
        try:
            while True:
                outcome = worker.run(queue.get_nowait())
                outcomes.append(outcome)
                told(outcome)
        except Empty:
            pass
        finally:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


# --- figures ----------------------------------------------------------------------------


def reason(why: str) -> str:
    """A refusal without the names and numbers that are the case's own."""
    text = re.sub(r"\(.*?\)", "", why.partition(";")[0])
    text = re.sub(r"'[^']*'", "'…'", re.sub(r"\[[^\]]*\]", "[…]", text))
    return re.sub(r"\s+", " ", re.sub(r"\d+", "n", text)).strip()[:110]


def table(outcomes: Sequence[Outcome], forms: Sequence[str] = tuple(FORMS)) -> str:
    """Counts for each form, and the refusals by reason, as Markdown."""
    kinds = ("converted", "refused", *FAILURES)
    lines = ["| | tried | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
    for form in (*forms, "all"):
        mine = [one for one in outcomes if form in (one.case.form, "all")]
        count = Counter(one.kind for one in mine)
        lines.append(f"| {form} | {len(mine)} | " + " | ".join(str(count[k]) for k in kinds) + " |")
    refused = Counter(reason(one.why) for one in outcomes if one.kind == "refused")
    lines += ["", "| refused | cases |", "|---|---|"]
    lines += [f"| {why} | {number} |" for why, number in refused.most_common()]
    return "\n".join(lines)


def main() -> int:
    """Judge, print, and say with the exit code whether anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take each n-th case only")
    parser.add_argument("--only", default="*", help="a glob on names such as node/test_abs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="bound for one case")
    parser.add_argument("--verbose", action="store_true", help="print a line on every case")
    options = parser.parse_args()
    start = time.monotonic()

    def told(one: Outcome) -> None:
        if options.verbose or one.kind in FAILURES:
            print(f"{one.case.name} ({one.case.form}): {one.kind}: {one.why}", flush=True)

    wanted = list(cases(options.every, options.only))
    outcomes = judge_all(wanted, options.workers, options.seconds, told)
    print(table(outcomes))
    print(f"\n{len(outcomes)} in {time.monotonic() - start:.0f} s, onnx {onnx.__version__}")
    return int(any(one.kind in FAILURES for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
