"""Where tensors are worked on, in which precision, by whom, and by which random numbers."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

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


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for what is narrower, else itself."""
    return torch.promote_types(torch.float32, dtype)


def in_a_transform() -> bool:
    """Whether torch compiles, or `torch.func` vectorises, this code: then it wants the equations, and no backward pass
    of ours."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


# -- random numbers ----------------------------------------------------------------------------------------------


def random_numbers_kept(device: torch.device) -> AbstractContextManager[object]:
    """Leaves torch's global generators as they were, that of the device too."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.random.fork_rng(devices=[index], device_type=device.type)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the global generators that a training there draws from, by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(device: torch.device, states: dict[str, Tensor]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)
