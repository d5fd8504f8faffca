"""Checks that need LLaMA Factory itself: its template, its parser, its trainer.

They run in a separate process (`prmkit.training.preflight`). Errors of other libraries are not caught here, because the
parent process reports them.
"""

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prmkit.errors import DataError, UsageError
from prmkit.files import read_json
from prmkit.llamafactory_schema import setting
from prmkit.prompts.encoding import ChatEncoding, limited, load_encoding
from prmkit.training.checks import Check, error, ok, warning
from prmkit.training.model_checks import TOKENIZER_FILES, is_hub_name

HUB_SECONDS = 5.0
TRAINER_ADVICE = "Change these keys, or install the packages that the messages mention."
NEEDS_TORCHRUN = ("deepspeed", "fsdp", "fsdp_config", "ddp_backend")
"""Keys that LLaMA Factory's parser accepts only in a process that torchrun has started."""


# --- does it start? -----------------------------------------------------------------------------------------------


def hub_answers(name: str) -> bool:
    """Return whether the hub responds, if the model would come from there; true if the hub is not needed.

    It is contacted once, for a few seconds, because huggingface_hub tries each file six times, for most of a minute,
    before it uses earlier downloads.
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
        return True  # it responds
    except OSError:
        return False
    return True


def check_start(gpus: int) -> Check:
    """Import nearly everything that training imports, and check that torch sees the GPUs that the driver reports."""
    from importlib import metadata

    import llamafactory.data.template  # noqa: F401  with torch, torchvision, torchaudio, peft
    import torch

    name = "LLaMA Factory starts"
    if gpus and not torch.cuda.is_available():
        found = f"torch {torch.__version__} cannot use the GPU that the driver reports (CUDA {torch.version.cuda})"
        return error(name, found, "Update the NVIDIA driver, or install the torch build for your CUDA version.")
    return ok(name, f"LLaMA Factory {metadata.version('llamafactory')}, torch {torch.__version__}")


# --- the template -------------------------------------------------------------------------------------------------

_USER, _SYSTEM, _ANSWER = "How good is this step?", "You are a strict judge.", '{"score": 0.50}'
WITHOUT_SYSTEM, WITH_SYSTEM, WITH_ANSWER = "a prompt", "a prompt with a system prompt", "an answer"


def check_encoding(values: Mapping[str, Any]) -> tuple[list[Check], ChatEncoding | None]:
    """Load the tokenizer with the configured template, and compare the template with the model's own."""
    model = str(values["model_name_or_path"])
    advice = "Check the tokenizer files in the model folder."
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


Rendering = Mapping[str, str | None]
"""The parts of one turn as strings, encoded and decoded; None if a template refuses a part (Gemma, system)."""


def check_template(encoding: ChatEncoding, values: Mapping[str, Any]) -> Check:
    """Compare the configured template with the model's own, and suggest a better one if LLaMA Factory has one.

    Args:
        encoding: the encoding of the model and the configured template.
        values: LLaMA Factory's keys.
    """
    name = values.get("template")
    if encoding.own_chat_template is None:
        return ok(
            "template", f"{name}; the base model has no chat template of its own and will be trained with this one"
        )
    try:
        with limited("the model's chat template"):
            own = _own_rendering(encoding.tokenizer, encoding.own_chat_template, values)
    except DataError as failure:
        return error("template", str(failure), "Download the model again, from a source that you trust.")
    differences = _differences(_rendering(encoding.template, encoding.tokenizer), own)
    if name is None:
        return _parsed_from_tokenizer(differences)
    if not differences:
        return ok("template", f"{name} matches the model's own chat template")
    return _mismatch(encoding, values, own, differences)


def _mismatch(encoding: ChatEncoding, values: Mapping[str, Any], own: Rendering, differences: list[str]) -> Check:
    found = f"{values['template']} differs from the model's chat template for {' and '.join(differences)}"
    shown = _first_difference(encoding, own)
    model_type = _model_type(values)
    family = model_type.rstrip("0123456789_")
    fitting = _fitting_templates(encoding.tokenizer, values, own)
    system = _default_system(own) if differences == [WITHOUT_SYSTEM] else None
    if system and not any(name.startswith(family) for name in fitting):
        return error("template", f"{found}: it adds a different system prompt. {shown}", f'default_system="{system}"')
    if fitting:
        nearest = sorted(
            fitting, key=lambda name: (name != _model_type(values), not name.startswith(family), len(name))
        )
        return error("template", f"{found}. {shown}", f"template={' or template='.join(nearest[:2])}")
    advice = "Use the judge with this template; transformers' apply_chat_template gives different prompts."
    return warning("template", f"{found}; no template of LLaMA Factory matches. {shown}", advice)


def _model_type(values: Mapping[str, Any]) -> str:
    return str(read_json(Path(str(values["model_name_or_path"])) / "config.json").get("model_type", ""))


