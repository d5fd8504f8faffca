"""finetune.jsonl -> data/: judged trajectories in, training and held-out datasets for LLaMA Factory out."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode

_EPILOG = """\
Without filters: reward_model_full and one variant for each evaluation type, judge and task, each with its held-out side
NAME_eval, listed in dataset_info.json; conversion_report.json, rejected.jsonl.
With filters: one variant (reward_model_custom, or --name), added to what is there; its report is NAME.report.json,
its rejected rows are NAME.rejected.jsonl, and it holds out the tasks that the conversion in the folder holds out.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    inputs = "files (.jsonl, .gz, .zst), folders of them, or - for stdin (default: finetune.jsonl)"
    add("--input", nargs="+", default=["finetune.jsonl"], metavar="PATH", help=inputs)
    add("--output-dir", type=Path, metavar="FOLDER", help="(default: dataset_dir of --config, or data)")
    add("--format", choices=["alpaca", "sharegpt"], default="alpaca", help="of the training files (default: alpaca)")
    labels = "train on verdicts in one form, or as the judge wrote them (default: canonical)"
    add("--labels", choices=["canonical", "verbatim"], default="canonical", help=labels)
    add("--mask-leaked-scores", action="store_true", help="hide earlier scores in prompts: (Score: 0.93)")
    add("--max-rejected", metavar="N", help="fail if more rows are set aside: a share (5%%) or a number")
    add("--no-task-variants", dest="task_variants", action="store_false", help="write no variant for each task")
    add("--processes", type=int, default=2, metavar="N", help="for inputs of more than 8 MB (default: 2)")
    add("--json", action="store_true", help="print the report instead of the summary")
    add("--audit", type=Path, metavar="FOLDER", help="only look for leaks between the datasets of a folder, anybody's")

    filters = parser.add_argument_group("filters, which all must agree").add_argument
    filters("--evaluation-types", nargs="+", metavar="TYPE", help="such as clip, category, final")
    filters("--model-names", nargs="+", metavar="JUDGE", help="judges, such as deepseek-chat")
    filters("--task-ids", nargs="+", metavar="TASK")
    filters("--name", metavar="NAME", help="of the variant (default: reward_model_custom)")

    split = parser.add_argument_group("held-out tasks").add_argument
    split("--eval-ratio", type=float, metavar="X", help="share of the tasks that is held out; 0: none (default: 0.1)")
    split("--split-seed", type=int, metavar="N", help="another seed holds out other tasks (default: 0)")
    split("--eval-tasks", type=Path, metavar="FILE", help="a list of one's own, one task a line")

    judges = parser.add_argument_group("several judges").add_argument
    consensus = "also write reward_model_consensus, with one row a prompt (default: none)"
    judges("--aggregate", choices=["none", "mean", "median"], default="none", help=consensus)
    judges("--max-disagreement", type=float, metavar="X", help="set prompts aside on which judges differ more (0 to 1)")

    lengths = parser.add_argument_group("length guard").add_argument
    lengths("--config", type=Path, metavar="FILE", help="take what is not given here from a training_config.yaml")
    lengths("assignments", nargs="*", metavar="key=value", help="goes before --config: cutoff_len=8192")
    lengths("--tokenizer", type=Path, metavar="FOLDER", help="the model's folder")
    lengths("--template", metavar="NAME", help="LLaMA Factory's, such as qwen")
    lengths("--cutoff-len", type=int, metavar="N", help="tokens of prompt and label")
    cut = "rows that LLaMA Factory would cut: shorten the middle of the prompt, set aside, fail (default: trim)"
    lengths("--too-long", choices=["trim", "drop", "error", "keep"], default="trim", help=cut)
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from prmkit.dataset.command import execute

    return execute(arguments)


if __name__ == "__main__":
    sys.exit(cli.run(_command, _parser()))
