"""Whether what a packed file gives back is what the source says, within what its type may lose."""

from __future__ import annotations

import numpy as np

from cpu_kernels.blocks import BlockFormat
from cpu_kernels.contract import BLOCK, padded

_F16_STEP = 2.0**-11  # relative error of a scale's rounding to f16
_F16_LEAST = 2.0**-25  # the same among f16's subnormals, absolute


def within_bounds(found: np.ndarray, source: np.ndarray, form: BlockFormat, fed: bool = False) -> bool:
    """Whether `found`, read back from `form`, can stand for `source`; both f32 [n, columns].

    A block's mean squared error is at most that of plain rounding, half a step of its largest weight / 127 or / 7;
    where only one scale was tried, as in int8, no weight is more than a step off. Both allow for the rounding of the
    scale itself. With error feedback (`fed`) weights move on purpose, so that only the mean over all blocks is bounded,
    by twice the step.
    """
    error, top = _blocks(found - source), np.abs(_blocks(source)).max(axis=2)
    high = form.largest
    allowed = top * (0.5 / high + _F16_STEP) + high * _F16_LEAST
    if fed:
        return bool(np.square(error).mean() <= 4 * np.square(allowed).mean())
    # A step may be twice as wide, the power of two that holds the largest, where that has the smaller squared error.
    near = len(form.tried) > 1 or bool((np.abs(error).max(axis=2) <= 2 * allowed).all())
    return near and bool((np.square(error).mean(axis=2) <= allowed**2).all())


def _blocks(x: np.ndarray) -> np.ndarray:
    """x [n, columns] as [n, blocks, 32], padded with zeros."""
    wide = np.zeros((len(x), padded(x.shape[1])), np.float32)
    wide[:, : x.shape[1]] = x
    return wide.reshape(len(x), -1, BLOCK)
