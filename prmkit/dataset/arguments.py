"""The flags of convert_dataset.py; the defaults are in `settings`. Imports no other package, so --help always works."""

import argparse
from pathlib import Path

from prmkit.dataset.settings import CUSTOM, LengthSettings, Settings, Split

_EPILOG = f"""\
Without filters: reward_model_full and one variant for each evaluation type,
judge and task, each with its held-out side NAME_eval, listed in
dataset_info.json; conversion_report.json, rejected.jsonl.
With filters: one variant ({CUSTOM}, or --name), added to those in
the folder; its report is NAME.report.json, its rejected rows are in
NAME.rejected.jsonl, and it holds out the same tasks as the conversion already
in the folder.
"""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of convert_dataset.py."""
    parser = argparse.ArgumentParser(
        description=description, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    inputs = "files of rows (.jsonl, .ndjson, .json; .gz, .bz2, .zst), files of labelled runs "
    inputs += "(import_trajectories.py), folders of both, - for stdin (default: finetune.jsonl)"
    add("--input", nargs="+", default=["finetune.jsonl"], metavar="PATH", help=inputs)
    add("--rubric", type=Path, metavar="FILE", help="the rubric for labelled runs (default: prmkit's own)")
    add("--output-dir", type=Path, metavar="FOLDER", help="(default: dataset_dir of --config, or data)")
    form = "of the training files (default: %(default)s)"
    add("--format", choices=["alpaca", "sharegpt"], default=Settings.form, help=form)
    labels = "train on verdicts in one form, or as judges wrote them (default: %(default)s)"
    add("--labels", choices=["canonical", "verbatim"], default=Settings.labels, help=labels)
    add("--mask-leaked-scores", action="store_true", help="hide earlier scores in prompts: (Score: 0.93)")
    add("--max-rejected", metavar="N", help="fail if more rows are rejected: a share or a number (default: 50%%)")
    add("--no-task-variants", dest="task_variants", action="store_false", help="write no variant for each task")
    add("--json", action="store_true", help="print the report instead of the summary")
    add("--no-next", action="store_true", help=argparse.SUPPRESS)  # run_training.sh does the next step itself
    add("--audit", type=Path, metavar="FOLDER", help="only check the datasets of a folder, any folder, for leaks")

    filters = parser.add_argument_group("filters (combined with AND)").add_argument
    filters("--evaluation-types", nargs="+", metavar="TYPE", help="such as clip, category, final")
    filters("--model-names", nargs="+", metavar="JUDGE", help="judges, such as deepseek-chat")
    filters("--task-ids", nargs="+", metavar="TASK")
    filters("--name", metavar="NAME", help=f"name of the variant (default: {CUSTOM})")

    split = parser.add_argument_group("held-out tasks").add_argument
    share = f"share of tasks to hold out; 0: none (default: {Split.ratio})"
    split("--eval-ratio", type=float, metavar="X", help=share)
    seed = f"another seed holds out different tasks (default: {Split.seed})"
    split("--split-seed", type=int, metavar="N", help=seed)
    split("--eval-tasks", type=Path, metavar="FILE", help="your list of held-out tasks, one per line")
    near = "training prompts that repeat a held-out one, a few words changed; they are counted (default: %(default)s)"
    split("--near-duplicates", choices=["keep", "drop"], default=Settings.near_duplicates, help=near)

    _add_judges_and_lengths(parser)
    return parser


def _add_judges_and_lengths(parser: argparse.ArgumentParser) -> None:
    judges = parser.add_argument_group("judges").add_argument
    scale = "the range of all judges (1 5), or of single judges (JUDGE=1:10 …); repeatable"
    judges("--scale", nargs="+", action="append", default=[], metavar="RANGE", help=scale)
    judges("--map", nargs="+", default=[], metavar="WORD=SCORE", help="scores of words: pass=1 fail=0")
    consensus = "also write reward_model_consensus, with one row per prompt (default: %(default)s)"
    judges("--aggregate", choices=["none", "mean", "median"], default=Settings.aggregate, help=consensus)
    judges("--no-leniency-correction", dest="leniency_correction", action="store_false",
           help="aggregate scores without correcting for each judge's leniency")  # fmt: skip
    judges("--max-disagreement", type=float, metavar="X", help="reject prompts on which judges differ by more (0 to 1)")

    lengths = parser.add_argument_group("length guard").add_argument
    lengths("--config", type=Path, metavar="FILE", help="training_config.yaml with the defaults for this group")
    lengths("assignments", nargs="*", metavar="key=value", help="overrides --config: cutoff_len=8192")
    lengths("--tokenizer", type=Path, metavar="FOLDER", help="the model's folder")
    lengths("--template", metavar="NAME", help="LLaMA Factory's template, such as qwen")
    lengths("--cutoff-len", type=int, metavar="N", help="most tokens of prompt and label")
    cut = "rows that LLaMA Factory would cut: shorten the middle of the prompt, reject, fail, keep "
    cut += "(default: %(default)s)"
    lengths("--too-long", choices=["trim", "drop", "error", "keep"], default=LengthSettings.too_long, help=cut)
