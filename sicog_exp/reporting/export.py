"""One generation of a tracked run as a folder to pass on: model, self-data, recipe, scores, each with its card.

What MLflow keeps is enough for everything but the images of the self-data, which lie in the step store. Nothing is
sampled, trained or scored here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sicog_exp import prompts
from sicog_exp.data.images import resolve
from sicog_exp.recipe import Recipe, TrackingConfig
from sicog_exp.records import Record, RecordFile, write_jsonl
from sicog_exp.store import MANIFEST, checksums, digest_of
from sicog_exp.tracking import NAME, PARENT, connect, generation_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Run

SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
"""Our roles in LLaVA's words."""
LLAVA, CHAT = "llava.json", "chat.jsonl"
ROWS, SUMMARY = "self.parquet", "summary.json"
"""What a card of the self-data is made of: the rows, and the counts of their curation."""
PICTURES = {
    "world": "The pictures are those of sicog-exp's built-in world, drawn from [OpenMoji](https://openmoji.org): all "
    "emojis designed by OpenMoji \N{EN DASH} the open-source emoji and icon project. License: CC BY-SA 4.0. Pictures "
    "made from them are passed on under the same licence, with this notice.",
    "easyvqa": "Pictures and questions are those of [easy-vqa](https://github.com/vzhou842/easy-VQA) by Victor Zhou, "
    "MIT License, whose notice goes along with every copy.",
    "own": "Pictures and annotations are the files that the recipe names under `data`, and their licence is theirs. "
    "Before this is passed on, someone who knows them writes here what may be done with them, and whether the people "
    "they show agreed.",
}
"""Notice for each `data.source`."""
TAUGHT = {"world": "pictures of sicog-exp's built-in world", "easyvqa": "pictures of one coloured shape (easy-vqa)",
          "own": "the data that its recipe names"}  # fmt: skip
SCORED = {"similarity": "mean {encoder} similarity of final {texts}",
          "lexical": "mean lexical similarity of final {texts}",
          "agreement": "share of candidates with the same normalised answer",
          "cross_format": "agreement with the candidates of the other format",
          "listing": "agreement of what is listed with all that is listed about the image",
          "likelihood": "mean probability of its tokens"}  # fmt: skip
LICENSES = {"world": "cc-by-sa-4.0", "easyvqa": "mit"}


class ExportError(RuntimeError):
    """A generation that cannot be exported; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Exported:
    """What was written. `notes` say what is not there, why, and how to get it."""

    directory: Path
    generation: str
    model_from: str
    rows: int
    images: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Generation:
    """A generation of a finished run, as tracked."""

    index: int
    run: Run
    experiment: Run
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    """The experiment's summary.json: scores, differences, the names of its artifacts in the step store."""

    @property
    def self_taught(self) -> bool:
        return self.index > 0 and self.recipe["self_data"] and self.recipe["pretrain"]["steps"] > 0

    def dataset(self, context: str) -> Dataset | None:
        """The data set logged with this context: `evaluation`, or `training` for the curated rows."""
        given = self.run.inputs.dataset_inputs if self.run.inputs else []
        return next((one.dataset for one in given if any(tag.value == context for tag in one.tags)), None)

    def recorded(self, context: str) -> Path:
        """Where the artifact of a data set lay on the machine of the run."""
        given = self.dataset(context)
        if given is None:
            raise ExportError(f"run {self.run.info.run_id} tells no {context} data: its experiment did not finish")
        return Path(unquote(urlsplit(json.loads(given.source)["uri"]).path))

    def stored(self, name: str) -> Path | None:
        """An artifact in the store of the run, or in the recipe's `store` as seen from here; None without it."""
        homes = (self.recorded("evaluation").parent, Path(self.recipe["store"]))
        return next((home / name for home in homes if (home / name / MANIFEST).is_file()), None)


