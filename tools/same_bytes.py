"""Whether two checkouts of this package convert models to the same bytes.

    git worktree add ../before HEAD~1
    ATTNROUND_DATA=... python tools/same_bytes.py ../before .

Says of each conversion ``same`` or ``DIFFERENT``, and ends with 1 if one differs. The version of
the package that a file names is not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx

MODELS = Path(__file__).resolve().parent.parent / "models"
SETTINGS = {
    "w8a8": (),
    "w4a8": ("--weight-bits", "4"),
    "w4a4-block": ("--weight-bits", "4", "--act-bits", "4", "--reconstruct", "block"),
    "openvino": ("--target", "openvino"),
    "weights": ("--weight-bits", "4", "--act-bits", "32"),
    "no-samples": ("--weight-bits", "4", "--act-bits", "32"),
}
WITHOUT_SAMPLES = {"no-samples"}
CIFAR_SAMPLES = 128
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The converting process, which imports the package from the root that PYTHONPATH names.
CONVERT = """
import json, sys
from pathlib import Path

import onnx_attnround
from onnx_attnround.__main__ import main

root, commands = json.load(sys.stdin)
if not Path(onnx_attnround.__file__).resolve().is_relative_to(root):
    sys.exit(f"imported {onnx_attnround.__file__}, expected the package in {root}")
for command in commands:
    if code := main(command):
        sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="A checkout: the folder that holds the package.")
    parser.add_argument("after", type=Path, help="The other.")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    roots = {"before": options.before.resolve(), "after": options.after.resolve()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = list(conversions(folder, options.only))
        # Both at once, on a thread each: as fast as one after the other on two.
        running = [start(root, folder / side, cases) for side, root in roots.items()]
        if any([process.wait() for process in running]):
            return 1
        different = [case for case, _ in cases if not compared(folder, case)]
    return 1 if different else 0


def conversions(folder: Path, settings: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A name for each conversion, and what the command line is given but for OUT."""
    for model, samples in models(folder):
        for setting in settings:
            calib = [] if setting in WITHOUT_SAMPLES else ["--calib", str(samples)]
            yield f"{model.stem}-{setting}", [str(model), *calib, *SETTINGS[setting]]


def models(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Models and their calibration samples."""
    for name in ("digits_resnet", "digits_mobilenet"):
        yield MODELS / f"{name}.onnx", MODELS / "digits_calib.npz"
    data = os.environ.get("ATTNROUND_DATA")
    if not data:
        print("skipped: the CIFAR-10 models, since ATTNROUND_DATA does not name their folder")
        return
    with np.load(Path(data) / "cifar10" / "calib.npz") as archive:
        images = archive["images"][:CIFAR_SAMPLES]
    values = (images.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD
    np.savez(folder / "cifar.npz", input=values.transpose(0, 3, 1, 2).astype(np.float32))
    for name in ("resnet20_cifar", "mobilenetv2_cifar"):
        yield Path(data) / f"{name}.onnx", folder / "cifar.npz"


def start(
    root: Path, folder: Path, cases: Sequence[tuple[str, list[str]]]
) -> subprocess.Popen[str]:
    """A process that does all conversions into the folder, by the package in ``root``."""
    folder.mkdir()
    common = ["--quiet", "--threads", "1"]
    commands = [
        [given[0], str(folder / f"{case}.onnx"), *given[1:], *common] for case, given in cases
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=folder,
        text=True,
    )
    process.stdin.write(json.dumps([str(root), commands]))
    process.stdin.close()
    return process


def compared(folder: Path, case: str) -> bool:
    """Whether both sides wrote the same file, which is also said."""
    before, after = (content(folder / side / f"{case}.onnx") for side in ("before", "after"))
    same = before == after
    print(f"{case}: {'same' if same else 'DIFFERENT'} ({len(before):,} bytes)", flush=True)
    return same


def content(path: Path) -> bytes:
    """The bytes of a model but for the version of the package in its metadata."""
    data = path.read_bytes()
    model = onnx.load_from_string(data)
    (version,) = (p for p in model.metadata_props if p.key == "onnx_attnround.version")
    entry = version.SerializeToString()
    # An entry of the file itself, so that no length elsewhere counts its bytes.
    field = onnx.ModelProto.METADATA_PROPS_FIELD_NUMBER << 3 | 2
    return data.replace(bytes([field, len(entry)]) + entry, b"", 1)


if __name__ == "__main__":
    sys.exit(main())
