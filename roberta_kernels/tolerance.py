"""The numerical promise (docs/design.md, section 6), in one place for tests and for `verify`.

    error(ours, float64) <= 2 * error(the original at that dtype, float64) + a rounding floor

Both errors are taken two ways, and both must hold: the largest absolute difference, and the root mean square of it
(which sees a small error that is everywhere). The floor allows for the original being exact by luck: `floor_ulps`
roundings, in the dtype at hand, of the largest value in the float64 result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The errors of one tensor: ours, the original's, and the most that ours may be."""

    name: str
    max_error: float
    max_error_original: float
    max_allowed: float
    rms_error: float
    rms_error_original: float
    rms_allowed: float

    @property
    def holds(self) -> bool:
        return self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "BROKEN"
        return (
            f"{self.name}: {verdict}: largest error {self.max_error:.3e} (original {self.max_error_original:.3e}, "
            f"allowed {self.max_allowed:.3e}); rms {self.rms_error:.3e} (original {self.rms_error_original:.3e}, "
            f"allowed {self.rms_allowed:.3e})"
        )


def compare(
    ours: Tensor, original: Tensor, exact: Tensor, *, name: str = "output", floor_ulps: float = 2.0
) -> Comparison:
    """Measures `ours` and `original` (same dtype) against `exact` (float64), all of one shape.

    Where `exact` is nan or infinite, ours must be too (same kind, same sign); such elements leave the error.
    """
    if ours.shape != exact.shape or original.shape != exact.shape:
        raise ValueError(f"{name}: shapes differ: {tuple(ours.shape)}, {tuple(original.shape)}, {tuple(exact.shape)}")
    if ours.dtype != original.dtype:
        raise ValueError(f"{name}: ours is {ours.dtype}, the original {original.dtype}")
    eps = torch.finfo(ours.dtype).eps
    ours64, original64, exact64 = (t.detach().to(exact.device, torch.float64) for t in (ours, original, exact))
    if exact64.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    finite = exact64.isfinite()
    agree = torch.where(exact64.isnan(), ours64.isnan(), ours64 == exact64)
    if not bool((finite | agree).all()):
        return Comparison(name, float("inf"), 0.0, 0.0, float("inf"), 0.0, 0.0)
    # A finite result where the original overflowed is better, not worse: its error counts as zero.
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    error = torch.where(finite, ours64 - exact64, zero).abs().nan_to_num(nan=float("inf"))
    error_original = torch.where(finite & original64.isfinite(), original64 - exact64, zero).abs()
    scale = torch.where(finite, exact64, zero).abs()

    def rms(t: Tensor) -> float:
        return float(t.square().mean().sqrt())

    floor = floor_ulps * eps
    return Comparison(
        name,
        float(error.max()),
        float(error_original.max()),
        2.0 * float(error_original.max()) + floor * float(scale.max()),
        rms(error),
        rms(error_original),
        2.0 * rms(error_original) + floor * rms(scale),
    )


def assert_three_way(
    ours: Tensor, original: Tensor, exact: Tensor, *, name: str = "output", floor_ulps: float = 2.0
) -> None:
    """Raises AssertionError, with the figures, where the promise does not hold."""
    comparison = compare(ours, original, exact, name=name, floor_ulps=floor_ulps)
    assert comparison.holds, str(comparison)
