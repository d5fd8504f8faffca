"""Is the template right for this model? LLaMA Factory's rendering of one turn against the model's own chat template.

Runs where LLaMA Factory is already imported (`prmkit.training.deep`).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.files import read_json
from prmkit.prompts.encoding import ChatEncoding
from prmkit.training.check import Check, error, ok, warning

NAME = "template"
USER, SYSTEM, ANSWER = "How good is this step?", "You are a strict judge.", '{"score": 0.50}'
WITHOUT_SYSTEM, WITH_SYSTEM, WITH_ANSWER = "a prompt", "a prompt with a system text", "an answer"


@dataclass(frozen=True)
class Rendering:
    """The parts of one turn as texts, each through the tokenizer and back; None where a template refuses a part
    (Gemma knows no system text)."""

    texts: Mapping[str, str | None]

    def differs_in(self, other: "Rendering") -> list[str]:
        """The parts in which two renderings differ, of those that both have."""
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
        return ok(NAME, f"{name}; the model has no chat template of its own (a base model) and will learn this one")
    own = _own_rendering(encoding.tokenizer, chat_template, values)
    differences = _rendering(encoding.template, encoding.tokenizer).differs_in(own)
    if name is None:
        return _parsed_from_tokenizer(differences)
    if not differences:
        return ok(NAME, f"{name} renders every turn as the model's own chat template does")
    return _mismatch(encoding, values, own, differences)


def _own_chat_template(values: Mapping[str, Any]) -> Any:
    # Not the encoding's tokenizer: some of LLaMA Factory's templates put themselves in the place of the model's.
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
        return error(NAME, f"{found}: it puts in another system text. {shown}", f'default_system="{system}"')
    if fitting:
        nearest = sorted(
            fitting, key=lambda name: (name != _model_type(values), not name.startswith(family), len(name))
        )
        return error(NAME, f"{found}. {shown}", f"template={' or template='.join(nearest[:2])}")
    advice = "Judge and chat with this same template; apply_chat_template of transformers gives other prompts."
    return warning(NAME, f"{found}; no template of LLaMA Factory fits. {shown}", advice)


def _model_type(values: Mapping[str, Any]) -> str:
    return str(read_json(Path(str(values["model_name_or_path"])) / "config.json").get("model_type", ""))


def _default_system(own: Rendering) -> str | None:
    """The system text that the model's own chat template puts in where there is none."""
    alone, given = own.texts[WITHOUT_SYSTEM], own.texts[WITH_SYSTEM]
    if alone is None or given is None or SYSTEM not in given:
        return None
    before, after = given.split(SYSTEM, maxsplit=1)
    fits = alone.startswith(before) and alone.endswith(after) and len(alone) > len(before) + len(after)
    return alone[len(before) : len(alone) - len(after)] if fits else None


def _parsed_from_tokenizer(differences: list[str]) -> Check:
    if not differences:
        return ok(NAME, "read from the tokenizer's chat template")
    found = f"LLaMA Factory's reading of the tokenizer's chat template gets {' and '.join(differences)} wrong"
    return error(NAME, found, "Name a template: template=qwen, llama3, mistral …")


def _own_rendering(tokenizer: Any, chat_template: Any, values: Mapping[str, Any]) -> Rendering:
    from jinja2 import TemplateError

    def applied(*messages: dict[str, str]) -> str | None:
        settings = {"chat_template": chat_template, "add_generation_prompt": messages[-1] is user}
        settings["enable_thinking"] = bool(values.get("enable_thinking", True))
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
        except TemplateError:
            return None
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))

    user, system = {"role": "user", "content": USER}, {"role": "system", "content": SYSTEM}
    answer = {"role": "assistant", "content": ANSWER}
    # A system text from the config stands before every prompt; an empty one takes the template's own away, on purpose.
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
    """Every template for texts that renders like the model's own."""
    from llamafactory.data.template import TEMPLATES

    fitting = []
    for name, registered in TEMPLATES.items():
        template = copy.copy(registered)
        template.enable_thinking = values.get("enable_thinking", True)
        # Templates for pictures and sound ask for a processor, which a model of texts has not.
        for_texts = type(template.mm_plugin).__name__ == "BasePlugin"
        if for_texts and not _rendering(template, tokenizer).differs_in(own):
            fitting.append(name)
    return fitting


def _first_difference(encoding: ChatEncoding, own: Rendering) -> str:
    """Both renderings of the first part that differs, as texts."""
    ours = _rendering(encoding.template, encoding.tokenizer)
    part = ours.differs_in(own)[0]
    return f"Trained would be {ours.texts[part]!r}, the model expects {own.texts[part]!r}."
