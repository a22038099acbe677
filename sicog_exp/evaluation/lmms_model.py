"""Our engines as one lmms-eval model, in process and as `lmms-eval --model sicog`.

lmms-eval's own models turn a failed generation into an empty answer, delete themselves after a run, and answer in the
order in which they happened to batch. Here a failure is raised, `clean` keeps the engine, and answers are joined by id.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.utils import simple_parse_args_string

from sicog_exp.generation.engine import Decoding, Engine, Refusal, Request
from sicog_exp.models.loading import resolve_base
from sicog_exp.prompts import KINDS, Kind
from sicog_exp.recipe import EvaluationConfig, ModelConfig
from sicog_exp.records import IMAGE_PLACEHOLDER, Message, user

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "sicog"
UNASKED_STOPS = ("\n\n",)
"""What lmms-eval puts where a task names no `until`. Its own LLaVA and Qwen models do not cut there either, since that
would leave the first paragraph of a chain of thought."""
ARGUMENTS = ("pretrained", "batch_size", "max_new_tokens", "threads", "device", "dtype", "trust_remote_code")


class HarnessError(RuntimeError):
    """A request that cannot be put to the engine, or an engine that did not answer; the message says which."""


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` loads."""
    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.EngineModel")


@dataclass(frozen=True)
class _Question:
    """One lmms-eval request in the engine's terms."""

    request: Request
    max_new_tokens: int
    until: tuple[str, ...]


class EngineModel(lmms):
    """Answers lmms-eval's requests greedily with any engine.

    A "simple" model in lmms-eval's sense: only those can run multiple choice. An answer has at most the task's
    `max_new_tokens` and never more than the model's.
    """

    is_simple = True

    def __init__(self, engine: Engine, batch_size: int, max_new_tokens: int, pictures: Path | None = None,
                 refused: dict[tuple[str, int], str] | None = None) -> None:  # fmt: skip
        """`pictures` keeps decoded pictures for a continued evaluation; without it they go with `clean`. `refused` is
        filled with (task, document) -> why a question cannot be put, for who reads the results to leave it out; without
        it such a question is an error, since the harness would score no answer as a wrong one."""
        super().__init__()
        self.engine = engine
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        # lmms-eval makes an Accelerator where this is missing, which would set up devices behind Lightning's back.
        self.accelerator = None
        self.shown: dict[tuple[str, int], str] = {}
        """(task, document) -> a digest of the pixels of its first picture, where the task handed pixels over."""
        self._pictures = _Pictures(pictures)
        self._refused = refused

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> EngineModel:
        """The model of `--model_args pretrained=PATH[,batch_size=N,max_new_tokens=N,threads=N,device=D,...]`."""
        values = simple_parse_args_string(arg_string)
        unknown = sorted(set(values) - set(ARGUMENTS))
        if unknown or "pretrained" not in values:
            wrong = f"unknown {', '.join(unknown)}" if unknown else "pretrained=PATH is missing"
            raise HarnessError(f"--model_args: {wrong}; allowed: {', '.join(ARGUMENTS)}")
        command_line = additional_config or {}
        # The harness's own default is the number 1, what a user types a string: without a word, ours.
        if isinstance(command_line.get("batch_size"), str):
            values.setdefault("batch_size", command_line["batch_size"])
        if command_line.get("device"):
            values.setdefault("device", command_line["device"])
        defaults = EvaluationConfig()
        batch_size = int(values.get("batch_size", defaults.batch_size))
        return cls(_load_engine(values), batch_size, int(values.get("max_new_tokens", defaults.max_new_tokens)))

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One greedy answer per request, in the order of the requests."""
        questions = {_id(instance): self._question(instance) for instance in requests}
        texts = self._answers(list(questions.values()))
        for instance in requests:
            if _id(instance) not in texts:
                self._leave_out(instance, self._reasons[_id(instance)])
        return [_cut(texts.get(_id(instance), ""), questions[_id(instance)].until) for instance in requests]

    def _answers(self, questions: Sequence[_Question]) -> dict[str, str]:
        groups: dict[int, list[Request]] = defaultdict(list)
        for question in questions:
            groups[question.max_new_tokens].append(question.request)
        texts: dict[str, str] = {}
        for limit, requests in groups.items():
            decoding = Decoding(0.0, 1.0, limit, 0, self.batch_size)
            for batch in self.engine.sample(requests, decoding):
                texts |= {candidate.sample_id: candidate.text for candidate in batch}
        settled = texts.keys() | self._reasons.keys()
        missing = [q.request.sample_id for q in questions if q.request.sample_id not in settled]
        if missing:
            raise HarnessError(f"the engine left {len(missing)} of {len(questions)} requests unanswered: {missing[:3]}")
        return texts

    @property
    def _reasons(self) -> Mapping[str, str]:
        """Request -> why the engine refused it."""
        return getattr(self.engine, "refused", {})

    def _leave_out(self, instance: Instance, reason: str) -> None:
        if self._refused is None:
            raise HarnessError(f"{_id(instance)} cannot be put to this model: {reason}")
        self._refused[instance.task_name, instance.doc_id] = reason

    def _question(self, instance: Instance) -> _Question:
        context, options, doc_to_visual, doc_id, task, split = instance.args
        # Some stock tasks ask for 32,768 tokens, some for none at all: then the model's own limit holds.
        limit = min(int(options.get("max_new_tokens") or self.max_new_tokens), self.max_new_tokens)
        until = options.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        stops = () if stops == UNASKED_STOPS else stops
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        return _Question(self._request(instance, context, visuals), limit, stops)

    def _request(self, instance: Instance, context: str, visuals: Any) -> Request:
        paths = tuple(self._pictures.path(_id(instance), visual) for visual in visuals or ())
        if paths and self._pictures.made(paths[0]):
            self.shown[instance.task_name, instance.doc_id] = paths[0].stem
        return Request(_id(instance), _kind(instance), (_message(_id(instance), context, len(paths)),), paths, 1)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:  # type: ignore[override]
        """(mean negative log-likelihood, is greedy) of each continuation, wrapped as lmms-eval 0.7.3 needs it.

        The documented (float, bool) pairs become strings there, and multiple choice takes the smallest value.
        """
        made, continuations = [], []
        for instance in requests:
            context, continuation, doc_to_visual, doc_id, task, split = instance.args
            doc = self.task_dict[task][split][doc_id]
            made.append(self._request(instance, context, doc_to_visual(doc)))
            text = continuation(doc) if callable(continuation) else continuation
            # Tasks put their delimiter, a space, in front; our assistants begin to speak without one.
            continuations.append(str(text).lstrip())
        pairs = []
        for instance, result in zip(requests, self.engine.log_likelihood(made, continuations), strict=True):
            if isinstance(result, Refusal):
                self._leave_out(instance, result.reason)
                result = 0.0, 0, False
            logprob, tokens, greedy = result
            pairs.append((-logprob / max(tokens, 1), greedy))
        return [GenerationResult(text=pair) for pair in pairs]  # type: ignore[arg-type]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("tasks of several rounds are not supported")

    def clean(self) -> None:
        """Remove spooled pictures; unlike lmms-eval's, keep the model, which the run goes on with."""
        self._pictures.clear()


