"""Is the template right for this model? LLaMA Factory's rendering of one turn against the model's own chat template.

Runs where LLaMA Factory is already imported (`prmkit.training.deep`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmkit.encoding import ChatEncoding
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
    own = _own_rendering(encoding.tokenizer, chat_template, thinking=bool(values.get("enable_thinking", True)))
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
    tokenizer, name = encoding.tokenizer, values["template"]
    where = " and ".join(differences)
    fitting = _fitting_templates(tokenizer, own)
    if not fitting:
        if differences == [WITHOUT_SYSTEM] and "default_system" not in values:
            found = f"{name} puts another default system text before {where} than the model's chat template"
        else:
            found = (
                f"{name} renders {where} differently from the model's chat template; no template of LLaMA Factory fits"
            )
        advice = "Judge and chat with this same template; apply_chat_template of transformers gives other prompts."
        return warning(NAME, f"{found}. {_first_difference(encoding, own)}", advice)
    found = f"{name} renders {where} differently from the model's chat template. {_first_difference(encoding, own)}"
    return error(NAME, found, f"template={' or template='.join(_nearest_first(fitting, _model_type(values)))}")


def _parsed_from_tokenizer(differences: list[str]) -> Check:
    if not differences:
        return ok(NAME, "read from the tokenizer's chat template")
    found = f"LLaMA Factory's reading of the tokenizer's chat template gets {' and '.join(differences)} wrong"
    return error(NAME, found, "Name a template: template=qwen, llama3, mistral …")


def _own_rendering(tokenizer: Any, chat_template: Any, *, thinking: bool) -> Rendering:
    from jinja2 import TemplateError

    def applied(messages: list[dict[str, str]]) -> str | None:
        opened = messages[-1]["role"] == "user"
        settings = {"chat_template": chat_template, "add_generation_prompt": opened, "enable_thinking": thinking}
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **settings)
        except TemplateError:
            return None
        return str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)))

    user, system = {"role": "user", "content": USER}, {"role": "system", "content": SYSTEM}
    answer = {"role": "assistant", "content": ANSWER}
    rendered = {WITHOUT_SYSTEM: [user], WITH_SYSTEM: [system, user], WITH_ANSWER: [system, user, answer]}
    return Rendering({part: applied(messages) for part, messages in rendered.items()})


def _rendering(template: Any, tokenizer: Any) -> Rendering:
    messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
    ((prompt, _),) = template.encode_multiturn(tokenizer, messages, None, None)
    ((with_system, answer),) = template.encode_multiturn(tokenizer, messages, SYSTEM, None)
    end = [tokenizer.eos_token_id] if template.efficient_eos else []
    parts = {WITHOUT_SYSTEM: prompt, WITH_SYSTEM: with_system, WITH_ANSWER: [*with_system, *answer, *end]}
    return Rendering({part: tokenizer.decode(ids) for part, ids in parts.items()})


def _fitting_templates(tokenizer: Any, own: Rendering) -> list[str]:
    from llamafactory.data.template import TEMPLATES

    return [name for name, template in TEMPLATES.items() if not _rendering(template, tokenizer).differs_in(own)]


def _model_type(values: Mapping[str, Any]) -> str:
    from prmkit.files import read_json

    config = read_json(Path(str(values["model_name_or_path"])) / "config.json")
    return str(config.get("model_type", ""))


def _nearest_first(names: list[str], model_type: str) -> list[str]:
    """At most two names, those that share most with the model's type first; the plainest name first among equals."""
    family = model_type.rstrip("0123456789_")
    return sorted(names, key=lambda name: (name != model_type, not name.startswith(family), len(name)))[:2]


def _first_difference(encoding: ChatEncoding, own: Rendering) -> str:
    """Both renderings of the first part that differs, as texts."""
    ours = _rendering(encoding.template, encoding.tokenizer)
    part = ours.differs_in(own)[0]
    return f"Trained would be {ours.texts[part]!r}, the model expects {own.texts[part]!r}."
