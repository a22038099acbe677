"""The training stream: exact shares, every row once an epoch, and any slot found without those before it."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sicog_exp.data.chat import IGNORED, ChatEncoder, ChatError, Example
from sicog_exp.data.mixture import (
    PATTERN,
    ImageTensors,
    Mixture,
    MixtureError,
    RecordSource,
    Rejected,
    Row,
    capped,
    collate,
    fill_bins,
    groups_of_bins,
    pack,
    read_rejected,
)
from sicog_exp.models.loading import ModelSource, load_model
from sicog_exp.prompts import KINDS, Kind, prompt
from sicog_exp.recipe import CapsConfig
from sicog_exp.records import Message, Record, conversation, user


class Numbers:
    """Rows that hold their own index."""

    def __init__(self, name: str, rows: int | None) -> None:
        self.name, self.rows = name, rows

    def row(self, index: int) -> Row:
        assert self.rows is None or 0 <= index < self.rows
        return Row(Example([index], [index]), None, self.name)


def seen(rows: list[Row]) -> list[tuple[str, int]]:
    return [(row.source, row.example.input_ids[0]) for row in rows]


SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(shares=SHARES, seed=st.integers(0, 2**31), turn=st.integers(0, 1000))
def test_shares_are_exact_over_a_pattern(shares: list[float], seed: int, turn: int) -> None:
    sources = [(Numbers(str(i), None), share) for i, share in enumerate(shares)]
    if min(share for share in shares if share > 0) * PATTERN / sum(shares) < 0.5:
        with pytest.raises(MixtureError, match="share of"):
            Mixture(sources, seed)
        return
    mixture = Mixture(sources, seed)
    counts = Counter(number for number, _ in map(mixture.locate, range(turn * PATTERN, (turn + 1) * PATTERN)))
    assert counts.total() == PATTERN
    for i, share in enumerate(shares):
        assert abs(counts[i] - PATTERN * share / sum(shares)) < 1


def test_the_paper_mixture_is_exact() -> None:
    shares = {"self_caption": 0.25, "self_cot": 0.3, "self_direct": 0.2, "text": 0.05, "annotated": 0.2}
    mixture = Mixture([(Numbers(name, 7), share) for name, share in shares.items()], 3)
    assert Counter(row.source for row in mixture.rows(0, PATTERN)) == {n: PATTERN * s for n, s in shares.items()}


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), seed=st.integers(0, 999), epochs=st.integers(1, 3))
def test_every_row_of_a_source_comes_once_an_epoch(sizes: list[int], seed: int, epochs: int) -> None:
    mixture = Mixture([(Numbers(str(i), size), 1.0) for i, size in enumerate(sizes)], seed)
    walked: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    for number, index in map(mixture.locate, range((epochs + 1) * len(sizes) * max(sizes) + 2 * PATTERN)):
        walked[number].append(index)
    for i, size in enumerate(sizes):
        for epoch in range(epochs):
            assert sorted(walked[i][epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_have_orders_of_their_own() -> None:
    mixture = Mixture([(Numbers("a", 50), 1.0)], 0)
    orders = [tuple(i for _, i in map(mixture.locate, range(e * 50, (e + 1) * 50))) for e in range(4)]
    assert len(set(orders)) == 4
    assert tuple(i for _, i in map(Mixture([(Numbers("a", 50), 1.0)], 1).locate, range(50))) != orders[0]


@settings(max_examples=40, deadline=None)
@given(slots=st.lists(st.integers(0, 10**6), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_a_slot_is_a_pure_function_of_seed_and_position(slots: list[int], seed: int) -> None:
    def make() -> Mixture:
        return Mixture([(Numbers("a", 13), 0.7), (Numbers("b", None), 0.3)], seed)

    one, two = make(), make()
    assert [one.locate(slot) for slot in slots] == [two.locate(slot) for slot in reversed(slots)][::-1]


@pytest.mark.parametrize("first", [0, 1, 7, 150])
def test_a_resumed_stream_goes_on_where_it_was(first: int) -> None:
    mixture = Mixture([(Numbers("a", 13), 0.7), (Numbers("b", 5), 0.3)], 1)
    through = [seen(mixture.rows(step * 16, 16)) for step in range(first + 3)]
    fresh = Mixture([(Numbers("a", 13), 0.7), (Numbers("b", 5), 0.3)], 1)
    assert [seen(fresh.rows(step * 16, 16)) for step in range(first, first + 3)] == through[first:]


def test_an_endless_source_never_repeats() -> None:
    mixture = Mixture([(Numbers("a", None), 0.6), (Numbers("b", None), 0.4)], 2)
    rows = seen(mixture.rows(0, 2500))
    assert len(set(rows)) == 2500
    assert [index for name, index in rows if name == "a"] == list(range(1500))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1, 4), min_size=1, max_size=40), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_rows_with_weights_come_as_often_as_they_weigh(weights: list[float], seed: int, epoch: int) -> None:
    mixture = Mixture([(Numbers("a", len(weights)), 1.0)], seed, {"a": weights})
    size = len(weights)
    counts = Counter(index for _, index in map(mixture.locate, range(epoch * size, (epoch + 1) * size)))
    assert counts.total() == size
    for index, weight in enumerate(weights):
        expected = size * weight / sum(weights)
        assert expected - 1 - 1e-6 < counts[index] < expected + 1 + 1e-6


def test_weights_are_those_of_their_source_alone() -> None:
    sources = [(Numbers("a", 50), 0.5), (Numbers("b", 50), 0.5)]
    plain, weighted = Mixture(sources, 0), Mixture(sources, 0, {"a": [1.0] * 49 + [50.0]})
    places = [(plain.locate(slot), weighted.locate(slot)) for slot in range(100)]
    assert all(one == other for one, other in places if one[0] == 1)
    assert sum(other == (0, 49) for _, other in places) >= 24


def test_empty_sources_are_left_out() -> None:
    mixture = Mixture([(Numbers("a", 0), 0.9), (Numbers("b", 4), 0.1), (Numbers("c", 4), 0.0)], 0)
    assert {row.source for row in mixture.rows(0, 100)} == {"b"}


@pytest.mark.parametrize("sources", [[], [(Numbers("a", 0), 1.0)], [(Numbers("a", 5), 0.0), (Numbers("b", 0), 1.0)]])
def test_no_rows_at_all_is_an_error(sources: list[tuple[Numbers, float]]) -> None:
    names = ", ".join(source.name for source, _ in sources) or "none"
    with pytest.raises(MixtureError, match=rf"no training rows: .*sources: {names}"):
        Mixture(sources, 0)


# Caps.

LIMITS = st.none() | st.integers(0, 12)
KINDS_DRAWN = st.lists(st.sampled_from(KINDS), max_size=30)


def rows_left(kinds: list[Kind], source: str, caps: CapsConfig, seed: int) -> list[int]:
    return capped([f"r{i}" for i in range(len(kinds))], kinds, source, caps, seed)


def fewest(*counts: int | None) -> int:
    return min(count for count in counts if count is not None)


@given(kinds=KINDS_DRAWN, whole=LIMITS, cod=LIMITS, direct=LIMITS, seed=st.integers(0, 99))
def test_caps_are_exact(kinds: list[Kind], whole: int | None, cod: int | None, direct: int | None, seed: int) -> None:
    """Each kind's first, then the source's; the rows that stay are in their order."""
    kept = rows_left(kinds, "annotated", CapsConfig(annotated=whole, cod=cod, direct=direct), seed)
    assert kept == sorted(set(kept))
    by_kind = {kind: fewest(kinds.count(kind), {"cod": cod, "direct": direct}.get(kind)) for kind in KINDS}
    assert len(kept) == fewest(sum(by_kind.values()), whole)
    if whole is None:
        assert Counter(kinds[i] for i in kept) == {kind: n for kind, n in by_kind.items() if n}


@given(kinds=KINDS_DRAWN, fewer=st.integers(0, 12), more=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_smaller_cap_keeps_some_of_a_larger_ones_rows(kinds: list[Kind], fewer: int, more: int, seed: int) -> None:
    one, other = (rows_left(kinds, "annotated", CapsConfig(annotated=cap), seed) for cap in sorted((fewer, more)))
    assert set(one) <= set(other)
    beside: list[Kind] = [*kinds, *["dd"] * 10]
    cods = [[i for i in rows_left(some, "annotated", CapsConfig(cod=fewer), seed) if some[i] == "cod"]
            for some in (kinds, beside)]  # fmt: skip
    assert cods[0] == cods[1], "a cap of one kind asks nothing of the others"


def test_caps_are_drawn_by_the_seed() -> None:
    kinds: list[Kind] = ["cot"] * 60
    chosen = [tuple(rows_left(kinds, "self_cot", CapsConfig(self_cot=10), seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert rows_left(kinds, "self_cot", CapsConfig(), 0) == list(range(60))
    assert rows_left(kinds, "self_direct", CapsConfig(self_cot=10), 0) == list(range(60))


# Batches.


def row(ids: list[int], images: int = 0) -> Row:
    labels = [IGNORED, *ids[1:]]
    return Row(Example(ids, labels), {"pixel_values": torch.full((images, 3, 2, 2), ids[0])} if images else None, "s")


def test_collate_pads_on_the_right_and_keeps_images_in_order() -> None:
    batch = collate([row([5, 6, 7], 1), row([8, 9]), row([3], 2)], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED], [IGNORED] * 3]
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 3, 3]
    assert "pixel_values" not in collate([row([5])], 0)


def test_pack_fills_rows_and_numbers_samples_and_positions() -> None:
    batch = pack([[row([5, 6, 7], 1), row([8, 9])], [row([3], 2)]], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1], [2, -1, -1, -1, -1]]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [5, 3, 3]


def test_the_first_token_of_a_packed_sample_is_not_predicted_from_the_one_before() -> None:
    first_too = Row(Example([8, 9], [8, 9]), None, "s")
    assert pack([[row([5, 6]), first_too]], 0)["labels"].tolist() == [[IGNORED, 6, IGNORED, 9]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 120))
def test_bins_hold_every_sample_once_and_never_overflow(lengths: list[int], capacity: int) -> None:
    rows = [row([i] * n) for i, n in enumerate(lengths)]
    bins = fill_bins(rows, capacity)
    assert sorted(id(r) for rows in bins for r in rows) == sorted(map(id, rows))
    sizes = [sum(len(r.example) for r in rows) for rows in bins]
    assert max(sizes) <= capacity
    # First fit leaves at most one bin half empty.
    assert sum(size <= capacity / 2 for size in sizes) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_bins_of_one_pass_hold_no_more_samples_than_asked(lengths: list[int], samples: int) -> None:
    bins = fill_bins([row([i] * n) for i, n in enumerate(lengths)], 60)
    groups = groups_of_bins(bins, samples)
    assert [rows for group in groups for rows in group] == bins
    assert all(len(group) == 1 or sum(map(len, group)) <= samples for group in groups)
    for group, following in pairwise(groups):
        assert sum(map(len, group)) + len(following[0]) > samples, "no pass ends early"


def test_a_pad_token_in_the_text_is_not_padding() -> None:
    batch = collate([row([0, 0, 4]), row([1])], pad_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# Records.


def refuse(source: str, id: str, reason: str) -> None:
    raise AssertionError(f"{id} of {source} was set aside: {reason}")


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatEncoder:
    return ChatEncoder(load_model(ModelSource(str(tiny_model)))[1])


def test_records_become_rows(chat: ChatEncoder, world_images: list[Path]) -> None:
    root = world_images[0].parent
    records = [
        Record("one", conversation(prompt("direct", "Is there a dog?"), "yes", ("0.png",)), ("0.png",), "direct", "x"),
        Record("text", conversation("What category is a dog?", "animal", ()), (), "text", "x"),
        Record("two", (user("Same?", 2), Message("assistant", "no")), ("1.png", "2.png"), "direct", "x"),
    ]
    source = RecordSource("annotated", records, ImageTensors(root, chat, 50_000_000), chat, 512, refuse)
    assert source.rows == 3
    rows = [source.row(i) for i in range(3)]
    assert [row.source for row in rows] == ["annotated"] * 3
    batch = collate(rows, chat.tokenizer.pad_token_id)
    assert batch["pixel_values"].shape[0] == 3
    image = chat.tokenizer.convert_tokens_to_ids(chat.image_token)
    assert int((batch["input_ids"] == image).sum()) == 27
    assert rows[1].image_inputs is None


def test_a_row_that_is_too_long_is_set_aside_and_named(
    chat: ChatEncoder, world_images: list[Path], tmp_path: Path
) -> None:
    """Another row of its source takes its slots, and each slot's stays a pure function of its position."""
    lengths = [1, 90, 2, 3, 95]
    records = [Record(f"r{i}", conversation("dog " * n, "yes", ("0.png",)), ("0.png",), "direct", "x")
               for i, n in enumerate(lengths)]  # fmt: skip
    images = ImageTensors(world_images[0].parent, chat, 50_000_000)

    def drawn(first: int, count: int) -> list[str]:
        source = RecordSource("annotated", records, images, chat, 60, Rejected(tmp_path).add)
        return [row.id for row in Mixture([(source, 1.0)], 0).rows(first, count)]

    whole = drawn(0, 25)
    assert set(whole) == {"r0", "r2", "r3"}
    assert [drawn(slot, 1) for slot in range(10)] == [[id] for id in whole[:10]]
    found = read_rejected(tmp_path)
    assert [(row["source"], row["id"]) for row in found] == [("annotated", "r1"), ("annotated", "r4")]
    assert "max_length is 60" in found[0]["reason"]