def export(source: str, directory: Path) -> Exported:
    """Write a generation into `directory`, whole or not at all.

    `source` is the id of an MLflow run: of a generation, or of an experiment, which stands for its champion
    (RUN:G1 names another generation). Raises ExportError for any other run, for a folder that is not empty, and where
    the model can neither be had from MLflow nor from the step store.
    """
    target = _free(directory)
    client: MlflowClient = connect(TrackingConfig())
    with tempfile.TemporaryDirectory() as scratch, _sibling(target) as partial:
        generation = _find(client, source, Path(scratch), partial)
        manifest, origin = _model(client, generation, partial / "model")
        rows, curation, notes = _self_data(client, generation, partial / "self-data", Path(scratch))
        facts = _facts(generation, manifest, rows, curation)
        _write_json(partial / "scores.json", _scores(generation, manifest))
        _write_card(partial / "model", "model_card.md", facts, _model_front(generation))
        count = len(rows) if rows else 0
        if count:
            _write_card(partial / "self-data", "data_card.md", facts, _data_front(generation, count))
        images = sum(1 for _ in (partial / "self-data" / "images").glob("*"))
        partial.rename(target)
    name = f"G{generation.index} of {generation.recipe['name']}"
    return Exported(target, name, origin, count, images, notes)


# The folder.


def _free(directory: Path) -> Path:
    target = directory.expanduser().resolve()
    if target == Path.cwd():
        raise ExportError(f"{directory}: the current folder would be replaced; name one inside or beside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{directory}: not an empty folder; name a new one")
    return target


@contextmanager
def _sibling(target: Path) -> Iterator[Path]:
    """A folder beside the target to work in; removed unless it was renamed."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# The generation.


def _find(client: MlflowClient, source: str, scratch: Path, partial: Path) -> Generation:
    """The generation that `source` names; its recipe goes into `partial`."""
    run, experiment = _runs(client, *_named(source))
    recipe = _download(client, experiment, "recipe.yaml", partial)
    summary = _download(client, experiment, SUMMARY, scratch)
    if recipe is None or summary is None:
        state = f"{experiment.info.run_id} ({experiment.data.tags.get(NAME, '')}, {experiment.info.status})"
        raise ExportError(f"run {state} logged no summary: it is a trial of a sweep, or it did not finish; run its "
                          "recipe with `sicog iterate`, which continues it, and export that run")  # fmt: skip
    index, made_by = int(run.data.tags["sicog.generation"]), _recipe(recipe)
    if made_by["scale"] == "smoke":
        raise ExportError(f"run {experiment.info.run_id} is a smoke test (scale=smoke): a model with random weights is "
                          "nothing to pass on; run its recipe without it")  # fmt: skip
    return Generation(index, run, experiment, made_by, json.loads(summary.read_text(encoding="utf-8")))


def _recipe(file: Path) -> dict[str, Any]:
    """A logged recipe as plain values, also one of another version: keys that it lacks have today's defaults."""
    from omegaconf import OmegaConf

    logged: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    merged: Any = OmegaConf.to_container(OmegaConf.merge(asdict(Recipe()), logged))
    return {**merged, "mixture": logged["mixture"]}


def _named(source: str) -> tuple[str, int | None]:
    run_id, _, index = source.partition(":G")
    if index and not index.isdecimal():
        raise ExportError(f"{source}: a generation is named as in {run_id}:G1")
    return run_id, int(index) if index else None


def _runs(client: MlflowClient, run_id: str, index: int | None) -> tuple[Run, Run]:
    """The run of the generation, and that of its experiment."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise ExportError(f"{run_id}: no run of {client.tracking_uri}") from None
    level = run.data.tags.get("sicog.level")
    if level == "experiment":
        return _generation_of(client, run, index), run
    if level != "generation":
        finished = run.data.tags.get("sicog.finished_run")
        hint = f"; nothing was to be done there, its work is in run {finished}" if finished else ""
        raise ExportError(f"run {run_id} is neither an experiment nor a generation{hint}")
    if index not in (None, int(run.data.tags["sicog.generation"])):
        raise ExportError(f"run {run_id} is generation {run.data.tags['sicog.generation']}; name its experiment's run "
                          f"to choose G{index}")  # fmt: skip
    return run, client.get_run(run.data.tags[PARENT])


def _generation_of(client: MlflowClient, experiment: Run, index: int | None) -> Run:
    known = generation_runs(client, experiment)
    champion = experiment.data.tags.get("sicog.champion", "").removeprefix("G")
    if not known:
        raise ExportError(f"run {experiment.info.run_id} has no generation yet")
    wanted = index if index is not None else int(champion or max(known))
    if wanted not in known:
        there = ", ".join(f"G{i}" for i in sorted(known))
        raise ExportError(f"run {experiment.info.run_id} has no G{wanted}; it has {there}")
    return known[wanted]


def _download(client: MlflowClient, run: Run, name: str, folder: Path) -> Path | None:
    """An artifact of a run, None where it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        return Path(client.download_artifacts(run.info.run_id, name, str(folder)))
    except (MlflowException, OSError):
        return None


