"""Where tensors are worked on, and in which precision."""

import torch

from recsim_gr.errors import ConfigError

PRECISIONS = ("float32", "bfloat16", "auto")
"""float32; products in bfloat16 (autocast); or those wherever the device has such products."""


def resolve_device(device: str | torch.device) -> torch.device:
    """A device of this machine.

    Raises:
        ConfigError: no such device here; says which there are.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device; there are {', '.join(device_names())}") from error
    name = str(found) if found.index is not None else f"{found.type}:0"
    if name not in device_names() and found.type != "cpu":
        raise ConfigError(f"device {str(found)!r} is not on this machine; there are {', '.join(device_names())}")
    return found


def device_names() -> list[str]:
    """The devices of this machine: ``cpu``, and those of an accelerator that torch can use."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What products are to be in by `torch.autocast`; None for none.

    Args:
        precision: one of `PRECISIONS`.
        device: where.
    """
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16_products(device)):
        return torch.bfloat16
    return None


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively, and so faster than float32: CUDA from compute capability 8 on, a
    CPU with avx512_bf16 or amx_bf16. Elsewhere it is emulated and slow."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
