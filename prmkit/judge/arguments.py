"""The command-line arguments that say which judge is asked, and how; the same in every script that asks one."""

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from prmkit.errors import UsageError
from prmkit.files import sha256_of
from prmkit.http_client import Endpoint, check_url
from prmkit.judge.sources import (
    EXPORT_FILE,
    JudgeSource,
    encoding_of,
    fingerprint_of,
    judge_source_of_export,
    judge_source_of_run,
)
from prmkit.judge.types import Judgement, Mode, Request, Score, lazily

DEFAULT_RUN = Path("saves/reward_model_training")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `judge_source` and `Judge.score` need to know."""
    group = parser.add_argument_group("the judge")
    group.add_argument("--run", type=Path, metavar="FOLDER", help=f"a trained run (default {DEFAULT_RUN})")
    group.add_argument("--model", metavar="FOLDER", help="an exported model, or a base model; instead of --run")
    group.add_argument("--adapter", type=Path, metavar="FOLDER", help="LoRA weights for --model")
    group.add_argument("--template", help="LLaMA Factory's template (default: the one of the training)")
    group.add_argument("--default-system", metavar="TEXT", help="system text (default: the one of the training)")
    group.add_argument("--enable-thinking", action=argparse.BooleanOptionalAction, help="for reasoning templates")
    group.add_argument("--cutoff-len", type=positive, metavar="TOKENS", help="prompt and answer together")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="auto: as trained on a GPU")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where there is one)")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run code that the model brings")
    asking = parser.add_argument_group("asking it")
    asking.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at once (default 8)")
    asking.add_argument(
        "--mode",
        choices=["expected", "generate"],
        default="expected",
        help="read the probability of every score (default), or let the model write its verdict",
    )
    asking.add_argument("--max-new-tokens", type=positive, default=1024, metavar="N", help="longest written verdict")
    asking.add_argument(
        "--too-long",
        choices=["trim", "report"],
        default="trim",
        help="shorten the middle of prompts that do not fit, as in training (default), or give them no score",
    )


def positive(text: str) -> int:
    """An argument that is a whole number above zero."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def seconds(text: str) -> float:
    """An argument that is a time above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def judge_source(arguments: argparse.Namespace) -> JudgeSource:
    """Where the judge comes from: the run or the model that was named, and on top whatever else was.

    Raises:
        DataError: nothing that could be a judge stands there.
        UsageError: the arguments contradict each other.
    """
    source = _named_source(arguments)
    given = {
        field.name: value
        for field in fields(source)
        if field.name not in ("model", "adapter") and (value := getattr(arguments, field.name, None)) is not None
    }
    return replace(source, **given)


def _named_source(arguments: argparse.Namespace) -> JudgeSource:
    if arguments.model is None:
        if arguments.adapter is not None:
            raise UsageError("--adapter needs --model, its base model. A whole run is named with --run alone.")
        return judge_source_of_run(arguments.run or DEFAULT_RUN)
    if arguments.run is not None:
        raise UsageError("--run and --model name two judges. Leave one of them out.")
    model = Path(arguments.model)
    if arguments.adapter is not None:
        return _source_of_adapter(model, arguments.adapter)
    if (model / EXPORT_FILE).is_file():
        return judge_source_of_export(model)
    return JudgeSource(model)


def _source_of_adapter(model: Path, adapter: Path) -> JudgeSource:
    """The settings of the run that made the adapter, where it still stands in its run's folder."""
    if any((folder / "run.json").is_file() for folder in (adapter, adapter.parent)):
        return replace(judge_source_of_run(adapter), model=model)
    return JudgeSource(model, adapter)