# The model.


def _model(client: MlflowClient, generation: Generation, folder: Path) -> tuple[dict[str, Any], str]:
    """Fill `folder` with the model's files; returns the manifest of the step that made them, and where they came from.

    Raises ExportError when there are none, or others than the step wrote.
    """
    name = generation.summary["models"][generation.index]
    origin = "MLflow"
    if not _logged_model(client, generation, folder):
        stored, origin = generation.stored(name), "the step store"
        if stored is None:
            raise ExportError(f"no model of G{generation.index}: none is logged in {client.tracking_uri} (tracking."
                              f"register), and {generation.recorded('evaluation').parent} holds no {name} here; "
                              "export where that store is")  # fmt: skip
        shutil.copytree(stored, folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found, wanted = checksums(folder), manifest["outputs"]
    wrong = sorted(file for file in found.keys() | wanted.keys() if found.get(file) != wanted.get(file))
    if wrong:
        raise ExportError(f"the model of G{generation.index} in {origin} is damaged ({', '.join(wrong[:3])}); run the "
                          "recipe again, which makes it again")  # fmt: skip
    (folder / MANIFEST).unlink()
    for file in wanted:
        (folder / file).chmod(0o644)  # safetensors writes files that nobody else may read
    return manifest, origin


def _logged_model(client: MlflowClient, generation: Generation, folder: Path) -> bool:
    """Download what `Tracker.register` logged. False, and no folder, where nothing was or it is gone."""
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    info = generation.run.info
    logged = client.search_logged_models([info.experiment_id], f"source_run_id = '{info.run_id}'")
    folder.mkdir()
    with suppress(MlflowException, OSError):
        for model in logged[:1]:
            download_artifacts(f"models:/{model.model_id}", dst_path=str(folder), tracking_uri=client.tracking_uri)
    found = (folder / MANIFEST).is_file()
    if not found:
        shutil.rmtree(folder)
    return found


def parameters(folder: Path) -> int:
    """Numbers in a model folder's safetensors files; tied weights are stored, and counted, once."""
    from math import prod

    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


# The self-data.


def _self_data(client: MlflowClient, generation: Generation, folder: Path,
               scratch: Path) -> tuple[RecordFile | None, dict[str, Any], tuple[str, ...]]:  # fmt: skip
    """Fill `folder`; returns its rows (None without any), the summary of their curation, and what is missing."""
    if not generation.self_taught:
        return None, {}, (f"no self-data/: G{generation.index} was trained on annotated and instruction rows alone",)
    name, data = generation.recorded("training").name, generation.recorded("evaluation").name
    curated = generation.stored(name) or _download(client, generation.run, "self-data", scratch)
    if curated is None:
        return None, {}, (_missing(generation, f"self-data/: its rows ({name}) and pictures ({data})"),)
    rows = RecordFile(curated / ROWS)
    write_self_data(rows, folder)
    summary, root = json.loads((curated / SUMMARY).read_text(encoding="utf-8")), generation.stored(data)
    if root is None:
        return rows, summary, (_missing(generation, f"self-data/images: the pictures ({data})"),)
    copy_images(rows, root, folder)
    return rows, summary, ()


def _missing(generation: Generation, what: str) -> str:
    home = generation.recorded("evaluation").parent
    return (f"missing: {what} lie in the step store {home}, which is not on this machine. Export where it is; or run "
            "`sicog iterate` with the exported recipe.yaml, which makes them again, and export that run")  # fmt: skip


def write_self_data(rows: Iterable[Record], folder: Path) -> None:
    """The rows, walked through twice, as LLaVA JSON and as chat messages; `data.readers` reads both back to the same
    messages."""
    folder.mkdir()
    with (folder / LLAVA).open("w", encoding="utf-8") as file:
        file.write("[\n")
        for number, record in enumerate(rows):
            file.write((",\n" if number else "") + json.dumps(llava_row(record), ensure_ascii=False))
        file.write("\n]\n")
    write_jsonl(folder / CHAT, map(chat_row, rows))


def llava_row(record: Record) -> dict[str, Any]:
    """`kind` is beyond LLaVA's own keys: which of our data kinds the row is."""
    turns = [{"from": SPEAKERS[message.role], "value": message.content} for message in record.messages]
    image = record.images[0] if len(record.images) == 1 else list(record.images)
    return {"id": record.id, "image": image, "kind": record.kind, "conversations": turns}


def chat_row(record: Record) -> dict[str, Any]:
    return {"id": record.id, "images": list(record.images), "kind": record.kind,
            "messages": [asdict(message) for message in record.messages]}  # fmt: skip


def copy_images(rows: Iterable[Record], root: Path, folder: Path) -> None:
    """Copy the rows' images from the data set `root`, each under the name that the rows give it; the names are held.

    Raises ImageError for one that lies outside of the root, ExportError for a name that would leave `folder`.
    """
    for name in sorted({image for record in rows for image in record.images}):
        copy = (folder / name).resolve()
        if not copy.is_relative_to(folder.resolve()):
            raise ExportError(f"image {name!r} would be written outside of the export")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(resolve(root, name), copy)


# Scores.


def _scores(generation: Generation, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and differences are fractions; intervals 95%, whole images resampled."""
    measured, recipe = generation.run.data.metrics, generation.recipe
    scores = {}
    for task, overall in generation.summary["generations"][generation.index].items():
        prefix = f"eval/{task}/family/"
        families = {name.removeprefix(prefix): mean for name, mean in measured.items() if name.startswith(prefix)}
        scores[task] = {**overall, "families": families}
    return {
        "recipe": recipe["name"],
        "seed": recipe["seed"],
        "run": generation.experiment.info.run_id,
        "generation": generation.index,
        "suite": recipe["evaluation"]["suite"],
        "split": recipe["evaluation"]["split"],
        "harness": f"lmms-eval {manifest['libraries'].get('lmms-eval', '')}",
        "scores": scores,
        "differences_to_G0": _differences(generation),
    }


def _differences(generation: Generation) -> list[dict[str, Any]]:
    """Paired, against G0, one a task; `holm_p` is corrected over all comparisons of the run."""
    pair = ("G0", f"G{generation.index}")
    return [delta for delta in generation.summary["deltas"] if (delta["before"], delta["after"]) == pair]


# The cards.


def _facts(generation: Generation, manifest: Mapping[str, Any], kept: RecordFile | None,
           curation: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """What the templates of both cards may name."""
    rows = kept or ()
    tags, artifacts = generation.experiment.data.tags, generation.summary["artifacts"]
    return {
        "generation": generation,
        "index": generation.index,
        "recipe": generation.recipe,
        "manifest": manifest,
        "weights": digest_of(manifest["outputs"]),
        "base": next((name for name in artifacts if name.startswith("base-")), ""),
        "base_name": _hub_name(generation.recipe) or Path(generation.recipe["model"]["base"]).name,
        "commit": tags.get("mlflow.source.git.commit", ""),
        "stages": _stages(generation.recipe, generation.index),
        "scores": generation.summary["generations"][generation.index],
        "first": generation.summary["generations"][0],
        "differences": {delta["task"]: delta for delta in _differences(generation)},
        "prompts": prompts.PROMPTS,
        "rows": rows,
        "curation": curation,
        "counts": Counter((record.source, record.kind) for record in rows),
        "images": len({image for record in rows for image in record.images}),
        "shares": _shares(generation.recipe["mixture"]),
        "known": _known(generation),
        "scored": {group: _scored(generation.recipe["curation"], group) for group in ("caption", "reasoning")},
        "families": _families(generation),
        "notice": PICTURES[generation.recipe["data"]["source"]],
        "taught": TAUGHT[generation.recipe["data"]["source"]],
        "example": next(iter(rows), None),
    }


def _stages(recipe: Mapping[str, Any], index: int) -> list[tuple[str, int, Mapping[str, Any]]]:
    """(stage, its steps, its configuration) in order, those of 0 steps left out; the generators are no ancestors."""
    instruct, closing = recipe["instruct"], recipe["closing_steps"]
    last = ("instruct", instruct["steps"] if closing is None or not index else closing, instruct)
    named = [(name, recipe[name]["steps"], recipe[name]) for name in ("align", "pretrain")] if index else []
    return [stage for stage in (*named, last) if stage[1]]


def _scored(curation: Mapping[str, Any], group: str) -> str:
    """A group's scorer in words, with the weights of what is blended into it."""
    words = {"encoder": curation["encoder"], "texts": "texts" if group == "caption" else "answers"}
    parts = {curation.get(f"{group}_scorer", "similarity"): 1.0, **(curation.get(f"{group}_blend") or {})}
    return " + ".join(("" if weight == 1 else f"{weight:g} x ") + SCORED[name].format(**words)
                      for name, weight in parts.items())  # fmt: skip


def _shares(mixture: Mapping[str, float]) -> dict[str, float]:
    """Source -> its share of the pre-training samples, if every source has rows."""
    return {source: share / sum(mixture.values()) for source, share in mixture.items() if share > 0}


def _known(generation: Generation) -> dict[str, dict[str, float]]:
    """Group (caption, reasoning) -> what the loop measured of its curation, truths included where they are known."""
    found: dict[str, dict[str, float]] = {}
    for name, value in generation.run.data.metrics.items():
        head, _, rest = name.partition("/")
        if head == "curation":
            group, _, metric = rest.partition("/")
            found.setdefault(group, {})[metric] = value
    return dict(sorted(found.items()))


def _families(generation: Generation) -> dict[str, float]:
    """Question family -> share of right answers among the kept ones; empty where no truth is known or at hand."""
    from sicog_exp.curation.diagnosis import diagnose

    if not generation.self_taught:
        return {}
    curated, data = (generation.stored(generation.recorded(context).name) for context in ("training", "evaluation"))
    found = diagnose(curated, data) if curated and data else {}
    return found["reasoning"].precision_by_family if "reasoning" in found else {}


def _hub_name(recipe: Mapping[str, Any]) -> str:
    """The base's name on the hub; empty for the embedded one and for a folder."""
    base = recipe["model"]["base"]
    return base if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base) and not Path(base).exists() else ""


def _model_front(generation: Generation) -> dict[str, Any]:
    """The hub's metadata of a model. `base_model` is for hub names alone: anything else is a dead link there."""
    base = _hub_name(generation.recipe)
    results = [{"task": {"type": "image-text-to-text"}, "dataset": {"name": task, "type": task},
                "metrics": [{"type": "accuracy", "value": round(score["mean"], 4)}]}
               for task, score in generation.summary["generations"][generation.index].items()]  # fmt: skip
    index = [{"name": f"{generation.recipe['name']}-G{generation.index}", "results": results}]
    return {"library_name": "transformers", "pipeline_tag": "image-text-to-text",
            **({"base_model": base} if base else {}), "tags": ["sicog", "self-improvement"],
            "model-index": index}  # fmt: skip


def _data_front(generation: Generation, rows: int) -> dict[str, Any]:
    """The hub's metadata of a data set; the two files hold the same rows, each is a configuration of its own."""
    license = LICENSES.get(generation.recipe["data"]["source"])
    size = next(name for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"),
                                         (float("inf"), "n>1M")) if rows < limit)  # fmt: skip
    return {**({"license": license} if license else {}), "task_categories": ["image-text-to-text"],
            "size_categories": [size], "tags": ["sicog", "synthetic", "machine-generated"],
            "configs": [{"config_name": "chat", "data_files": CHAT, "default": True},
                        {"config_name": "llava", "data_files": LLAVA}]}  # fmt: skip


def _write_card(folder: Path, template: str, facts: Mapping[str, Any], front: Mapping[str, Any]) -> None:
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters |= {"percent": lambda share: f"{100 * share:.1f}", "points": lambda x: f"{100 * x:+.1f}",
                            "count": lambda number: f"{int(number):,}", "words": lambda name: name.replace("_", " "),
                            "json": lambda text: json.dumps(text, ensure_ascii=False)}  # fmt: skip
    header = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    config = folder / "config.json"
    shape = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    text = environment.get_template(template).render(
        **facts, header=header, architecture=(shape.get("architectures") or ["model"])[0],
        parameters=parameters(folder), has_images=(folder / "images").is_dir())  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
