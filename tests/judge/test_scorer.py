"""Which judge the command line names."""

import argparse
from pathlib import Path

import families
import pytest

from prmkit.errors import UsageError
from prmkit.files import write_json
from prmkit.http_client import Endpoint
from prmkit.judge.scorer import Scorer, add_backend_arguments, add_judge_arguments, judge_source, load_judge, scorer_of
from prmkit.judge.sources import JudgeSource
from prmkit.judge.transformers_judge import LocalJudge
from prmkit.judge.types import Request
from prmkit.scoring.score import abstention_of
from prmkit.verdict import asked_shape


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


def fingerprint(arguments: argparse.Namespace) -> dict:
    return scorer_of(arguments).fingerprint()


REMOTE = ("--backend", "openai", "--base-url", "http://x/v1", "--model", "exported_model")


@pytest.mark.usefixtures("project")
def test_a_challenger_is_loaded_here_next_to_a_judge_on_a_server() -> None:
    local = parsed(*REMOTE, "--device", "cpu")
    local.challenger = "exported_model"
    assert not scorer_of(local).is_local
    local.adapter = Path("saves/reward_model_training")
    with pytest.raises(UsageError, match="--adapter: only for a judge that is loaded here"):
        scorer_of(local)


@pytest.mark.usefixtures("project")
def test_a_judge_on_a_server_differs_from_one_that_is_loaded() -> None:
    loaded = fingerprint(parsed("--model", "exported_model"))
    remote = fingerprint(parsed(*REMOTE))
    assert remote["model"] == "exported_model"
    assert scorer_of(parsed("--model", "exported_model")).is_local and not scorer_of(parsed(*REMOTE)).is_local
    assert loaded != remote
    with pytest.raises(UsageError, match="require a local judge in --mode expected"):
        abstention_of(scorer_of(parsed(*REMOTE)), 0.9, None)
    with pytest.raises(UsageError, match="--base-url and --model"):
        scorer_of(parsed("--backend", "openai", "--model", "exported_model"))


@pytest.mark.usefixtures("project")
def test_the_address_of_a_server_is_enough() -> None:
    assert scorer_of(parsed(*REMOTE[2:])) == scorer_of(parsed(*REMOTE))
    assert scorer_of(parsed(*REMOTE[2:])).endpoint == Endpoint("http://x/v1", "exported_model")
    assert scorer_of(parsed("--backend", "transformers")).endpoint is None


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--run saves/reward_model_training --base-url http://x/v1", "--base-url needs --model"),
        ("--backend transformers --base-url http://x/v1 --model x", "--backend transformers loads the model here"),
        ("--backend openai", "--backend openai needs --base-url"),
        *((flag, f"{flag.split()[0]}: only for a judge on a server") for flag in (
            "--tokenizer exported_model", "--api-key-env OPENAI_API_KEY", "--concurrency 16", "--logprobs exact",
            "--top-logprobs 20", "--timeout 300",
        )),
        ("--backend transformers --timeout 9 --logprobs top", "--logprobs, --timeout: only for"),
        *((f"--base-url http://x/v1 --model x {flags}", f"^{given}: only for a judge that is loaded here")
          for flags, given in (
            ("--device cpu", "--device"), ("--dtype auto", "--dtype"), ("--adapter saves/x", "--adapter"),
            ("--tokenizer exported_model --device cuda:1 --dtype float16", "--device, --dtype"),
        )),
    ],
)  # fmt: skip
def test_no_flag_is_ignored_because_the_judge_is_elsewhere(arguments: str, message: str) -> None:
    """Not even with the value that is the default."""
    with pytest.raises(UsageError, match=message):
        scorer_of(parsed(*arguments.split()))


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "changed",
    [
        "--top-logprobs 5",
        "--min-label-mass 0.3",
        "--cutoff-len 99",
        "--default-system Hi",
        "--enable-thinking",
        "--template qwen",
        "--model x",
    ],
)
def test_what_changes_a_score_makes_another_judge_on_a_server(changed: str) -> None:
    before = fingerprint(parsed(*REMOTE, "--tokenizer", "exported_model"))
    after = fingerprint(parsed(*REMOTE, "--tokenizer", "exported_model", *changed.split()))
    assert before != after


@pytest.mark.usefixtures("project")
def test_another_tokenizer_is_another_judge_and_another_port_is_not() -> None:
    tokenizer = Path("exported_model/tokenizer.json")
    tokenizer.write_text("{}")
    before = fingerprint(parsed(*REMOTE))
    moved = fingerprint(parsed(*REMOTE, "--base-url", "http://y:9000/v1", "--concurrency", "3", "--timeout", "1.5"))
    assert moved == before
    tokenizer.write_text("{ }")
    after = fingerprint(parsed(*REMOTE))
    assert after != before


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://x/v1", "http://[::1/v1", "http://", "x", "http://a b/v1", "http://x:99999/v1"]
)
def test_an_address_of_no_server_is_rejected_before_anything_loads(url: str) -> None:
    with pytest.raises(UsageError, match="not the URL of a server"):
        scorer_of(parsed(*REMOTE, "--base-url", url))
    scorer_of(parsed(*REMOTE, "--base-url", "https://[::1]:8000/v1"))


@pytest.mark.usefixtures("project")
def test_a_key_that_cannot_be_one_is_rejected_and_never_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sec\nret", "secrét", "sec\x01ret"):
        monkeypatch.setenv("MY_KEY", key)
        with pytest.raises(UsageError, match=r"\$MY_KEY contains an invalid character") as caught:
            scorer_of(parsed(*REMOTE, "--api-key-env", "MY_KEY"))
        assert "sec" not in str(caught.value)
    monkeypatch.setenv("MY_KEY", "secret\r\n")
    scorer_of(parsed(*REMOTE, "--api-key-env", "MY_KEY"))


def test_times_are_above_zero() -> None:
    for text in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit):
            parsed("--timeout", text)


def test_shares_are_from_0_to_1() -> None:
    for text in ("-0.1", "1.1", "nan", "much"):
        with pytest.raises(SystemExit):
            parsed("--min-label-mass", text)


# --- from Python ------------------------------------------------------------------------------------------------------


def test_prompts_and_rows_are_scored_from_python(model_folders: dict[str, Path], judges: dict[str, LocalJudge]) -> None:
    """As `score_trajectories.py` scores them."""
    loaded = load_judge(model_folders["qwen"])
    text = families.prompts()[1]
    row = {"conversations": [{"from": "system", "value": "Be strict."}, {"from": "human", "value": text}]}
    plain, with_system, unknown, empty, named = loaded.score([text, row, "Rate it.", {"x": 1}, text])
    expected = list(judges["qwen"].score([Request(text, asked_shape(text), each) for each in (None, "Be strict.")]))
    # A base model that is loaded from a folder has no template of LLaMA Factory: its chat template is parsed.
    assert plain.score == pytest.approx(named.score)
    assert plain.score != pytest.approx(with_system.score, abs=1e-6)
    assert list(plain.scores) == list(expected[0].scores)
    assert "pass --keys, or keys in a request to a server" in unknown.reason and unknown.score is None
    assert (empty.status, "conversations" in empty.reason) == ("error", True)
    (one,) = loaded.score(["Rate it."], keys=["a_score"])
    assert list(one.scores) == ["a_score"]


def test_nothing_is_loaded_before_it_is_asked() -> None:
    assert list(Scorer(JudgeSource(Path("nowhere"))).judgements([])) == []
