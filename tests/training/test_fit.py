"""A killed stage continues, to the same bits and the same account of its work; an untrained one is no success."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_modules import CPU, data, load, make_mixture, stage

from sicog_exp.interruption import Terminated
from sicog_exp.prompts import prompt
from sicog_exp.records import Record, conversation, write_records
from sicog_exp.store import Artifact, Step, Store, Workplace, checksums
from sicog_exp.training.fit import Checkpoints, fit
from sicog_exp.training.modules import DivergedError, SupervisedFineTuning

STEPS = 12
RUN = """
import sys, time
from pathlib import Path
import torch
from sicog_exp.recipe import ModelConfig, StageConfig
from sicog_exp.store import Artifact, Step, Store
from sicog_exp.training.stages import TrainingTask, fine_tune

model, data, root, wait, steps, loaders = sys.argv[1:]
stage = StageConfig(steps=int(steps), batch_size=4, micro_batch_size=2, max_length=512, checkpoint_every=2)
task = TrainingTask(stage, ModelConfig(device="cpu", threads=1, loaders=int(loaders)), dict(annotated=0.7, text=0.3), 3)
paths = dict(model=model, data=data)
inputs = {name: Artifact(Path(path), dict(fingerprint=name), True) for name, path in paths.items()}

def progress(done, total):
    print(done, flush=True)
    time.sleep(float(wait))

Store(root).run(Step("develop", fine_tune, task, inputs, 3), progress)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world_images: list[Path]) -> Path:
    """A data set directory with annotated and text rows."""
    home = tmp_path_factory.mktemp("data")
    annotated = []
    for i, path in enumerate(world_images[:6]):
        (home / path.name).write_bytes(path.read_bytes())
        messages = conversation(prompt("dd"), "a red dog, " * (i + 1), (path.name,))
        annotated.append(Record(f"a{i}", messages, (path.name,), "dd", "annotated"))
    texts = [Record(f"t{i}", conversation("What is it?", "animal " * i, ()), (), "text", "text") for i in range(1, 5)]
    texts.append(Record("long", conversation("What is it? " * 300, "animal", ()), (), "text", "text"))
    write_records(home / "annotated.parquet", annotated)
    write_records(home / "instruction.parquet", texts)
    return home


def run(model: Path, data: Path, root: Path, kill_at: int = 0, loaders: int = 0) -> None:
    """Train in a process of its own; with `kill_at`, SIGKILL when that step has been reported."""
    wait = "0.2" if kill_at else "0"
    command = [sys.executable, "-c", RUN, str(model), str(data), str(root), wait, str(STEPS), str(loaders)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    if kill_at:
        for line in process.stdout:
            if line.strip() == str(kill_at):
                process.send_signal(signal.SIGKILL)
                break
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if kill_at else 0), errors


