"""The self-data of one iteration: sample a pool, curate it, mix it, behind one LightningDataModule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sicog_exp.curation.curate import Group, group_of
from sicog_exp.curation.embeddings import embed_texts, encoder_state, encoder_work, stored_encoder
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.filters import parse
from sicog_exp.data.readers import words_of
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.prompts import Kind, final_text, prompt, question_of
from sicog_exp.recipe import CurationConfig, ModelConfig, SamplingConfig
from sicog_exp.records import Record, conversation, read_jsonl, read_records, user, write_jsonl, write_records
from sicog_exp.store import Artifact, Step, Workplace
from sicog_exp.training.stages import MixtureData, TrainingTask

GROUPS: dict[Group, tuple[Kind, Kind]] = {"caption": ("cod", "dd"), "reasoning": ("cot", "direct")}
POOL_REVISION = 1
CURATION_REVISION = 3
EMBEDDING_REVISION = 1


@dataclass(frozen=True)
class PoolTask:
    """What a pool depends on besides its generator and data."""

    sampling: SamplingConfig
    model: ModelConfig
    group: Group
    iteration: int
    seed: int
    max_pixels: int = 50_000_000


def requests_for(task: PoolTask, unlabeled: Sequence[Record], root: Path) -> list[Request]:
    """One request per unlabeled item and kind. Indices go on from iteration to iteration, so that pooled candidates
    differ in key and seed."""
    requests = []
    for record in unlabeled:
        if group_of(record.kind) != task.group:
            continue
        question = question_of(record.kind, words_of(record.prompt[-1]))
        for kind in GROUPS[task.group]:
            count = getattr(task.sampling, kind)
            if count:
                messages = (user(prompt(kind, question), len(record.images)),)
                images = tuple(root / name for name in record.images)
                requests.append(Request(record.id, kind, messages, images, count, task.iteration * count))
    return requests


def generate(task: PoolTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Sample candidates for the unlabeled items of one group into `candidates.jsonl`."""
    from sicog_exp.generation.pool import generate_pool
    from sicog_exp.generation.transformers_engine import TransformersEngine
    from sicog_exp.models.loading import work_of

    engine = TransformersEngine.from_path(inputs["generator"].path, task.model.generation_dtype,
                                          task.model.torch_device, task.model.trust_remote_code,
                                          threads=task.model.threads)  # fmt: skip
    requests = requests_for(task, read_records(inputs["data"] / "unlabeled.parquet"), inputs["data"].path)
    sampling = task.sampling
    decoding = Decoding(sampling.temperature, sampling.top_p, sampling.max_new_tokens, task.seed, sampling.batch_size)
    facts = generate_pool(engine, requests, decoding, workplace.scratch, workplace.directory / "candidates.jsonl",
                          workplace.progress)  # fmt: skip
    workplace.device = task.model.device_name
    workplace.add(samples=facts["candidates"], model_seconds=facts["seconds"],
                  **work_of(engine.model).of_sampling(facts))  # fmt: skip


@dataclass(frozen=True)
class CurationTask:
    """What curation depends on besides its pools."""

    curation: CurationConfig


def pool_rows(unlabeled: Sequence[Record], pools: Sequence[Artifact]) -> Iterator[dict]:
    """One row per unlabeled item that any pool sampled, with all its candidates: what `sicog curate` reads.

    Joined by sample id, never by position (paper.md, defects).
    """
    candidates: dict[str, list[dict]] = {}
    for pool in pools:
        for row in read_jsonl(pool / "candidates.jsonl"):
            kept = {name: row[name] for name in ("kind", "text", "finish_reason")}
            candidates.setdefault(row["sample_id"], []).append(kept)
    known = {record.id: record for record in unlabeled}
    for sample_id, texts in candidates.items():
        record = known[sample_id]
        question = question_of(record.kind, words_of(record.prompt[-1]))
        yield {"id": sample_id, "kind": group_of(record.kind), "prompt": question,
               "image": record.images[0] if record.images else None, "candidates": texts}  # fmt: skip


def training_rows(curated: Mapping, images: tuple[str, ...]) -> Iterator[Record]:
    """The records of one kept item: its chosen response whole, and its final text in the plain kind of its group."""
    group: Group = curated["kind"]
    plain = GROUPS[group][1]
    question = curated["prompt"] if group == "reasoning" else ""
    responses: dict[Kind, str] = {curated["chosen_kind"]: curated["chosen"]}
    final = final_text(curated["chosen_kind"], curated["chosen"])
    if final:  # broken steps, which curation.require_format=false lets pass, have no final text of their own
        responses[plain] = final
    for kind, response in responses.items():
        messages = conversation(prompt(kind, question), response, images)
        yield Record(f"{curated['id']}:{kind}", messages, images, kind, f"self_{group if group == 'caption' else kind}")