def _default_system(own: Rendering) -> str | None:
    """Return the system prompt that the model's own chat template adds to a prompt without one, or None."""
    alone, given = own[WITHOUT_SYSTEM], own[WITH_SYSTEM]
    if alone is None or given is None or _SYSTEM not in given:
        return None
    before, after = given.split(_SYSTEM, maxsplit=1)
    fits = alone.startswith(before) and alone.endswith(after) and len(alone) > len(before) + len(after)
    return alone[len(before) : len(alone) - len(after)] if fits else None


def _parsed_from_tokenizer(differences: list[str]) -> Check:
    if not differences:
        return ok("template", "read from the tokenizer's chat template")
    found = f"LLaMA Factory misreads the tokenizer's chat template for {' and '.join(differences)}"
    return error("template", found, "Choose a template: template=qwen, llama3, mistral …")


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

    user, system = {"role": "user", "content": _USER}, {"role": "system", "content": _SYSTEM}
    answer = {"role": "assistant", "content": _ANSWER}
    # A system prompt in the config precedes every prompt; an empty one intentionally removes the template's own.
    chosen = values.get("default_system")
    before = [{"role": "system", "content": chosen}] if chosen else []
    alone = None if chosen == "" else applied(*before, user)
    return {WITHOUT_SYSTEM: alone, WITH_SYSTEM: applied(system, user), WITH_ANSWER: applied(system, user, answer)}


def _rendering(template: Any, tokenizer: Any) -> Rendering:
    messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    ((prompt, _),) = template.encode_multiturn(tokenizer, messages, None, None)
    ((with_system, answer),) = template.encode_multiturn(tokenizer, messages, _SYSTEM, None)
    end = [tokenizer.eos_token_id] if template.efficient_eos else []
    parts = {WITHOUT_SYSTEM: prompt, WITH_SYSTEM: with_system, WITH_ANSWER: [*with_system, *answer, *end]}
    return {part: _decoded(tokenizer, ids) for part, ids in parts.items()}


def _differences(one: Rendering, other: Rendering) -> list[str]:
    """Return the parts in which two renderings differ, among those that both have."""
    both = [part for part in one if one[part] is not None and other[part] is not None]
    return [part for part in both if one[part] != other[part]]


def _decoded(tokenizer: Any, ids: Sequence[int | None]) -> str:
    # A token that is not in the vocabulary has no id if the tokenizer has no id for unknown tokens.
    known = [each for each in ids if each is not None]
    return str(tokenizer.decode(known)) + ("" if len(known) == len(ids) else " + tokens that the vocabulary lacks")


def _fitting_templates(tokenizer: Any, values: Mapping[str, Any], own: Rendering) -> list[str]:
    """Return every text-only template that renders like the model's own."""
    from llamafactory.data.template import TEMPLATES

    fitting = []
    for name, registered in TEMPLATES.items():
        template = copy.copy(registered)
        template.enable_thinking = setting(values, "enable_thinking")
        # Templates for images and sound need a processor, which a text model does not have.
        is_text_only = type(template.mm_plugin).__name__ == "BasePlugin"
        if is_text_only and not _differences(_rendering(template, tokenizer), own):
            fitting.append(name)
    return fitting


def _first_difference(encoding: ChatEncoding, own: Rendering) -> str:
    """Quote both renderings of the first part that differs."""
    ours = _rendering(encoding.template, encoding.tokenizer)
    part = _differences(ours, own)[0]
    return f"Training would use {_shortened(ours[part])}, but the model expects {_shortened(own[part])}."


def _shortened(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 400 else text[:400] + "…")


# --- parser and trainer -------------------------------------------------------------------------------------------


def check_parser(values: Mapping[str, Any]) -> tuple[Check, Any]:
    """Let LLaMA Factory parse the config; also return its training arguments."""
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
    shown = ", ".join(str(getattr(name, "value", name)) for name in names)
    return ok("trainer", f"can create the optimizer, the schedule and the loggers ({shown})")


def _make_optimizer(arguments: Any) -> None:
    import torch
    from transformers import Trainer

    # Optimizers that need the names of the model's layers cannot be tried on another model.
    if not arguments.optim_target_modules:
        Trainer.get_optimizer_cls_and_kwargs(arguments, torch.nn.Linear(1, 1))


def _make_schedule(arguments: Any) -> None:
    import torch
    from llamafactory.train.trainer_utils import create_custom_scheduler
    from transformers import get_scheduler

    steps = 100  # any number would do
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters(), lr=arguments.learning_rate)
    create_custom_scheduler(arguments, steps)
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(steps), steps, arguments.lr_scheduler_kwargs
    )


def _make_loggers(arguments: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for logger in get_reporting_integration_callbacks(arguments.report_to):
        logger()
