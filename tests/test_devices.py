"""Devices and precision: what there is, what is refused, and that no tensor is made on the CPU when the others are not.

There is no accelerator where these tests run, so they pretend one: tensors that say that they are on another device,
compute on the CPU, and refuse to meet a tensor that is there.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from recsim_gr import training
from recsim_gr.backbones import BACKBONES, Backbone, new_backbone
from recsim_gr.devices import autocast_dtype, device_names, has_bfloat16_products, resolve_device
from recsim_gr.errors import ConfigError
from recsim_gr.histories import Batch, Histories
from recsim_gr.log import InteractionLog
from recsim_gr.prefixes import (
    chosen_log_probs,
    imitation_loss,
    last_imitation_loss,
    negative_log_likelihood,
    prefix_log_probs,
    prefix_logits,
)
from recsim_gr.pretraining import pretrain
from recsim_gr.sampled_softmax import Softmax, SoftmaxConfig
from recsim_gr.training import TrainingConfig
from recsim_gr.world import World, WorldConfig

PRETENDED = torch.device("meta")
"""Its autograd needs no driver, and its kernels are never reached."""


class Elsewhere(torch.Tensor):
    """A tensor that says it is on `PRETENDED`."""

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(
            cls, kept.size(), strides=kept.stride(), dtype=kept.dtype, device=PRETENDED
        )

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.kept})"

    def tolist(self) -> Any:
        return self.kept.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(func, args, kwargs or {})


class PretendedDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on `PRETENDED`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the function gives, computed on the CPU, and where it belongs."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device = kwargs.get("device")
    there = any(isinstance(x, Elsewhere) for x in given) if device is None else torch.device(device) == PRETENDED
    if func not in COPIES and any(isinstance(x, Elsewhere) for x in given):
        stray = [x for x in given if not isinstance(x, Elsewhere) and x.dim() > 0]
        if stray:
            raise RuntimeError(f"{func} got a tensor on the CPU, of shape {tuple(stray[0].shape)}, beside others")
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    plain_args, plain_kwargs = tree_map(lambda x: x.kept if isinstance(x, Elsewhere) else x, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    known = {id(x.kept): x for x in given if isinstance(x, Elsewhere)}  # what was written in place

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not there:
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x)

    return tree_map(placed, found)


ADAMW = torch.optim.AdamW
"""Its fused kernel knows which devices there are."""


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that is not the CPU."""
    asked, autocast = torch.is_autocast_enabled, torch.autocast

    def is_enabled(kind: str) -> bool:
        return False if kind == PRETENDED.type else asked(kind)

    def context(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == PRETENDED.type else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(torch, "is_autocast_enabled", is_enabled)
    monkeypatch.setattr(torch, "autocast", context)
    with PretendedDevice():
        yield PRETENDED


@pytest.fixture(scope="module")
def log() -> InteractionLog:
    """Histories of different lengths, and titles that are not out yet."""
    config = WorldConfig(n_titles=20, history_length=6, history_median=4, cold_share=0.2)
    return World(config).generate_log(40)


def backbone_of(kind: str, n_titles: int) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BACKBONES[kind].config_type(dimensions=8, max_length=6, dropout=0.0)
        return new_backbone(config, n_titles)


def gradients(backbone: Backbone) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    return {name: grad.kept if isinstance(grad, Elsewhere) else grad for name, grad in found.items()}


def losses(backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
    counts = torch.ones(backbone.n_titles)
    sampled = Softmax(SoftmaxConfig(kind="sampled", negatives=8), backbone.n_titles, counts)
    torch.manual_seed(1)
    return {
        "imitation": imitation_loss(backbone, batch),
        "chunked": imitation_loss(backbone, batch, softmax=Softmax(SoftmaxConfig(chunk_rows=7), backbone.n_titles)),
        "sampled": imitation_loss(backbone, batch, softmax=sampled),
        "last": last_imitation_loss(backbone, batch),
        "logits": -chosen_log_probs(torch.log_softmax(prefix_logits(backbone, batch), dim=-1), batch).mean(),
        "rows": prefix_log_probs(backbone, batch).mean(),
    }


def test_the_pretence_refuses_a_tensor_on_the_cpu(pretended: torch.device) -> None:
    x = torch.ones(3).to(pretended)
    assert x.device == pretended
    assert (x + 1.0).sum().item() == 6.0
    with pytest.raises(RuntimeError, match="on the CPU"):
        x + torch.ones(3)
    assert (x.cpu() + torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("kind", BACKBONES)
def test_losses_and_gradients_stay_on_the_device_of_their_inputs(
    kind: str, log: InteractionLog, pretended: torch.device
) -> None:
    batch = next(Histories(log).chunks(16))
    assert batch.unreleased is not None
    for name in losses(backbone_of(kind, 20), batch):
        here, there = backbone_of(kind, 20), backbone_of(kind, 20).to(pretended)
        losses(here, batch)[name].backward()
        loss = losses(there, batch.to(pretended))[name]
        assert loss.device == pretended
        loss.backward()
        expected, found = gradients(here), gradients(there)
        assert expected.keys() == found.keys()
        assert len(found) > 5
        for key, grad in found.items():
            torch.testing.assert_close(grad, expected[key], atol=2e-5, rtol=1e-4, msg=f"{name}: {key}")


def test_training_moves_what_it_is_given(
    log: InteractionLog, pretended: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run here and there, but for rounding; validation too."""
    monkeypatch.setattr(training, "resolve_device", torch.device)
    monkeypatch.setattr(training, "random_numbers_kept", lambda device: torch.random.fork_rng(devices=[]))
    steps = TrainingConfig(steps=6, batch_users=8, learning_rate=1e-2, checks=2)
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused, **rest: ADAMW(groups, foreach=False, **rest))
    config = BACKBONES["hstu"].config_type(dimensions=8, dropout=0.0)
    there = pretrain(log, config, steps, device=pretended)
    here = pretrain(log, config, steps, device="cpu")
    assert all(parameter.device == pretended for parameter in there.parameters())
    for name, value in there.state_dict().items():
        assert isinstance(value, Elsewhere)
        torch.testing.assert_close(value.kept, here.state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)
    held_out = Histories(log)
    apart = negative_log_likelihood(there, held_out) - negative_log_likelihood(here, held_out)
    assert abs(apart) < 1e-3


# -- which there are ---------------------------------------------------------------------------------------------


def test_devices_that_are_not_here_are_refused(log: InteractionLog) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device(torch.device("cpu", 0)).type == "cpu"
    for bad in ("warp", "meta", "cuda:99", "", "cpu:x"):
        with pytest.raises(ConfigError, match="there are cpu"):
            resolve_device(bad)
    assert device_names()[0] == "cpu"
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match="'cuda' is not on this machine; there are cpu"):
            pretrain(log, device="cuda")


def test_accelerators_are_named_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_names() == ["cpu", "cuda:0", "cuda:1"]
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="there are cpu, cuda:0, cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("native", [False, True])
def test_auto_takes_bfloat16_where_a_device_multiplies_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    for device in (cpu, cuda):
        assert has_bfloat16_products(device) == native
        assert autocast_dtype("auto", device) == (torch.bfloat16 if native else None)
        assert autocast_dtype("bfloat16", device) == torch.bfloat16
        assert autocast_dtype("float32", device) is None
    assert autocast_dtype("auto", torch.device("mps")) is None
