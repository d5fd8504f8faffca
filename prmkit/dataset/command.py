"""The command `convert_dataset.py`: its flags, the settings made from them, and then a conversion or a leak audit."""

import argparse
import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unicodedata import normalize

from prmkit import cli
from prmkit.dataset.settings import CUSTOM, PREFIX, Filters, LengthSettings, Settings, Split, read_tasks
from prmkit.errors import DataError, ExitCode, UsageError
from prmkit.files import read_json
from prmkit.llamafactory_schema import read_yaml, setting, split_assignment, value_of
from prmkit.paths import HELD_OUT_SUFFIX, REPORT
from prmkit.verdict import Scale
from prmkit.verdict.read import WORD

log = logging.getLogger(__name__)

# --- flags ---------------------------------------------------------------------------------------------------------

_EPILOG = f"""\
Without filters: reward_model_full and one variant per evaluation type, judge
and task, each with its held-out split NAME_eval, listed in dataset_info.json;
conversion_report.json, rejected.jsonl.
With filters: one variant ({CUSTOM}, or --name), added to those in
the folder; its report is NAME.report.json, its rejected rows are in
NAME.rejected.jsonl, and it holds out the same tasks as the conversion already
in the folder.
"""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of convert_dataset.py."""
    parser = argparse.ArgumentParser(
        description=description, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    inputs = "row files (.jsonl, .ndjson, .json; also compressed: .gz, .bz2, .zst), files of labelled runs "
    inputs += "(import_trajectories.py), folders of either, or - for stdin (default: finetune.jsonl)"
    add("--input", nargs="+", default=["finetune.jsonl"], metavar="PATH", help=inputs)
    add("--rubric", type=Path, metavar="FILE", help="the rubric for labelled runs (default: prmkit's own)")
    folder = "output folder (default: dataset_dir of --config, or data)"
    add("--output-dir", type=Path, metavar="FOLDER", help=folder)
    form = "format of the training files (default: %(default)s)"
    add("--format", choices=["alpaca", "sharegpt"], default=Settings.form, help=form)
    labels = "canonical: verdicts as uniform JSON; verbatim: the judges' own text (default: %(default)s)"
    add("--labels", choices=["canonical", "verbatim"], default=Settings.labels, help=labels)
    masked = "mask the scores of earlier evaluations in prompts, such as (Score: 0.93)"
    add("--mask-leaked-scores", action="store_true", help=masked)
    most = "fail if more than N rows are rejected; N may be a percentage such as 5%% (default: 50%%)"
    add("--max-rejected", metavar="N", help=most)
    add("--no-task-variants", dest="task_variants", action="store_false", help="write no per-task variants")
    add("--json", action="store_true", help="print the report instead of the summary")
    add("--no-next", action="store_true", help=argparse.SUPPRESS)  # run_training.sh does the next step itself
    audit = "check the datasets in FOLDER, from any tool, for leaks; convert nothing"
    add("--audit", type=Path, metavar="FOLDER", help=audit)

    filters = parser.add_argument_group("filters (combined with AND)").add_argument
    filters("--evaluation-types", nargs="+", metavar="TYPE", help="types, such as clip, category, final")
    filters("--model-names", nargs="+", metavar="JUDGE", help="judges, such as deepseek-chat")
    filters("--task-ids", nargs="+", metavar="TASK", help="tasks, by task_id")
    filters("--name", metavar="NAME", help=f"name of the variant (default: {CUSTOM})")

    split = parser.add_argument_group("held-out tasks").add_argument
    ratio = f"fraction of tasks to hold out; 0 holds out none (default: {Split.ratio})"
    split("--eval-ratio", type=float, metavar="X", help=ratio)
    seed = f"another seed holds out different tasks (default: {Split.seed})"
    split("--split-seed", type=int, metavar="N", help=seed)
    split("--eval-tasks", type=Path, metavar="FILE", help="your list of held-out tasks, one per line")
    near = "what to do with training prompts that nearly repeat a held-out one; they are always counted "
    near += "(default: %(default)s)"
    split("--near-duplicates", choices=["keep", "drop"], default=Settings.near_duplicates, help=near)

    _add_judges_and_lengths(parser)
    return parser


def _add_judges_and_lengths(parser: argparse.ArgumentParser) -> None:
    judges = parser.add_argument_group("judges").add_argument
    scale = "score range, for all judges (1 5) or per judge (JUDGE=1:10 …); repeatable; 0 1 if not given"
    judges("--scale", nargs="+", action="append", default=[], metavar="RANGE", help=scale)
    words = "scores from 0 to 1 for verbal answers: pass=1 fail=0"
    judges("--map", nargs="+", default=[], metavar="WORD=SCORE", help=words)
    consensus = "also write reward_model_consensus: one row per prompt, with the mean or median of the judges' scores "
    consensus += "(default: %(default)s)"
    judges("--aggregate", choices=["none", "mean", "median"], default=Settings.aggregate, help=consensus)
    judges("--no-leniency-correction", dest="leniency_correction", action="store_false",
           help="with --aggregate: do not correct for the leniency of each judge")  # fmt: skip
    limit = "reject prompts on which the scores of judges differ by more than X (0 to 1)"
    judges("--max-disagreement", type=float, metavar="X", help=limit)

    lengths = parser.add_argument_group("length check").add_argument
    lengths("--config", type=Path, metavar="FILE", help="training config, whose values are the defaults of this group")
    lengths("assignments", nargs="*", metavar="key=value", help="overrides --config: cutoff_len=8192")
    lengths("--tokenizer", type=Path, metavar="FOLDER", help="folder of the model whose tokenizer measures the rows")
    lengths("--template", metavar="NAME", help="LLaMA Factory's template, such as qwen")
    lengths("--cutoff-len", type=int, metavar="TOKENS", help="maximum tokens of prompt plus label")
    cut = "rows over the limit: trim the middle of the prompt, drop the row, stop with an error, or keep it "
    cut += "(default: %(default)s)"
    lengths("--too-long", choices=["trim", "drop", "error", "keep"], default=LengthSettings.too_long, help=cut)


# --- work ----------------------------------------------------------------------------------------------------------


def arguments_of(options: Mapping[str, Any]) -> argparse.Namespace:
    """Return the arguments of a command line with some flags set, for callers from Python.

    Raises:
        UsageError: there is no such flag.
    """
    arguments = make_parser(None).parse_args([])
    if unknown := sorted(options.keys() - vars(arguments).keys()):
        raise UsageError(f"convert has no option {unknown[0]}. Options: {', '.join(sorted(vars(arguments)))}.")
    return argparse.Namespace(**{**vars(arguments), **options})


def execute(arguments: argparse.Namespace) -> ExitCode:
    """Convert, or audit an earlier conversion.

    Raises:
        UsageError: arguments contradict each other.
        DataError: see `convert` and `audit`.
    """
    if arguments.audit is not None:
        if arguments != arguments_of({"audit": arguments.audit, "json": arguments.json}):
            raise UsageError("--audit converts nothing and takes no option other than --json. Remove the others.")
        return _audit(arguments.audit, as_json=arguments.json)
    from prmkit.dataset.conversion import convert
    from prmkit.dataset.report import show_summary

    report = convert(settings_of(arguments))
    if arguments.json:
        cli.emit_json(report)
    else:
        show_summary(report)
        if not arguments.no_next:
            cli.emit(_next_step(arguments, next(iter(report["variants"])), Path(report["settings"]["output"])))
    return ExitCode.DONE


def _next_step(arguments: argparse.Namespace, name: str, folder: Path) -> str:
    """Return the train.py command for this data, with the settings with which the lengths were measured."""
    overrides: dict[str, Any] = dict(map(split_assignment, arguments.assignments))
    flags = {"model_name_or_path": "tokenizer", "template": "template", "cutoff_len": "cutoff_len"}
    overrides |= {key: value for key, flag in flags.items() if (value := getattr(arguments, flag)) is not None}
    if folder != Path(str(_config(arguments).get("dataset_dir") or "data")):
        overrides["dataset_dir"] = folder
    words = ["--config", str(arguments.config or "training_config.yaml"), "--dataset", name]
    return f"next: python train.py {shlex.join([*words, *(f'{key}={value}' for key, value in overrides.items())])}"


def _audit(folder: Path, *, as_json: bool) -> ExitCode:
    from prmkit.dataset.leaks import audit_folder, describe_leaks

    result = audit_folder(folder)
    near = result["near_duplicates"]
    if as_json:
        cli.emit_json(result)
    if result["passed"] is False:
        raise DataError(f"{folder}: {describe_leaks(result)}")
    if not as_json:
        repeated = (
            f"{near['prompts']:,} training prompts nearly repeat a held-out one" if near["prompts"] else "no leak"
        )
        cli.emit(
            f"{folder}: {repeated}. {result['held_out_rows']:,} rows and {result['held_out_tasks']:,} tasks in "
            f"{result['held_out_datasets']:,} held-out datasets, {result['training_datasets']:,} training datasets."
        )
        for example in near["examples"]:
            cli.emit(f"  {example['training']} shares {example['share']:.0%} of its words with {example['held_out']}")
    if result["passed"] is None:
        log.error(
            "error: %s: no row has a task_id, so one task may be in both splits; only prompts were compared. "
            "Convert rows with metadata.task_id.", folder,
        )  # fmt: skip
        return ExitCode.GATE
    return ExitCode.DONE


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Turn parsed arguments into settings.

    Raises:
        UsageError: the arguments contradict each other, or a value is invalid.
        DataError: a file among them cannot be read.
    """
    output = arguments.output_dir or Path(str(_config(arguments).get("dataset_dir") or "data"))
    filters = Filters(_values(arguments.evaluation_types), _values(arguments.model_names), _values(arguments.task_ids))
    _check(arguments, filters)
    return Settings(
        inputs=tuple(arguments.input),
        output=output,
        filters=filters,
        name=arguments.name or Settings.name,
        form=arguments.format,
        labels=arguments.labels,
        split=_split(arguments, filters, output),
        scales=_scales(arguments),
        aggregate=arguments.aggregate,
        leniency_correction=arguments.leniency_correction,
        max_disagreement=arguments.max_disagreement,
        near_duplicates=arguments.near_duplicates,
        mask_leaked_scores=arguments.mask_leaked_scores,
        max_rejected=arguments.max_rejected,
        task_variants=arguments.task_variants,
        lengths=_lengths(arguments),
        rubric=arguments.rubric,
    )


