"""A judge that is ready to score, for Python, the server and the scripts. `Scorer.backend` chooses the backend."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prmkit import cli
from prmkit.errors import UsageError
from prmkit.http_client import KEY_VARIABLE, Endpoint, check_url, key_from
from prmkit.judge.sources import (
    JudgeSource,
    encoding_fingerprint,
    encoding_of,
    fingerprint_of,
    is_run,
    judge_source_of_export,
    judge_source_of_run,
)
from prmkit.judge.types import DEFAULT_OPTIONS, Judgement, Mode, Request, ScoringOptions
from prmkit.paths import EXPORT_NOTE
from prmkit.registered import UseRegistered
from prmkit.verdict import Shape, asked_shape, is_score_key

if TYPE_CHECKING:
    from prmkit.judge.openai_judge import CompletionsJudge
    from prmkit.judge.transformers_judge import LocalJudge

_NAME_THEM = "pass --keys, or keys in a request to a server"
DEFAULT_RUN = Path("saves/reward_model_training")


@dataclass(frozen=True)
class ShapeOf:
    """Decides which score keys to ask for."""

    keys: tuple[str, ...] = ()
    """The keys that the user named; if empty, the prompt's schema decides, then the evaluation type."""
    known: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Evaluation type -> keys in converted data, which override those of `trained`."""
    trained: Mapping[str, Sequence[Shape]] | None = None
    """Evaluation type -> shapes of the judge's training labels, most frequent first."""

    def __call__(self, prompt: str, evaluation_type: str | None, system: str | None = None) -> Shape | str:
        """The shape, or why it is unknown."""
        asked = asked_shape(prompt, system)
        learned = (self.trained or {}).get(evaluation_type or "", ())
        if self.keys:
            return asked if asked and asked.keys == self.keys else self._as_learned(self.keys, learned)
        if asked:
            return asked
        if known := tuple(self.known.get(evaluation_type or "", ())):
            shape = self._as_learned(known, learned)
            return shape if shape.nested or len(known) == 1 or shape in learned else _ambiguous(known)
        if not learned:
            return f"the prompt shows no score keys, and none are known for its evaluation type; {_NAME_THEM}"
        if any(set(shape.keys) - set(learned[0].keys) for shape in learned):
            return _ambiguous(dict.fromkeys(", ".join(shape.keys) for shape in learned))
        return learned[0]

    def _as_learned(self, keys: tuple[str, ...], learned: Sequence[Shape]) -> Shape:
        """Return the shape of training labels with these keys, preferring those of the same evaluation type.

        Without such labels, a single score is at the top level (`reasonableness_score`), and several are in a `scores`
        object, as judges write them.
        """
        shapes = [*learned, *chain.from_iterable((self.trained or {}).values())]
        places = (shape.nested for shape in shapes if set(shape.keys) == set(keys))
        return Shape(keys, next(places, not all(map(is_score_key, keys))))


def _ambiguous(keys: Iterable[str]) -> str:
    return f"the prompt shows no score keys, and several are possible ({' or '.join(keys)}); {_NAME_THEM}"


