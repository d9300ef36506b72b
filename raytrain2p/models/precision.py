"""Which precision the hardware multiplies natively."""

import torch


def resolve_precision(setting: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device has the instructions for it: emulated, it is slower than float32."""
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"
