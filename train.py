"""Fine-tune a judge: train an adapter on the data, verify it and, on request, merge it into the base model."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from prmkit import cli
from prmkit.errors import ExitCode
from prmkit.registered import UseRegistered


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Add to argparse's message what to write instead: lora_rank=8 for `--lora-rank 8`."""
        from prmkit.training.options import suggest_flag

        super().error(message + suggest_flag(message, list(self._option_string_actions), sys.argv))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, epilog="Run the same command again to resume a run that was stopped.")
    add = parser.add_argument
    add("assignments", nargs="*", metavar="key=value", help="any key of LLaMA Factory, such as lora_rank=32")
    add("-c", "--config", type=Path, default=Path("training_config.yaml"), metavar="FILE", help="default: %(default)s")
    add("-d", "--dataset", metavar="NAME", help="the variant to train on, such as reward_model_full")
    add("-e", "--epochs", metavar="N", help="passes over the data")
    add("-lr", "--learning-rate", metavar="X", help="the peak learning rate")
    add("-bs", "--batch-size", metavar="N", help="rows per device and step")
    add("--export", action="store_true", help="merge the adapter into the base model after training")
    add("--export-only", nargs="?", const="", metavar="FOLDER", help="merge an existing training run or checkpoint")
    judge = "merge a registered version: production, NAME@NUMBER; instead of --export-only FOLDER"
    add("--judge", dest="export_only", action=UseRegistered, default=argparse.SUPPRESS, metavar="VERSION", help=judge)
    add("--evaluate", action="store_true", help="measure the judge on held-out rows after training")
    add("--validate-only", "--doctor", action="store_true", help="check config, machine, model and data, then stop")
    add("--force", action="store_true", help="train even if the checks found errors")
    add("--overwrite", action="store_true", help="rename an earlier run or export of the same name")
    add("--runs", action="store_true", help="list all training runs with their state, losses and agreement")
    add("--verbose", action="store_true", help="show the complete config and everything that LLaMA Factory prints")
    add("--json", action="store_true", help="print the result as JSON")
    several = parser.add_argument_group("several processes and nodes, with torchrun's names").add_argument
    several("--nproc", type=int, metavar="N", help="processes on this node (default: one for each visible GPU)")
    several("--nnodes", default="1", metavar="N", help="nodes, or MIN:MAX for an elastic run")
    several("--node-rank", type=int, default=0, metavar="N", help="this node's number, from 0 (default: %(default)s)")
    several("--master-addr", metavar="HOST", help="address of the first node, needed for several nodes")
    several("--master-port", type=int, metavar="PORT", help="the first node's port (for several nodes: 29500)")
    several("--rdzv-id", metavar="NAME", help="id of an elastic run, the same on every node")
    several("--max-restarts", type=int, default=0, metavar="N", help="restarts of an elastic run")
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from dataclasses import fields

    from prmkit.training.launcher import Launch
    from prmkit.training.options import TrainOptions, next_commands
    from prmkit.training.train import execute

    typed = vars(arguments)
    launch = Launch(**{field.name: typed.pop(field.name) for field in fields(Launch)})
    options = TrainOptions(**typed, launch=launch)
    outcome = execute(options)
    # The only place where training calls evaluation in code; everywhere else they exchange files.
    if outcome.run is not None and (options.evaluate or outcome.exported):
        from prmkit.evaluation.command import evaluate_run, prove_export

        # A model's own code ran in the training or the export only because this command line allows it.
        trust = bool(outcome.record["config"].get("trust_remote_code"))
        if options.evaluate:
            evaluate_run(outcome.run, trust_remote_code=trust, show=not options.json)
        if outcome.exported is not None:
            prove_export(outcome.run, outcome.exported, trust_remote_code=trust, show=not options.json)
    for line in next_commands(options, outcome, evaluated=options.evaluate and outcome.run is not None):
        cli.emit(line)
    return outcome.code


if __name__ == "__main__":
    sys.exit(cli.run(_command, _parser()))
