"""The bash front end: what it refuses, and that words reach Python as they were typed."""

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from prmkit.dataset.command import make_parser
from prmkit.llamafactory_schema import training_keys

Script = Callable[..., subprocess.CompletedProcess[str]]


def test_help_names_every_option(script: Script, root: Path) -> None:
    shown = script("run_training.sh", "--help").stdout
    text = (root / "run_training.sh").read_text()
    lists = re.findall(r"^ *(?:local )?(?:switches|valued|options|short)=\(([^)]*)", text, re.MULTILINE)
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(lists)))
    assert {"-c", "-lr", "--input", "--overwrite", "--demo", "--nproc", "--help"} <= options
    for option in options:
        assert re.search(rf"{option}[ ,\n]", shown), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exprot"], "'--exprot' is not an option. Did you mean --export? See ./run_training.sh --help"),
        (["--evalute", "--demo"], "'--evalute' is not an option. Did you mean --evaluate?"),
        (["--batch_size", "4"], "'--batch_size' is not an option. Did you mean --batch-size?"),
        (["--lora-rank", "8"], "'--lora-rank' is not an option. A key of LLaMA Factory is written lora_rank=VALUE."),
        (["--lora-rank=8"], "'--lora-rank' is not an option. A key of LLaMA Factory is written lora_rank=VALUE."),
        (["--scale", "1", "5"], "--scale is an option of convert_dataset.py. Convert with it, then run"),
        (["--too-long", "drop"], "--too-long is an option of convert_dataset.py. Convert with it, then run"),
        (
            ["--cutoff-len=8192"],
            "Write cutoff_len=N instead of --cutoff-len here, because the training needs it as well.",
        ),
        (["--runs"], "--runs is an option of train.py alone: python train.py --runs"),
        (["--judge", "production"], "--judge is an option of train.py alone: python train.py --judge"),
        (["-x"], "'-x' is not an option."),
        (["--ma", "3"], "--ma could be --master-addr --master-port --max-restarts."),
        (["reward_model_full"], "'reward_model_full' is neither an option nor key=value."),
        (["; ls"], "'; ls' is neither an option nor key=value."),
        (["-d"], "--dataset needs a value."),
        (["--epoch"], "--epochs needs a value."),
        (["-c", ""], "--config needs a value."),
        (["--export=yes"], "--export takes no value."),
        (["--demo", "--input", "finetune.jsonl"], "--demo runs on the sample."),
        (["--model", "smollm2"], "--model takes smollm2, and only with --demo."),
        (["--demo", "--model", "llama"], "--model takes smollm2, and only with --demo."),
        (["--no-convert", "--input", "finetune.jsonl"], "--input and --no-convert contradict each other."),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(script: Script, arguments: list[str], message: str) -> None:
    refused = script("run_training.sh", *arguments, code=2)
    assert refused.stderr.startswith(f"error: {message}")
    assert refused.stderr.count("\n") == 1 and not refused.stdout


def test_every_option_of_the_conversion_is_taken_or_refused_with_what_to_type_instead(script: Script) -> None:
    options = [
        option
        for action in make_parser(None)._actions
        for option in action.option_strings
        if option not in ("-h", "--help") and action.help != argparse.SUPPRESS
    ]
    assert len(options) > 20
    taken = []
    for option in options:
        said = script("run_training.sh", option, code=2).stderr
        if said == f"error: {option} needs a value.\n":
            taken.append(option)
        elif written := re.match(rf"error: Write (\w+)=[A-Z]+ instead of {option} here, because ", said):
            assert written[1] in training_keys()
        else:
            assert said.startswith(f"error: {option} is an option of convert_dataset.py"), said
    assert taken == ["--input", "--config"]


def test_rows_that_are_not_there_are_named(script: Script, tmp_path: Path) -> None:
    refused = script("run_training.sh", "--input", "my_rows.jsonl", cwd=tmp_path, code=1)
    assert refused.stderr.startswith("error: my_rows.jsonl: no such file.")


