"""The checks that need LLaMA Factory itself: its template, its row lengths, its parser, its trainer.

They run in `prmkit.training.preflight`, a separate process. Foreign errors are not caught: the parent reports them.
"""

import copy
import hashlib
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from prmkit.dataset_info import Entry, read_entries, split_names
from prmkit.errors import DataError, UsageError
from prmkit.files import read_json, read_jsonl
from prmkit.limits import limited
from prmkit.llamafactory_schema import setting
from prmkit.paths import REPORT
from prmkit.prompts.encoding import ChatEncoding, load_encoding
from prmkit.training.checks import Check, error, ok, warning
from prmkit.training.model_checks import TOKENIZER_FILES, is_hub_name

HUB_SECONDS = 5.0
TRAINER_ADVICE = "Change the keys that are named, or install what the messages name."
NEEDS_TORCHRUN = ("deepspeed", "fsdp", "fsdp_config", "ddp_backend")
"""Keys that LLaMA Factory's parser accepts only in a process that torchrun has started."""


# --- does it start? -----------------------------------------------------------------------------------------------


def hub_answers(name: str) -> bool:
    """Whether a model that would come from the hub can be asked for; true where the hub is not needed.

    It is asked once here, for a few seconds: huggingface_hub itself asks for each file six times, for most of a minute,
    before it looks at what was downloaded earlier.
    """
    from urllib import error as failures
    from urllib import request

    if Path(name).is_dir() or not is_hub_name(name) or "HF_HUB_OFFLINE" in os.environ:
        return True
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not endpoint.startswith(("https://", "http://")):  # urllib would open file: as well
        return False
    try:
        request.urlopen(request.Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()  # noqa: S310
    except failures.HTTPError:
        return True  # it answers
    except OSError:
        return False
    return True


def check_start(gpus: int) -> Check:
    """Import nearly everything that a training imports; the driver shows so many GPUs, and torch must see them."""
    from importlib import metadata

    import llamafactory.data.template  # noqa: F401  with torch, torchvision, torchaudio, peft
    import torch

    name = "LLaMA Factory starts"
    if gpus and not torch.cuda.is_available():
        found = f"torch {torch.__version__} cannot use the GPU that the driver shows (CUDA {torch.version.cuda})"
        return error(name, found, "Update the NVIDIA driver, or install the torch build for your CUDA version.")
    return ok(name, f"LLaMA Factory {metadata.version('llamafactory')}, torch {torch.__version__}")


# --- the template -------------------------------------------------------------------------------------------------

USER, SYSTEM, ANSWER = "How good is this step?", "You are a strict judge.", '{"score": 0.50}'
WITHOUT_SYSTEM, WITH_SYSTEM, WITH_ANSWER = "a prompt", "a prompt with a system text", "an answer"


def check_encoding(values: Mapping[str, Any]) -> tuple[list[Check], ChatEncoding | None]:
    """Load the tokenizer with the configured template, and compare the template with the model's own."""
    model = str(values["model_name_or_path"])
    advice = "Look at the model folder's tokenizer files."
    try:
        if not Path(model).is_dir():
            advice = f"Download the model first: hf download {model} --local-dir model"
            if not is_hub_name(model):
                raise DataError(f"unknown: there is no folder {model}")
        elif not any((Path(model) / name).is_file() for name in TOKENIZER_FILES):
            return [error("template", f"not checked: no tokenizer in {model}", "Fix the model folder first.")], None
        encoding = load_encoding(
            Path(model),
            values.get("template"),
            default_system=values.get("default_system"),
            enable_thinking=setting(values, "enable_thinking"),
            trust_remote_code=bool(values.get("trust_remote_code")),
        )
    except (DataError, UsageError) as failure:
        return [error("template", str(failure), advice)], None
    return [check_template(encoding, values)], encoding


@dataclass(frozen=True)
class Rendering:
    """The parts of one turn as strings, encoded and decoded; None where a template refuses one (Gemma, system)."""

    texts: Mapping[str, str | None]

    def differs_in(self, other: "Rendering") -> list[str]:
        """The parts in which two renderings differ, among those that both have."""
        both = [part for part, text in self.texts.items() if text is not None and other.texts[part] is not None]
        return [part for part in both if self.texts[part] != other.texts[part]]


def check_template(encoding: ChatEncoding, values: Mapping[str, Any]) -> Check:
    """Compare the configured template with the model's own, and name a better one where there is one.

    Args:
        encoding: of the model and the configured template.
        values: LLaMA Factory's keys.
    """
    name = values.get("template")
    chat_template = _own_chat_template(values)
    if chat_template is None:
        return ok("template", f"{name}; a base model: it has no chat template and will learn this one")
    try:
        with limited("the model's chat template"):
            own = _own_rendering(encoding.tokenizer, chat_template, values)
    except DataError as failure:
        return error("template", str(failure), "Download the model again, from a source that you trust.")
    differences = _rendering(encoding.template, encoding.tokenizer).differs_in(own)
    if name is None:
        return _parsed_from_tokenizer(differences)
    if not differences:
        return ok("template", f"{name} renders every turn as the model's own chat template does")
    return _mismatch(encoding, values, own, differences)


def _own_chat_template(values: Mapping[str, Any]) -> Any:
    # Not the encoding's tokenizer: some of LLaMA Factory's templates replace the model's.
    from transformers import AutoTokenizer

    trust = bool(values.get("trust_remote_code"))
    untouched = AutoTokenizer.from_pretrained(str(values["model_name_or_path"]), trust_remote_code=trust)
    return getattr(untouched, "chat_template", None)


def _mismatch(encoding: ChatEncoding, values: Mapping[str, Any], own: Rendering, differences: list[str]) -> Check:
    found = f"{values['template']} renders {' and '.join(differences)} differently from the model's chat template"
    shown = _first_difference(encoding, own)
    model_type = _model_type(values)
    family = model_type.rstrip("0123456789_")
    fitting = _fitting_templates(encoding.tokenizer, values, own)
    system = _default_system(own) if differences == [WITHOUT_SYSTEM] else None
    if system and not any(name.startswith(family) for name in fitting):
        return error("template", f"{found}: it adds another system text. {shown}", f'default_system="{system}"')
    if fitting:
        nearest = sorted(
            fitting, key=lambda name: (name != _model_type(values), not name.startswith(family), len(name))
        )
        return error("template", f"{found}. {shown}", f"template={' or template='.join(nearest[:2])}")
    advice = "Use the judge with this template; apply_chat_template of transformers gives other prompts."
    return warning("template", f"{found}; no template of LLaMA Factory matches. {shown}", advice)


def _model_type(values: Mapping[str, Any]) -> str:
    return str(read_json(Path(str(values["model_name_or_path"])) / "config.json").get("model_type", ""))


def _default_system(own: Rendering) -> str | None:
    """The system text that the model's own chat template adds to a prompt without one."""
    alone, given = own.texts[WITHOUT_SYSTEM], own.texts[WITH_SYSTEM]
    if alone is None or given is None or SYSTEM not in given:
        return None
    before, after = given.split(SYSTEM, maxsplit=1)
    fits = alone.startswith(before) and alone.endswith(after) and len(alone) > len(before) + len(after)
    return alone[len(before) : len(alone) - len(after)] if fits else None


def _parsed_from_tokenizer(differences: list[str]) -> Check:
    if not differences:
        return ok("template", "read from the tokenizer's chat template")
    found = f"LLaMA Factory's reading of the tokenizer's chat template gets {' and '.join(differences)} wrong"
    return error("template", found, "Name a template: template=qwen, llama3, mistral …")


def _own_rendering(tokenizer: Any, chat_template: Any, values: Mapping[str, Any]) -> Rendering:
    from jinja2 import TemplateError

    def applied(*messages: dict[str, str]) -> str | None:
        settings = {"chat_template": chat_template, "add_generation_prompt": messages[-1] is user}
        settings["enable_thinking"] = bool(setting(values, "enable_thinking"))
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
        except TemplateError:
            return None
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))

    user, system = {"role": "user", "content": USER}, {"role": "system", "content": SYSTEM}
    answer = {"role": "assistant", "content": ANSWER}
    # A system text from the config precedes every prompt; an empty one removes the template's own, on purpose.
    chosen = values.get("default_system")
    before = [{"role": "system", "content": chosen}] if chosen else []
    alone = None if chosen == "" else applied(*before, user)
    return Rendering(
        {WITHOUT_SYSTEM: alone, WITH_SYSTEM: applied(system, user), WITH_ANSWER: applied(system, user, answer)}
    )


