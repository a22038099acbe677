"""A dry look at a user's source: all rows read as a run would read them, token lengths, and what would be learned.

Nothing is copied or trained. Rows are validated one by one; lengths come from the model's own tokenizer and image
tokens, for a sample or for every row; pictures are checked by their headers, or decoded.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sicog_exp import prompts
from sicog_exp.data.chat import IGNORED, ChatEncoder, ChatError, ImageInputs
from sicog_exp.data.formats import DataError, Reading, default_root, exists, is_hub
from sicog_exp.data.images import ImageError, ImageHeaders, open_bytes, open_image
from sicog_exp.data.readers import SET_ASIDE, BadRow, Intake, no_rows, read_annotated, read_unlabeled
from sicog_exp.recipe import DataConfig, StageConfig
from sicog_exp.records import Message, Record, conversation

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWN = 2000
"""Rows whose tokens are counted where not every row's are."""
SHOWN = 2
"""Rows of each kind that are shown."""
PROBES = ((64, 64), (336, 336), (1200, 400), (400, 1200))
"""Image sizes (width, height) by which it is found out whether a model's image tokens depend on the size."""
REFUSED = "model"
"""Problem of rows with a picture that the model's processor refuses: read by a run, and set aside where it trains."""
ENDLESS = 10**9
"""A length limit that no row reaches."""
THUMBNAIL = 256
"""Largest side of a shown picture, in pixels."""
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How a source is looked at. `data` gives root, max_pixels and max_bad_share; its files are not read."""

    data: DataConfig = field(default_factory=DataConfig)
    model: str = "embedded"
    max_length: int | None = None
    """Tokens of a row; by default a stage's own default, or what the model can hold if that is less."""
    unlabeled: bool = False
    """Read as `data.unlabeled`: rows need no response."""
    decode: bool = False
    """Decode every picture instead of reading its header."""
    every: bool = False
    """Count the tokens of every row."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a shown row, as text; `trained` ones carry loss."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Shown:
    """A row as the model would get it."""

    record: Record
    pieces: tuple[Piece, ...]
    tokens: int
    pictures: tuple[Image, ...]
    problem: str = ""
    """Why it cannot be shown: a picture that its header did not give away, or a template that refuses the row."""


@dataclass
class Lengths:
    """Token counts of rows, image tokens included. `of` and `responses` are those of the rows that were counted."""

    max_length: int
    of: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    """Ids of rows whose response does not fit whole; of all rows, counted or not."""
    too_long: list[str] = field(default_factory=list)
    """Ids of rows whose prompt does not fit, which training sets aside; of all rows."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reasons of the model's template for rows that it cannot carry."""


@dataclass
class Findings:
    """What was found. read = usable + rejected + unused."""

    source: Path
    options: Options
    intake: Intake
    lengths: Lengths
    usable: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    """User turns of a row -> rows."""
    images: int = 0
    """Different images, by name or, of embedded ones, by content."""
    shown: list[Shown] = field(default_factory=list)
    seconds: float = 0.0
    """From the first row on, without loading the processor."""

    @property
    def read(self) -> int:
        return self.intake.read.total()

    @property
    def bad(self) -> int:
        """Unusable rows; those left out on purpose (repeated ones) don't count, nor do those that one model refuses."""
        return sum(row.problem not in (*SET_ASIDE, REFUSED) for row in self.intake.rejected)

    @property
    def too_many_bad(self) -> bool:
        """Whether a run would stop here."""
        return self.bad > self.options.data.max_bad_share * self.read or not self.usable


def check(source: Path, options: Options, watch: Callable[[Reading], None] | None = None) -> Findings:
    """Read the whole source. Raises DataError where it cannot be read, ModelError where the processor cannot."""
    if not exists(source):
        raise DataError(f"{source}: no such file or folder; correct the path")
    root = _root(source, options.data)
    encoder, limit = _load(options.model)
    started = time.perf_counter()
    headers = ImageHeaders(options.data.max_pixels, options.decode)
    counter = TokenCounter(encoder, options.max_length or min(StageConfig().max_length, limit), options.every)
    found = Findings(source, options, Intake(reading=Reading(watch)), counter.lengths)
    looks: dict[str, Drawing[Look]] = defaultdict(lambda: Drawing(SHOWN))
    for record in _records(source, root, options, headers, found.intake):
        sizes = {name: headers.sizes[name] for name in record.images}
        refusal = _refusal(sizes, counter.images)
        if refusal:
            found.intake.reject(source, found.intake.origin[record.source, record.id], record.id, refusal)
            continue
        found.usable += 1
        found.kinds[record.kind] += 1
        found.turns[sum(message.role == "user" for message in record.messages)] += 1
        counter.add(record, tuple(sizes[name] for name in record.images))
        drawing = looks[record.kind]
        if drawing.wants_next():
            drawing.put(Look(record, {name: headers.latest.get(name) for name in record.images}))
    if not found.read:
        raise no_rows(source)
    counter.finish()
    found.images = len(headers.sizes)
    found.shown = [_show(look, root, encoder, options) for drawing in looks.values() for look in drawing.items]
    found.seconds = time.perf_counter() - started
    return found


