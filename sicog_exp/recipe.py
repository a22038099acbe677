"""The typed configuration tree: one YAML file is one whole recipe, overridden by a dotlist.

Every key is a field below with its meaning beside it. `load` raises `RecipeError` naming the key, the value and
what is allowed; cross-field checks stand in each class's `__post_init__`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar


class RecipeError(ValueError):
    """A recipe that cannot run; the message names the key, the value and what is allowed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecipeError(message)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{name}={value}: must be above 0")


def _share(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{name}={value}: must lie between 0 and 1")


@dataclass(frozen=True)
class DataConfig:
    """Where the images and annotations come from."""

    source: Literal["world", "easyvqa", "own"] = "world"
    """`world`: the built-in scenes; `easyvqa`: the easy-vqa package; `own`: the files named below."""
    seed: int = 20_503
    """Seed of the built-in world's scenes; not the run's seed, so that runs of all seeds share one benchmark."""
    annotated_images: int = 100
    """Annotated images used (world, easyvqa); `own` takes all rows of `annotated`."""
    unlabeled_images: int = 1200
    """Unlabeled images used; `own` takes at most this many files, 0 for all."""
    instruction_images: int = 1000
    """Images of the public-style instruction set, replayed in the instruct stage (world); `own` takes all rows of
    `instruction`."""
    development_images: int = 150
    """Images whose questions choose thresholds and regimes."""
    benchmark_images: int = 500
    """Images of the benchmark, used for no decision."""
    questions_per_image: int = 4
    """Questions asked about each annotated, unlabeled, development and benchmark image."""
    annotated: str | None = None
    """`own`: rows with responses: LLaVA, ShareGPT or chat messages as JSON, JSONL, Parquet, WebDataset shards (a file,
    a folder, or a pattern such as part-{000..009}.tar), a saved `datasets` directory, or hub:OWNER/NAME."""
    unlabeled: str | None = None
    """`own`: a folder of images, or rows with an image and (optionally) a question in any form of `annotated`."""
    development: str | None = None
    """`own`: like `annotated`; without it `holdout` of the annotated images is kept for development."""
    benchmark: str | None = None
    """`own`: like `annotated`; without it `holdout` of the annotated images is kept for the benchmark."""
    instruction: str | None = None
    """`own`: like `annotated`: an instruction set, whose rows the instruct stage replays (`replay`), text-only rows
    included. Its pictures may be those of other training rows."""
    alignment: str | None = None
    """`own`: like `annotated`: captions that the align stage trains on instead of the annotated and instruction rows.
    Its pictures may be those of other training rows."""
    root: str | None = None
    """`own`: images lie under this folder; by default the folder of the file that names them."""
    holdout: float = 0.2
    """`own`: share of annotated images kept for development, and again for the benchmark, where no file is named."""
    max_bad_share: float = 0.1
    """A source with a larger share of unusable rows stops the run; the rows are listed in `rejected.jsonl`."""
    max_pixels: int = 50_000_000
    """Images with more pixels are set aside."""
    exclude_contaminated: bool = True
    """Leave rows out of training that show or say what a benchmark of the suite holds; they are listed either way."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        _positive(self, "annotated_images", "development_images", "benchmark_images", "questions_per_image")
        _positive(self, "max_pixels")
        public = self.source == "own" or (self.instruction is None and self.alignment is None)
        _require(public, f"source={self.source}: data.instruction and data.alignment name files of data.source=own")
        _share(self, "holdout", "max_bad_share")
        if self.source == "own":
            for name in ("annotated", "unlabeled"):
                _require(getattr(self, name) is not None, f"data.{name} is missing: data.source=own needs a path there")


def _elsewhere(default: Any) -> Any:
    """A field that says where or how fast something computes, not what: the store leaves it out of fingerprints."""
    return field(default=default, metadata={"identity": False})


@dataclass(frozen=True)
class ModelConfig:
    """The base model, G0's parts."""

    base: str = "embedded"
    """`embedded` (shipped with the package), or a folder or hub name of a transformers image-text-to-text model."""
    language: str | None = None
    """With `vision`, instead of `base`: a LLaVA is made of this causal language model with a chat template (a folder, a
    hub name or a .gguf file), that vision tower and a fresh projector."""
    vision: str | None = None
    """A CLIP or SigLIP tower (a folder or hub name), or an image-text-to-text model, whose tower is taken; `embedded`
    takes that of the shipped base."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you say so."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    """Lightning precision for training, and the dtype of generation. `bf16-true` rounds away most updates of full
    fine-tuning at 1e-5; `bf16-mixed` does not."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where training and generation run."""
    devices: int = 1
    """Devices of each machine that train together, a process each; every step's rows are shared out among them.
    Sampling and evaluation use one."""
    nodes: int = 1
    """Machines that train together; more than 1 need a SLURM job with as many (docs/cluster.md)."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several devices train: each with the whole model (`ddp`, which `auto` is), or with a share of its weights,
    gradients and optimizer state (`fsdp`)."""
    threads: int = 2
    """CPU cores. Micro-batches and sampling batches run side by side, a core each, with the same bits for any number; a
    stage whose batch is one micro-batch uses all cores together, and then the last bits depend on it."""
    loaders: int | None = _elsewhere(None)
    """Processes a device that open pictures and tokenize rows for the coming steps while it trains; if nothing is said,
    4 a GPU (fewer where cores are few) and none on a CPU, whose cores train."""
    image_pixels: int | None = None
    """Most pixels that the model sees of an image: fewer tiles (LLaVA-NeXT, LLaVA-OneVision, Idefics3, SmolVLM,
    InternVL) or a smaller image (Qwen-VL), and so fewer image tokens. As the model's processor says if nothing is; a
    model that shows every image at one size keeps to a cap above that."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """How attention is computed; `flash_attention_2` needs the flash-attn package and a GPU."""
    static_cache: bool = False
    """Sample in key/value buffers of fixed size; a GPU then captures one decoding step and replays it. Not yet tried on
    a GPU. A model that cannot (layers that attend within a window, flash_attention_2) warns and decodes as usual."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time, equal bits."""

    def __post_init__(self) -> None:
        _positive(self, "threads", "image_pixels", "devices", "nodes")
        _require((self.loaders or 0) >= 0, f"model.loaders={self.loaders}: must be 0 or more")
        _require(self.ranks > 1 or self.strategy == "auto", f"model.strategy={self.strategy}: there is one device; set "
                 "model.devices or model.nodes above 1, or leave the strategy out")  # fmt: skip
        both = (self.language is None) == (self.vision is None)
        _require(both, "model.language and model.vision: a model is made of both or of neither; name the other too")
        _require(self.language is None or self.base == "embedded", f"model.base={self.base}: leave it out, the base is "
                 "made of model.language and model.vision")  # fmt: skip

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.devices * self.nodes

    @property
    def loader_processes(self) -> int:
        """`loaders`, or what goes for nothing said."""
        if self.loaders is not None:
            return self.loaders
        return 0 if self.torch_device == "cpu" else min(4, (os.cpu_count() or 1) // self.devices)

    @property
    def generation_dtype(self) -> str:
        return "float32" if self.precision == "32-true" else "bfloat16"

    @property
    def torch_device(self) -> str:
        import torch

        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def device_name(self) -> str:
        """What computes, in words for people."""
        import torch

        if self.torch_device == "cpu":
            return f"{self.threads} CPU threads"
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "a GPU"


@dataclass(frozen=True)
class StageConfig:
    """One training stage. A learning rate of 0 freezes that part."""

    steps: int = 100
    """Optimizer steps; 0 leaves the stage out."""
    batch_size: int = 64
    """Samples per optimizer step, over all devices."""
    micro_batch_size: int = 64
    """Samples per forward pass on one device; the loss does not depend on it."""
    vision_lr: float = 1e-3
    """Peak learning rate of the vision tower."""
    projector_lr: float = 1e-3
    """Peak learning rate of the projector."""
    language_lr: float = 1e-3
    """Peak learning rate of the language model."""
    warmup_ratio: float = 0.03
    """Share of the steps with a linearly rising learning rate; a cosine to 0 follows (paper.md, Training)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    max_length: int = 4096
    """Tokens of one sample, image tokens included. A longer text is cut at its end, never inside image tokens."""
    packing: bool = False
    """Put several samples in a row of at most `max_length` tokens; no sample attends to another."""
    checkpoint_every: int = 50
    """Steps between checkpoints from which a killed stage continues."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in 8 bits: a quarter of their memory; it needs bitsandbytes and a GPU."""
    lora_rank: int = 0
    """Above 0, `lora_parts` train by adapters of this rank (LoRA) and not in full; they are merged when the stage is
    done. Other parts train in full, at their rate."""
    lora_alpha: float | None = None
    """Scale of the adapters, over the rank; twice the rank if nothing is said."""
    lora_parts: tuple[Literal["vision", "projector", "language"], ...] = ("language",)
    """Parts whose linear layers get adapters, trained at the part's learning rate."""
    lora_4bit: bool = False
    """Hold the adapted parts in 4 bits while their adapters train (QLoRA); it needs bitsandbytes and a GPU."""

    def __post_init__(self) -> None:
        _require(self.steps >= 0, f"steps={self.steps}: must be 0 or more")
        _positive(self, "batch_size", "micro_batch_size", "clip_norm", "max_length", "checkpoint_every")
        _share(self, "warmup_ratio")
        whole = self.batch_size % self.micro_batch_size == 0
        _require(whole, f"batch_size={self.batch_size}: must be a multiple of micro_batch_size={self.micro_batch_size}")
        _require(self.weight_decay >= 0, f"weight_decay={self.weight_decay}: must be 0 or more")
        rates = (self.vision_lr, self.projector_lr, self.language_lr)
        _require(min(rates) >= 0, f"learning rates {rates}: must be 0 (frozen) or more")
        _require(self.steps == 0 or max(rates) > 0, "all three learning rates are 0: nothing would train")
        self._check_adapters()

    @property
    def trained(self) -> tuple[str, ...]:
        """Parts whose weights train in full."""
        return tuple(part for part in self._learning if part not in self.adapted)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Parts whose adapters train."""
        return self.lora_parts if self.lora_rank else ()

    @property
    def _learning(self) -> tuple[str, ...]:
        rates = {"vision": self.vision_lr, "projector": self.projector_lr, "language": self.language_lr}
        return tuple(part for part, rate in rates.items() if rate > 0)

    def _check_adapters(self) -> None:
        _require(self.lora_rank >= 0, f"lora_rank={self.lora_rank}: must be 0 (no adapters) or more")
        _require(self.lora_rank > 0 or not self.lora_4bit, "lora_4bit=true: needs lora_rank above 0, since weights in "
                 "4 bits cannot train")  # fmt: skip
        _positive(self, "lora_alpha")
        if self.lora_rank:
            _require(len(self.lora_parts) > 0, "lora_parts is empty: name vision, projector or language, or set "
                     "lora_rank=0")  # fmt: skip
            frozen = [part for part in self.lora_parts if getattr(self, f"{part}_lr") == 0]
            _require(not frozen, f"lora_parts names {', '.join(frozen)}, whose learning rate is 0: raise it or leave "
                     "the part out")  # fmt: skip


@dataclass(frozen=True)
class PreferenceConfig(StageConfig):
    """The stage after `develop` that tunes a generator by preference: DPO with an SFT term (paper.md, Curation).

    Its samples are pairs of a chosen and a rejected response, which the generator itself gives about some of the
    unlabeled images.
    """

    steps: int = 0
    """Optimizer steps; 0 leaves the stage out: the generator stays as `develop` made it."""
    batch_size: int = 32
    """Pairs per optimizer step, over all devices."""
    micro_batch_size: int = 32
    """Pairs per forward pass on one device; the loss does not depend on it."""
    vision_lr: float = 1e-4
    """Peak learning rate of the vision tower."""
    projector_lr: float = 1e-4
    """Peak learning rate of the projector."""
    language_lr: float = 1e-4
    """Peak learning rate of the language model."""
    beta: float = 0.1
    """DPO's beta: how dear it is to leave the supervised generator."""
    sft_weight: float = 1.0
    """Weight of the SFT term, the chosen response's negative log-likelihood a token; 0 is plain DPO."""
    rejected: Literal["low_score", "corrupted"] = "low_score"
    """`low_score`: a candidate of the lower half by score; `corrupted`: a response to a corrupted image."""
    images: int = 200
    """Unlabeled images whose candidates make the pairs, drawn by name; 0 takes all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "beta")
        _require(self.sft_weight >= 0, f"sft_weight={self.sft_weight}: must be 0 or more")
        _require(self.images >= 0, f"images={self.images}: must be 0 (all) or more")


@dataclass(frozen=True)
class SamplingConfig:
    """Candidates and how they are drawn (paper.md, Sizes and sampling)."""

    cod: int = 2
    """Chain-of-Description captions per unlabeled image."""
    dd: int = 1
    """Detailed-description captions per unlabeled image."""
    cot: int = 2
    """Chain-of-thought answers per unlabeled question."""
    direct: int = 1
    """Direct answers per unlabeled question."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    """Nucleus sampling: the smallest set of tokens with this probability."""
    max_new_tokens: int = 1200
    """Tokens after which a candidate is cut (finish reason `length`)."""
    batch_size: int = 64
    """Requests (image and prompt) per batch; each serves all its candidates."""
    pooled: bool = True
    """Pool the candidates of earlier iterations with the new ones (authors' runs: N = 3, 6, 9)."""

    def __post_init__(self) -> None:
        for name in ("cod", "dd", "cot", "direct"):
            _require(getattr(self, name) >= 0, f"sampling.{name}={getattr(self, name)}: must be 0 or more")
        _require(self.temperature >= 0, f"temperature={self.temperature}: must be 0 (greedy) or more")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1")
        _positive(self, "max_new_tokens", "batch_size")


CaptionScorer = Literal["similarity", "lexical", "cross_format", "listing", "likelihood"]
ReasoningScorer = Literal["similarity", "lexical", "agreement", "cross_format", "listing", "likelihood"]
UPPER_BOUNDS = ("oracle", "truth")
"""Selections that look at the truth: what they give is no result."""


@dataclass(frozen=True)
class CurationConfig:
    """Self-consistency (paper.md, Curation). A kind is a caption (cod, dd) or reasoning (cot, direct)."""

    encoder: str = "lexical"
    """Similarity of final texts: `lexical` (uni- and bigram F1), `minilm` (the packaged MiniLM), or the name or path
    of a sentence-transformers model."""
    include_self: bool = True
    """Count a candidate's similarity to itself in its mean, as the authors do (with N = 3, 0.90 means 0.85 to the
    two others)."""
    caption_threshold: float = 0.85
    """Keep an image's caption when the best score reaches this."""
    reasoning_threshold: float = 0.85
    """Keep a question's answer when the best score reaches this."""
    threshold_by: Literal["score", "quantile"] = "score"
    """`quantile`: a threshold is a rank among the items' best scores, from 0 to 1: 0.4 keeps the best 60%."""
    cod_threshold: float | None = None
    """A threshold of their own for captions in steps. Where a kind of row has one, its group's two kinds are decided
    separately, so that an item may give only its steps or only its plain row; null: decided together."""
    dd_threshold: float | None = None
    """The same for plain descriptions."""
    cot_threshold: float | None = None
    """The same for chains of thought."""
    direct_threshold: float | None = None
    """The same for direct answers."""
    caption_scorer: CaptionScorer = "similarity"
    """`similarity`: mean similarity of final texts by `encoder`; `lexical`: the same by words; `cross_format`:
    similarity to the captions of the other kind; `listing`: agreement with everything else listed about the image;
    `likelihood`: mean probability of its tokens."""
    reasoning_scorer: ReasoningScorer = "agreement"
    """`similarity`: mean similarity of final answers; `agreement`: share of candidates with the same normalised
    answer; `cross_format`: share of the candidates of the other kind with it; `listing`: votes weighted by how well
    each chain's listing agrees with the image's others; `lexical`, `likelihood`: as for captions."""
    caption_blend: Mapping[str, float] = field(default_factory=dict)
    """Weights of further caption scorers, such as {likelihood: 0.5}; the score is the weighted mean with
    `caption_scorer`, which weighs 1."""
    reasoning_blend: Mapping[str, float] = field(default_factory=dict)
    """The same for answers."""
    require_direct_agreement: bool = False
    """Keep a question only if the chosen answer is also the most frequent direct answer."""
    select: Literal["best", "random", "oracle", "truth"] = "best"
    """`random` draws the chosen candidate, seeded by sample id, and keeps every item: the control without curation.
    Upper bounds that look at the truth, never a result: `oracle` chooses among the candidates those that are correct,
    `truth` trains on the ground truth instead of any candidate."""
    family_quota: float = 1.0
    """Keep at most this share of each question family's items, the best ones; a family is the question's first two
    words where its source names none."""
    disagreement_weight: float = 1.0
    """Draw a kept answer up to this many times as often in training: the surer the vote and the more direct answers
    disagree with it, the oftener; 1 draws all alike."""
    require_format: bool = True
    """Set aside candidates whose steps are missing or out of order, or that were cut at the token limit."""
    min_words: int = 1
    """Shortest final text."""
    max_words: int = 1000
    """Longest final text."""
    candidates: int | None = None
    """Candidates of each kind that are used, the first ones sampled; all of them if nothing is said."""
    dedup: bool = True
    """Among kept items, drop exact and near duplicates (same image and prompt, nearly the same response)."""
    near_duplicate: float = 0.95
    """Lexical similarity from which two responses to the same prompt and image count as near duplicates."""

    def __post_init__(self) -> None:
        _share(self, "near_duplicate", "family_quota")
        self._check_thresholds()
        self._check_blend("caption", CaptionScorer)
        self._check_blend("reasoning", ReasoningScorer)
        _require(self.family_quota > 0, f"family_quota={self.family_quota}: must be above 0")
        _require(self.disagreement_weight >= 1, f"disagreement_weight={self.disagreement_weight}: must be 1 or more")
        _positive(self, "candidates")
        in_order = 0 <= self.min_words <= self.max_words
        _require(in_order, f"min_words={self.min_words}, max_words={self.max_words}: need 0 <= min_words <= max_words")

    def _check_thresholds(self) -> None:
        lowest = 0 if self.threshold_by == "quantile" else -1
        for name in ("caption", "reasoning", "cod", "dd", "cot", "direct"):
            value = getattr(self, f"{name}_threshold")
            _require(value is None or lowest <= value <= 1,
                     f"curation.{name}_threshold={value}: must lie between {lowest} and 1")  # fmt: skip

    def _check_blend(self, group: str, scorers: Any) -> None:
        main = getattr(self, f"{group}_scorer")
        others = [name for name in typing.get_args(scorers) if name != main]
        for name, weight in getattr(self, f"{group}_blend").items():
            _require(name in others and weight > 0, f"curation.{group}_blend.{name}={weight}: blends a scorer beside "
                     f"{group}_scorer={main} ({', '.join(others)}) with a weight above 0")  # fmt: skip

    @property
    def is_upper_bound(self) -> bool:
        """Whether the selection looks at the truth."""
        return self.select in UPPER_BOUNDS


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of the pre-training samples by source; they are normalised to 1. Sources without rows are left out."""

    self_caption: float = 0.25
    """Curated captions (CoD and DD rows)."""
    self_cot: float = 0.25
    """Curated answers with their steps."""
    self_direct: float = 0.25
    """The same answers alone: short rows, of which a small share gives hardly any response tokens."""
    self_turns: float = 0.0
    """Curated CoD captions as conversations, a turn a step (v6 of the paper, by the reviewers' account)."""
    text: float = 0.05
    """Text-only instruction data, against forgetting."""
    annotated: float = 0.2
    """The annotated rows."""

    def __post_init__(self) -> None:
        shares = dataclasses.astuple(self)
        _require(min(shares) >= 0 and sum(shares) > 0, f"mixture {shares}: shares must be 0 or more, one above 0")


@dataclass(frozen=True)
class CapsConfig:
    """The most distinct rows of the pre-training mixture, by source and by kind; null sets no limit.

    The rows that stay are drawn by the run's seed and their ids: those of a smaller cap are among those of a larger
    one. The shares of `mixture` do not change: fewer rows come more often.
    """

    self_caption: int | None = None
    """Rows of curated captions."""
    self_cot: int | None = None
    """Rows of curated answers with their steps."""
    self_direct: int | None = None
    """Rows of these answers alone."""
    self_turns: int | None = None
    """Conversations made of curated CoD captions."""
    text: int | None = None
    """Text-only rows."""
    annotated: int | None = None
    """Annotated rows."""
    cod: int | None = None
    """Rows of this kind from each source (conversations included)."""
    dd: int | None = None
    """Rows of this kind from each source."""
    cot: int | None = None
    """Rows of this kind from each source."""
    direct: int | None = None
    """Rows of this kind from each source."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require(value is None or value >= 0, f"{name}={value}: must be 0 or more, or null for no limit")


@dataclass(frozen=True)
class EngineConfig:
    """What samples candidates and answers benchmarks. Training knows nothing of it."""

    kind: Literal["transformers", "vllm", "openai"] = "transformers"
    """`transformers`: in this process; `vllm`: in this process, by the vllm package; `openai`: a server that you run
    and that speaks OpenAI's protocol (`vllm serve`, say)."""
    evaluates: bool = _elsewhere(True)
    """False: benchmarks are answered by `transformers` all the same. A server cannot score given answers, as tasks of
    multiple choice ask."""
    max_length: int | None = None
    """`vllm`: tokens of a prompt and its answer together; as many as the model allows if nothing is said."""
    memory: float = _elsewhere(0.9)
    """`vllm`: share of a GPU's memory for weights and key/value cache."""
    server: str | None = _elsewhere(None)
    """`openai`: the server's base URL, such as http://127.0.0.1:8000/v1. Its key is read from SICOG_API_KEY."""
    in_flight: int = _elsewhere(32)
    """`openai`: requests that are under way at once."""
    wait: float = _elsewhere(0.0)
    """`openai`: seconds to wait for the server to serve the generation that is asked; it is looked for every few
    seconds."""
    workers: int = _elsewhere(0)
    """Above 0, so many workers of a Ray cluster share the batches, each with an engine of its own: a core or
    `worker_gpus`."""
    worker_gpus: float | None = _elsewhere(None)
    """GPUs of each worker; one where `model.device` is a GPU here, else none."""
    ray: str | None = _elsewhere(None)
    """Address of the Ray cluster (`auto` for the one that this machine belongs to); a cluster of this machine alone,
    for the time of the run, if nothing is said."""

    def __post_init__(self) -> None:
        _positive(self, "max_length", "in_flight")
        _require(0 < self.memory <= 1, f"engine.memory={self.memory}: must be above 0 and at most 1")
        _require(self.wait >= 0 and self.workers >= 0, f"engine.wait={self.wait}, engine.workers={self.workers}: must "
                 "be 0 or more")  # fmt: skip
        _require((self.worker_gpus or 0) >= 0, f"engine.worker_gpus={self.worker_gpus}: must be 0 or more")
        _require((self.kind == "openai") == (self.server is not None), f"engine.kind={self.kind}, engine.server="
                 f"{self.server}: a server's URL belongs to engine.kind=openai; give both or neither")  # fmt: skip
        _require(self.server is None or self.server.startswith(("http://", "https://")), f"engine.server={self.server}:"
                 " must be an http or https URL, such as http://127.0.0.1:8000/v1")  # fmt: skip
        _require(self.kind != "openai" or self.workers == 0, f"engine.workers={self.workers}: a server takes its "
                 "requests from this process; set engine.in_flight instead")  # fmt: skip

    @property
    def of_evaluation(self) -> EngineConfig:
        """What answers benchmarks."""
        return self if self.evaluates else dataclasses.replace(self, kind="transformers", server=None, max_length=None)


@dataclass(frozen=True)
class EvaluationConfig:
    """What every generation is scored on, through lmms-eval."""

    suite: str = "embedded"
    """A suite in evals/suites/, or a path to a suite file."""
    split: Literal["benchmark", "development"] = "benchmark"
    """`development` while you choose thresholds and regimes; the benchmark is for the result alone."""
    batch_size: int = 128
    """Requests per batch."""
    max_new_tokens: int = 160
    """Tokens an answer may take."""
    bootstrap: int = 2000
    """Resamples of the image-clustered intervals."""
    judge: bool = False
    """Also score the suite's tasks that need a judge model, whose calls cost money; they are left out otherwise."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "max_new_tokens", "bootstrap")


@dataclass(frozen=True)
class StopConfig:
    """When to end before `iterations`; everything is off by default. Looked at after every generation but the last."""

    no_gain: bool = False
    """Stop when a generation's mean paired difference to the one before is not above zero beyond noise (95% interval).
    Decided on the development split alone, on which G0 and later generations are scored for it."""
    collapse: bool = False
    """Stop when the collapse alarm (`tracking.collapse_alarm`) rings."""
    budget_flops: float | None = None
    """Stop when the FLOPs of the run's steps, those read from the store included, reach this (2e13, say)."""

    def __post_init__(self) -> None:
        _positive(self, "budget_flops")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    uri: str = "sqlite:///mlflow.db"
    """Tracking store; artifacts of the default lie in mlruns/. MLFLOW_TRACKING_URI takes precedence."""
    experiment: str = "sicog"
    """Experiment name. Under `mlflow run` its --experiment-name takes precedence."""
    register: bool = True
    """Register each generation in the model registry, with aliases gen-0, gen-1, ... and champion."""
    collapse_alarm: float = 0.2
    """Warn when distinct word pairs or the entropy of answers of the kept self-data fall by this share against the
    first iteration; 0 switches it off."""

    def __post_init__(self) -> None:
        _share(self, "collapse_alarm")


@dataclass(frozen=True)
class PlanConfig:
    """What `sicog plan` takes for given where it cannot look, or instead of what it measures. No step reads it.

    Tokens are means over the rows of a kind; without a value they are measured on the data, where these are at hand.
    """

    shape: str | None = None
    """Shape of a base model that is not at hand: llava-qwen2-7b, llava-llama3-8b, qwen2.5-vl-3b,
    qwen2.5-vl-7b, smolvlm2-2.2b, or a folder with a config.json. `scale=smoke` makes its miniature of it."""
    image_tokens: int | None = None
    """Tokens of an image, where the model's shape does not say: it makes more of a larger one."""
    unlabeled_questions: int | None = None
    """Questions about unlabeled images; without data at hand, `data.questions_per_image` an image."""
    benchmark_questions: int | None = None
    """Questions of each benchmark task whose number is not known."""
    question_tokens: int | None = None
    """A prompt's text, the chat template's marks included."""
    cod_tokens: int | None = None
    """A caption in five steps."""
    dd_tokens: int | None = None
    """A detailed caption."""
    cot_tokens: int | None = None
    """A chain of thought."""
    direct_tokens: int | None = None
    """A short answer."""
    alignment_tokens: int | None = None
    """A caption of `data.alignment`."""
    instruction_tokens: int | None = None
    """The responses of a row of the instruction set."""
    text_tokens: int | None = None
    """The response of a text-only row."""

    def __post_init__(self) -> None:
        _positive(self, *(f.name for f in dataclasses.fields(self) if f.name != "shape"))


@dataclass(frozen=True)
class Recipe:
    """One SIcog experiment."""

    name: str = "embedded"
    """Names the run and the registered model."""
    seed: int = 0
    """Seed of training order and sampling."""
    iterations: int = 2
    """Iterations g -> g+1; 2 give generations G0, G1, G2. The most there can be, where `stop` ends a run earlier."""
    start: Literal["base", "previous", "parts"] = "base"
    """The next generation starts from the base's parts (`base`), from the previous generation's (`previous`), or as in
    the paper from the base's vision tower and language model and a new projector that `align` trains (`parts`)."""
    generators: Literal["mixed", "two"] = "mixed"
    """One generator for captions and answers, or one for perception and one for reasoning."""
    self_data: bool = True
    """False: the control that trains every generation on annotated rows alone, for the same number of steps."""
    store: str = "store"
    """Folder of the step store."""
    scale: Literal["full", "smoke"] = "full"
    """`smoke`: every step of the recipe on a miniature of its architecture with random weights and a handful of made
    pictures, in a minute on a CPU: whether the recipe runs, never a result."""
    other_base: Mapping[str, Any] = field(default_factory=dict)
    """Sections whose keys hold instead of the recipe's own where `model.base` is not `embedded`, such as {model:
    {precision: bf16-mixed}}. What is given on the command line comes after them."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    develop: StageConfig = field(default_factory=StageConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    align: StageConfig = field(default_factory=lambda: StageConfig(steps=0, vision_lr=0.0, language_lr=0.0))
    pretrain: StageConfig = field(default_factory=StageConfig)
    instruct: StageConfig = field(default_factory=StageConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    curation: CurationConfig = field(default_factory=CurationConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    caps: CapsConfig = field(default_factory=CapsConfig)
    replay: float = 0.3
    """Share of instruction-set replay beside the annotated rows in the instruct stage."""
    closing_steps: int | None = None
    """Steps of the instruct stage that closes every generation after G0; as many as G0's if nothing is said."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        _require(self.iterations >= 0, f"iterations={self.iterations}: must be 0 or more")
        _require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        _share(self, "replay")
        _require((self.closing_steps or 0) >= 0, f"closing_steps={self.closing_steps}: must be 0 or more")
        candidates = self.sampling.cod + self.sampling.dd + self.sampling.cot + self.sampling.direct
        _require(not self.self_data or candidates > 0, "sampling asks for no candidate of any kind: set sampling.cod, "
                 "sampling.dd, sampling.cot or sampling.direct above 0, or self_data=false")  # fmt: skip
        self._check_start()
        self._check_pairs()
        self._check_ranks()
        watched = self.self_data and self.tracking.collapse_alarm > 0
        _require(not self.stop.collapse or watched, "stop.collapse=true: the alarm never rings with self_data=false or "
                 "tracking.collapse_alarm=0; change these, or leave stop.collapse out")  # fmt: skip

    def _check_start(self) -> None:
        aligned = self.align.steps > 0 and self.align.projector_lr > 0
        _require(self.start != "parts" or aligned, f"start=parts, align.steps={self.align.steps}, align.projector_lr="
                 f"{self.align.projector_lr}: a new projector must be trained, set both above 0")  # fmt: skip

    def _check_pairs(self) -> None:
        """A chosen response is told from a lower one of its own kind."""
        sampling = self.sampling
        several = max(sampling.cod, sampling.dd, sampling.cot, sampling.direct) > 1
        low_score = self.self_data and self.preference.steps > 0 and self.preference.rejected == "low_score"
        _require(several or not low_score, "preference.rejected=low_score needs two candidates of one kind: set "
                 "sampling.cod or sampling.cot to 2 or more, or preference.rejected=corrupted")  # fmt: skip
        _require(not self.is_upper_bound or self.preference.steps == 0, f"curation.select={self.curation.select}, "
                 f"preference.steps={self.preference.steps}: pairs are chosen without the truth; set "
                 "preference.steps=0, or curation.select=best")  # fmt: skip

    def _check_ranks(self) -> None:
        """That every device gets as many rows of a step, and a stage nothing that shards cannot hold."""
        ranks = self.model.ranks
        for name in ("develop", "preference", "align", "pretrain", "instruct"):
            stage = getattr(self, name)
            _require(stage.steps == 0 or stage.batch_size % ranks == 0, f"{name}.batch_size={stage.batch_size}: must "
                     f"be a multiple of model.devices x model.nodes = {ranks}, so that all have as many rows")
            whole = not stage.lora_4bit and stage.optimizer == "adamw"
            _require(stage.steps == 0 or self.model.strategy != "fsdp" or whole, f"{name}.lora_4bit={stage.lora_4bit}, "
                     f"{name}.optimizer={stage.optimizer}: weights and moments in few bits are not shared out; leave "
                     "these out, or set model.strategy=ddp")  # fmt: skip
            # Ranks that pack their own rows pass through the model in unlike numbers; shards need all of them at once.
            packed = stage.packing and name != "preference"
            _require(stage.steps == 0 or self.model.strategy != "fsdp" or not packed, f"{name}.packing=true: ranks "
                     "that share weights cannot pack their rows; set it to false, or model.strategy=ddp")  # fmt: skip

    @property
    def is_upper_bound(self) -> bool:
        """Whether the run trains on what the truth chose: a bound for others, never a result."""
        return self.self_data and self.curation.is_upper_bound


T = TypeVar("T")


def build(cls: type[T], values: Any, key: str = "") -> T:
    """A typed, validated `cls` from plain values.

    OmegaConf merges; this converts: it knows Literal and optional fields, which structured configs do not, and says
    which key is wrong. Raises RecipeError.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{key or 'recipe'}={values!r}: expected a mapping of {', '.join(_keys(cls))}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise RecipeError(f"{_join(key, name)}: unknown key; allowed here: {', '.join(_keys(cls))}"
                              f"{_meant(str(name), _keys(cls))}")  # fmt: skip
    missing = [_join(key, name) for name in _required(cls) if name not in values]
    _require(not missing, f"{', '.join(missing)}: missing; nothing stands in for it")
    made = {name: _convert(hints[name], value, _join(key, name)) for name, value in _completed(cls, values).items()}
    try:
        return cls(**made)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}" if key and not str(error).startswith(key) else str(error)) from None


def _completed(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` whose sections begin from what they are in `cls`: `align` freezes what a stage by itself would train."""
    made = [(f.name, f.default_factory()) for f in dataclasses.fields(cls)
            if f.default_factory is not dataclasses.MISSING]  # fmt: skip
    own = {name: dataclasses.asdict(typing.cast(Any, section)) for name, section in made
           if dataclasses.is_dataclass(section)}  # fmt: skip
    return {name: {**own[name], **value} if name in own and isinstance(value, dict) else value
            for name, value in values.items()}  # fmt: skip


def _keys(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _required(cls: type) -> list[str]:
    absent = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is absent and f.default_factory is absent]


def _meant(word: str, known: typing.Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _convert(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise RecipeError(f"{key}={value!r}: allowed: {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is types.UnionType:
        return None if value is None else _convert(typing.get_args(hint)[0], value, key)
    if origin is collections.abc.Mapping:
        if not isinstance(value, dict):
            raise RecipeError(f"{key}={value!r}: expected a mapping")
        return {name: _convert(typing.get_args(hint)[1], item, _join(key, name)) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{key}={value!r}: expected a list")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise RecipeError(f"{key}={value!r}: expected {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key}={value!r}: expected a finite number")
    return value


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file with dotlist overrides (`a.b=1`) on top. Raises RecipeError."""
    return load_as(Recipe, path, overrides)


def load_as(cls: type[T], path: str | Path, overrides: typing.Sequence[str] = ()) -> T:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{file}: no such recipe; the shipped ones are in experiments/")
    _check_form(overrides, "curation.encoder=minilm")
    try:
        read = OmegaConf.load(file)
        _require(isinstance(read, DictConfig), f"{file}: holds a list; write one `key: value` a line")
        merged = _merged(read, _dotlist(overrides))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except UnicodeDecodeError:
        raise RecipeError(f"{file}: not UTF-8 text; name a YAML file, saved as UTF-8") from None
    except (YAMLError, OSError) as error:
        raise RecipeError(f"{file}: unreadable YAML, {_one_line(error)}; correct it there") from None
    except (OmegaConfBaseException, TypeError) as error:
        raise RecipeError(f"{file}: {_one_line(error)}") from None
    try:
        return build(cls, values)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def _merged(read: Any, given: Any) -> Any:
    """A file with overrides on top; between them its `other_base`, where the base is another."""
    from omegaconf import OmegaConf

    merged: Any = OmegaConf.merge(read, given)
    other = OmegaConf.select(merged, "other_base")
    model = merged.get("model") or {}
    if not other or (model.get("base", "embedded") == "embedded" and not model.get("language")):
        return merged
    _require(isinstance(other, collections.abc.Mapping), f"other_base={other}: expected a mapping of sections")
    merged = OmegaConf.merge(read, other, given)
    merged.other_base = {}  # applied: what is resolved reads back as it is
    return merged


def other_base(path: str | Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """What `other_base` of the recipe in `path` sets for the base that overrides name: dotted key -> value.

    For people to read: `load` has applied it. Empty where it does not apply.
    """
    from omegaconf import OmegaConf

    applied = load(path, overrides)
    written: Any = OmegaConf.select(OmegaConf.load(path), "other_base")
    if applied.other_base or not written:
        return {}
    return {f"{section}.{key}": getattr(getattr(applied, section), key)
            for section, keys in written.items() for key in keys}  # fmt: skip


def build_overrides(cls: type[T], section: str, overrides: typing.Sequence[str]) -> T:
    """One section from its defaults and a dotlist such as `curation.encoder=minilm`. Raises RecipeError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_form(overrides, f"{section}.{_keys(cls)[0]}=...")
    try:
        values = OmegaConf.to_container(_dotlist(overrides), throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{' '.join(overrides)}: {_one_line(error)}") from None
    unknown = sorted(set(typing.cast(dict, values)) - {section})
    _require(not unknown, f"{', '.join(unknown)}: only {section}.* keys apply here, such as {section}.{_keys(cls)[0]}")
    return build(cls, typing.cast(dict, values).get(section, {}), section)


def _check_form(overrides: typing.Sequence[str], example: str) -> None:
    for override in overrides:
        key, equals, _ = override.partition("=")
        _require(bool(key and equals), f"{override!r}: an override is key=value without spaces, for example {example}")


def _dotlist(overrides: typing.Sequence[str]) -> Any:
    """The overrides as OmegaConf reads them; one that it cannot read is named by itself."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        try:
            OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, YAMLError) as error:
            raise RecipeError(f"{override!r}: not YAML behind the =, {_one_line(error)}; quote the value") from None
    return OmegaConf.from_dotlist(list(overrides))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def to_yaml(config: Any) -> str:
    """A resolved configuration as YAML that `load` reads back to an equal one."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_representer(str, _yaml_string)
    return yaml.dump(dataclasses.asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _yaml_string(dumper: Any, text: str) -> Any:
    """A string that OmegaConf reads back as it is: it takes 1e3 for a number and ${...} for a reference."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style="'" if _is_number(text) else None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