# --- backends ------------------------------------------------------------------------------------------------------


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what chooses between a model loaded here and one behind HTTP; `add_judge_arguments` comes first."""
    group = parser.add_argument_group("a judge behind HTTP")
    group.add_argument(
        "--backend",
        choices=["transformers", "openai"],
        default="transformers",
        help="load the model here (default), or ask an OpenAI-compatible completions endpoint (vLLM, SGLang)",
    )
    group.add_argument("--base-url", metavar="URL", help="as http://localhost:8000/v1; --model is its name there")
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="the model's folder here, for its tokenizer and template (default: --model if it is a folder, else --run)",
    )
    group.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    group.add_argument("--concurrency", type=positive, default=16, metavar="N", help="requests at once (default 16)")
    group.add_argument(
        "--top-logprobs", type=positive, default=20, metavar="N", help="likeliest tokens to ask for (default 20)"
    )
    group.add_argument(
        "--timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="longest wait for an answer, of which six are tried (default 300)",
    )


def asking(arguments: argparse.Namespace) -> tuple[Score, dict[str, Any]]:
    """The judge that was named, loaded when it is first asked, and what tells it from others.

    Raises:
        DataError: nothing that could be a judge stands there.
        UsageError: the arguments contradict each other.
    """
    settings = {
        "batch_size": arguments.batch_size,
        "trim": arguments.too_long == "trim",
        "max_new_tokens": arguments.max_new_tokens,
    }
    lasting = {key: value for key, value in settings.items() if key != "batch_size"}
    if arguments.backend == "openai":
        load, fingerprint = _over_http(arguments)
    else:
        source = judge_source(arguments)
        load, fingerprint = (lambda: _load_judge(source)), fingerprint_of(source)

    def loaded() -> Score:
        judge = load()

        def score(requests: Iterable[Request], mode: Mode) -> Iterator[Judgement]:
            judgements: Iterator[Judgement] = judge.score(requests, mode=mode, **settings)
            return judgements

        return score

    return lazily(loaded), fingerprint | lasting


def _load_judge(source: JudgeSource) -> Any:
    from prmkit.judge.transformers_judge import load_model

    return load_model(source)


def _over_http(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    if not arguments.base_url or not arguments.model:
        raise UsageError("--backend openai needs --base-url and --model, the model's name on the server.")
    check_url(arguments.base_url)
    folder = arguments.tokenizer or (Path(arguments.model) if Path(arguments.model).is_dir() else None)
    local = argparse.Namespace(**vars(arguments) | {"model": folder and str(folder)})
    source = judge_source(local)
    endpoint = Endpoint(
        arguments.base_url,
        arguments.model,
        api_key=_api_key(arguments.api_key_env),
        concurrency=arguments.concurrency,
        top_logprobs=arguments.top_logprobs,
        timeout=arguments.timeout,
    )

    def load() -> Any:
        from prmkit.judge.openai_judge import CompletionsJudge

        return CompletionsJudge(endpoint, encoding_of(source), source.cutoff_len)

    return load, _fingerprint_over_http(endpoint, source)


def _api_key(name: str) -> str | None:
    """The key in a variable, without the line break that `$(cat file)` or an .env file may have left in it.

    Raises:
        UsageError: it cannot be one, and a header with it could not be sent. It is not repeated: it may be most of one.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"${name}: holds a character that no API key has, such as a line break. Set it anew.")
    return key or None


_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "chat_template*")


def _fingerprint_over_http(endpoint: Endpoint, source: JudgeSource) -> dict[str, Any]:
    """What changes a score; not where the server is: started anew on another port, it gives the same ones."""
    files = {file for pattern in _TOKENIZER_FILES for file in source.model.glob(pattern) if file.is_file()}
    return {
        "model": endpoint.model,
        "top_logprobs": endpoint.top_logprobs,
        # A model of the hub lies in the hub's cache, under its name.
        "tokenizer": {file.name: sha256_of(file) for file in sorted(files)} or str(source.model),
        "template": source.template,
        "default_system": source.default_system,
        "enable_thinking": source.enable_thinking,
        "cutoff_len": source.cutoff_len,
    }