def _rendering(template: Any, tokenizer: Any) -> Rendering:
    messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    ((prompt, _),) = template.encode_multiturn(tokenizer, messages, None, None)
    ((with_system, answer),) = template.encode_multiturn(tokenizer, messages, SYSTEM, None)
    end = [tokenizer.eos_token_id] if template.efficient_eos else []
    parts = {WITHOUT_SYSTEM: prompt, WITH_SYSTEM: with_system, WITH_ANSWER: [*with_system, *answer, *end]}
    return Rendering({part: tokenizer.decode(ids) for part, ids in parts.items()})


def _fitting_templates(tokenizer: Any, values: Mapping[str, Any], own: Rendering) -> list[str]:
    """Every text-only template that renders like the model's own."""
    from llamafactory.data.template import TEMPLATES

    fitting = []
    for name, registered in TEMPLATES.items():
        template = copy.copy(registered)
        template.enable_thinking = setting(values, "enable_thinking")
        # Templates for images and sound need a processor, which a text model does not have.
        is_text_only = type(template.mm_plugin).__name__ == "BasePlugin"
        if is_text_only and not _rendering(template, tokenizer).differs_in(own):
            fitting.append(name)
    return fitting


def _first_difference(encoding: ChatEncoding, own: Rendering) -> str:
    """Both renderings of the first part that differs."""
    ours = _rendering(encoding.template, encoding.tokenizer)
    part = ours.differs_in(own)[0]
    return f"It would be trained on {_shortened(ours.texts[part])}, and expects {_shortened(own.texts[part])}."


