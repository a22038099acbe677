"""Recipes: every shipped one loads, a resolved one runs again as it is, a wrong one says what is wrong and allowed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sicog_exp.base import BaseRecipe
from sicog_exp.recipe import (
    CurationConfig,
    DataConfig,
    MixtureConfig,
    Recipe,
    RecipeError,
    SamplingConfig,
    StageConfig,
    TrackingConfig,
    build_overrides,
    load,
    load_as,
    other_base,
    to_yaml,
)

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
OWN_FILES = ["data.annotated=rows.jsonl", "data.unlabeled=pictures"]
LIMITED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: mine\nsampling: {cod: 2}\n")
    return path


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path, tmp_path: Path) -> None:
    needed = OWN_FILES if path.stem == "own" else []
    config: BaseRecipe | Recipe = load_as(BaseRecipe, path) if path.stem == "base" else load(path, needed)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_as(type(config), copy) == config


def test_another_base_has_lines_of_its_own(file: Path) -> None:
    file.write_text("model: {threads: 1}\ndevelop: {steps: 7, language_lr: 1.0e-3}\n"
                    "other_base: {develop: {language_lr: 1.0e-4, lora_rank: 8}, model: {precision: bf16-mixed}}\n")
    shipped = load(file)
    assert (shipped.develop.language_lr, shipped.develop.lora_rank, shipped.model.precision) == (1e-3, 0, "32-true")
    assert other_base(file) == {}
    real = load(file, ["model.base=OWNER/NAME", "develop.lora_rank=4"])
    assert (real.develop.steps, real.develop.language_lr, real.develop.lora_rank) == (7, 1e-4, 4)
    assert (real.model.precision, real.model.threads) == ("bf16-mixed", 1)
    said = other_base(file, ["model.base=OWNER/NAME", "develop.lora_rank=4"])
    assert said == {"develop.language_lr": 1e-4, "develop.lora_rank": 4, "model.precision": "bf16-mixed"}
    file.write_text(to_yaml(real))
    assert load(file) == real, "what is resolved says all by itself"
    parts = load(EXPERIMENTS / "own.yaml", ["model.language=x", "model.vision=y", *OWN_FILES])
    assert parts.pretrain.lora_rank == 16


@pytest.mark.parametrize(("written", "message"), [
    ("other_base: {develop: {lr: 1}}", "develop.lr: unknown key"),
    ("other_base: [1]", "expected a mapping"),
    ("other_base: {develop: {steps: x}}", "develop.steps='x'"),
])  # fmt: skip
def test_lines_for_another_base_are_checked(written: str, message: str, file: Path) -> None:
    file.write_text(written)
    with pytest.raises(RecipeError, match=message):
        load(file, ["model.base=OWNER/NAME"])


def test_public_sets_are_files_of_ones_own() -> None:
    with pytest.raises(RecipeError, match=r"name files of data\.source=own"):
        DataConfig(instruction="rows.json")


# The resolved recipe reads back equal.

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
NAMES = st.one_of(TEXTS, st.sampled_from(["1e3", "1_0", "0x1f", "no", "null", "2024-01-01", ".inf", "a: b", "${x}"]))
RATES = st.floats(0, 10, allow_nan=False)
SHARES = st.floats(0, 1)
STAGES = st.builds(
    StageConfig, steps=st.integers(1, 10**6), batch_size=st.just(64), micro_batch_size=st.just(16), vision_lr=RATES,
    projector_lr=st.floats(1e-12, 1), language_lr=RATES, warmup_ratio=SHARES,
)  # fmt: skip
RECIPES = st.builds(
    Recipe, name=NAMES.filter(lambda name: name != "???"), seed=st.integers(0, 2**31), replay=SHARES,
    start=st.sampled_from(["base", "previous"]), self_data=st.booleans(), develop=STAGES, pretrain=STAGES,
    data=st.builds(DataConfig, annotated=st.none() | NAMES.filter(lambda name: name != "???"), holdout=SHARES),
    sampling=st.builds(SamplingConfig, cod=st.integers(1, 9), temperature=RATES),
    mixture=st.builds(MixtureConfig, text=SHARES, annotated=st.floats(0.01, 1)),
)  # fmt: skip


@LIMITED
@given(recipe=RECIPES)
def test_a_resolved_recipe_reads_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load(path) == recipe


def test_the_resolved_recipe_of_an_interpolation_holds_its_value(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 7\ndata: {seed: '${seed}'}\n")
    recipe = load(path)
    assert recipe.data.seed == 7
    path.write_text(to_yaml(recipe))
    assert "${" not in path.read_text()
    assert load(path) == recipe


def test_overrides_win_and_keep_their_neighbours(file: Path) -> None:
    recipe = load(file, ["sampling.cot=5", "curation.encoder=minilm", "develop.vision_lr=1", "data.root=null"])
    assert (recipe.name, recipe.sampling.cod, recipe.sampling.cot) == ("mine", 2, 5)
    assert recipe.curation.encoder == "minilm"
    assert recipe.develop.vision_lr == 1.0
    assert type(recipe.develop.vision_lr) is float


# A wrong one names the key, the value and what is allowed.

WRONG = [
    ("smapling.cod=3", r"smapling: unknown key; allowed here: .*sampling"),
    ("sampling.cood=3", r"sampling\.cood: unknown key; allowed here: cod, dd"),
    ("sampling.cod=two", r"sampling\.cod='two': expected int"),
    ("sampling.cod=true", r"sampling\.cod=True: expected int"),
    ("sampling.cod=1.5", r"sampling\.cod=1\.5: expected int"),
    ("name=3", r"name=3: expected str"),
    ("self_data=1", r"self_data=1: expected bool"),
    ("start=middle", r"start='middle': allowed: base, previous, parts"),
    ("start=parts", r"start=parts, align\.steps=0, align\.projector_lr=0\.001: .*set both above 0"),
    ("caps.cod=-1", r"caps: cod=-1: must be 0 or more, or null"),
    ("caps.coot=1", r"caps\.coot: unknown key; .*did you mean cot\?"),
    ("preference.beta=0", r"preference: beta=0\.0: must be above 0"),
    ("preference.rejected=worst", r"preference\.rejected='worst': allowed: low_score, corrupted"),
    ("preference.images=-1", r"preference: images=-1: must be 0 \(all\) or more"),
    ("preference.batch_size=30", r"preference: batch_size=30: must be a multiple of micro_batch_size=32"),
    ("data.source=coco", r"data\.source='coco': allowed: world, easyvqa, own"),
    ("data=3", r"data=3: expected a mapping of source"),
    ("seed.x=1", r"seed=\{'x': 1\}: expected int"),
    ("seed=-1", r"seed=-1: must be 0 or more"),
    ("data.seed=-1", r"data: seed=-1: must be 0 or more"),
    ("replay=1.5", r"replay=1\.5: must lie between 0 and 1"),
    ("replay=.nan", r"replay=nan: expected a finite number"),
    ("develop.clip_norm=.inf", r"develop\.clip_norm=inf: expected a finite number"),
    ("develop.steps=-1", r"develop: steps=-1: must be 0 or more"),
    ("develop.weight_decay=-1", r"develop: weight_decay=-1\.0: must be 0 or more"),
    ("develop.vision_lr=-1", r"develop: learning rates .*must be 0 \(frozen\) or more"),
    ("develop.micro_batch_size=48", r"develop: batch_size=64: must be a multiple of micro_batch_size=48"),
    ("sampling.top_p=0", r"sampling: top_p=0\.0: must be above 0"),
    ("curation.caption_threshold=2", r"curation\.caption_threshold=2\.0: must lie between -1 and 1"),
    ("curation.min_words=2000", r"curation: min_words=2000, max_words=1000"),
    ("data.source=own", r"data\.annotated is missing: data\.source=own needs a path"),
    ("model.threads=0", r"model: threads=0: must be above 0"),
    ("data.annotated=???", r"data\.annotated"),
    ("name='${nothing}'", r"nothing"),
    ("sampling.cod=[1,", r"'sampling\.cod=\[1,': not YAML behind the ="),
    ("=1", r"'=1': an override is key=value"),
    ("curation.caption_treshold=0.9", r"curation\.caption_treshold: unknown key; .*did you mean caption_threshold\?"),
    ("sampling", r"'sampling': an override is key=value"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_a_wrong_value_names_key_value_and_what_is_allowed(file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(file, [override])


def test_impossible_combinations(file: Path) -> None:
    with pytest.raises(RecipeError, match="all three learning rates are 0"):
        load(file, ["instruct.vision_lr=0", "instruct.projector_lr=0", "instruct.language_lr=0"])
    nothing = [f"sampling.{kind}=0" for kind in ("cod", "dd", "cot", "direct")]
    with pytest.raises(RecipeError, match="sampling asks for no candidate"):
        load(file, nothing)
    assert not load(file, [*nothing, "self_data=false"]).self_data
    single = [f"sampling.{kind}=1" for kind in ("cod", "dd", "cot", "direct")]
    with pytest.raises(RecipeError, match=r"preference\.rejected=low_score needs two candidates of one kind"):
        load(file, [*single, "preference.steps=1"])
    assert load(file, [*single, "preference.steps=1", "preference.rejected=corrupted"]).preference.steps == 1
    with pytest.raises(RecipeError, match="one above 0"):
        load(file, [f"mixture.{field.name}=0" for field in dataclasses.fields(MixtureConfig)])


def test_a_section_that_is_given_in_part_keeps_its_other_defaults(file: Path) -> None:
    """`align` trains the projector alone, whatever else is said of it."""
    align = load(file, ["align.steps=5"]).align
    assert (align.steps, align.vision_lr, align.projector_lr, align.language_lr) == (5, 0.0, 1e-3, 0.0)
    assert load(file, ["align.steps=5", "start=parts", "align.vision_lr=1e-4"]).align.vision_lr == 1e-4


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,\n", "a: 1\na: 2\n", "just words", "name: '${'"])
def test_bad_yaml_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such recipe; the shipped ones are in experiments/"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="no such recipe"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name: \xe4")
    with pytest.raises(RecipeError, match=r"binary\.yaml"):
        load(tmp_path / "binary.yaml")


def test_one_section_from_overrides() -> None:
    assert build_overrides(CurationConfig, "curation", ["curation.encoder=minilm"]).encoder == "minilm"
    assert build_overrides(CurationConfig, "curation", []) == CurationConfig()
    for override, message in [("sampling.cod=1", r"sampling: only curation\.\* keys apply"), ("x", "key=value"),
                              ("curation.dedup=2", r"curation\.dedup=2: expected bool"),
                              ("curation.encoder=[1,", "encoder"), ("curation.encoder=???", "encoder")]:  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            build_overrides(CurationConfig, "curation", [override])


@pytest.mark.parametrize("config", [Recipe, BaseRecipe, TrackingConfig, StageConfig])
def test_defaults_are_valid(config: type) -> None:
    config()
