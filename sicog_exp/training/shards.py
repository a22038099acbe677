"""A model whose weights are spread over ranks, and come from the first one: no other ever holds it whole.

The first rank loads the model. The others know its shapes alone ("meta" tensors) until each has its share of every
weight; when training is over, the first one collects the weights where they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(module: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Each layer by itself, all else together, with the first rank's values. All ranks call this with one structure."""
    places = _of_the_first(_places(module))
    values = {names[0]: module.get_parameter(names[0]).data for names in places}
    for names in places:
        _put(module, names, values[names[0]].to("meta"))
    _share_buffers(module, mesh.device_type)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for names in places:
        value = values.pop(names[0])  # the first rank's memory shrinks as it hands out its weights
        whole = torch.empty_like(value, device=mesh.device_type) if value.is_meta else value.to(mesh.device_type)
        share = module.get_parameter(names[0])
        assert isinstance(share, DTensor)
        _put(module, names, distribute_tensor(whole, share.device_mesh, share.placements))


def gather(module: nn.Module) -> None:
    """What `shard` spread, whole again and on the CPU, in the first rank's module; the others keep nothing. All ranks
    call this; without shards it does nothing. The module is good for saving then, and not for training."""
    if not isinstance(module, FSDPModule):
        return
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for names in _places(module):
        share = module.get_parameter(names[0])
        whole = share.full_tensor() if isinstance(share, DTensor) else share.data
        _put(module, names, whole.to("meta" if distributed.get_rank() else "cpu"))


def _places(module: nn.Module) -> list[list[str]]:
    """The names of each parameter: tied weights have several."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def _put(module: nn.Module, names: Sequence[str], value: torch.Tensor) -> None:
    """A new parameter in all places of an old one, which stay tied."""
    parameter = nn.Parameter(value, requires_grad=module.get_parameter(names[0]).requires_grad)
    for name in names:
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, parameter)


def _of_the_first(value: Any) -> Any:
    """The first rank's: weights that it found equal are tied there, which a rank without values cannot see."""
    said = [value]
    distributed.broadcast_object_list(said, src=0)
    return said[0]


def _share_buffers(module: nn.Module, device: str) -> None:
    """Of rotary embeddings, say, which no checkpoint holds. They are small: every rank has them whole."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            whole = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            whole = whole.contiguous()
            distributed.broadcast(whole, src=0)
            part._buffers[name] = whole
