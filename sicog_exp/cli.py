"""The commands: parsing and printing only. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import os
import select
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sicog_exp.interruption import EXIT_CODE, Terminated, terminable

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_RECIPE = "experiments/embedded.yaml"
DEFAULT_STUDY = "experiments/sweeps/tau_and_mix.yaml"
DEFAULT_ABLATION = "experiments/ablations/paper.yaml"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sicog", description="Run, measure and compare self-improving multimodal LLM experiments (SIcog).",
        epilog="`sicog COMMAND --help` explains a command, `sicog keys` every key of a recipe; the guide is in docs/.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _runs(commands)
    _curation(commands)
    _data(commands)
    _results(commands)
    _benchmarks(commands)
    _surroundings(commands)
    return parser


def _runs(commands: Any) -> None:
    """What runs a file: recipes and studies."""
    stages = "develop, generate, curate, pre-train, instruct, evaluate"
    _add(commands, "iterate", DEFAULT_RECIPE, f"run a recipe: {stages}",
         "Runs a recipe, or continues it where it was killed; a finished run is a no-op.")  # fmt: skip
    _plan_arguments(_add(commands, "plan", DEFAULT_RECIPE, "estimate a recipe's tokens, FLOPs, memory, hours and disk",
                         "Estimates what each step of a recipe will take, from the model's shape and the data's "
                         "lengths; nothing is run, and all assumptions are printed."))  # fmt: skip
    base = _add(commands, "base", "experiments/base.yaml", "train the embedded base model again",
                "Trains the embedded base from nothing and writes it to --publish.")  # fmt: skip
    base.add_argument("--publish", type=Path, help="folder for the finished model (default: none)")
    ablate = _add(commands, "ablate", DEFAULT_ABLATION, "compare arms of a recipe over seeds, at counted compute",
                  "Runs the arms that a study lists over its seeds in one store, continues them where they were "
                  "killed, and shows their pooled paired differences and FLOPs; a finished one is a no-op that shows "
                  "its result.", "study", "iterations=2, or of its recipe")  # fmt: skip
    ablate.add_argument("--seeds", type=_seeds, help="comma-separated, such as 0,1,2 (default: the study's)")
    ablate.add_argument("--out", type=Path, metavar="FILE.json", help="copy the result there, its plot, page and "
                        "tables beside it (default: no copy)")  # fmt: skip
    _add(commands, "sweep", DEFAULT_STUDY, "search a recipe's keys with Optuna",
         "Searches the keys that a study declares, on the development split; scores the winner on the benchmark. "
         "Run it again to continue, or elsewhere at the same time to help.", "study", "trials=20")  # fmt: skip


def _plan_arguments(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("--device", metavar="NAME", help="a100, h100, h200, b200, l40s, mi300x or cpu (default: cpu for "
                      "a recipe with model.device=cpu, else h100)")  # fmt: skip
    plan.add_argument("--devices", type=_at_least_one, default=1, help="how many of them (default: %(default)s)")
    plan.add_argument("--utilisation", type=_part, metavar="SHARE", help="share of the device's peak that training "
                      "uses (default: 0.4, of a cpu's measured rate 1)")  # fmt: skip
    plan.add_argument("--sampling-utilisation", type=_part, metavar="SHARE", help="the same where token after token "
                      "is drawn (default: 0.03, of a cpu's measured rate 0.45)")  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print JSON; memory and disk are bytes")


def _add(commands: Any, name: str, default: str, summary: str, description: str, file: str = "recipe",
         example: str = "seed=1 curation.caption_threshold=0.9") -> argparse.ArgumentParser:  # fmt: skip
    """A command that reads a YAML file and changes its keys."""
    command = commands.add_parser(name, help=summary, description=description)
    command.add_argument(file, nargs="?", default=default, help="YAML file (default: %(default)s)")
    command.add_argument("overrides", nargs="*", help=f"keys of the {file} to change, such as {example}")
    command.add_argument("--overrides", dest="more", default="", metavar="'A=1 B=2'", help="the same as one argument")
    return command


def _curation(commands: Any) -> None:
    curate = commands.add_parser("curate", help="curate any file of candidates by self-consistency", description=(
        "Reads rows {id, kind, prompt, image, candidates} and writes curated.jsonl, scores.jsonl, preferences.jsonl, "
        "rejected.jsonl and summary.json."))  # fmt: skip
    curate.add_argument("--candidates", type=Path, required=True, help="JSONL file of rows with candidates")
    curate.add_argument("--out", type=Path, required=True, help="folder for the results")
    curate.add_argument("overrides", nargs="*", help="such as curation.encoder=minilm curation.caption_threshold=0.9")
    sweep = commands.add_parser("curation", help="move the thresholds of a finished pool after the fact", description=(
        "Keep rate, precision where the truth is known, variety and length of what every threshold would keep, from "
        "one pool: nothing is sampled or embedded again. Prints a table and writes a page."))  # fmt: skip
    sweep.add_argument("run", metavar="RUN", help="id of an MLflow run, the name of one experiment, or a folder that "
                       "curation wrote (STORE/curate-..., or --out of `sicog curate`)")  # fmt: skip
    sweep.add_argument("--out", type=Path, default=Path("curation.html"), help="HTML file (default: %(default)s)")
    sweep.add_argument("--json", action="store_true", help="print JSON; shares are fractions")
    sweep.add_argument("--encoder", default="", help="compare another encoder, such as minilm, on items drawn from the "
                       "pool")  # fmt: skip
    sweep.add_argument("--candidates", type=Path, help="file that `sicog curate` read (default: the store's own pool)")
    sweep.add_argument("--truth", type=Path, help="JSONL of {id, answer or description, family} (default: the data "
                       "set's own)")  # fmt: skip


def _data(commands: Any) -> None:
    data = commands.add_parser("data", help="look at your own data before a run", description=(
        "Looks at files of rows and images as a run would read them."))  # fmt: skip
    tasks = data.add_subparsers(dest="task", required=True, metavar="TASK", help="what to do with the data")
    check = tasks.add_parser("check", help="validate all rows; token lengths, a masked sample, pictures", description=(
        "Reads every row as a run would, says what is set aside and why, counts tokens with images by a model's own "
        "processor, and shows rows with what the loss falls on. Trains and copies nothing. Ends with status 1 where "
        "more than data.max_bad_share of the rows are unusable."))  # fmt: skip
    check.add_argument("file", metavar="FILE", help="a file, a folder or brace pattern of shards, a saved datasets "
                       "directory, a folder of images, or hub:OWNER/NAME")  # fmt: skip
    check.add_argument("overrides", nargs="*", help="such as data.max_bad_share=0.2 data.max_pixels=1000000")
    check.add_argument("--root", metavar="DIR", help="folder that image names are relative to (default: FILE's own)")
    check.add_argument("--model", metavar="FOLDER", default="embedded",
                       help="model whose processor counts tokens (default: %(default)s)")  # fmt: skip
    check.add_argument("--unlabeled", action="store_true", help="read as data.unlabeled: rows need no response")
    check.add_argument("--max-length", type=_at_least_one, metavar="N", help="tokens that a row may have (default: a "
                       "stage's, or the model's if that is less)")  # fmt: skip
    check.add_argument("--images", choices=("headers", "all"), default="headers",
                       help="read headers, or decode all (default: %(default)s)")  # fmt: skip
    check.add_argument("--tokens", choices=("sample", "all"), default="sample",
                       help="count a sample's tokens, or every row's (default: %(default)s)")  # fmt: skip
    check.add_argument("--out", type=Path, default=Path("data-check.html"),
                       help="page with pictures and rows (default: %(default)s)")  # fmt: skip


def _results(commands: Any) -> None:
    """What reads finished runs."""
    compare = commands.add_parser("compare", help="paired differences of generations or sample files", description=(
        "B - A for every further source, per task and overall, with image-clustered intervals. A source is an "
        "evaluation's or a run's folder (FOLDER:G1 names a generation), a sample file of ours or of lmms-eval, or an "
        "MLflow run id; several joined by commas are seeds."))  # fmt: skip
    compare.add_argument("sources", nargs="+", metavar="A B", help="two sources or more")
    compare.add_argument("--metric", help="which value of lmms-eval's sample files, where they hold several")
    compare.add_argument("--json", action="store_true", help="print JSON; differences are fractions")
    report = commands.add_parser("report", help="draw the report of a run again, or of several runs side by side",
                                 description=(
        "Draws from the tracking store alone, on any machine: one run's report, or a page on which several runs stand "
        "side by side, each compared with the first."))  # fmt: skip
    report.add_argument("runs", nargs="+", metavar="RUN", help="id of an MLflow run, or the name of one experiment")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="HTML file (default: %(default)s)")
    export = commands.add_parser("export", help="write a generation's model and self-data to pass on", description=(
        "Writes a generation of a finished run as a folder: the model and the self-data that it was pre-trained on, "
        "each with its card, the recipe and the scores."))  # fmt: skip
    export.add_argument("run", metavar="RUN", help="id of an MLflow run: of an experiment (its champion; RUN:G1 names "
                        "another generation) or of a generation")  # fmt: skip
    export.add_argument("directory", metavar="DIR", type=Path, help="a new or empty folder")


def _benchmarks(commands: Any) -> None:
    benchmarks = commands.add_parser("benchmarks", help="list suites of benchmarks, or mirror one from local data",
                                     description=(
        "Says what a suite holds and needs, or points its stock lmms-eval tasks at local copies."))  # fmt: skip
    actions = benchmarks.add_subparsers(dest="action", required=True, metavar="ACTION", help="list or mirror")
    listing = actions.add_parser("list", help="tasks, metrics, who scores them, where the data are", description=(
        "Lists a suite's tasks: the metric, whether a rule or a judge model scores it, local data or the hub's."))
    listing.add_argument("suite", nargs="?", default="", help="a suite of evals/suites/, or its file (default: all)")
    mirror = actions.add_parser("mirror", help="score a suite's stock tasks on local copies of their data",
                                description=(
        "Writes DIR/SUITE.yaml, in which every stock task reads its copy and is scored by the stock functions; names "
        "the data sets that are missing, with the commands that download them."))  # fmt: skip
    mirror.add_argument("suite", help="a suite of evals/suites/, or its file")
    mirror.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR",
                        help="folder of the copies, a folder per data set named as on the hub")  # fmt: skip
    mirror.add_argument("--out", type=Path, default=Path("mirrored"), metavar="DIR",
                        help="folder for the suite (default: %(default)s)")  # fmt: skip


def _surroundings(commands: Any) -> None:
    """Keys, machine, tracking store."""
    keys = commands.add_parser("keys", help="list every recipe key with its type, default and meaning", description=(
        "Lists the keys that a recipe sets and that an override KEY=VALUE changes, with their defaults."))  # fmt: skip
    keys.add_argument("prefix", nargs="?", default="", help="only keys that begin so, such as curation")
    keys.add_argument("--markdown", action="store_true", help="the whole list as the page docs/recipe-keys.md")
    commands.add_parser("doctor", help="check this machine: packages, devices, disk, tracking store, model hub",
                        description="Says what a run will find here and what to do about it. Ends with status 1 where "
                        "a run cannot start.")  # fmt: skip
    ui = commands.add_parser("ui", help="open the MLflow UI on 127.0.0.1", description=(
        "Serves the runs of MLFLOW_TRACKING_URI, or else of mlflow.db here, to this machine alone."))  # fmt: skip
    ui.add_argument("--port", type=_port, default=5000, help="port (default: %(default)s)")


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words) or len(set(words)) < len(words):
        raise argparse.ArgumentTypeError(f"{text!r}: different whole numbers from 0, joined by commas, such as 0,1,2")
    return [int(word) for word in words]


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1")
    return int(text)


def _part(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a share above 0 and at most 1, such as 0.4")
    return share


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise argparse.ArgumentTypeError(f"{text!r}: a port is a whole number from 1 to 65535")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Errors that a user can mend are one message, without a traceback; status 2."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may follow
        from sicog_exp.completion import complete

        complete(parser)
    args = _parse(parser, arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        commands = {"iterate": _iterate, "base": _base, "curate": _curate, "curation": _sweep_curation,
                    "data": _check_data, "ablate": _ablate, "sweep": _sweep, "compare": _compare, "export": _export,
                    "report": _report, "plan": _plan, "benchmarks": _run_benchmarks, "keys": _keys,
                    "doctor": _doctor, "ui": _ui}  # fmt: skip
        with terminable():
            status = commands[args.command](args)
            sys.stdout.flush()  # what a reader that has gone makes of it shows here, and not in the dying interpreter
            return status
    except BrokenPipeError:
        if not _reader_is_gone():  # a worker's pipe, say: a defect
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    except Terminated as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return EXIT_CODE
    except Exception as error:
        if not _is_for_users(error):
            raise
        print(f"sicog {args.command}: {error}", file=sys.stderr)
        return 2


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more, as behind `| head`; then the rest of it goes nowhere, quietly."""
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are told unasked
    gone = bool(output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand before options or behind them, which argparse alone does not allow."""
    args, rest = parser.parse_known_args(arguments)
    late = [word for word in rest if "=" in word and not word.startswith("-")] if hasattr(args, "overrides") else []
    unknown = [word for word in rest if word not in late]
    if unknown:
        from sicog_exp.completion import chosen

        chosen(parser, args).error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides += late
    return args


def _is_for_users(error: Exception) -> bool:
    """Whether the error is one of ours, written for people; anything else is a defect and keeps its traceback."""
    return type(error).__module__.startswith("sicog_exp.")


def _overrides(args: argparse.Namespace, default: str = DEFAULT_RECIPE, file: str = "") -> tuple[str, list[str]]:
    """The path of the recipe (or of `file`) and all overrides; `sicog iterate a.b=1` means the default one."""
    given, path = [*args.overrides, *_split(args.more)], file or args.recipe
    if "=" in path:
        return default, [path, *given]
    return path, given


def _split(text: str) -> list[str]:
    """The words of --overrides, as a shell would split them."""
    from sicog_exp.recipe import RecipeError

    try:
        return shlex.split(text)
    except ValueError as error:
        raise RecipeError(f"--overrides {text!r}: {str(error).lower()}; close the quotation") from None


def _iterate(args: argparse.Namespace) -> int:
    from sicog_exp.recipe import load, other_base

    given = _overrides(args)
    recipe, applied = load(*given), other_base(*given)
    if applied:
        shown = " ".join(f"{key}={value}" for key, value in applied.items())
        console().print(f"other_base holds for {recipe.model.base}: {shown}", highlight=False, markup=False)
    quiet_libraries()
    from sicog_exp.experiment import run_experiment

    run_experiment(recipe, console())
    return 0


def _plan(args: argparse.Namespace) -> int:
    from sicog_exp import smoke
    from sicog_exp.planning.devices import check_device
    from sicog_exp.recipe import load

    recipe = load(*_overrides(args))
    smoke.refuse(recipe, "plan")
    device = check_device(args.device or ("cpu" if recipe.model.device == "cpu" else "h100"))
    quiet_libraries()
    from sicog_exp.planning.plan import make_plan, pricing
    from sicog_exp.planning.show import show, to_json

    plan = make_plan(recipe, pricing(device, args.devices, args.utilisation, args.sampling_utilisation))
    if args.json:
        print(to_json(plan))
    else:
        show(plan, console())
    return 0


def _base(args: argparse.Namespace) -> int:
    from sicog_exp.base import BaseRecipe, base_steps, publish
    from sicog_exp.recipe import load_as
    from sicog_exp.store import Store

    recipe = load_as(BaseRecipe, *_overrides(args, "experiments/base.yaml"))
    quiet_libraries()
    from sicog_exp.ahead import check_device

    check_device(recipe.model)
    model = base_steps(recipe, Store(recipe.store))["instruct"]
    if args.publish:
        publish(model, args.publish)
    print(f"base model: {args.publish or model.path}")
    return 0


def _curate(args: argparse.Namespace) -> int:
    from sicog_exp.curation.files import curate_file
    from sicog_exp.recipe import CurationConfig, build_overrides

    summary = curate_file(args.candidates, args.out, build_overrides(CurationConfig, "curation", args.overrides))
    kept, aside = f"kept {summary['kept']} of {summary['items']} items", f"{summary['rejected_rows']} rows set aside"
    print(f"{kept}; {aside}; see {args.out}")
    return 0


def _check_data(args: argparse.Namespace) -> int:
    from sicog_exp.recipe import DataConfig, build_overrides

    config = build_overrides(DataConfig, "data", args.overrides)
    if args.root:
        config = replace(config, root=args.root)
    quiet_libraries()
    from sicog_exp.data.check import Options, check
    from sicog_exp.data.preview import show, write_page
    from sicog_exp.progress import RowsBar

    options = Options(config, args.model, args.max_length, args.unlabeled, args.images == "all", args.tokens == "all")
    with RowsBar(console(), f"reading {Path(args.file).name}") as bar:
        found = check(Path(args.file).expanduser(), options, bar)
    listing = args.out.with_suffix(".rejected.jsonl") if found.intake.rejected else None
    write_page(found, args.out)
    if listing:
        found.intake.write(listing)
    show(found, args.out, listing, console())
    return 1 if found.too_many_bad else 0


def _sweep_curation(args: argparse.Namespace) -> int:
    if args.encoder or not Path(args.run).is_dir():
        quiet_libraries()
    from sicog_exp.reporting import curation_page

    found = curation_page.read(args.run, args.candidates, args.truth, args.encoder)
    curation_page.write(found, args.out)
    if args.json:
        print(curation_page.to_json(found))
    else:
        curation_page.show(found, console())
        print(f"page: {args.out}")
    return 0


def _ablate(args: argparse.Namespace) -> int:
    from sicog_exp.studies.ablate import load_ablation, run_ablation

    path, overrides = _overrides(args, DEFAULT_ABLATION, args.study)
    seeds = [f"seeds={args.seeds}"] if args.seeds else []
    study = load_ablation(path, [*overrides, *seeds])
    quiet_libraries()
    run_ablation(study, console(), args.out)
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from sicog_exp.studies.sweep import load_study

    study = load_study(*_overrides(args, DEFAULT_STUDY, args.study))
    quiet_libraries()
    from sicog_exp.studies.sweep import run_sweep

    run_sweep(study, console())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from sicog_exp.evaluation.outcomes import compare, show, to_json

    if len(args.sources) < 2:
        build_parser().error("compare needs two sources or more")
    first, *others = args.sources
    found = [one for other in others for one in compare(first, other, args.metric)]
    if args.json:
        print(to_json(found))
    else:
        show(found, console())
    return 0


def _export(args: argparse.Namespace) -> int:
    quiet_libraries()
    from sicog_exp.reporting.export import export

    made = export(args.run, args.directory)
    print(f"{made.generation}, its model from {made.model_from}, is in {made.directory}")
    if made.rows:
        print(f"self-data: {made.rows:,} rows, {made.images:,} images")
    for note in made.notes:
        print(note)
    return 0


def _report(args: argparse.Namespace) -> int:
    quiet_libraries()
    from sicog_exp.reporting.side_by_side import rebuild

    rebuild(args.runs, args.out)
    print(f"report: {args.out}")
    return 0


def _run_benchmarks(args: argparse.Namespace) -> int:
    if args.action == "list":
        from sicog_exp.evaluation.overview import show, suite_names

        show([args.suite] if args.suite else suite_names(), console())
        return 0
    quiet_libraries()
    from sicog_exp.evaluation.mirror import mirror

    made = mirror(args.suite, args.source, args.out)
    for one in made.tasks:
        print(f"{one.name}: {len(one.found)} files of {one.data}")
    for note in made.notes:
        print(note)
    print(f"score it with evaluation.suite={made.suite}")
    return 0


def _keys(args: argparse.Namespace) -> int:
    from sicog_exp.reference import keys, markdown, no_such_key

    if args.markdown:
        print(markdown(), end="")
        return 0
    found = [key for key in keys() if key.name.startswith(args.prefix)]
    if not found:
        raise no_such_key(args.prefix)
    for key in found:
        print(f"{key.name}={key.default}\n    {key.type}. {key.meaning}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    quiet_libraries()
    from sicog_exp.doctor import examine

    return 0 if examine(console()) else 1


def _ui(args: argparse.Namespace) -> int:
    import socket

    from sicog_exp.recipe import RecipeError

    with socket.socket() as taken:
        if taken.connect_ex(("127.0.0.1", args.port)) == 0:
            raise RecipeError(f"--port {args.port}: something answers at http://127.0.0.1:{args.port} already; open "
                              "that, or name another port")  # fmt: skip
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    options = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(args.port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])


def console() -> Console:
    """Where commands print; a log file gets room for a whole table."""
    from rich.console import Console

    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def quiet_libraries() -> None:
    """Our progress instead of other libraries' bars, tips and notices."""
    import logging
    import warnings

    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "MLFLOW_DISABLE_TELEMETRY"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("lightning.pytorch", "lightning.fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
