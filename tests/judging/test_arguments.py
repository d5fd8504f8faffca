"""Which judge the command line names."""

import argparse
from pathlib import Path

import pytest

from prmkit.errors import UsageError
from prmkit.files import write_json
from prmkit.judging.arguments import add_backend_arguments, add_judge_arguments, asking, judge_source
from prmkit.judging.sources import JudgeSource


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    add_backend_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a trained run and its export; the weights are left out."""
    monkeypatch.chdir(tmp_path)
    run, export = Path("saves/reward_model_training"), Path("exported_model")
    config = {"model_name_or_path": "model", "template": "llama3", "cutoff_len": 4096, "bf16": True}
    write_json(run / "run.json", {"config": config})
    write_json(run / "adapter_config.json", {})
    write_json(export / "config.json", {})
    settings = {
        "template": "llama3",
        "default_system": "",
        "enable_thinking": False,
        "cutoff_len": 512,
        "dtype": "float16",
    }
    write_json(export / "prmkit.json", settings)
    return tmp_path


TRAINED = JudgeSource(
    Path("model"), Path("saves/reward_model_training"), "llama3", cutoff_len=4096, trained_dtype="bfloat16"
)


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", TRAINED),
        ("--run saves/reward_model_training", TRAINED),
        (
            "--template qwen --cutoff-len 99 --dtype float32 --device cpu --no-enable-thinking",
            JudgeSource(
                Path("model"),
                Path("saves/reward_model_training"),
                "qwen",
                enable_thinking=False,
                cutoff_len=99,
                trained_dtype="bfloat16",
                dtype="float32",
                device="cpu",
            ),
        ),
        (
            "--model exported_model",
            JudgeSource(
                Path("exported_model"),
                template="llama3",
                default_system="",
                enable_thinking=False,
                cutoff_len=512,
                trained_dtype="float16",
            ),
        ),
        ("--model elsewhere --template qwen", JudgeSource(Path("elsewhere"), template="qwen")),
        (
            "--model elsewhere --adapter saves/reward_model_training",
            JudgeSource(
                Path("elsewhere"),
                Path("saves/reward_model_training"),
                "llama3",
                cutoff_len=4096,
                trained_dtype="bfloat16",
            ),
        ),
    ],
)
def test_the_judge_that_is_named(arguments: str, expected: JudgeSource) -> None:
    assert judge_source(parsed(*arguments.split())) == expected


@pytest.mark.usefixtures("project")
def test_a_judge_behind_http_is_told_from_one_that_is_loaded() -> None:
    _, loaded = asking(parsed("--model", "exported_model"))
    _, remote = asking(parsed("--backend", "openai", "--base-url", "http://x/v1", "--model", "exported_model"))
    assert loaded["model"] == remote["model"] == "exported_model"
    assert remote["base_url"] == "http://x/v1"
    with pytest.raises(UsageError, match="--base-url and --model"):
        asking(parsed("--backend", "openai", "--model", "exported_model"))