def test_own_rows_are_found_from_the_folder_in_which_the_command_is_typed(script: Script, tmp_path: Path) -> None:
    """They are converted, and it is the training that has no model; `--epoch=1` is read as train.py reads it."""
    rows = [json.dumps({"conversations": [{"from": "human", "value": f"prompt {number}"},
                                          {"from": "gpt", "value": '{"score": 0.5}'}],
                        "metadata": {"task_id": f"task {number}", "evaluation_type": "clip", "model_name": "judge"}})
            for number in range(40)]  # fmt: skip
    (tmp_path / "my rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "mine.yaml").write_text(f"model_name_or_path: {tmp_path}/none\ndataset_dir: {tmp_path}/data\n")
    arguments = ("--input=my rows.jsonl", "--config", "mine.yaml", "--validate-only", "--epoch=1")
    script("run_training.sh", *arguments, cwd=tmp_path, code=2)
    assert "my rows.jsonl" in (tmp_path / "data" / "conversion_report.json").read_text()


@pytest.mark.slow
def test_values_with_spaces_survive_and_nothing_is_evaluated(script: Script, tmp_path: Path, root: Path) -> None:
    config = tmp_path / "my config $(touch pwned).yaml"
    refused = script("run_training.sh", "--no-convert", "-c", config, cwd=tmp_path, code=2)
    assert str(config) in refused.stderr
    named = "no such; touch pwned `touch pwned` $(touch pwned)"
    refused = script("run_training.sh", "--no-convert", "--validate-only", "-d", named, cwd=tmp_path, code=2)
    assert named in refused.stderr + refused.stdout
    assert not list(tmp_path.glob("pwned*")) and not list(root.glob("pwned*"))


def test_a_configuration_is_found_from_the_folder_in_which_the_command_is_typed(script: Script, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("learning_rtae: 1.0e-4\n")
    refused = script("run_training.sh", "--no-convert", "--validate-only", "-c", "mine.yaml", cwd=tmp_path, code=2)
    assert "learning_rate" in refused.stderr + refused.stdout, "the misspelt key of mine.yaml was not read"


def test_a_configuration_that_is_not_there_is_named(script: Script, tmp_path: Path) -> None:
    refused = script("run_training.sh", "--no-convert", "-c", "no folder/mine.yaml", cwd=tmp_path, code=2)
    assert f"{tmp_path}/no folder/mine.yaml: No such file" in refused.stderr


def test_without_the_packages_the_command_that_installs_them_is_named(root: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "empty")}
    for arguments in ([], ["--validate-only"], ["lora_rank=8"]):
        command = [root / "run_training.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (
            1,
            "",
            f"error: the packages that prmkit needs are not installed for {tmp_path}/empty/bin/python. "
            "Run ./run_training.sh --install-deps once.\n",
        )
    assert subprocess.run([root / "run_training.sh", "--help"], env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["setup_environment.sh", "run_tests.sh"])
def test_help_of_the_other_scripts(script: Script, name: str) -> None:
    assert script(name, "--help").stdout.startswith(f"Usage: ./{name}")
    assert script(name, "-h").stdout.startswith(f"Usage: ./{name}")


def test_setting_up_refuses_what_is_not_a_file(script: Script) -> None:
    assert "is not an option" in script("setup_environment.sh", "--hepl", code=2).stderr
    assert "no such file" in script("setup_environment.sh", "requirments.txt", code=2).stderr


def test_an_environment_of_an_older_python_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin" / "python"
    old.write_text("#!/bin/sh\nexit 1\n")  # what `sys.exit(sys.version_info < (3, 11))` gives there
    old.chmod(0o755)
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path)}
    done = subprocess.run([root / "run_training.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {old} is not Python 3.11 or newer.")


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
    assert "Dependencies are already installed" in done.stderr


PIP = """#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >&2
echo "Collecting torch==2.11.0"
echo "  Downloading torch-2.11.0-cp311.whl (530 MB)"
echo "Installing collected packages: torch"
exit {code}
"""


@pytest.mark.parametrize("code", [0, 1])
def test_installing_shows_its_progress_and_fails_in_one_sentence(root: Path, tmp_path: Path, code: int) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(PIP.format(code=code))
    python.chmod(0o755)
    done = subprocess.run(
        [root / "setup_environment.sh", "requirements-dev.txt"],
        cwd=root,
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert lines[1:3] == ["Downloading torch-2.11.0-cp311.whl (530 MB)", "Unpacking, a minute or two ..."]
    assert done.returncode == code
    assert (tmp_path / ".prmkit-requirements-dev.txt").exists() == (code == 0)
    assert ("error: pip could not install" in lines[-1]) == (code == 1)
