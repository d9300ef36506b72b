"""Which precision the hardware multiplies natively."""

import torch

from raytrain2p.models.distributed import WorkerGroup


def resolve_precision(setting: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device has the instructions for it: emulated, it is slower than float32."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def agree_on_precision(setting: str, device: torch.device, group: WorkerGroup) -> str:
    """bf16 only if every worker's hardware has it: workers in different precisions would not train one model."""
    return "bf16" if set(group.gather(resolve_precision(setting, device))) == {"bf16"} else "float32"