@dataclass(frozen=True)
class Scorer:
    """A judge with its settings, loaded on first use."""

    source: JudgeSource
    """The model; for a model on a server, its tokenizer and template."""
    endpoint: Endpoint | None = None
    """The server that runs the model; None if it runs here."""
    options: ScoringOptions = DEFAULT_OPTIONS

    @property
    def is_local(self) -> bool:
        """Whether the model is loaded here; only then are its training run, held-out scores and calibration known."""
        return self.endpoint is None

    @cached_property
    def backend(self) -> "LocalJudge | CompletionsJudge":
        """The loaded judge; both kinds have the same `score`.

        Raises:
            DataError: nothing can be loaded.
            UsageError: an unknown template, device or dtype.
        """
        if self.endpoint:
            from prmkit.judge.openai_judge import CompletionsJudge

            return CompletionsJudge(self.endpoint, encoding_of(self.source), self.source.cutoff_len)
        from prmkit.judge.transformers_judge import load_model

        return load_model(self.source)

    def judgements(self, requests: Iterable[Request], mode: Mode | None = None) -> Iterator[Judgement]:
        """Judge a stream of requests in order; see `transformers_judge.LocalJudge.score`.

        The judge is not loaded if there is no request.

        Args:
            requests: read as needed.
            mode: overrides the mode of `options`.
        """
        requests = iter(requests)
        first = next(requests, None)
        if first is not None:
            options = replace(self.options, mode=mode) if mode else self.options
            yield from self.backend.score(chain([first], requests), options)

    def score(self, prompts: Iterable[str | Mapping[str, Any]], keys: Sequence[str] | None = None) -> list[Judgement]:
        """Score prompts.

        Args:
            prompts: strings, or rows as `score_trajectories.py` reads them: with a prompt or a conversation, and
                optionally a system prompt and metadata.
            keys: the scores to give; None for those in each prompt's schema.

        Returns:
            One judgement per prompt, in order: `score` and `std` of the verdict, `scores` by key, `status` and
            `reason`. A prompt that cannot be judged has the status `error`.

        Raises:
            UsageError: `prompts` is a single string, each character of which would be read as a prompt.
        """
        if isinstance(prompts, str | Mapping):
            raise UsageError("prompts: expected a list of prompts, not a single one.")
        shape_of = ShapeOf(tuple(keys or ()), trained=self.source.shapes)
        requests = [_request(prompt, shape_of) for prompt in prompts]
        judgements = self.judgements(each for each in requests if isinstance(each, Request))
        return [next(judgements) if isinstance(each, Request) else Judgement("error", reason=each) for each in requests]

    def fingerprint(self) -> dict[str, Any]:
        """Return what makes scores comparable: contents and settings, not locations.

        A server restarted on another port, or a copied folder, gives the same scores.

        Raises:
            DataError: there is no such judge.
        """
        settings = {
            "trim": self.options.trim,
            "max_new_tokens": self.options.max_new_tokens,
            "min_label_mass": self.options.min_label_mass,
        }
        if self.endpoint:
            served = {"model": self.endpoint.model, "top_logprobs": self.endpoint.top_logprobs}
            return encoding_fingerprint(self.source) | served | settings
        return fingerprint_of(self.source) | settings


def _request(prompt: str | Mapping[str, Any], shape_of: ShapeOf) -> Request | str:
    """The request to the judge, or why a prompt cannot be judged."""
    from prmkit.layouts import Rejected
    from prmkit.rows import read_row

    try:
        row = read_row({"prompt": prompt} if isinstance(prompt, str) else dict(prompt))
    except Rejected as rejected:
        return rejected.reason
    shape = shape_of(row.prompt, row.evaluation_type, row.system)
    return shape if isinstance(shape, str) else Request(row.prompt, shape, row.system)


# --- from Python ------------------------------------------------------------------------------------------------------