def _scales(arguments: argparse.Namespace) -> dict[str | None, Scale]:
    """Return judge -> scale; the judge None means every other judge."""
    words: dict[str, float] = {}
    for word, score in map(_word, arguments.map):
        if words.setdefault(word, score) != score:
            raise UsageError(f"--map: {word} has two scores. Pass one; upper and lower case are the same.")
    ranges: dict[str | None, tuple[float, float]] = {}
    for given in arguments.scale:
        if len(given) == 2 and not any("=" in text for text in given):
            pairs = [(None, ":".join(given))]
        else:
            pairs = [(judge or None, span) for judge, _, span in (text.rpartition("=") for text in given)]
        for judge, span in pairs:
            if judge in ranges:
                raise UsageError(f"--scale: two ranges for {judge or 'all judges'}. Pass one.")
            ranges[judge] = _range(span, shlex.join(given))
    if words:
        ranges.setdefault(None, (0.0, 1.0))
    return {judge: Scale(low, high, words) for judge, (low, high) in ranges.items()}


def _range(span: str, given: str) -> tuple[float, float]:
    low, colon, high = span.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = (0.0, 0.0)
    if not colon or not float("-inf") < ends[0] < ends[1] < float("inf"):
        raise UsageError(f"--scale {given}: expected the worst and the best value, as in --scale 1 5 or JUDGE=1:10.")
    return ends


