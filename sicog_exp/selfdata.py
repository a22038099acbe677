"""The self-data of one iteration: sample a pool, curate it, mix it, behind one LightningDataModule."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from sicog_exp.curation.diagnosis import read_truth
from sicog_exp.curation.embeddings import (
    Embed,
    EmbeddingWorker,
    embed_texts,
    encoder_state,
    encoder_work,
    stored_encoder,
)
from sicog_exp.curation.files import curate_file
from sicog_exp.curation.filters import parse
from sicog_exp.curation.items import ROW_KINDS, Group, group_of
from sicog_exp.curation.oracle import upper_bound
from sicog_exp.curation.scorers import compared_by
from sicog_exp.data.readers import words_of
from sicog_exp.generation.engine import Decoding, Request
from sicog_exp.generation.pool_index import PoolIndex
from sicog_exp.prompts import Kind, final_text, prompt, question_of
from sicog_exp.recipe import CurationConfig, EngineConfig, ModelConfig, Recipe, RecipeError, SamplingConfig
from sicog_exp.records import (
    Record,
    RecordFile,
    RecordsById,
    conversation,
    read_jsonl,
    user,
    write_jsonl,
    write_records,
)
from sicog_exp.store import REJECTED, Artifact, Step, Workplace
from sicog_exp.training.stages import WEIGHTS, MixtureData, TrainingTask

GROUPS = ROW_KINDS
POOL_REVISION = 1
CURATION_REVISION = 4
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
    engine: EngineConfig = field(default_factory=EngineConfig)


def requests_for(task: PoolTask, unlabeled: Iterable[Record], root: Path) -> Iterator[Request]:
    """One request per unlabeled item and kind. Indices go on from iteration to iteration, so that pooled candidates
    differ in key and seed."""
    for record in unlabeled:
        if group_of(record.kind) != task.group:
            continue
        question = question_of(record.kind, words_of(record.prompt[-1]))
        for kind in GROUPS[task.group]:
            count = getattr(task.sampling, kind)
            if count:
                messages = (user(prompt(kind, question), len(record.images)),)
                images = tuple(root / name for name in record.images)
                yield Request(record.id, kind, messages, images, count, task.iteration * count)


def items_of(inputs: Mapping[str, Artifact]) -> RecordFile:
    """The records to sample for: those of `items` where there is such an input, else the data set's unlabeled ones."""
    return RecordFile(inputs.get("items", inputs["data"]) / "unlabeled.parquet")