def _load_engine(values: Mapping[str, Any]) -> Engine:
    import torch

    from sicog_exp.generation.transformers_engine import TransformersEngine

    device = str(values.get("device", "auto"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = resolve_base(str(values["pretrained"]))
    trust = values.get("trust_remote_code", False) is True
    return TransformersEngine.from_path(path, str(values.get("dtype", "float32")), device, trust_remote_code=trust,
                                        threads=int(values.get("threads", ModelConfig().threads)))  # fmt: skip


def _id(instance: Instance) -> str:
    return f"{instance.task_name}/{instance.doc_id}/{instance.idx}"


def _kind(instance: Instance) -> Kind:
    kind = instance.metadata.get("kind", "direct")
    if kind not in KINDS:
        raise HarnessError(f"{_id(instance)}: metadata kind {kind!r} is none of {', '.join(KINDS)}")
    return kind  # type: ignore[return-value]


def _message(request_id: str, context: str, images: int) -> Message:
    """Images in front as everywhere, unless the task placed them itself."""
    placed = context.count(IMAGE_PLACEHOLDER)
    if placed not in (0, images):
        raise HarnessError(f"{request_id}: {placed} {IMAGE_PLACEHOLDER} in the text for {images} images")
    return Message("user", context) if placed else user(context, images)


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text


class _Pictures:
    """Paths of the pictures that tasks hand over: engines read files, so that there is one way to open an image."""

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = folder

    def path(self, request_id: str, visual: Any) -> Path:
        """A path as it is, an undecoded PIL image's own file, or a lossless copy named by its pixels."""
        from PIL.Image import Image

        if isinstance(visual, str | Path):
            return self._existing(request_id, Path(visual))
        if not isinstance(visual, Image):
            raise HarnessError(f"{request_id}: expected an image, the task gave {type(visual).__name__}")
        # Tiles are what is still to be decoded: afterwards the pixels may differ from the file's.
        if getattr(visual, "filename", "") and getattr(visual, "tile", None):
            file = Path(visual.filename)  # type: ignore[attr-defined]
            visual.close()
            return self._existing(request_id, file)
        return self._spool(visual)

    def made(self, path: Path) -> bool:
        """Is it one of the copies?"""
        return path.parent == self._folder

    def clear(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = self._folder = None

    @staticmethod
    def _existing(request_id: str, path: Path) -> Path:
        if not path.is_file():
            raise HarnessError(f"{request_id}: image {path} is missing")
        return path.absolute()

    def _spool(self, image: Image) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sicog-pictures-")
            self._folder = Path(self._temporary.name)
        picture = image if image.mode in ("1", "L", "LA", "RGB", "RGBA") else _as_rgb(image)
        digest = hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).hexdigest()
        path = self._folder / f"{digest[:32]}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")  # a kill leaves no half of a picture under its name
            picture.save(part, "png", compress_level=1)
            part.replace(path)
        return path


def _as_rgb(image: Image) -> Image:
    return image.convert("RGBA" if "transparency" in image.info else "RGB")