def made(root: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Checksums of the trained model and the facts that do not depend on the clock."""
    (path,) = root.glob("develop-*[0-9a-f]")
    names = ("samples", "tokens", "prompt_tokens", "image_tokens", "new_tokens", "steps", "flops", "rejected")
    return checksums(path), {name: facts_of(root)[name] for name in names}


def facts_of(root: Path) -> dict[str, float]:
    (manifest,) = root.glob("develop-*[0-9a-f]/manifest.json")
    return json.loads(manifest.read_text())["facts"]


def test_a_killed_stage_ends_with_the_bits_and_facts_of_an_undisturbed_one(
    tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    """Rows made by other processes, and those that cannot train, included."""
    run(tiny_model, folder, tmp_path / "whole")
    run(tiny_model, folder, tmp_path / "killed", kill_at=5, loaders=2)
    assert [path.name for path in (tmp_path / "killed").glob("*.partial/scratch/*.ckpt")] == ["step-00000004.ckpt"]
    run(tiny_model, folder, tmp_path / "killed", kill_at=9)
    run(tiny_model, folder, tmp_path / "killed", loaders=3)
    weights, facts = made(tmp_path / "killed")
    assert (weights, facts) == made(tmp_path / "whole")
    (aside,) = (tmp_path / "killed").glob("develop-*[0-9a-f]/rejected.jsonl")
    assert [json.loads(line)["id"] for line in aside.open()] == ["long"]
    assert facts["samples"] == STEPS * 4
    assert facts["steps"] == STEPS
    assert facts["prompt_tokens"] + facts["new_tokens"] == facts["tokens"]
    timed = facts_of(tmp_path / "killed")
    # two attempts that waited 0.2 s a step; what training computed until its last checkpoint is kept with it
    assert timed["seconds"] > timed["earlier_seconds"] > (5 + 5) * 0.2
    assert timed["model_seconds"] > 8 * 0.2
    assert "earlier_seconds" not in facts_of(tmp_path / "whole")
    assert not [name for name in weights if name.endswith((".ckpt", ".bin", ".pt", ".pth", ".pkl"))]


def fit_here(folder: Path, images: list[Path], workplace: Workplace, **changes: Any) -> Any:
    config = stage(batch_size=2, micro_batch_size=2, **changes)
    model, encoder = load(folder)
    module = SupervisedFineTuning(model, config)
    fit(module, data(encoder, images, config), CPU, workplace, 0)
    return module


def test_no_step_at_all_is_no_success(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="trained 0 of 0 steps"):
        fit_here(tiny_model, world_images, Workplace(tmp_path, tmp_path), steps=0)


def test_fewer_steps_than_asked_for_is_no_success(tiny_model: Path, world_images: list[Path], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    class Ends:
        def __init__(self, batches: Any) -> None:
            self.batches = batches

        def __iter__(self) -> Any:
            return (batch for _, batch in zip(range(3), self.batches, strict=False))

    model, encoder = load(tiny_model)
    config = stage(steps=5, batch_size=2, micro_batch_size=2)
    short = data(encoder, world_images, config)
    short.train_dataloader = lambda: Ends(short.batches)  # type: ignore[method-assign, assignment, return-value]
    import lightning.pytorch

    plain = lightning.pytorch.Trainer
    monkeypatch.setattr("sicog_exp.training.fit.Trainer", lambda **options: plain(**{**options, "max_epochs": 1}))
    with pytest.raises(RuntimeError, match="trained 3 of 5 steps"):
        fit(SupervisedFineTuning(model, config), short, CPU, Workplace(tmp_path, tmp_path), 0)


def test_a_step_that_diverges_is_not_applied_and_its_rows_are_kept(tiny_model: Path, world_images: list[Path],
                                                                   tmp_path: Path) -> None:  # fmt: skip
    """And the checkpoint before it is whole: without what broke the step, training goes on to the same bits."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    config = stage(steps=5, batch_size=4, micro_batch_size=2, checkpoint_every=2)
    modules = [SupervisedFineTuning(load(tiny_model)[0], config) for _ in range(3)]

    def breaks(done: int, total: int) -> None:
        if done == 3:
            with torch.no_grad():
                modules[0].model.get_output_embeddings().weight[0, 0] = float("inf")
            before.update({name: value.clone() for name, value in modules[0].state_dict().items()})

    before: dict[str, torch.Tensor] = {}
    _, encoder = load(tiny_model)
    feed = data(encoder, world_images, config)
    with pytest.raises(DivergedError, match=r"training step 3: loss (nan|inf).*its rows \(.*step-00000002.ckpt"):
        fit(modules[0], feed, CPU, Workplace(tmp_path, scratch, progress=breaks), 0)
    assert all(torch.equal(value, before[name]) for name, value in modules[0].state_dict().items())

    (kept,) = scratch.glob("diverged-00000003-*.safetensors")
    rows = [row for micro in feed.batches.micro_batches(make_mixture(encoder, world_images).rows(12, 4))
            for row in micro["ids"]]  # fmt: skip
    assert json.loads(kept.with_suffix(".json").read_text()) == {"step": 3, "rows": rows}
    assert load_file(kept)["1.input_ids"].shape[0] == 2

    fit(modules[1], data(encoder, world_images, config), CPU, Workplace(tmp_path, scratch), 0)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    fit(modules[2], data(encoder, world_images, config), CPU, Workplace(tmp_path, fresh), 0)
    whole = modules[2].state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in modules[1].state_dict().items())


def test_sigterm_ends_training_with_a_checkpoint(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    """Also behind the last step, which is not trained again; whoever handled SIGTERM before does so again."""
    handler = signal.getsignal(signal.SIGTERM)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for at in (2, 4):
        workplace = Workplace(tmp_path, scratch, progress=lambda done, total, at=at: stop_at(done, at))
        with pytest.raises(Terminated, match=f"behind training step {at}"):
            fit_here(tiny_model, world_images, workplace, steps=4)
        assert [path.name for path in scratch.glob("*.ckpt")] == [f"step-{at:08d}.ckpt"]
        assert signal.getsignal(signal.SIGTERM) == handler
    stopped = Workplace(tmp_path, scratch)
    module = fit_here(tiny_model, world_images, stopped, steps=4)
    whole = Workplace(tmp_path, tmp_path / "fresh")
    whole.scratch.mkdir()
    undisturbed = fit_here(tiny_model, world_images, whole, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), undisturbed.parameters(), strict=True))
    assert stopped.facts["tokens"] == whole.facts["tokens"]
    assert stopped.facts["steps"] == 4


