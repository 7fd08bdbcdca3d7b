"""The kernels that there are, and dispatch: which of them run.

op_namespaces.py: the namespaces, how they are loaded, whether they can run. override.py: which backend was asked for.
selection.py: dispatch of a call. gpus.py: what cannot run on a GPU. choosing.py, choices.json: what was measured
on which GPU. library_ops.py: what a compiled library has beside the ops of schemas.def.
"""

from __future__ import annotations

from roberta_kernels.backends.op_namespaces import (
    CPU_ISAS,
    EMULATION_VARIABLE,
    ISA_VARIABLE,
    BackendError,
    BackendStatus,
    Kernels,
    available_backends,
    build_report,
    cpu_isa,
    cpu_isas,
    cuda_served,
    cuda_variant,
    emulating,
    missing_op,
    namespaces,
    use_cpu_isa,
    use_cuda_variant,
)
from roberta_kernels.backends.override import ENVIRONMENT_VARIABLE, backend, current_backend, set_backend
from roberta_kernels.backends.selection import (
    BIASED_ATTENTION,
    Serving,
    check_environment,
    choices,
    select,
    serves_alone,
    serving,
    unserved,
)
from roberta_kernels.schemas import schemas

__all__ = [
    "BIASED_ATTENTION",
    "CPU_ISAS",
    "EMULATION_VARIABLE",
    "ENVIRONMENT_VARIABLE",
    "ISA_VARIABLE",
    "BackendError",
    "BackendStatus",
    "Kernels",
    "Serving",
    "available_backends",
    "backend",
    "build_report",
    "check_environment",
    "choices",
    "cpu_isa",
    "cpu_isas",
    "cuda_served",
    "cuda_variant",
    "current_backend",
    "emulating",
    "missing_op",
    "namespaces",
    "schemas",
    "select",
    "serves_alone",
    "serving",
    "set_backend",
    "unserved",
    "use_cpu_isa",
    "use_cuda_variant",
]