@dataclass(frozen=True)
class EmbeddingTask:
    """What the embeddings of a pool depend on: the encoder's name and what its model's files hold."""

    encoder: str
    state: str


def compared_texts(pool: Path) -> Iterator[str]:
    """Every text of a pool that some curation may compare; broken steps are compared as a whole where they may pass."""
    lenient = CurationConfig(require_format=False)
    for row in read_jsonl(pool / "candidates.jsonl"):
        final = parse(row["kind"], row["text"], row["finish_reason"], lenient).final
        if final:
            yield final


def embed(task: EmbeddingTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Embed a pool's compared texts, once for every curation of it."""
    started = time.perf_counter()
    texts = embed_texts(lambda: compared_texts(inputs["pool"].path), task.encoder, workplace.directory,
                        workplace.scratch, workplace.progress)  # fmt: skip
    workplace.add(samples=texts, model_seconds=time.perf_counter() - started)
    workplace.add(**encoder_work(compared_texts(inputs["pool"].path), task.encoder))


def embeddings(config: CurationConfig, pools: Sequence[Artifact], run: Callable[[Step], Artifact],
               ) -> dict[str, Artifact]:  # fmt: skip
    """The embeddings of the pools' texts, where a model compares them; `run` makes or reads each."""
    if config.encoder == "lexical":
        return {}
    groups = GROUPS if config.reasoning_scorer == "similarity" else ("caption",)
    compared = [pool for pool in pools if pool.name in {f"generate-{group}" for group in groups}]
    task = EmbeddingTask(config.encoder, encoder_state(config.encoder))
    steps = [Step("embed", embed, task, {"pool": pool}, 0, EMBEDDING_REVISION) for pool in compared]
    return {f"embeddings{i:02d}": run(step) for i, step in enumerate(steps)}


def curate(task: CurationTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Score, choose and keep; `curated.jsonl` holds every item, `self.parquet` the training rows of the kept ones."""
    unlabeled = read_records(inputs["data"] / "unlabeled.parquet")
    pools = [artifact for name, artifact in inputs.items() if name.startswith("pool")]
    pool_file = workplace.directory / "pool.jsonl"
    items = write_jsonl(pool_file, pool_rows(unlabeled, pools))
    embeddings = [artifact.path for name, artifact in inputs.items() if name.startswith("embeddings")]
    encoder = stored_encoder(task.curation.encoder, embeddings)
    summary = curate_file(pool_file, workplace.directory, task.curation, encoder)
    images = {record.id: record.images for record in unlabeled}
    kept = [row for row in read_jsonl(workplace.directory / "curated.jsonl") if row["kept"]]
    rows = [record for row in kept for record in training_rows(row, images[row["id"]])]
    write_records(workplace.directory / "self.parquet", rows)
    workplace.add(samples=items, kept=summary["kept"])


class SelfDataModule(MixtureData):
    """`prepare_data` samples and curates through the store, `setup` builds the pre-training mixture.

    `generators` maps each group to the model that samples it; `earlier` are the pools of previous iterations.
    """

    def __init__(self, pool_task: PoolTask, curation: CurationConfig, training: TrainingTask, model: Artifact,
                 data: Artifact, generators: Mapping[Group, Artifact], earlier: Sequence[Artifact],
                 run: Callable[[Step], Artifact]) -> None:  # fmt: skip
        super().__init__(training, {"model": model, "data": data})
        self._pool_task, self._curation = pool_task, curation
        self._generators, self._run = generators, run
        self.pools = list(earlier)
        self.curated: Artifact | None = None

    def prepare_data(self) -> None:
        """Generate and curate, once; a finished step is read, a killed one goes on."""
        if self.curated is not None:
            return
        data = self.inputs["data"]
        # A folder of images without questions has captions to sample and no answers.
        present = {group_of(record.kind) for record in read_records(data / "unlabeled.parquet")}
        for group, generator in self._generators.items():
            task = replace(self._pool_task, group=group)
            if group in present and any(getattr(task.sampling, kind) for kind in GROUPS[group]):
                step = Step(f"generate-{group}", generate, task, {"generator": generator, "data": data}, task.seed,
                            POOL_REVISION)  # fmt: skip
                self.pools.append(self._run(step))
        inputs = {"data": data} | {f"pool{i:02d}": pool for i, pool in enumerate(self.pools)} 
        inputs |= embeddings(self._curation, self.pools, self._run)
        step = Step("curate", curate, CurationTask(self._curation), inputs, 0, CURATION_REVISION)
        self.curated = self.inputs["curated"] = self._run(step)
