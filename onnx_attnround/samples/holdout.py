"""Which of the calibration samples are kept apart, to measure on what nothing was fitted to."""

from __future__ import annotations

from onnx_attnround.samples import Samples

SHARE = 0.2
"""The share of the samples that is kept apart by default ..."""

LEAST, MOST = 32, 256
"""... but no fewer, and no more, than so many."""

MOST_SHARE = 1 / 3
"""The largest share by default: what the file is fitted to comes before what is said of it."""


def hold_out(samples: Samples, share: float | None) -> tuple[Samples, Samples | None]:
    """The samples to fit to, and those to measure on, which are ``None`` if there are too few.

    ``share`` of the samples are kept apart, at least one; with ``None``, a fifth but 32
    to 256, if that is no more than a third of them. 0 keeps none apart. They are spread
    over all samples, as :meth:`Samples.split` does.
    """
    if share == 0:
        return samples, None
    count = round((SHARE if share is None else share) * samples.count)
    count = max(count, 1) if share is not None else min(max(count, LEAST), MOST)
    parted = samples.split(count)
    if parted is None or (share is None and parted[1].count > MOST_SHARE * samples.count):
        return samples, None
    return parted