def test_a_source_that_cannot_train_at_all_is_an_error(chat: ChatEncoder, world_images: list[Path]) -> None:
    records = [Record(f"r{i}", conversation("dog " * 90, "yes", ()), (), "text", "x") for i in range(3)]
    rejected: list[str] = []
    source = RecordSource("text", records, ImageTensors(world_images[0].parent, chat, 10**8), chat, 60,
                          lambda source, id, reason: rejected.append(id))  # fmt: skip
    with pytest.raises(MixtureError, match=r"none of 3 rows of text.* can train; the last one: .*max_length is 60"):
        Mixture([(source, 1.0)], 0).rows(0, 1)
    assert sorted(rejected) == ["r0", "r1", "r2"], "each once"


def test_a_row_that_the_template_refuses_is_set_aside(tiny_model: Path, world_images: list[Path]) -> None:
    strict = ChatEncoder(load_model(ModelSource(str(tiny_model)))[1])
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    strict.processor.chat_template = refusing + strict.processor.chat_template
    said = conversation("What category is a dog?", "animal", ())
    odd = (Message("system", "Be brief."), *said)
    records = [Record("odd", odd, (), "text", "x"), Record("plain", said, (), "text", "x")]
    images = ImageTensors(world_images[0].parent, strict, 50_000_000)
    rejected: list[tuple[str, str, str]] = []
    source = RecordSource("annotated", records, images, strict, 512, lambda *row: rejected.append(row))
    assert source.row(1).id == "plain"
    with pytest.raises(ChatError, match="no system message"):
        source.row(0)
    assert [row[:2] for row in rejected] == [("annotated", "odd")]
    with pytest.raises(ChatError, match="no system message"):
        strict.prompt(records[0].messages[:-1], None)


def test_rejected_rows_of_all_processes_are_one_list(tmp_path: Path) -> None:
    """Of forked ones, whatever characters ids have, and without the line that one of them was killed in."""
    folder = tmp_path / "rejected"
    rejected = Rejected(folder)
    for id in ("caf\x85", "b\u2028"):
        child = multiprocessing.get_context("fork").Process(target=rejected.add, args=("text", id, "too\nlong"))
        child.start()
        child.join()
    for _ in range(2):
        rejected.add("text", "b\u2028", "too\nlong")
    assert len(list(folder.iterdir())) == 3
    with next(folder.iterdir()).open("a") as file:
        file.write('{"source": "te')
    assert [(row["id"], row["reason"]) for row in read_rejected(folder)] == [
        ("b\u2028", "too\nlong"), ("caf\x85", "too\nlong")]  # fmt: skip
    assert read_rejected(tmp_path / "nothing") == []
