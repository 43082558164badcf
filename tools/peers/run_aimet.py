"""AIMET: AdaRound layer by layer, 500 steps each."""

from __future__ import annotations

import aimet_onnx
import numpy as np
import onnx
from job import Job

STEPS = 500
CONFIG = "default"  # per channel, symmetric weights


def main() -> None:
    job = Job.from_command_line()
    feeds = job.batches()
    sim = aimet_onnx.QuantizationSimModel(
        onnx.load(job.model),
        param_type=aimet_onnx.qtype.int(job.weight_bits),
        activation_type=aimet_onnx.qtype.int(job.act_bits),
        quant_scheme="min_max",
        config_file=CONFIG,
        session_options_kwargs={"intra_op_num_threads": 1},
    )
    aimet_onnx.apply_adaround(sim, feeds, STEPS)
    sim.compute_encodings(feeds)
    try:
        onnx.save(sim.to_onnx_qdq(prequantize_constants=True), job.output)
    except RuntimeError as error:
        job.remarks.append(f"no export: {error}")
        job.simulate(lambda batch: np.asarray(sim.session.run(None, {job.input: batch})[0]))
    job.finish()


if __name__ == "__main__":
    main()
