"""Fine-tune a judge: config and data in, a checked adapter in saves/ out, and on request a merged model."""

import argparse
import sys
from pathlib import Path

from prmkit import cli
from prmkit.errors import ExitCode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Run the same command again to go on where it stopped."
    )
    add = parser.add_argument
    add("assignments", nargs="*", metavar="key=value", help="any key of LLaMA Factory, such as lora_rank=32")
    add("-c", "--config", type=Path, default=Path("training_config.yaml"), metavar="FILE")
    add("-d", "--dataset", metavar="NAME", help="the variant to train on, such as reward_model_full")
    add("-e", "--epochs", metavar="N", help="passes over the data")
    add("-lr", "--learning-rate", metavar="X")
    add("-bs", "--batch-size", metavar="N", help="rows a device and step")
    add("--export", action="store_true", help="merge the adapter into the base model when it is trained")
    add("--export-only", nargs="?", const="", metavar="FOLDER", help="merge a run or checkpoint that is there already")
    add("--evaluate", action="store_true", help="measure the judge on held-out rows when it is trained")
    check = "check the config, this machine, the model and the data, and stop"
    add("--validate-only", "--doctor", action="store_true", help=check)
    add("--force", action="store_true", help="train although the checks found errors")
    add("--overwrite", action="store_true", help="move an earlier run or export of the same name aside")
    add("--runs", action="store_true", help="list the runs with their state and numbers")
    add("--verbose", action="store_true", help="show everything that LLaMA Factory prints")
    add("--json", action="store_true", help="the result as JSON")
    several = parser.add_argument_group("several processes and nodes, as torchrun names them").add_argument
    several("--nproc", type=int, metavar="N", help="processes on this node (default: one for each visible GPU)")
    several("--nnodes", default="1", metavar="N", help="nodes, or MIN:MAX for an elastic run")
    several("--node-rank", type=int, default=0, metavar="N")
    several("--master-addr", metavar="HOST", help="of the first node; several nodes need it")
    several("--master-port", type=int, metavar="PORT")
    several("--rdzv-id", metavar="NAME", help="of an elastic run; the same on every node")
    several("--max-restarts", type=int, default=0, metavar="N", help="of an elastic run")
    return parser


def _command(arguments: argparse.Namespace) -> ExitCode:
    from dataclasses import fields

    from prmkit.pipeline import train_and_prove
    from prmkit.training.command import Command
    from prmkit.training.launch import Launch

    typed = vars(arguments)
    evaluate = typed.pop("evaluate")
    launch = Launch(**{field.name: typed.pop(field.name) for field in fields(Launch)})
    return train_and_prove(Command(**typed, launch=launch), evaluate=evaluate)


if __name__ == "__main__":
    sys.exit(cli.run(_command, _parser()))
