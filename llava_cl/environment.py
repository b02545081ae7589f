"""Which environment a rank gets: the one list of variables that would change a result, or with whom a rank talks.

What is left says where things are, how fast they go and what is logged.
"""

from __future__ import annotations

from collections.abc import MutableMapping

RESULT = (
    # Precision, sharding, accumulation, clipping, compilation and kernels of accelerate and transformers.
    *("ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "TRANSFORMERS_", "XLA_"),
    *("MIXED_PRECISION", "TRUST_REMOTE_CODE", "USE_HUB_KERNELS", "USE_TORCH_XLA", "KUBEFLOW_TRAINER_"),
    # Precision of torch's products, and its guard against pickles.
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "DEEPSPEED_", "DS_"),
)
"""Beginnings of the names of variables that change what is computed."""

MEETING = (
    # Arguments of torchrun, and what this or another launcher tells a rank.
    *("PET_", "TORCHELASTIC_", "TORCH_ELASTIC_", "TORCH_DISTRIBUTED_USE_", "RANK", "WORLD_SIZE", "MASTER_"),
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK", "GROUP_", "ROLE_", "CROSS_", "NPROC"),
    *("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "MPI_LOCAL", "SMDATAPARALLEL_", "SM_", "PYTHONINSPECT"),
)
"""Beginnings of those that make it wait for ranks of another job."""

_KEPT = frozenset(
    {"DS_ACCELERATOR", "DS_SKIP_CUDA_CHECK", "TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
)


def drop(environment: MutableMapping[str, str], beginnings: tuple[str, ...]) -> None:
    """Takes the variables whose names begin so out of an environment."""
    for name in [name for name in environment if name.startswith(beginnings) and name not in _KEPT]:
        del environment[name]