@pytest.mark.parametrize("changes", [{"language_lr": 0.0}, {"lora_rank": 4, "vision_lr": 0.0}])
def test_a_checkpoint_holds_what_trains(changes: dict[str, Any], tiny_model: Path, world_images: list[Path],
                                        tmp_path: Path) -> None:  # fmt: skip
    """And a stage that goes on from it ends with the same bits."""
    places = {}
    for name, at in (("whole", 0), ("stopped", 2)):
        scratch = tmp_path / name
        scratch.mkdir()
        places[name] = Workplace(tmp_path, scratch, progress=lambda done, total, at=at: stop_at(done, at))
    torch.manual_seed(0)
    whole = fit_here(tiny_model, world_images, places["whole"], steps=4, **changes).state_dict()
    torch.manual_seed(0)
    with pytest.raises(Terminated):
        fit_here(tiny_model, world_images, places["stopped"], steps=4, **changes)
    (checkpoint,) = places["stopped"].scratch.glob("*.ckpt")
    held = torch.load(checkpoint, weights_only=False)["state_dict"]  # made here
    assert 0 < len(held) < len(whole)
    assert not any("language_model" in name and "lora" not in name for name in held)
    places["stopped"].progress = None
    torch.manual_seed(0)
    again = fit_here(tiny_model, world_images, places["stopped"], steps=4, **changes).state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def stop_at(done: int, at: int) -> None:
    """The signal reaches this process during a step; what is asked is asked before the next look."""
    if done == at - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_rows_made_in_another_process_train_the_same_bits(tiny_model: Path, world_images: list[Path],
                                                          tmp_path: Path) -> None:  # fmt: skip
    results = []
    for workers in (0, 1):
        model, encoder = load(tiny_model)
        config = stage(steps=3, batch_size=2, micro_batch_size=2)
        feed = data(encoder, world_images, config)
        feed.workers = workers
        scratch = tmp_path / str(workers)
        scratch.mkdir()
        fit(SupervisedFineTuning(model, config), feed, CPU, Workplace(tmp_path, scratch), 0)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_went_away_is_named(workers: int, tiny_model: Path, world_images: list[Path],
                                           tmp_path: Path) -> None:  # fmt: skip
    """In the same words, whichever process opened it."""
    model, encoder = load(tiny_model)
    config, folder = stage(steps=3, batch_size=8), tmp_path / "images"
    folder.mkdir()
    feed = data(encoder, [folder / "0.png"], config)
    feed.workers = workers
    with pytest.raises(ValueError, match=r"^image '\d\.png': not found under ") as caught:
        fit(SupervisedFineTuning(model, config), feed, CPU, Workplace(tmp_path, tmp_path), 0)
    assert "Traceback" not in str(caught.value)


def test_only_the_newest_checkpoint_stays(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    workplace = Workplace(tmp_path, tmp_path / "scratch")
    shown: list[tuple[int, int]] = []
    workplace.progress = lambda done, total: shown.append((done, total))
    fit_here(tiny_model, world_images, workplace, steps=5, checkpoint_every=2)
    assert [path.name for path in workplace.scratch.iterdir()] == ["step-00000004.ckpt"]
    assert Checkpoints.newest(workplace.scratch) == workplace.scratch / "step-00000004.ckpt"
    assert Checkpoints.newest(tmp_path) is None
    assert shown == [(i, 5) for i in range(1, 6)]
    assert workplace.facts["samples"] == 10
    assert workplace.facts["model_seconds"] > 0


def test_a_torn_checkpoint_is_never_taken_for_one(tiny_model: Path, world_images: list[Path], tmp_path: Path) -> None:
    """A kill while a checkpoint is written leaves a file under another name."""
    (tmp_path / "writing.tmp").write_bytes(b"torn")
    module = fit_here(tiny_model, world_images, Workplace(tmp_path, tmp_path), steps=2)
    assert module.global_step == 2


def test_a_stage_through_the_store_is_trained_once(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    from sicog_exp.training.stages import TrainingTask, fine_tune

    config = stage(steps=2, batch_size=2, micro_batch_size=2)
    task = TrainingTask(config, CPU, {"annotated": 1.0}, 0)
    inputs = {name: Artifact(path, {"fingerprint": name}, True)
              for name, path in (("model", tiny_model), ("data", folder))}  # fmt: skip
    step = Step("instruct", fine_tune, task, inputs)
    store = Store(tmp_path)
    first, second = store.run(step), store.run(step)
    assert (first.cached, second.cached) == (False, True)
    assert first.facts["flops"] > 0
    assert first.facts["image_tokens"] == 4 * 9