def _shortened(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 400 else text[:400] + "…")


# --- row lengths --------------------------------------------------------------------------------------------------

# LLaMA Factory cuts a row that is too long at the end of its *prompt*, silently: the question and the beginning of the
# answer's turn are lost, the label stays. So the longest rows are measured first, and a random sample after them, until
# the time is up.

BUDGET_SECONDS = 4.0
SAMPLE = 400
FEW = 0.01
"""Up to this share of cut rows only a warning is given."""
PADDING_WORTH_SAYING = 0.15


def check_rows(encoding: ChatEncoding | None, values: Mapping[str, Any]) -> tuple[Check, int | None]:
    """Are rows cut? Also the longest row in tokens, where it could be measured."""
    if encoding is None:
        return warning("row lengths", "not measured (no tokenizer)", "Fix the model folder first."), None
    try:
        lengths = measure(encoding, values)
    except DataError as failure:
        return warning("row lengths", f"not measured: {failure}", "Fix the dataset first."), None
    return check_lengths(lengths, values), lengths.longest if lengths else None


@dataclass(frozen=True)
class Lengths:
    """Rows and their lengths in tokens, prompt and answer together."""

    rows: int
    longest_first: Sequence[int]
    """Of the rows with the most bytes."""
    sample: Sequence[int]
    """Of rows drawn at random, in random order."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row that was measured."""
        return max((*self.longest_first, *self.sample), default=0)

    @property
    def measured_all(self) -> bool:
        """Whether every row was measured."""
        return len(self.longest_first) >= self.rows