def _word(text: str) -> tuple[str, float]:
    word, _, score = normalize("NFC", text).rpartition("=")
    try:
        value = float(score)
    except ValueError:
        value = -1.0
    if not word or not 0 <= value <= 1:
        raise UsageError(f"--map {text}: expected a word and its score from 0 to 1, as in --map pass=1 fail=0.")
    if not WORD.fullmatch(word):
        raise UsageError(f"--map {text}: only one to three words of letters can be mapped. For numbers use --scale.")
    return word.lower(), value


def _values(values: list[str] | None) -> frozenset[str] | None:
    from prmkit.rows import as_name

    return None if values is None else frozenset(map(as_name, values))


def _check(arguments: argparse.Namespace, filters: Filters) -> None:
    """Report all invalid or contradictory arguments together.

    Raises:
        UsageError: with one line per problem.
    """
    if problems := list(_problems(arguments, filters)):
        raise UsageError("\n  ".join(problems))


def _problems(given: argparse.Namespace, filters: Filters) -> Iterator[str]:
    if given.eval_ratio is not None and not 0 <= given.eval_ratio < 1:
        yield "--eval-ratio must be a fraction of the tasks, at least 0 and below 1"
    if given.eval_tasks is not None and (given.eval_ratio is not None or given.split_seed is not None):
        yield "--eval-tasks replaces --eval-ratio and --split-seed; remove these"
    if given.max_disagreement is not None and not 0 <= given.max_disagreement <= 1:
        yield "--max-disagreement must be a difference of scores, 0 to 1"
    if given.max_rejected is not None and not re.fullmatch(r"\d+|\d+(\.\d+)?%", given.max_rejected):
        yield "--max-rejected must be a percentage such as 5%, or a number of rows"
    if given.labels == "verbatim" and (given.scale or given.map):
        yield "--labels verbatim keeps the judges' own numbers and words; remove --scale and --map"
    yield from _problems_of_name(given.name, filters)
    if given.assignments and given.config is None:
        yield "key=value overrides --config; pass --config as well"
    if given.tokenizer is not None and given.cutoff_len is None and given.config is None:
        yield "--tokenizer needs --cutoff-len, or a --config with cutoff_len"
    sets_length = given.cutoff_len is not None or given.template is not None
    if sets_length and given.tokenizer is None and given.config is None:
        yield "--cutoff-len and --template need --tokenizer, or a --config with model_name_or_path"
    if given.too_long != LengthSettings.too_long and given.tokenizer is None and given.config is None:
        yield "--too-long needs --tokenizer and --cutoff-len, or a --config: without them, no lengths are measured"
    if given.cutoff_len is not None and given.cutoff_len < 1:
        yield "--cutoff-len must be a number above 0"


