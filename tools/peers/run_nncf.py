"""NNCF: post-training quantisation with its accurate bias correction, all samples."""

from __future__ import annotations

import nncf
import onnx
from job import Job
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix


def main() -> None:
    job = Job.from_command_line()
    if (job.weight_bits, job.act_bits) != (8, 8):
        job.cannot("8 bits only in ONNX; its compression to 4 bits takes MatMul alone")
    feeds = job.batches(1)
    quantised = nncf.quantize(
        onnx.load(job.model),
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
        fast_bias_correction=False,
        # Else weights keep to 7 bits, for CPUs without VNNI.
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
    )
    onnx.save(quantised, job.output)
    job.finish()


if __name__ == "__main__":
    main()