def generate(task: PoolTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Sample candidates for the items of one group into `candidates.jsonl`; a prompt that the model cannot carry is set
    aside, in `rejected.jsonl`."""
    from sicog_exp.generation.engines import open_engine
    from sicog_exp.generation.pool import generate_pool

    requests = requests_for(task, items_of(inputs), inputs["data"].path)
    sampling = task.sampling
    decoding = Decoding(sampling.temperature, sampling.top_p, sampling.max_new_tokens, task.seed, sampling.batch_size)
    with open_engine(inputs["generator"].path, task.model, task.engine, task.max_pixels) as opened:
        facts = generate_pool(opened.engine, requests, decoding, workplace.scratch,
                              workplace.directory / "candidates.jsonl", workplace.progress)  # fmt: skip
    workplace.device = opened.device
    workplace.add(samples=facts["candidates"], model_seconds=facts["seconds"], **opened.halvings,
                  **opened.work.of_sampling(facts))  # fmt: skip
    if "rejected" in facts:
        workplace.add(rejected=facts["rejected"])
        first = next(read_jsonl(workplace.directory / REJECTED))
        print(f"sampling: {facts['rejected']} {task.group} prompts cannot be put to this model and are set aside, for "
              f"example of {first['id']} ({first['reason']}); {REJECTED} lists them")  # fmt: skip


def sample_pools(task: PoolTask, generators: Mapping[Group, Artifact], inputs: Mapping[str, Artifact],
                 run: Callable[[Step], Artifact], name: str = "generate") -> dict[Group, Artifact]:  # fmt: skip
    """A pool of every group that has items and candidates to sample; `inputs` as in `generate`, but the generator."""
    # A folder of images without questions has captions to sample and no answers.
    present = {group_of(record.kind) for record in items_of(inputs)}
    pools = {}
    for group, generator in generators.items():
        if group in present and any(getattr(task.sampling, kind) for kind in GROUPS[group]):
            step = Step(f"{name}-{group}", generate, replace(task, group=group), {"generator": generator, **inputs},
                        task.seed, POOL_REVISION)  # fmt: skip
            pools[group] = run(step)
    return pools


@dataclass(frozen=True)
class CurationTask:
    """What curation depends on besides its pools."""

    curation: CurationConfig


def pool_rows(unlabeled: Iterable[Record], pools: Sequence[Artifact]) -> Iterator[dict]:
    """One row per unlabeled item that any pool sampled, with all its candidates: what `sicog curate` reads.

    Joined by sample id, never by position (paper.md, defects). `unlabeled` is walked through once a group of pools
    where they have its order, as they do.
    """
    known = RecordsById(unlabeled)
    for sample_id, candidates in PoolIndex([pool / "candidates.jsonl" for pool in pools]):
        record = known[sample_id]
        kept = ("kind", "text", "finish_reason", "logprob", "tokens")
        texts = [{name: row[name] for name in kept} for row in candidates]
        question = question_of(record.kind, words_of(record.prompt[-1]))
        family = {"family": record.family} if record.family else {}
        yield {"id": sample_id, "kind": group_of(record.kind), "prompt": question,
               "image": record.images[0] if record.images else None, **family, "candidates": texts}  # fmt: skip


def training_rows(curated: Mapping, images: tuple[str, ...]) -> Iterator[Record]:
    """The records of one kept item: its chosen response whole, and its final text in the plain kind of its group; or
    those of its rows that were kept, where they were decided separately."""
    group: Group = curated["kind"]
    question = curated["prompt"] if group == "reasoning" else ""
    for kind, response in _responses(curated).items():
        messages = conversation(prompt(kind, question), response, images)
        yield Record(f"{curated['id']}:{kind}", messages, images, kind, f"self_{group if group == 'caption' else kind}")


def _responses(curated: Mapping) -> dict[Kind, str]:
    if "rows" in curated:
        return {row["kind"]: row["text"] for row in curated["rows"]}
    responses: dict[Kind, str] = {curated["chosen_kind"]: curated["chosen"]}
    final = final_text(curated["chosen_kind"], curated["chosen"])
    if final:  # broken steps, which curation.require_format=false lets pass, have no final text of their own
        responses[GROUPS[curated["kind"]][1]] = final
    return responses


@dataclass(frozen=True)
class EmbeddingTask:
    """What the embeddings of a pool depend on: the encoder's name and what its model's files hold."""

    encoder: str
    state: str
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How many workers share the texts; which engine samples does not matter here."""


def compared_texts(pool: Path) -> Iterator[str]:
    """Every text of a pool that some curation may compare; broken steps are compared as a whole where they may pass."""
    lenient = CurationConfig(require_format=False)
    for row in read_jsonl(pool / "candidates.jsonl"):
        final = parse(row["kind"], row["text"], row["finish_reason"], lenient).final
        if final:
            yield final


class _Clock:
    """Seconds of a step with those of its killed attempts, which scratch keeps up to each one's last progress."""

    def __init__(self, workplace: Workplace) -> None:
        self._file, self._told = workplace.scratch / "seconds", workplace.progress
        self._earlier = float(self._file.read_text() or 0) if self._file.exists() else 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._started

    def progress(self, done: int, total: int) -> None:
        """Keep the time, then tell who watches."""
        self._file.write_text(str(self.seconds))
        if self._told:
            self._told(done, total)


def embed(task: EmbeddingTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Embed a pool's compared texts, once for every curation of it."""
    clock, texts = _Clock(workplace), partial(compared_texts, inputs["pool"].path)
    with embedded_by(task) as spread:
        embedded = embed_texts(texts, task.encoder, workplace.directory, workplace.scratch, clock.progress, spread)
    workplace.add(samples=embedded, model_seconds=clock.seconds)
    workplace.add(**encoder_work(texts, task.encoder))


@contextmanager
def embedded_by(task: EmbeddingTask) -> Iterator[Embed | None]:
    """Ray workers that embed batches, where the recipe has some; None for this process."""
    if not task.engine.workers:
        yield None
        return
    from sicog_exp.ray_pool import RayPool

    pool = RayPool(partial(EmbeddingWorker, task.encoder), task.engine.workers, gpus=task.engine.worker_gpus or 0,
                   address=task.engine.ray)  # fmt: skip
    try:
        yield lambda batches: pool.map("vectors", ((batch,) for batch in batches))
    finally:
        pool.close()


def embeddings(config: CurationConfig, pools: Sequence[Artifact], run: Callable[[Step], Artifact],
               engine: EngineConfig | None = None) -> dict[str, Artifact]:  # fmt: skip
    """The embeddings of the pools' texts, where a model compares them; `run` makes or reads each."""
    if config.encoder == "lexical":
        return {}
    groups = {group for group in GROUPS if "similarity" in compared_by(config, group)}
    compared = [pool for pool in pools if pool.name.rpartition("-")[2] in groups]
    workers = replace(engine or EngineConfig(), kind="transformers", server=None, max_length=None)
    task = EmbeddingTask(config.encoder, encoder_state(config.encoder), workers)
    steps = [Step("embed", embed, task, {"pool": pool}, 0, EMBEDDING_REVISION) for pool in compared]
    return {f"embeddings{i:02d}": run(step) for i, step in enumerate(steps)}


def curate(task: CurationTask, inputs: Mapping[str, Artifact], workplace: Workplace) -> None:
    """Score, choose and keep; `curated.jsonl` holds every item, `self.parquet` the training rows of the kept ones.

    The truth is read for upper bounds alone.
    """
    data, folder = inputs["data"], workplace.directory
    unlabeled = RecordFile(data / "unlabeled.parquet")
    pools = [artifact for name, artifact in inputs.items() if name.startswith("pool")]
    items = write_jsonl(folder / "pool.jsonl", pool_rows(unlabeled, pools))
    embeddings = [artifact.path for name, artifact in inputs.items() if name.startswith("embeddings")]
    encoder = stored_encoder(task.curation.encoder, embeddings)
    judge = upper_bound(task.curation, read_truth(data.path)) if task.curation.is_upper_bound else None
    summary = curate_file(folder / "pool.jsonl", folder, task.curation, encoder, judge)
    write_records(folder / "self.parquet", (record for record, _ in weighted_rows(folder, unlabeled)))
    if task.curation.disagreement_weight > 1 and task.curation.select == "best":
        weights = ({"id": record.id, "weight": weight} for record, weight in weighted_rows(folder, unlabeled))
        write_jsonl(folder / WEIGHTS, weights)
    workplace.add(samples=items, kept=summary["kept"])


def weighted_rows(curated: Path, unlabeled: Iterable[Record]) -> Iterator[tuple[Record, float | None]]:
    """The training rows of the kept items with the weight that curation gave them, in the items' order."""
    known = RecordsById(unlabeled)
    for row in read_jsonl(curated / "curated.jsonl"):
        if row["kept"]:
            for record in training_rows(row, known[row["id"]].images):
                yield record, row.get("weight")


def curate_pools(name: str, curation: CurationConfig, data: Artifact, pools: Sequence[Artifact],
                 run: Callable[[Step], Artifact], engine: EngineConfig | None = None) -> Artifact:  # fmt: skip
    """Curate these pools together; `data` holds the items that they were sampled for."""
    inputs = {"data": data, **numbered(pools), **embeddings(curation, pools, run, engine)}
    return run(Step(name, curate, CurationTask(curation), inputs, 0, CURATION_REVISION))


def numbered(pools: Iterable[Artifact]) -> dict[str, Artifact]:
    """Pools as a step's inputs."""
    return {f"pool{i:02d}": pool for i, pool in enumerate(pools)}


def check_truth(recipe: Recipe, data: Artifact) -> None:
    """Raises RecipeError where an upper bound is asked for and the source knows no truth of what would be sampled."""
    if not recipe.is_upper_bound:
        return
    truths = read_truth(data.path)
    asked = {group for group, kinds in GROUPS.items() if any(getattr(recipe.sampling, kind) for kind in kinds)}
    items = {(group_of(record.kind), record.id in truths) for record in RecordFile(data / "unlabeled.parquet")}
    for group in sorted(asked & {group for group, _ in items}):
        if (group, True) not in items:
            kinds = " and ".join(f"sampling.{kind}=0" for kind in GROUPS[group])
            raise RecipeError(f"curation.select={recipe.curation.select}: data.source={recipe.data.source} knows no "
                              f"truth of the unlabeled {group} items; use best or random, give the rows their "
                              f"{'descriptions' if group == 'caption' else 'answers'}, or leave them out with "
                              f"{kinds}")  # fmt: skip


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
        self.pools += sample_pools(self._pool_task, self._generators, {"data": data}, self._run).values()
        self.curated = self.inputs["curated"] = curate_pools("curate", self._curation, data, self.pools, self._run,
                                                                      self._pool_task.engine)  # fmt: skip
