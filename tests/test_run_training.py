"""The bash front end: what it refuses, and that words reach Python as they were typed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Script = Callable[..., subprocess.CompletedProcess[str]]


def test_help_names_every_option(script: Script, root: Path) -> None:
    shown = script("run_training.sh", "--help").stdout
    cases = re.findall(r"^ +(-[-a-z| ]+)\)", (root / "run_training.sh").read_text(), re.MULTILINE)
    options = {option for case in cases for option in case.split(" | ")}
    assert {"-c", "--overwrite", "--demo", "--help"} <= options
    for option in options:
        assert f"{option} " in shown or f"{option}," in shown, option


@pytest.mark.parametrize(
    "arguments", [["--exprot"], ["-x"], ["reward_model_full"], ["-d"], ["--epochs"], ["; ls"], ["-c", ""]]
)
def test_what_is_not_understood_is_refused_with_usage(script: Script, arguments: list[str]) -> None:
    refused = script("run_training.sh", *arguments, code=2)
    assert refused.stderr.startswith("error: ")
    assert "Usage: ./run_training.sh" in refused.stderr


def test_values_with_spaces_survive_and_nothing_is_evaluated(script: Script, tmp_path: Path, root: Path) -> None:
    config = tmp_path / "my config $(touch pwned).yaml"
    refused = script("run_training.sh", "--no-convert", "-c", config, cwd=tmp_path, code=2)
    assert str(config) in refused.stderr
    named = "no such; touch pwned `touch pwned` $(touch pwned)"
    refused = script("run_training.sh", "--no-convert", "--validate-only", "-d", named, cwd=tmp_path, code=2)
    assert named in refused.stderr + refused.stdout
    assert not list(tmp_path.glob("pwned*")) and not list(root.glob("pwned*"))


def test_a_configuration_is_found_from_the_folder_in_which_one_stands(script: Script, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("learning_rtae: 1.0e-4\n")
    refused = script("run_training.sh", "--no-convert", "--validate-only", "-c", "mine.yaml", cwd=tmp_path, code=2)
    assert "learning_rate" in refused.stderr + refused.stdout, "the misspelt key of mine.yaml was not read"


def test_a_configuration_that_is_not_there_is_named(script: Script, tmp_path: Path) -> None:
    refused = script("run_training.sh", "--no-convert", "-c", "no folder/mine.yaml", cwd=tmp_path, code=2)
    assert f"{tmp_path}/no folder/mine.yaml: No such file" in refused.stderr


def test_setting_up_again_changes_nothing(root: Path, tmp_path: Path) -> None:
    """An environment whose stamp carries today's pins is left alone: no pip, no network."""
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    pins = b"".join(path.read_bytes() for path in sorted(root.glob("requirements*.txt")))
    stamp = subprocess.run(["cksum"], input=pins, capture_output=True, check=True).stdout
    (environment / ".prmkit-requirements.txt").write_bytes(stamp)
    done = subprocess.run(
        [root / "setup_environment.sh"],
        env={**os.environ, "VIRTUAL_ENV": str(environment)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(environment / "bin" / "python")
    assert "Dependencies are there" in done.stderr