def _root(source: Path, data: DataConfig) -> Path:
    root = Path(data.root).expanduser() if data.root else default_root(source)
    if not root.is_dir() and (data.root or not is_hub(source)):
        raise DataError(f"{root}: no such folder; correct --root")
    return root


def _load(model: str) -> tuple[ChatEncoder, int]:
    """The model's encoder and the positions that it has."""
    from transformers import AutoConfig

    from sicog_exp.models.loading import ModelSource, load_processor, resolve_base

    path = resolve_base(model)
    encoder = ChatEncoder(load_processor(ModelSource(path)))
    text = AutoConfig.from_pretrained(path).get_text_config()
    return encoder, getattr(text, "max_position_embeddings", None) or StageConfig().max_length


def _records(source: Path, root: Path, options: Options, headers: ImageHeaders, intake: Intake) -> Iterator[Record]:
    if not options.unlabeled:
        yield from read_annotated(source, root, headers, intake)
        return
    for request in read_unlabeled(source, root, headers, intake):
        kind: prompts.Kind = "cot" if request.question else "cod"
        messages = conversation(prompts.prompt(kind, request.question), None, (request.image,))
        record = Record(f"row {request.place[1]}", messages, (request.image,), kind, "unlabeled")
        intake.origin[record.source, record.id] = request.place
        yield record


def _refusal(sizes: Mapping[str, tuple[int, int]], lengths: ImageLengths) -> BadRow | None:
    """Why the model's processor takes none of a row whose images have these sizes; None where it takes them."""
    for name, size in sizes.items():
        try:
            lengths.of(size)
        except ChatError as error:
            reason, _, fix = str(error).partition("; ")
            return BadRow(REFUSED, f"image {name!r}, {size[0]} x {size[1]} pixels: {reason}", fix)
    return None


class Drawing(Generic[T]):
    """A uniform sample of a stream, the same each time (algorithm R; Vitter, 1985)."""

    def __init__(self, size: int) -> None:
        self.items: list[T] = []
        self._size, self._seen, self._rng = size, 0, random.Random(0)
        self._place = 0

    def wants_next(self) -> bool:
        """Whether the stream's next item belongs to the sample; then `put` it."""
        self._place = self._seen if self._seen < self._size else self._rng.randrange(self._seen + 1)
        self._seen += 1
        return self._place < self._size

    def put(self, item: T) -> None:
        self.items[self._place : self._place + 1] = [item]


# Tokens.


