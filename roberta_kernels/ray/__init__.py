"""A corpus larger than a machine: encode() on Ray Data (docs/design.md, section 11; docs/encoding.md, "On a cluster").

Ray is the engine, and the extra `ray` installs it. Importing this does not import it; nor torch, which the tasks that
read files do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roberta_kernels.lazy import attributes

if TYPE_CHECKING:
    from roberta_kernels.ray.encoder import Encoder
    from roberta_kernels.ray.report import RayReport
    from roberta_kernels.ray.run import encode, import_ray

__all__ = ["Encoder", "RayReport", "encode", "import_ray"]

__getattr__, __dir__ = attributes(
    __name__, {"Encoder": "encoder", "RayReport": "report", "encode": "run", "import_ray": "run"}
)