def load_judge(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    batch_size: int = DEFAULT_OPTIONS.batch_size,
    min_label_mass: float = DEFAULT_OPTIONS.min_label_mass,
) -> Scorer:
    """Load a judge, ready to score.

    Args:
        folder: a training run, a checkpoint in it, an exported model, or a base model.
        device: `cpu`, `cuda`, `cuda:1`, …; `auto` uses a GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`; `auto` is float32 on a CPU, otherwise the dtype of the training.
        trust_remote_code: run Python code that comes with the model.
        batch_size: the maximum number of prompts to run at once.
        min_label_mass: scores with less label mass are `unsure`.

    Raises:
        DataError: the folder has nothing that can be loaded.
        UsageError: an unknown device or dtype, or a model with its own code, which was not allowed to run.
    """
    source = judge_source_in(Path(folder))
    source = replace(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    scorer = Scorer(source, options=ScoringOptions(batch_size=batch_size, min_label_mass=min_label_mass))
    _ = scorer.backend
    return scorer


def judge_source_in(folder: Path) -> JudgeSource:
    """Return the source of the judge in a training run's folder, an export or a model folder.

    Raises:
        DataError, UsageError: as `judge_source_of_run` and `judge_source_of_export`.
    """
    if is_run(folder):
        return judge_source_of_run(folder)
    return judge_source_of_export(folder) if (folder / EXPORT_NOTE).is_file() else JudgeSource(folder)


# --- from the command line --------------------------------------------------------------------------------------------


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `judge_source` and `scorer_of` read, except those for a server."""
    group = parser.add_argument_group("the judge")
    group.add_argument("--run", type=Path, metavar="FOLDER", help=f"a training run (default: {DEFAULT_RUN})")
    group.add_argument(
        "--judge",
        dest="run",
        action=UseRegistered,
        default=argparse.SUPPRESS,
        metavar="VERSION",
        help="a registered version: production, NAME@NUMBER (manage_judges.py); instead of --run",
    )
    group.add_argument("--model", metavar="FOLDER", help="an exported model, or a base model; instead of --run")
    group.add_argument("--adapter", type=Path, metavar="FOLDER", help="LoRA weights for --model")
    group.add_argument("--template", metavar="NAME", help="LLaMA Factory's template (default: as in training)")
    group.add_argument("--default-system", metavar="TEXT", help="system prompt (default: as in training)")
    thinking = "thinking mode of a reasoning template (default: as in training)"
    group.add_argument("--enable-thinking", action=argparse.BooleanOptionalAction, help=thinking)
    longest = "maximum number of tokens of prompt plus answer (default: as in training)"
    group.add_argument("--cutoff-len", type=cli.positive, metavar="TOKENS", help=longest)
    precision = "auto (default): as in training on a GPU, float32 on a CPU"
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help=precision)
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    group.add_argument("--trust-remote-code", action="store_true", default=None, help="run the model's own code")
    _add_asking_arguments(parser)


def _add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument_group("inference").add_argument, DEFAULT_OPTIONS
    at_once = "batch size (default: %(default)s)"
    add("--batch-size", type=cli.positive, default=default.batch_size, metavar="N", help=at_once)
    how = "read the probability of every score (default), or generate the verdict"
    add("--mode", choices=["expected", "generate"], default=default.mode, help=how)
    longest = "maximum number of tokens of a generated verdict (default: %(default)s)"
    add("--max-new-tokens", type=cli.positive, default=default.max_new_tokens, metavar="N", help=longest)
    mass = "mark a score unsure if the total probability of all 101 scores is below this (default: %(default)s)"
    add("--min-label-mass", type=cli.share, default=default.min_label_mass, metavar="P", help=mass)
    cut = "cut the middle of prompts that do not fit, as in training (default), or give them no score"
    add("--too-long", choices=["trim", "report"], default="trim", help=cut)


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose between a local model and one on a server; call `add_judge_arguments` first."""
    add = parser.add_argument_group("remote judge").add_argument
    add(
        "--base-url",
        nargs="+",
        metavar="URL",
        help="an OpenAI-compatible completions endpoint (vLLM, SGLang, llama-server), for example "
        "http://localhost:8000/v1; --model is the model's name there. With several, each request goes to the server "
        "with the fewest requests in flight; servers that fail are skipped",
    )
    add(
        "--backend",
        choices=["transformers", "openai"],
        help="openai: use a server (default with --base-url); transformers: load the model here (default otherwise)",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="local folder with tokenizer and template (default: --model if it is a folder, otherwise --run)",
    )
    # No defaults here, so that a flag without a server can be reported as a mistake.
    add("--api-key-env", metavar="NAME", help=f"environment variable with the server's key (default: {KEY_VARIABLE})")
    at_once = f"maximum concurrent requests (default: {Endpoint.concurrency})"
    add("--concurrency", type=cli.positive, metavar="N", help=at_once)
    add(
        "--logprobs",
        choices=["exact", "top"],
        help="exact (default): request each needed token by name, if the server can do so (vLLM, SGLang); this "
        "disturbs other clients that request logprobs from the same vLLM. top: request only the top logprobs",
    )
    top = f"number of top logprobs to request (default: {Endpoint.top_logprobs})"
    add("--top-logprobs", type=cli.positive, metavar="N", help=top)
    longest = f"longest wait for an answer, in each of {Endpoint.attempts} attempts (default: {Endpoint.timeout:g})"
    add("--timeout", type=cli.seconds, metavar="SECONDS", help=longest)


def scorer_of(arguments: argparse.Namespace) -> Scorer:
    """Return the judge on the command line, with its settings; nothing is loaded yet.

    Raises:
        DataError: there is no such judge.
        UsageError: the arguments contradict each other.
    """
    endpoint = _endpoint(arguments)
    if endpoint:
        folder = arguments.tokenizer or (Path(arguments.model) if Path(arguments.model).is_dir() else None)
        arguments = argparse.Namespace(**vars(arguments) | {"model": folder and str(folder)})
    return Scorer(judge_source(arguments), endpoint, scoring_options_of(arguments))


def scoring_options_of(arguments: argparse.Namespace) -> ScoringOptions:
    """Return the inference settings from the flags of `add_judge_arguments`."""
    return ScoringOptions(
        mode=arguments.mode,
        batch_size=arguments.batch_size,
        trim=arguments.too_long == "trim",
        max_new_tokens=arguments.max_new_tokens,
        min_label_mass=arguments.min_label_mass,
    )


def judge_source(arguments: argparse.Namespace) -> JudgeSource:
    """Return the judge's source: the training run or model on the command line, modified by all other flags.

    Raises:
        DataError: there is no such judge.
        UsageError: the arguments contradict each other.
    """
    source = _named_source(arguments)
    given = {
        each.name: value
        for each in fields(source)
        if each.name not in ("model", "adapter") and (value := getattr(arguments, each.name, None)) is not None
    }
    return replace(source, **given)


def _named_source(arguments: argparse.Namespace) -> JudgeSource:
    if arguments.model is None:
        if arguments.adapter is not None:
            raise UsageError("--adapter needs --model, its base model. For a complete training run, pass only --run.")
        return judge_source_of_run(arguments.run or DEFAULT_RUN)
    if arguments.run is not None:
        raise UsageError("--run and --model are mutually exclusive. Use only one.")
    model = Path(arguments.model)
    if arguments.adapter is None:
        return judge_source_of_export(model) if (model / EXPORT_NOTE).is_file() else JudgeSource(model)
    # An adapter in a training run's folder is used with that run's settings.
    if is_run(arguments.adapter):
        return replace(judge_source_of_run(arguments.adapter), model=model)
    return JudgeSource(model, arguments.adapter)


_SERVER_SETTINGS = ("concurrency", "logprobs", "top_logprobs", "timeout")


def _endpoint(arguments: argparse.Namespace) -> Endpoint | None:
    """Return the server of --base-url; None if that was not passed."""
    if arguments.base_url is None:
        _check_no_server(arguments)
        return None
    if arguments.backend == "transformers":
        raise UsageError("--backend transformers loads the model here, but --base-url is a server. Use only one.")
    if not arguments.model:
        raise UsageError("--base-url needs --model, the model's name on the server.")
    # A challenger is always loaded here, on the same device.
    loading = ("adapter", *(() if getattr(arguments, "challenger", None) else ("device", "dtype")))
    if given := _given(arguments, loading):
        raise UsageError(f"{given}: only for a judge that is loaded here, but --base-url is a server. Remove one.")
    for url in arguments.base_url:
        check_url(url)
    first, *others = arguments.base_url
    settings = {name: value for name in _SERVER_SETTINGS if (value := getattr(arguments, name)) is not None}
    return Endpoint(first, arguments.model, key_from(arguments.api_key_env), others=tuple(others), **settings)


def _check_no_server(arguments: argparse.Namespace) -> None:
    if arguments.backend == "openai":
        raise UsageError("--backend openai needs --base-url and --model, the model's name on the server.")
    if given := _given(arguments, ("tokenizer", "api_key_env", *_SERVER_SETTINGS)):
        raise UsageError(f"{given}: only for a judge on a server. Pass its address with --base-url.")


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None)