def measure(encoding: ChatEncoding, values: Mapping[str, Any], budget: float = BUDGET_SECONDS) -> Lengths | None:
    """Measure the rows of `dataset` and `eval_dataset`; None for kinds of files that are not read here.

    Args:
        encoding: of the model and the configured template.
        values: LLaMA Factory's keys.
        budget: seconds.
    """
    folder = Path(str(setting(values, "dataset_dir")))
    entries = read_entries(folder)
    names = [*split_names(values.get("dataset")), *split_names(values.get("eval_dataset"))]
    chosen = [entries[name] for name in names if name in entries]
    if not chosen or any(entry.file is None or entry.file.suffix != ".jsonl" for entry in chosen):
        return None
    if converted := _converted_lengths(encoding, folder / REPORT, chosen, values):
        sample = random.Random(0).sample(converted, min(SAMPLE, len(converted)))  # noqa: S311
        return Lengths(len(converted), sorted(converted, reverse=True), sample)
    places = [place for entry in chosen for place in _places(entry)]
    drawn = random.Random(0).sample(places, min(SAMPLE, len(places)))  # noqa: S311
    lengths = _in_time(encoding, sorted(places, key=lambda place: -place.size), budget * 0.6)
    longest_first = list(lengths.values())
    if len(lengths) < len(places):
        lengths |= _in_time(encoding, [place for place in drawn if place not in lengths], budget * 0.4)
    return Lengths(len(places), longest_first, [lengths[place] for place in drawn if place in lengths])


