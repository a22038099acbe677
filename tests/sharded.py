"""One of two ranks that shard models and make them whole again: `torchrun sharded.py MODEL...`, folders of models.

Beside the shards each rank has the model as one process loads it, to compare them with.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sicog_exp.data.chat import ChatEncoder
from sicog_exp.data.mixture import Row, collate
from sicog_exp.models.loading import ModelSource, decoder_layers, load_model, save_model
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.records import Message, user
from sicog_exp.training.modules import SupervisedFineTuning
from sicog_exp.training.shards import gather, shard
from sicog_exp.training.stages import loaded, merged

STAGE = StageConfig(lora_rank=2, vision_lr=0.0, projector_lr=1e-3, language_lr=1e-3)
MACHINE = ModelConfig(device="cpu", devices=2, strategy="fsdp")


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for folder in folders:
        check(Path(folder))
        print(f"{Path(folder).parent.name}: rank {distributed.get_rank()} is done", flush=True)
    distributed.destroy_process_group()


def check(folder: Path) -> None:
    source, first = ModelSource(str(folder)), distributed.get_rank() == 0
    single, processor = load_model(source)
    wanted, found = tuned(single), tuned(loaded(source, STAGE, MACHINE)[0])
    assert all(parameter.is_meta != first for parameter in found.model.parameters()), "a rank holds what is not its own"
    shard(found, decoder_layers(found.model), init_device_mesh("cpu", (2,)))
    register_fsdp_forward_method(found, "token_losses")
    compare(found, wanted)
    micro_batch = collate(rows(processor), 0)
    for own, other in zip(found.token_losses(micro_batch), wanted.token_losses(micro_batch), strict=True):
        torch.testing.assert_close(own, other)
    gather(found)
    if first:
        for module, name in ((found, "shards"), (wanted, "single")):
            save_model(merged(module.model, source, STAGE), processor, folder / name)
        same_files(folder / "shards", folder / "single")
    else:
        assert all(parameter.is_meta for parameter in found.parameters())


def tuned(model: Any) -> SupervisedFineTuning:
    torch.manual_seed(3)
    return SupervisedFineTuning(model, STAGE)


def compare(found: nn.Module, wanted: nn.Module) -> None:
    """Values, ties and what trains."""
    names = {name for name, _ in wanted.named_parameters()}
    assert names == {name for name, _ in found.named_parameters()}
    for name, other in wanted.named_parameters(remove_duplicate=False):
        own = found.get_parameter(name)
        assert isinstance(own, DTensor)
        assert own.to_local().shape[0] <= (other.shape[0] + 1) // 2, name
        assert own.requires_grad == other.requires_grad, name
        same(own.full_tensor(), other, name)
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(wanted.named_buffers()).keys()
    for name, buffer in wanted.named_buffers():
        same(buffers[name], buffer, name)


def same(own: torch.Tensor, other: torch.Tensor, name: str) -> None:
    assert own.dtype == other.dtype, name
    assert torch.equal(own, other), name


def same_files(own: Path, other: Path) -> None:
    assert sorted(path.name for path in own.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in own.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path


def rows(processor: Any) -> list[Row]:
    """One with a picture, one without."""
    encoder, picture = ChatEncoder(processor), Image.effect_mandelbrot((56, 40), (-2, -1, 1, 1), 50).convert("RGB")
    made = []
    for count, pixels in ((1, encoder.pixels([picture])), (0, None)):
        messages = user("What color is the cat?", count), Message("assistant", "blue")
        made.append(Row(encoder.example(messages, pixels, 4096), pixels, "test"))
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
