"""Memory and peak FLOP/s of GPUs, by their makers' data sheets, without sparsity."""

from dataclasses import dataclass

from upfit.errors import UpfitError


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes, peaks in FLOP/s: bfloat16 with float32 accumulation, and float32 (TF32 where torch allows it is not
    counted on)."""

    name: str
    memory: float
    bfloat16: float
    float32: float

    def peak(self, dtype: str) -> float:
        return {"bfloat16": self.bfloat16, "float32": self.float32}[dtype]


# NVIDIA's data sheets of the SXM modules; dense figures are half of those told "with sparsity".
GPUS = {
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 80e9, 312e12, 19.5e12),
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 80e9, 989e12, 67e12),
    "h200": Gpu("NVIDIA H200 SXM 141 GB", 141e9, 989e12, 67e12),
    "b200": Gpu("NVIDIA B200 180 GB", 180e9, 2250e12, 75e12),
}


def find_gpu(name: str) -> Gpu:
    """Raises UpfitError for one that is not known: a guess would be worse."""
    if name.lower() not in GPUS:
        raise UpfitError(f"--gpu {name} is not known; give one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