def _converted_lengths(
    encoding: ChatEncoding, report: Path, entries: Sequence[Entry], values: Mapping[str, Any]
) -> list[int]:
    """The lengths that the conversion measured, where it measured all rows with this tokenizer and template."""
    try:
        measured, content = read_json(report)["measured_with"], encoding.tokenizer.backend_tokenizer.to_str()
        same = (
            measured["template"] == values.get("template")
            and measured["default_system"] == values.get("default_system")
            and measured["enable_thinking"] == setting(values, "enable_thinking")
            and measured["tokenizer_sha256"] == hashlib.sha256(content.encode()).hexdigest()
        )
        written = report.stat().st_mtime
        # The report is written last; a newer dataset was changed by somebody else.
        if not same or any(e.file is None or e.sidecar is None or e.file.stat().st_mtime > written for e in entries):
            return []
        return [int(row["tokens"]) for entry in entries if entry.sidecar for row in read_jsonl(entry.sidecar)]
    except (DataError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return []


class _Place(NamedTuple):
    file: Path
    offset: int
    size: int
    entry: Entry


def _places(entry: Entry) -> Iterator[_Place]:
    offset, file = 0, entry.file or Path()
    with file.open("rb") as stream:
        for line in stream:
            if line.strip():
                yield _Place(file, offset, len(line), entry)
            offset += len(line)


def _in_time(encoding: ChatEncoding, places: Sequence[_Place], budget: float) -> dict[_Place, int]:
    lengths: dict[_Place, int] = {}
    end = time.monotonic() + budget
    for place in places:
        if time.monotonic() > end:
            break
        with place.file.open("rb") as stream:
            stream.seek(place.offset)
            row = orjson.loads(stream.readline())
        try:
            system, prompt, answer = place.entry.read(row)
        except ValueError as failure:
            raise DataError(f"{place.file}: {failure}") from failure
        lengths[place] = sum(map(len, encoding.pair_ids(prompt, answer, system)))
    return lengths


def check_lengths(lengths: Lengths | None, values: Mapping[str, Any]) -> Check:
    """Report whether rows are cut, and which `cutoff_len` would be long enough."""
    if lengths is None:
        return warning(
            "row lengths", "not measured: the dataset is not a JSONL file", "Compare cutoff_len with your longest row."
        )
    if not lengths.rows:
        return error("row lengths", "the dataset has no rows", "Convert the data again: python convert_dataset.py")
    cutoff = int(setting(values, "cutoff_len")) - (1 if values.get("packing") or values.get("neat_packing") else 0)
    measured = "" if lengths.measured_all else f", {len(lengths.longest_first):,} longest measured"
    size = f"{lengths.rows:,} rows{measured}, the longest of {lengths.longest:,} tokens"
    if lengths.longest <= cutoff:
        return ok("row lengths", f"{size}; cutoff_len {cutoff:,} cuts none", _padding(lengths, values))
    cut, share = _cut(lengths, cutoff)
    found = f"{cut} cut at cutoff_len {cutoff:,}, at the end of the prompt, where the question is ({size})"
    needed = -(-lengths.longest // 512) * 512
    advice = f"cutoff_len={needed}, or shorten them in the conversion: --too-long trim"
    return warning("row lengths", found, advice) if share <= FEW else error("row lengths", found, advice)


def _cut(lengths: Lengths, cutoff: int) -> tuple[str, float]:
    """How many rows are cut, in words, and their share."""
    counted = sum(length > cutoff for length in lengths.longest_first)
    share = sum(length > cutoff for length in lengths.sample) / max(1, len(lengths.sample))
    if lengths.measured_all or counted < len(lengths.longest_first):
        return (f"{counted:,} of {lengths.rows:,} rows are" if counted != 1 else "1 row is"), counted / lengths.rows
    return f"about {share:.0%} of {lengths.rows:,} rows are", share


def _padding(lengths: Lengths, values: Mapping[str, Any]) -> str:
    """What batches of one row would save, if it is worth saying."""
    batch = int(setting(values, "per_device_train_batch_size"))
    accumulation = int(setting(values, "gradient_accumulation_steps"))
    sample = lengths.sample
    if batch < 2 or len(sample) < batch or values.get("neat_packing"):
        return ""
    padded = sum(max(sample[start : start + batch]) * batch for start in range(0, len(sample) - batch + 1, batch))
    real = sum(sample[: len(sample) // batch * batch])
    wasted = 1 - real / padded
    if wasted < PADDING_WORTH_SAYING:
        return ""
    flags = f"per_device_train_batch_size=1 gradient_accumulation_steps={batch * accumulation}"
    return f"{wasted:.0%} of each batch is padding; {flags} trains the same without it."


# --- parser and trainer -------------------------------------------------------------------------------------------


def check_parser(values: Mapping[str, Any]) -> tuple[Check, Any]:
    """Let LLaMA Factory parse the config; also the training arguments that it makes."""
    from llamafactory.hparams import get_train_args

    left_out = [key for key in NEEDS_TORCHRUN if key in values]
    kept = {key: value for key, value in values.items() if key not in left_out}
    # It refuses an output folder that contains an adapter, and looks for checkpoints: both are handled elsewhere.
    fresh = str(Path(tempfile.gettempdir()) / f"prmkit-{os.getpid()}-is-never-made")
    _, _, arguments, _, _ = get_train_args({**kept, "output_dir": fresh, "resume_from_checkpoint": None})
    without = f" (without {', '.join(left_out)}, which it accepts only under torchrun)" if left_out else ""
    return ok("LLaMA Factory's own parser", f"accepts all {len(kept)} keys{without}"), arguments


def check_trainer(arguments: Any) -> Check:
    """Create what transformers' trainer creates only after the model has loaded: optimizer, schedule, loggers."""
    parts = {"optim": _make_optimizer, "lr_scheduler_type": _make_schedule, "report_to": _make_loggers}
    problems = []
    for key, make in parts.items():
        try:
            make(arguments)
        except (ImportError, ValueError, TypeError, RuntimeError, LookupError, AttributeError, OSError) as failure:
            problems.append(f"{key}: {next(iter(str(failure).splitlines()), repr(failure))}")
    if problems:
        return error("trainer", "; ".join(problems), TRAINER_ADVICE)
    names = (arguments.optim, arguments.lr_scheduler_type, *arguments.report_to)
    return ok("trainer", f"creates {', '.join(str(getattr(name, 'value', name)) for name in names)}")


def _make_optimizer(arguments: Any) -> None:
    import torch
    from transformers import Trainer

    # Those that need the names of the model's layers cannot be tried on another model.
    if not arguments.optim_target_modules:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))


def _make_schedule(arguments: Any) -> None:
    import torch
    from llamafactory.train.trainer_utils import create_custom_scheduler
    from transformers import get_scheduler

    steps = 100  # as good as any other number
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters(), lr=arguments.learning_rate)
    create_custom_scheduler(arguments, steps)
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(steps), steps, arguments.lr_scheduler_kwargs
    )


def _make_loggers(arguments: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for logger in get_reporting_integration_callbacks(arguments.report_to):
        logger()
