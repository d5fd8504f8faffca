"""The command-line arguments that say which judge is asked, and how; the same in every script that asks one."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from prmkit.errors import UsageError
from prmkit.judging.sources import EXPORT_FILE, JudgeSource, judge_source_of_export, judge_source_of_run

DEFAULT_RUN = Path("saves/reward_model_training")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `judge_source` and `Judge.score` need to know."""
    group = parser.add_argument_group("the judge")
    group.add_argument("--run", type=Path, metavar="FOLDER", help=f"a trained run (default {DEFAULT_RUN})")
    group.add_argument("--model", metavar="FOLDER", help="an exported model, or a base model; instead of --run")
    group.add_argument("--adapter", type=Path, metavar="FOLDER", help="LoRA weights for --model")
    group.add_argument("--template", help="LLaMA Factory's template (default: the one of the training)")
    group.add_argument("--default-system", metavar="TEXT", help="system text (default: the one of the training)")
    group.add_argument("--enable-thinking", action=argparse.BooleanOptionalAction, help="for reasoning templates")
    group.add_argument("--cutoff-len", type=positive, metavar="TOKENS", help="prompt and answer together")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="auto: as trained on a GPU")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the model brings")
    asking = parser.add_argument_group("asking it")
    asking.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at once (default 8)")
    asking.add_argument(
        "--mode",
        choices=["expected", "generate"],
        default="expected",
        help="read the probability of every score (default), or let the model write its verdict",
    )
    asking.add_argument("--max-new-tokens", type=positive, default=1024, metavar="N", help="longest written verdict")
    asking.add_argument(
        "--too-long",
        choices=["trim", "report"],
        default="trim",
        help="shorten the middle of prompts that do not fit, as in training (default), or give them no score",
    )


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def judge_source(arguments: argparse.Namespace) -> JudgeSource:
    """Where the judge comes from: the run or the model that was named, and on top whatever else was.

    Raises:
        DataError: nothing that could be a judge stands there.
        UsageError: the arguments contradict each other.
    """
    source = _named_source(arguments)
    given = {
        field.name: value
        for field in fields(source)
        if field.name not in ("model", "adapter") and (value := getattr(arguments, field.name, None)) is not None
    }
    return replace(source, **given)


def _named_source(arguments: argparse.Namespace) -> JudgeSource:
    if arguments.model is None:
        if arguments.adapter is not None:
            raise UsageError("--adapter needs --model, its base model. A whole run is named with --run alone.")
        return judge_source_of_run(arguments.run or DEFAULT_RUN)
    if arguments.run is not None:
        raise UsageError("--run and --model name two judges. Leave one of them out.")
    model = Path(arguments.model)
    if arguments.adapter is not None:
        return _source_of_adapter(model, arguments.adapter)
    if (model / EXPORT_FILE).is_file():
        return judge_source_of_export(model)
    return JudgeSource(model)


def _source_of_adapter(model: Path, adapter: Path) -> JudgeSource:
    """The settings of the run that made the adapter, where it still stands in its run's folder."""
    if any((folder / "run.json").is_file() for folder in (adapter, adapter.parent)):
        return replace(judge_source_of_run(adapter), model=model)
    return JudgeSource(model, adapter)