class ImageLengths:
    """Tokens of an image by its size (width, height), from the model's own processor."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder
        probed = {self._ask(size) for size in PROBES}
        self._fixed = probed.pop() if len(probed) == 1 else None
        self._asked = lru_cache(maxsize=100_000)(self._ask)

    def stand_in(self, sizes: Sequence[tuple[int, int]]) -> ImageInputs:
        """In the place of images of these sizes: as many tokens, and no pixel decoded."""
        return ImageInputs({}, [self._encoder.image_token * self.of(size) for size in sizes])

    def of(self, size: tuple[int, int]) -> int:
        """Raises ChatError where the processor refuses the size."""
        return self._fixed if self._fixed is not None else self._asked(size)

    def _ask(self, size: tuple[int, int]) -> int:
        """Counted on a blank picture of that size: what is on it does not matter."""
        from PIL import Image

        return self._encoder.image_length(Image.new("RGB", size))


class TokenCounter:
    """Exact token counts of a sample of rows or of all, and of every row that may be longer than `max_length`."""

    def __init__(self, encoder: ChatEncoder, max_length: int, every: bool) -> None:
        self.lengths, self.images = Lengths(max_length), ImageLengths(encoder)
        self._encoder, self._every = encoder, every
        self._drawn: Drawing[tuple[Record, tuple[tuple[int, int], ...]]] = Drawing(DRAWN)
        hello = (Message("user", "a"), Message("assistant", "a"))
        self._frame = len(self._encoder.example(hello, None, ENDLESS))

    def add(self, record: Record, sizes: tuple[tuple[int, int], ...]) -> None:
        if self._every:
            self._count(record, sizes)
        elif self._drawn.wants_next():
            self._drawn.put((record, sizes))
        if self._may_exceed(record, sizes):
            self._compare(record, sizes)

    def finish(self) -> None:
        for record, sizes in self._drawn.items:
            self._count(record, sizes)

    def _may_exceed(self, record: Record, sizes: tuple[tuple[int, int], ...]) -> bool:
        """False where the row surely fits: no token is shorter than a byte, and no turn has more around it than a
        whole small conversation. Only where bytes are too many, the words are tokenized."""
        texts = [message.content for message in record.messages]
        left = self.lengths.max_length - self._frame * len(texts) - sum(map(self.images.of, sizes))
        if sum(len(text.encode()) for text in texts) <= left:
            return False
        tokenizer = self._encoder.tokenizer
        return sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts) > left

    def _tokens(self, record: Record, sizes: Any) -> tuple[int, int]:
        """All tokens, and those with loss."""
        if record.response is None:
            return len(self._encoder.prompt(record.messages, self.images.stand_in(sizes))), 0
        example = self._encoder.example(record.messages, self.images.stand_in(sizes), ENDLESS)
        return len(example), len(example) - example.labels.count(IGNORED)

    def _count(self, record: Record, sizes: Any) -> None:
        try:
            tokens, trained = self._tokens(record, sizes)
        except ChatError as error:
            self.lengths.refused[str(error)] += 1
            return
        self.lengths.of.append(tokens)
        self.lengths.responses.append(trained)

    def _compare(self, record: Record, sizes: Any) -> None:
        """Does the row fit, and if not, what would training do with it?"""
        try:
            if self._tokens(record, sizes)[0] <= self.lengths.max_length:
                return
        except ChatError:
            return  # counted as refused, not as long
        try:
            if record.response is not None:
                self._encoder.example(record.messages, self.images.stand_in(sizes), self.lengths.max_length)
                self.lengths.cut.append(record.id)
                return
        except ChatError:
            pass
        self.lengths.too_long.append(record.id)


def quantiles(counts: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The smallest counts that reach each share of the rows."""
    ordered = sorted(counts)
    return [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in shares]


def histogram(counts: Sequence[int], bars: int = 10) -> list[tuple[int, int, int]]:
    """(first, last, rows) of at most `bars` equal ranges from the smallest count to the largest."""
    low, high = min(counts), max(counts)
    width = max(1, -(-(high - low + 1) // bars))
    held = Counter((count - low) // width for count in counts)
    return [(low + i * width, low + (i + 1) * width - 1, held[i]) for i in range(max(held) + 1)]


# Rows to look at.


@dataclass(frozen=True)
class Look:
    """A drawn row with the bytes of its embedded images."""

    record: Record
    embedded: Mapping[str, bytes | None]


def _show(look: Look, root: Path, encoder: ChatEncoder, options: Options) -> Shown:
    record, limit = look.record, options.data.max_pixels
    try:
        pictures = [_open(root, name, content, limit) for name, content in _named(look)]
        inputs = encoder.pixels(pictures) if pictures else None
        if record.response is None:
            ids = encoder.prompt(record.messages, inputs)
            labels = [IGNORED] * len(ids)
        else:
            example = encoder.example(record.messages, inputs, ENDLESS)
            ids, labels = example.input_ids, example.labels
    except (ImageError, ChatError) as error:
        return Shown(record, (), 0, (), str(error))
    for picture in pictures:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return Shown(record, tuple(_pieces(ids, labels, encoder)), len(ids), tuple(pictures))


def _named(look: Look) -> Iterator[tuple[str, bytes | None]]:
    return ((name, look.embedded[name]) for name in look.record.images)


def _open(root: Path, name: str, content: bytes | None, max_pixels: int) -> Image:
    return open_image(root, name, max_pixels) if content is None else open_bytes(content, max_pixels)


def _pieces(ids: Sequence[int], labels: Sequence[int], encoder: ChatEncoder) -> Iterator[Piece]:
    """Runs of tokens with and without loss, decoded; image tokens are counted instead of repeated."""
    image = encoder.tokenizer.convert_tokens_to_ids(encoder.image_token)

    def state(pair: tuple[int, int]) -> tuple[bool, bool]:
        return pair[1] != IGNORED, pair[0] == image

    for (trained, is_image), run in groupby(zip(ids, labels, strict=True), state):
        tokens = [token for token, _ in run]
        text = f"[{len(tokens)} image tokens]" if is_image else encoder.tokenizer.decode(tokens)
        yield Piece(text, trained)
