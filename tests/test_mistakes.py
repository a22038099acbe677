"""Users' mistakes: each is one message that names the file, key or row and the fix; status 2, no traceback.

The commands run inside this process, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from PIL import Image
from runs import REPOSITORY

from sicog_exp.cli import main

FILES = {
    "typo.yaml": "name: x\nsed: 1\n",
    "broken.yaml": "name: x\ndata: [1,\n",
    "list.yaml": "- name\n- seed\n",
    "afile": "no rows\n",
    "bad.jsonl": '{"id": "1", "kind": "cap\n',
    "empty.jsonl": "",
    "keyless.jsonl": '{"id": "1", "kind": "caption", "prompt": "p", "image": null}\n',
    "good.jsonl": '{"id": "1", "kind": "caption", "prompt": "p", "image": null, "candidates": ["a dog", "a dog"]}\n',
    "number.jsonl": "3\n",
    "suite.yaml": "name: s\nbenchmark: [{task: no_such_task}]\n",
    "suite_typo.yaml": "name: s\nbenchmark: [{tusk: sicog_world_direct}]\n",
    "suite_folder.yaml": "name: s\nbenchmark: [{task: mine}]\ninclude: [nowhere]\n",
    "no_space.yaml": "name: s\nrecipe: experiments/embedded.yaml\n",
    "no_recipe.yaml": "name: s\nrecipe: nowhere.yaml\nspace: {seed: {low: 0, high: 1}}\n",
}
AXES = {
    "key.yaml": "{curation.caption_treshold: {low: 0.1, high: 0.9}}",
    "order.yaml": "{curation.caption_threshold: {low: 0.9, high: 0.1}}",
    "axis.yaml": "{curation.caption_threshold: 3}",
    "choice.yaml": "{curation.reasoning_scorer: {choices: [similarity, vote]}}",
    "when.yaml": "{curation.caption_threshold: {low: 0.1, high: 0.9, when: curation.encoder=minilm}}",
    "high.yaml": "{curation.caption_threshold: {low: 0.1, high: 9.0}}",
}


ARMS = {
    "arm_key.yaml": "[curation.selekt=random]",
    "arm_value.yaml": "[curation.select=worst]",
    "arm_form.yaml": "[curation]",
    "arm_text.yaml": "seed=1",
    "arm_seed.yaml": "[seed=1]",
    "arm_twin.yaml": "[iterations=2]",
    "arm_split.yaml": "[evaluation.split=development]",
    "arm_stop.yaml": "[stop.no_gain=true]",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: files with a mistake each, the shipped recipes, and one finished run's folder."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name, axes in AXES.items():
        (folder / name).write_text(f"name: s\nrecipe: experiments/embedded.yaml\nspace: {axes}\n")
    for name, changes in ARMS.items():
        arms = f"{{a: [], b: {changes}}}"
        (folder / name).write_text(f"name: s\nrecipe: experiments/embedded.yaml\nreference: a\narms: {arms}\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "experiments").symlink_to(REPOSITORY / "experiments")
    (folder / "nothing").mkdir()
    (folder / "nothing" / ".keep").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "summary.json").write_text(json.dumps({"evaluations": ["a", "b"]}))
    return folder


ITERATE = "iterate experiments/embedded.yaml store=S"
OWN = "iterate experiments/own.yaml store=S"
CURATE = "curate --candidates good.jsonl --out O"
SWEEP = "sweep experiments/sweeps/tau_and_mix.yaml"
ABLATE = "ablate experiments/ablations/evidence.yaml"
MISTAKES = [
    # (command, what the one message must say)
    ("itirate", "invalid choice: 'itirate'"),
    ("iterate nowhere.yaml", r"nowhere\.yaml: no such recipe; .*experiments/"),
    ("iterate nothing", "nothing: no such recipe"),
    ("iterate typo.yaml", r"typo\.yaml: sed: unknown key; .*did you mean seed\?"),
    ("iterate broken.yaml", r"broken\.yaml: unreadable YAML, .*line 3"),
    ("iterate binary.yaml", r"binary\.yaml: not UTF-8"),
    ("iterate list.yaml", r"list\.yaml: holds a list; write one `key: value` a line"),
    ("iterate no_space.yaml", r"no_space\.yaml: recipe: unknown key"),
    (f"{ITERATE} smapling.cod=3", r"smapling: unknown key; .*did you mean sampling\?"),
    (f"{ITERATE} sampling.cood=3", r"sampling\.cood: unknown key; .*did you mean cod\?"),
    (f"{ITERATE} sampling.cod=two", r"sampling\.cod='two': expected int"),
    (f"{ITERATE} seed =1", "'seed': an override is key=value without spaces"),
    (f"{ITERATE} =1", "'=1': an override is key=value"),
    (f"{ITERATE} seed=", "seed=None: expected int"),
    (f"{ITERATE} seed=[1,", r"'seed=\[1,': not YAML behind the =.*quote"),
    (f"{ITERATE} --seed 1", "unrecognized arguments: --seed 1"),
    (f"{ITERATE} --overrides \"'seed=1\"", "--overrides \"'seed=1\": no closing quotation"),
    (f"{ITERATE} evaluation.suite=nope", r"evaluation\.suite=nope: no such suite; there are .*embedded"),
    (f"{ITERATE} evaluation.suite=nope.yaml", r"evaluation\.suite=nope\.yaml: no such file"),
    (f"{ITERATE} evaluation.suite=suite_typo.yaml", r"suite_typo\.yaml: benchmark\[0\]\.tusk: unknown key"),
    (f"{ITERATE} evaluation.suite=suite_folder.yaml", r"include: no folder .*nowhere"),
    (f"{ITERATE} evaluation.suite=suite.yaml", "unknown tasks no_such_task: neither lmms-eval's own nor in"),
    (f"{ITERATE} evaluation.suite=suite.yaml evaluation.split=development", "suite s: development names"),
    (f"{ITERATE} model.base=nowhere", r"model\.base=nowhere: neither a folder nor a model that the hub gave us"),
    (f"{ITERATE} model.base=nothing", r"model\.base=nothing: no safetensors weights in nothing"),
    (f"{ITERATE} model.base=afile", r"model\.base=afile: neither a folder nor"),
    (f"{ITERATE} model.devices=0", "devices=0: must be above 0"),
    (f"{ITERATE} model.devices=3", r"batch_size=\d+: must be a multiple of model\.devices x model\.nodes = 3"),
    (f"{ITERATE} model.strategy=dpp", r"model\.strategy='dpp': allowed: auto, ddp, fsdp"),
    (f"{ITERATE} model.strategy=fsdp", r"model\.strategy=fsdp: there is one device; set model\.devices or"),
    (f"{ITERATE} model.devices=2 model.strategy=fsdp instruct.optimizer=adamw_8bit",
     r"instruct\.optimizer=adamw_8bit: weights and moments in few bits are not shared out"),
    (f"{ITERATE} model.devices=2 model.strategy=fsdp instruct.packing=true",
     r"instruct\.packing=true: ranks that share weights cannot pack their rows"),
    (f"{ITERATE} model.nodes=2", r"model\.nodes=2: needs `srun` and a SLURM job .*this is none"),
    ("base experiments/base.yaml model.devices=2", r"model\.devices=2, .*the embedded base trains on one device"),
    (f"{ITERATE} model.device=cuda", r"model\.device=cuda: torch sees no GPU here; use model\.device=auto"),
    (f"{ITERATE} model.attention=flash_attention_2", r"model\.attention=flash_attention_2: needs a GPU and the flash"),
    (f"{ITERATE} model.language=nowhere", "model.language and model.vision: a model is made of both or of neither"),
    (f"{ITERATE} model.language=a model.vision=b model.base=c", "model.base=c: leave it out"),
    (f"{ITERATE} model.language=nowhere model.vision=embedded", r"model\.language=nowhere: neither a folder nor"),
    (f"{ITERATE} model.image_pixels=0", "image_pixels=0: must be above 0"),
    (f"{ITERATE} develop.optimizer=adamw_8bit", r"develop\.optimizer=adamw_8bit: needs a GPU and the bitsandbytes"),
    (f"{ITERATE} pretrain.lora_rank=4 pretrain.lora_4bit=true", r"pretrain\.lora_4bit=true: needs a GPU and the bits"),
    (f"{ITERATE} pretrain.lora_4bit=true", "pretrain: lora_4bit=true: needs lora_rank above 0"),
    (f"{ITERATE} develop.lora_rank=-1", "develop: lora_rank=-1: must be 0 .no adapters. or more"),
    (f"{ITERATE} develop.lora_rank=4 develop.lora_parts=[]", "develop: lora_parts is empty: name vision, projector"),
    (f"{ITERATE} develop.lora_rank=4 develop.lora_parts=[tower]", r"develop\.lora_parts\[0\]='tower': allowed: vision"),
    (f"{ITERATE} develop.lora_rank=4 develop.language_lr=0", "lora_parts names language, whose learning rate is 0"),
    (f"{ITERATE} store=afile", "store=afile: .*name a folder"),
    (f"{ITERATE} curation.encoder=./nowhere", r"encoder.*nowhere.*no such folder"),
    (f"{ITERATE} tracking.uri=nonsense://x", r"tracking\.uri=nonsense://x: no tracking store answers there"),
    (f"{ITERATE} tracking.uri=http://127.0.0.1:9", r"tracking\.uri=http://127\.0\.0\.1:9: no tracking store answers"),
    (f"{ITERATE} tracking.uri=sqlite:///afile/x.db", r"tracking\.uri=sqlite:///afile/x\.db: no tracking store can be"),
    ("iterate experiments/own.yaml", r"data\.annotated is missing: data\.source=own needs a path there"),
    (f"{OWN} data.annotated=no.jsonl data.unlabeled=nothing", r"no\.jsonl: no such file or folder; correct data"),
    (f"{OWN} data.annotated=bad.jsonl data.unlabeled=nowhere", "nowhere: no such file or folder; correct data"),
    (f"{OWN} data.annotated=afile data.unlabeled=nothing", r"afile: unknown kind of file; use \.json"),
    (f"{OWN} data.annotated=nothing data.unlabeled=nothing", "nothing: a folder with neither shards"),
    (f"{OWN} data.annotated=x-{{0..2}}.tar data.unlabeled=nothing", r"x-\{0\.\.2\}\.tar: no such file or folder"),
    (f"{OWN} data.annotated=hub:a/b data.unlabeled=nothing", "hub:a/b: the hub did not give it .* name its folder"),
    ("data check nowhere.jsonl", r"nowhere\.jsonl: no such file or folder"),
    ("data check good.jsonl --max_length=3", r"usage: sicog data check (.|\n)*unrecognized arguments: --max_length=3"),
    ("data check good.jsonl --model nope", "nope: no such folder; correct the path, or give a hub's OWNER/NAME"),
    ("data check empty.jsonl", r"empty\.jsonl: holds no rows or images"),
    ("data check good.jsonl --max-length 0", "'0': a whole number from 1"),
    (f"{OWN} data.annotated=good.jsonl data.unlabeled=nothing data.root=nowhere", "nowhere: no such folder"),
    ("base nowhere.yaml", r"nowhere\.yaml: no such recipe"),
    ("base broken.yaml", r"broken\.yaml: unreadable YAML"),
    ("base list.yaml", r"list\.yaml: holds a list"),
    ("base experiments/embedded.yaml", r"embedded\.yaml: \w+: unknown key; allowed here: seed, store, turns"),
    ("base shape.widht=3", r"shape\.widht: unknown key; .*did you mean width\?"),
    ("base shape.width=wide", r"shape\.width='wide': expected int"),
    ("base shape.width=100", r"shape: width=100: must be a multiple of 2 \* heads = 8"),
    ("base shape.patch_size=25", r"patch_size=25: must divide the image's 72 pixels"),
    ("base turns=0", "turns=0.*need a turn or more"),
    ("base text_share=2", "text_share=2.0.*between 0 and 1"),
    ("base vision.batch_size=3", "vision: batch_size=3: must be a multiple of micro_batch_size"),
    ("base --pubish x", "unrecognized arguments: --pubish"),
    ("base --publish", "--publish: expected one argument"),
    ("base store=afile", "store=afile: .*name a folder"),
    ("base model.device=cuda", r"model\.device=cuda: torch sees no GPU"),
    ("curate", "required: --candidates, --out"),
    ("curate good.jsonl --out O", "required: --candidates"),
    ("curate --candidates good.jsonl", "required: --out"),
    ("curate --candidates no.jsonl --out O", r"no\.jsonl: No such file or directory; check the paths"),
    ("curate --candidates nothing --out O", "nothing: Is a directory; check the paths"),
    ("curate --candidates empty.jsonl --out O", r"empty\.jsonl: the file is empty; write one JSON object a line"),
    ("curate --candidates bad.jsonl --out O", r"bad\.jsonl: none of its 1 rows can be used; .*row 1: not JSON"),
    ("curate --candidates keyless.jsonl --out O", "row 1: missing candidates; add the missing keys"),
    ("curate --candidates good.jsonl --out afile", "afile: File exists; check the paths"),
    (f"{CURATE} curation.encoder=./nowhere", r"encoder.*nowhere.*no such folder"),
    (f"{CURATE} sampling.cod=1", r"sampling: only curation\.\* keys apply here"),
    (f"{CURATE} curation.caption_treshold=1", r"curation\.caption_treshold: unknown key; .*mean caption_threshold\?"),
    (f"{CURATE} curation.caption_threshold=high", r"curation\.caption_threshold='high': expected float"),
    (f"{CURATE} curation", "'curation': an override is key=value"),
    ("ablate nowhere.yaml", r"nowhere\.yaml: no such study; .*experiments/ablations/"),
    ("ablate broken.yaml", r"broken\.yaml: unreadable YAML"),
    ("ablate experiments/embedded.yaml", "unknown key; allowed here: name, recipe, reference, arms"),
    ("ablate no_recipe.yaml", r"no_recipe\.yaml: space: unknown key"),
    ("ablate arm_key.yaml", r"arms\.b: .*curation\.selekt: unknown key; allowed here: .*did you mean select\?"),
    ("ablate arm_value.yaml", r"arms\.b: .*curation\.select='worst': allowed: best, random"),
    ("ablate arm_form.yaml", r"arms\.b: 'curation': an override is key=value"),
    ("ablate arm_text.yaml", r"arms\.b='seed=1': expected a list"),
    ("ablate arm_seed.yaml", r"arms\.b: seed=1: an arm cannot set seed; the study's name and seeds"),
    ("ablate arm_twin.yaml", r"arms\.b: the same recipe as a's"),
    ("ablate arm_split.yaml", r"arms\.b: evaluation\.split=development: the other arms have benchmark; .*overrides"),
    ("ablate arm_stop.yaml", r"arms\.b: stop: arms that end at different generations"),
    (f"{ABLATE} reference=all", "reference=all: no such arm; there are curated, random candidate, annotated only"),
    (f"{ABLATE} 'pairs=[{{before: all, after: curated}}]'", "pairs: all: no such arm; there are curated, random"),
    (f"{ABLATE} 'pairs=[{{before: \"curated:G7\", after: curated}}]'", "pairs: curated:G7: curated ends with G2"),
    (f"{ABLATE} sed=1", "sed: unknown key"),
    (f"{ABLATE} seed=1", "seed=1: overrides cannot set seed; the study's name and seeds"),
    (f"{ABLATE} recipe=experiments/own.yaml", r"data\.annotated is missing"),
    (f"{ABLATE} seeds=[]", r"seeds=\[\]: different whole numbers from 0"),
    (f"{ABLATE} --seeds a", "--seeds: 'a': different whole numbers from 0, joined by commas"),
    (f"{ABLATE} --seeds 0,,1", "--seeds: '0,,1'"),
    (f"{ABLATE} --seeds 0,0", "--seeds: '0,0': different"),
    (f"{ABLATE} --seeds=-1", "--seeds: '-1'"),
    ("ablate --seeds 0 1", "1: no such study"),
    (f"{ABLATE} store=S iterations=0", r"arms\.curated: iterations=0: the arms differ from G1 on"),
    (f"{ABLATE} store=S self_data=false", r"arms\.annotated only: the same recipe as curated's"),
    (f"{ABLATE} store=S --out nothing", "--out nothing: a folder; name a file"),
    (f"{ABLATE} store=S --out x.html", r"--out x\.html: no JSON file; name a file, such as x\.json"),
    (f"{ABLATE} store=S --out afile/x.json", r"--out afile/x\.json: .*afile; name a file"),
    ("plan nowhere.yaml", r"nowhere\.yaml: no such recipe"),
    ("plan --device tpu", "--device tpu: allowed: a100, h100"),
    ("plan --devices 0", "--devices: '0': a whole number from 1"),
    ("plan --utilisation 40", "--utilisation: '40': a share above 0 and at most 1"),
    ("plan --sampling-utilisation x", "--sampling-utilisation: 'x'"),
    ("plan plan.cod_tokens=0", "plan: cod_tokens=0: must be above 0"),
    ("plan model.base=OWNER/NAME", "OWNER/NAME: no config.json .* set plan.shape to a published shape .llava-qwen2-7b"),
    ("plan plan.shape=llava-9b", "llava-9b: no config.json"),
    (f"{OWN.replace('iterate', 'plan').replace(' store=S', '')} data.annotated=binary.yaml data.unlabeled=nothing",
     r"binary\.yaml: unknown kind of file"),
    ("sweep nowhere.yaml", r"nowhere\.yaml: no such study; .*experiments/sweeps/"),
    ("sweep broken.yaml", r"broken\.yaml: unreadable YAML"),
    ("sweep experiments/embedded.yaml", "unknown key; allowed here: name, recipe, space"),
    ("sweep no_space.yaml", r"no_space\.yaml: space: missing"),
    ("sweep no_recipe.yaml", r"no_recipe\.yaml: nowhere\.yaml: no such recipe"),
    ("sweep key.yaml", r"space\.curation\.caption_treshold: .*did you mean caption_threshold\?"),
    ("sweep order.yaml", r"caption_threshold: low=0\.9, high=0\.1: low must not be above high"),
    ("sweep axis.yaml", r"caption_threshold=3: expected a mapping of low, high"),
    ("sweep choice.yaml", r"reasoning_scorer='vote': allowed: similarity, lexical, agreement"),
    ("sweep when.yaml", r"when=curation\.encoder=minilm: names no axis before this one"),
    ("sweep high.yaml", r"space\.curation\.caption_threshold: .*=9\.0: must lie between -1 and 1"),
    (f"{SWEEP} objectives=[{{metric:eval/meen}}]", "objectives"),
    (f"{SWEEP} 'objectives=[{{metric: eval/meen/accuracy}}]' rungs=[1.0]", "eval/meen/accuracy is not measured here"),
    (f"{SWEEP} trials=0", "at least one trial"),
    (f"{SWEEP} trials=many", "trials='many': expected int"),
    (f"{SWEEP} pruner=best", "pruner='best': allowed: median, hyperband, none"),
    (f"{SWEEP} rungs=[0.5]", r"rungs=\[0\.5\]: must rise from above 0 to 1"),
    (f"{SWEEP} 'overrides=[store=S]' storage=nonsense", "storage=nonsense: no database answers there"),
    ("compare", "required: A B"),
    ("compare A", "needs two sources or more"),
    ("compare A B", "A: neither a file, nor a folder, nor a run"),
    ("compare nothing nothing", r"nothing: no samples\.jsonl there"),
    ("compare afile afile", "afile, row 1: no JSON object"),
    ("compare bad.jsonl bad.jsonl", r"bad\.jsonl, row 1: no JSON object"),
    ("compare number.jsonl number.jsonl", r"number\.jsonl, row 1: no JSON object"),
    ("compare empty.jsonl empty.jsonl", r"empty\.jsonl: no rows"),
    ("compare good.jsonl good.jsonl", r"good\.jsonl: row 1 is neither ours .* nor lmms-eval's"),
    ("compare binary.yaml binary.yaml", r"binary\.yaml: not UTF-8 text"),
    ("compare run:G7 run:G0", "run:G7: no generation G7; there are G0, G1"),
    ("compare run:Glast run:G0", "run:Glast: behind :G stands the number of a generation"),
    ("compare good.jsonl,good.jsonl good.jsonl", r"good\.jsonl: row 1 is neither"),
    ("keys curatoin", "no key begins with 'curatoin'; did you mean curation"),
    ("keys curation.treshold", "no key begins with 'curation.treshold'; did you mean curation"),
    ("keys xyzzy", "no key begins with 'xyzzy'; they begin with name, seed"),
    ("keys curation data", "unrecognized arguments: data"),
    ("keys --markdwn", "unrecognized arguments: --markdwn"),
    ("doctor now", "unrecognized arguments: now"),
    ("ui --port x", "--port: 'x': a port is a whole number from 1 to 65535"),
    ("ui --port 99999", "--port: '99999'"),
    ("ui 5000", "unrecognized arguments: 5000"),
]  # fmt: skip


def said(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must fail prints to standard error."""
    import shlex

    try:
        status: object = main(shlex.split(command))
    except SystemExit as stop:  # argparse's own
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2, message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(("command", "wanted"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_message_that_says_what_to_do(
    command: str, wanted: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    message = said(command, capsys)
    assert re.search(wanted, message), message
    ours = [line for line in message.splitlines() if line.startswith("sicog")]
    assert len(ours) == 1, message


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert f"--port {port}: something answers at http://127.0.0.1:{port}" in said(f"ui --port {port}", capsys)


OVER = [("seed=1", []), ("--seeds 0 seed=1", ["seed=1"]), ("seed=1 --seeds 0 name=x", ["name=x"])]


@pytest.mark.parametrize(("words", "late"), OVER, ids=[words for words, _ in OVER])
def test_overrides_may_stand_behind_options(words: str, late: list[str]) -> None:
    from sicog_exp.cli import _parse, build_parser

    args = _parse(build_parser(), ["ablate", "experiments/ablations/evidence.yaml", *words.split()])
    assert [word for word in late if word in args.overrides] == late
    assert args.study == "experiments/ablations/evidence.yaml"


def test_rows_that_cannot_be_used_stop_a_run_and_are_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    message = said(f"{OWN} data.annotated=good.jsonl data.unlabeled=nothing", capsys)
    assert re.search(r"good\.jsonl: 1 of 1 rows are unusable .* row 1 \(1\): .*conversations", message, re.DOTALL)
    message = said(f"{OWN} data.annotated=empty.jsonl data.unlabeled=nothing", capsys)
    assert "empty.jsonl: holds no rows or images; name a file or folder that does" in message


def test_overrides_alone_change_the_default_study(monkeypatch: pytest.MonkeyPatch) -> None:
    from sicog_exp.studies import sweep

    read: list[int] = []
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sweep, "run_sweep", lambda study, console: read.append(study.trials))
    assert main(["sweep", "trials=20"]) == 0
    assert read == [20]


def test_a_root_may_be_named_by_a_number(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "2024" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "1", "image": "a.png", "conversations": turns}) + "\n")
    assert main(["data", "check", "rows.jsonl", "--root", "2024"]) == 0
