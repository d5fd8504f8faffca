"""Which judge the command line names."""

import argparse
from pathlib import Path

import pytest

from prmkit.errors import UsageError
from prmkit.files import write_json
from prmkit.judge.arguments import add_backend_arguments, add_judge_arguments, asking, judge_source
from prmkit.judge.sources import JudgeSource


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


REMOTE = ("--backend", "openai", "--base-url", "http://x/v1", "--model", "exported_model")


@pytest.mark.usefixtures("project")
def test_a_judge_behind_http_is_told_from_one_that_is_loaded() -> None:
    _, loaded = asking(parsed("--model", "exported_model"))
    _, remote = asking(parsed(*REMOTE))
    assert remote["model"] == "exported_model"
    assert loaded != remote
    with pytest.raises(UsageError, match="--base-url and --model"):
        asking(parsed("--backend", "openai", "--model", "exported_model"))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "changed",
    ["--top-logprobs 5", "--cutoff-len 99", "--default-system Hi", "--enable-thinking", "--template qwen", "--model x"],
)
def test_what_changes_a_score_tells_judges_behind_http_apart(changed: str) -> None:
    _, before = asking(parsed(*REMOTE, "--tokenizer", "exported_model"))
    _, after = asking(parsed(*REMOTE, "--tokenizer", "exported_model", *changed.split()))
    assert before != after


@pytest.mark.usefixtures("project")
def test_another_tokenizer_is_another_judge_and_another_port_is_not() -> None:
    tokenizer = Path("exported_model/tokenizer.json")
    tokenizer.write_text("{}")
    _, before = asking(parsed(*REMOTE))
    _, moved = asking(parsed(*REMOTE, "--base-url", "http://y:9000/v1", "--concurrency", "3", "--timeout", "1.5"))
    assert moved == before
    tokenizer.write_text("{ }")
    _, after = asking(parsed(*REMOTE))
    assert after != before


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x/v1", "http://[::1/v1", "http://", "x", "http://a b/v1", "http://x:99999/v1"]
)
def test_an_address_of_no_server_is_refused_before_anything_loads(url: str) -> None:
    with pytest.raises(UsageError, match="not the address of a server"):
        asking(parsed(*REMOTE, "--base-url", url))
    asking(parsed(*REMOTE, "--base-url", "https://[::1]:8000/v1"))


@pytest.mark.usefixtures("project")
def test_a_key_that_cannot_be_one_is_refused_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sec\nret", "secrét", "sec\x01ret"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(UsageError, match=r"\$MY_KEY: holds a character") as caught:
            asking(parsed(*REMOTE, "--api-key-env", "MY_KEY"))
        assert "sec" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "secret\r\n")
    asking(parsed(*REMOTE, "--api-key-env", "MY_KEY"))


def test_times_are_above_zero() -> None:
    for text in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            parsed("--timeout", text)
