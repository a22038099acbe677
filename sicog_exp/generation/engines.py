"""The one place where an engine is made of a recipe: its kind, in this process or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sicog_exp.generation.batched import BatchedEngine
from sicog_exp.generation.engine import MAX_PIXELS
from sicog_exp.generation.pool import PoolEngine
from sicog_exp.models.loading import Work, image_tokens_of, work_of
from sicog_exp.recipe import EngineConfig, ModelConfig


@dataclass(frozen=True)
class OpenEngine:
    """An engine, what its model costs, and what computes it, in words."""

    engine: PoolEngine
    work: Work
    device: str

    @property
    def halvings(self) -> dict[str, float]:
        """What a step reports of memory that was short in this process; nothing where it was not."""
        halved = getattr(self.engine, "halved", 0)
        return {"halved_batches": halved} if halved else {}


@contextmanager
def open_engine(folder: Path, model: ModelConfig, config: EngineConfig,
                max_pixels: int = MAX_PIXELS) -> Iterator[OpenEngine]:  # fmt: skip
    """The engine over a generation's model in `folder`, as the recipe says; what it holds is let go at the end."""
    opened = _opened(folder, model, config, max_pixels)
    try:
        yield opened
    finally:
        close = getattr(opened.engine, "close", None)
        if close:
            close()


def _opened(folder: Path, model: ModelConfig, config: EngineConfig, max_pixels: int) -> OpenEngine:
    if config.workers:
        return _on_ray(folder, model, config, max_pixels)
    engine, work = make_engine(folder, model, config, max_pixels)
    return OpenEngine(engine, work, config.server or model.device_name)


def make_engine(folder: Path, model: ModelConfig, config: EngineConfig,
                max_pixels: int = MAX_PIXELS) -> tuple[BatchedEngine, Work]:  # fmt: skip
    """The engine in this process, and what its model costs."""
    if config.kind == "transformers":
        from sicog_exp.generation.transformers_engine import TransformersEngine

        engine = TransformersEngine.from_recipe(folder, model, max_pixels)
        return engine, work_of(engine.model)
    work = _work_of(folder, model)
    if config.kind == "vllm":
        from sicog_exp.generation.vllm_engine import VllmEngine

        return VllmEngine.from_recipe(folder, model, config, max_pixels), work
    return _client(folder, model, config, max_pixels), work


def _client(folder: Path, model: ModelConfig, config: EngineConfig, max_pixels: int) -> BatchedEngine:
    """A client of the server, which must serve this generation."""
    from transformers import AutoConfig

    from sicog_exp.generation.openai_engine import OpenAIEngine, served

    assert config.server
    name = served(config.server, folder, config.wait)
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    return OpenAIEngine(config.server, name, config.in_flight, image_tokens_of(shape) or 0, max_pixels)


def _work_of(folder: Path, model: ModelConfig) -> Work:
    """By the model's configuration, without its weights."""
    from sicog_exp.models.shapes import read_shape

    return read_shape(str(folder), model.trust_remote_code).work


def _on_ray(folder: Path, model: ModelConfig, config: EngineConfig, max_pixels: int) -> OpenEngine:
    from sicog_exp.generation.ray_engine import RayEngine

    gpus = config.worker_gpus
    if gpus is None:
        gpus = 1.0 if model.torch_device == "cuda" else 0.0
    # a worker computes one batch at a time, for which one core is fastest (benchmarks/2026-11-24-cores.md)
    make = partial(make_engine, folder.resolve(), replace(model, threads=1), replace(config, workers=0), max_pixels)
    engine = RayEngine(make, config.workers, gpus=gpus, address=config.ray)
    each = f"{gpus:g} GPUs" if gpus else "a core"
    return OpenEngine(engine, engine.work, f"{config.workers} Ray workers with {each} each")
