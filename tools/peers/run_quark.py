"""AMD Quark: AdaRound or AdaQuant layer by layer, as in its presets."""

from __future__ import annotations

from job import Job, Reader
from quark.onnx import (
    AdaQuantConfig,
    AdaRoundConfig,
    Int8Spec,
    ModelQuantizer,
    QConfig,
    QLayerConfig,
    UInt8Spec,
)
from quark.onnx.quantization.config.spec import CalibMethod, QuantGranularity

# Steps, samples and batch of its presets for AdaRound and AdaQuant.
PRESET = {"num_iterations": 1000, "data_size": 1000, "batch_size": 2, "early_stop": True}


def main() -> None:
    job = Job.from_command_line()
    if (job.weight_bits, job.act_bits) != (8, 8):
        job.cannot("integers of 8, 16 and 32 bits; 4 bits for the weights of MatMul alone")
    algorithm = {
        "adaround": AdaRoundConfig(learning_rate=0.1, **PRESET),
        "adaquant": AdaQuantConfig(learning_rate=1e-5, **PRESET),
    }[job.method]
    config = QConfig(
        global_config=QLayerConfig(
            activation=UInt8Spec(calibration_method=CalibMethod.MinMax),
            weight=Int8Spec(
                calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel
            ),
        ),
        algo_config=[algorithm],
    )
    ModelQuantizer(config).quantize_model(job.model, job.output, Reader(job))
    job.finish()


if __name__ == "__main__":
    main()
