"""NVIDIA Model Optimizer: int8 with its default calibration, on the CPU."""

from __future__ import annotations

import numpy as np
from job import Job
from modelopt.onnx.quantization import quantize


def main() -> None:
    job = Job.from_command_line()
    if (job.weight_bits, job.act_bits) != (8, 8):
        job.cannot("8 bits, or weights alone of MatMul and Gemm at 4 bits")
    samples = np.concatenate([feed[job.input] for feed in job.batches()])
    quantize(
        job.model,
        quantize_mode="int8",
        calibration_data={job.input: samples},
        calibration_method=job.method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=job.output,
    )
    job.finish()


if __name__ == "__main__":
    main()
