"""Does the numerical promise (docs/design.md, section 6) hold for this model? `verify` runs it and says so.

verify.py compares the runs of the original, the patched and the float64 model; run.py is one such run; batches.py makes
what they run on; report.py is the answer.
"""

from roberta_kernels.verification.batches import complete_batch, generated_batch
from roberta_kernels.verification.report import (
    GRADIENT,
    LAYERWISE,
    ORDINARY,
    Entry,
    VerificationError,
    VerificationReport,
)
from roberta_kernels.verification.verify import nudge, over_draws, verify

__all__ = [
    "GRADIENT",
    "LAYERWISE",
    "ORDINARY",
    "Entry",
    "VerificationError",
    "VerificationReport",
    "complete_batch",
    "generated_batch",
    "nudge",
    "over_draws",
    "verify",
]
