"""ONNX Runtime: ``quantize_static`` behind ``quant_pre_process``."""

from __future__ import annotations

import logging
from pathlib import Path

from job import Job, Reader
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

WEIGHTS = {8: QuantType.QInt8, 4: QuantType.QInt4}
ACTIVATIONS = {8: QuantType.QUInt8, 4: QuantType.QUInt4}


def main() -> None:
    job = Job.from_command_line()
    if job.weight_bits not in WEIGHTS or job.act_bits not in ACTIVATIONS:
        job.cannot("its QuantType has 4, 8 and 16 bits only")
    logging.disable(logging.WARNING)
    prepared = str(Path(job.folder) / "prepared.onnx")
    quant_pre_process(job.model, prepared)
    quantize_static(
        prepared,
        job.output,
        Reader(job),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=ACTIVATIONS[job.act_bits],
        weight_type=WEIGHTS[job.weight_bits],
        calibrate_method=CalibrationMethod.MinMax,
    )
    job.finish()


if __name__ == "__main__":
    main()
