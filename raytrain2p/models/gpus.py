"""What GPUs can do, from NVIDIA's data sheets: SXM modules in a DGX; L4 and L40S on PCIe, with 100 Gbit/s a node."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of the links.

    Args:
        flops: a second, dense bfloat16.
        bandwidth: of its memory, bytes a second.
        memory: bytes.
        link: to the other GPUs of a node, bytes a second in one direction.
        network: of a node, bits a second in one direction.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float


GPUS = {
    "a100": Gpu(312e12, 2.039e12, 80e9, 300e9, 1600e9),
    "h100": Gpu(989.4e12, 3.35e12, 80e9, 450e9, 3200e9),
    "h200": Gpu(989.4e12, 4.8e12, 141e9, 450e9, 3200e9),
    "b200": Gpu(2250e12, 8e12, 180e9, 900e9, 3200e9),
    "l4": Gpu(121e12, 0.3e12, 24e9, 32e9, 100e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9, 32e9, 100e9),
}


def gpu_of(name: str) -> Gpu | None:
    """Of a name such as `NVIDIA H100 80GB HBM3`, or None. That of another form, such as `H100 PCIe`, is None too."""
    words = name.lower().replace("-", " ").split()
    return next((gpu for key, gpu in GPUS.items() if key in words), None) if "pcie" not in words and "nvl" not in words else None
