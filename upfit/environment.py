"""Versions and hardware of this machine."""

import platform
from typing import Any

from upfit import provenance


def environment() -> dict[str, Any]:
    """What a bug report needs to say: versions, system, cores, memory in GB, accelerators by name."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        **provenance.versions(),
        "system": platform.platform(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "accelerators": ", ".join(gpus) or "none",
    }