def _problems_of_name(name: str | None, filters: Filters) -> Iterator[str]:
    if name is None:
        return
    if name and not filters:
        yield "--name requires a filter: --evaluation-types, --model-names or --task-ids"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,100}", name, re.ASCII) or name.endswith(HELD_OUT_SUFFIX):
        yield f"--name may have letters, digits, '_', '-' and '.', and must not end in {HELD_OUT_SUFFIX}"
    if (name.startswith(PREFIX) and name != CUSTOM) or name == "rejected":
        yield f"--name {name} may clash with a file of the main conversion; choose another name"
    if name.endswith((".meta", ".rejected", "_consensus")):
        yield f"--name {name} may clash with a file of another variant; choose another name"


def _split(arguments: argparse.Namespace, filters: Filters, output: Path) -> Split:
    if arguments.eval_tasks is not None:
        return Split(tasks=read_tasks(arguments.eval_tasks))
    given = {
        key: value
        for key, value in (("ratio", arguments.eval_ratio), ("seed", arguments.split_seed))
        if value is not None
    }
    if filters and not given and (earlier := _earlier_split(output / REPORT)):
        return earlier
    return Split(**given)


def _earlier_split(report: Path) -> Split | None:
    """Read the split of the folder's main conversion: a filtered variant holds out the same tasks."""
    if not report.exists():
        return None
    try:
        settings = read_json(report)["settings"]["split"]
        tasks = settings["tasks"]
        tasks = None if tasks is None else frozenset(tasks)
        return Split(float(settings["ratio"]), int(settings["seed"]), tasks, from_report=True)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{report}: damaged ({error!r}). Run the conversion without filters first.") from error


def _lengths(arguments: argparse.Namespace) -> LengthSettings | None:
    """Return the settings of the length check: from the flags, otherwise from the configuration."""
    config = _config(arguments)
    folder = arguments.tokenizer or config.get("model_name_or_path")
    if not folder:
        return None
    folder = Path(folder)
    if not _holds_a_model(folder):
        if arguments.tokenizer is not None:
            raise DataError(f"{folder} has no tokenizer. --tokenizer must be the folder of a downloaded model.")
        log.warning(
            "warning: no model in %s, so lengths are not checked, and LLaMA Factory will silently cut long prompts. "
            "Convert again once the model is in place.",
            folder,
        )
        return None
    cutoff_len = arguments.cutoff_len if arguments.cutoff_len is not None else setting(config, "cutoff_len")
    if type(cutoff_len) is not int or cutoff_len < 1:
        raise UsageError(f"{arguments.config}: cutoff_len is {cutoff_len!r}, expected a number of tokens.")
    return LengthSettings(
        tokenizer=folder,
        template=arguments.template or config.get("template"),
        cutoff_len=cutoff_len,
        too_long=arguments.too_long,
        packing=bool(config.get("packing") or config.get("neat_packing")),
        default_system=config.get("default_system"),
        enable_thinking=setting(config, "enable_thinking"),
        trust_remote_code=bool(config.get("trust_remote_code", False)),
    )


_STRINGS = ("model_name_or_path", "template", "default_system", "dataset_dir")
"""Keys that are always strings, because YAML would parse some of their values as numbers."""


def _config(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read --config, overridden by key=value; keys that only train.py needs are ignored.

    Raises:
        UsageError: the file cannot be read, or an argument is not key=value.
    """
    config = read_yaml(arguments.config) if arguments.config is not None else {}
    for text in arguments.assignments:
        if "=" not in text:
            raise UsageError(f"'{text}' is not key=value. Pass input files after --input.")
        key, value = split_assignment(text)
        if value:
            config[key] = value if key in _STRINGS else _value_or_string(value)
        else:
            config.pop(key, None)
    return config


def _value_or_string(text: str) -> Any:
    try:
        return value_of(text)
    except ValueError:
        return text


def _holds_a_model(folder: Path) -> bool:
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
