"""Train, then prove: the one place where wings meet in code. Everywhere else they meet in files."""

from prmkit.errors import ExitCode
from prmkit.training.command import Command
from prmkit.training.flow import execute


def train_and_prove(command: Command, *, evaluate: bool) -> ExitCode:
    """Do what `train.py` was asked to do, and measure what came of it.

    Args:
        command: the training, export or check that was asked for.
        evaluate: measure the judge on the held-out rows when it is trained.

    A model that was exported must score as the run that it was made from.

    Raises:
        PrmkitError: as each part says; what was done before it stays.
    """
    outcome = execute(command)
    if evaluate and outcome.run is not None:
        from prmkit.evaluation.command import evaluate_run

        evaluate_run(outcome.run)
    if outcome.exported is not None and outcome.run is not None:
        from prmkit.evaluation.command import prove_export

        prove_export(outcome.run, outcome.exported)
    return outcome.code
