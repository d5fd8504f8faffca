"""judges.yaml: the strong judges, their endpoints and their prices."""

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from prmkit.errors import UsageError
from prmkit.files import read_plain_yaml
from prmkit.http_client import check_url, key_from
from prmkit.rows import as_name

JsonMode = Literal["schema", "object", "prompt"]
_LIMITS = ("max_tokens", "max_completion_tokens")
_DEFAULT_LIMIT = 1024
"""The default maximum number of tokens of an answer."""


@dataclass(frozen=True)
class StrongJudge:
    """One strong judge: a model at an OpenAI-compatible chat endpoint."""

    name: str
    """The judge's name; rows have it as `model_name`."""
    base_url: str
    model: str
    api_key_env: str | None = None
    """The name of the environment variable with the API key; the key itself is never written to a file."""
    concurrency: int = 4
    json: JsonMode = "object"
    """How JSON is requested: `schema` sends a JSON schema, `object` asks for any object, `prompt` sends neither."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters that are sent unchanged: temperature, max_tokens, reasoning_effort, …"""
    price_in: float | None = None
    """Price per million prompt tokens, in the user's currency; None if it is unknown."""
    price_out: float | None = None
    """Price per million tokens of the answer."""
    timeout: float = 300.0

    @property
    def host(self) -> str:
        """The host that receives the data."""
        return urlsplit(self.base_url).hostname or self.base_url

    @property
    def limit(self) -> tuple[str, int]:
        """The parameter that limits the length of an answer, and its value in tokens."""
        name = next((name for name in _LIMITS if name in self.parameters), _LIMITS[0])
        return name, int(self.parameters.get(name, _DEFAULT_LIMIT))

    def key(self) -> str | None:
        """Return the API key.

        Raises:
            UsageError: the key's environment variable is empty, or the key cannot be sent.
        """
        if self.api_key_env is None:
            return None
        key = key_from(self.api_key_env)
        if key is None:
            raise UsageError(f"{self.name}: the variable {self.api_key_env} is not set. Set it to the API key.")
        return key

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """Return the cost of a request and its answer; 0 if the prices are unknown."""
        return (tokens_in * (self.price_in or 0.0) + tokens_out * (self.price_out or 0.0)) / 1e6


_SETTING_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "base_url": (str,),
    "model": (str,),
    "api_key_env": (str,),
    "concurrency": (int,),
    "json": (str,),
    "parameters": (dict,),
    "price_in": (int, float),
    "price_out": (int, float),
    "timeout": (int, float),
}
_OURS = {"model", "messages", "response_format", "stream", "n"}
"""Parameters that each request sets, so judges.yaml must not."""


def load_judges(path: Path) -> list[StrongJudge]:
    """Read judges.yaml: a list of judges.

    Raises:
        UsageError: the file is missing or not YAML, or a setting is missing, misspelt or of the wrong type.
    """
    content = read_plain_yaml(path)
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path}: not a list of judges with name, base_url and model. See examples/judges.yaml.")
    judges = [_judge(each, f"{path}: judge {number}") for number, each in enumerate(content, start=1)]
    names = [judge.name for judge in judges]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{path}: two judges have the name {twice}. Give each a different name.")
    _check_answers_differ(judges, path)
    return judges


def _check_answers_differ(judges: Sequence[StrongJudge], path: Path) -> None:
    """Check that no two judges have the same model and parameters: these identify answers, so both would share them."""
    sent: dict[str, str] = {}
    for judge in judges:
        same = json.dumps([judge.model, judge.json, judge.parameters | dict([judge.limit])], sort_keys=True)
        other = sent.setdefault(same, judge.name)
        if other != judge.name:
            raise UsageError(
                f"{path}: {other} and {judge.name} have the same model and parameters, so their answers cannot be "
                "distinguished. Remove one, or give the models different names on their servers."
            )


def _judge(content: Any, location: str) -> StrongJudge:
    if not isinstance(content, dict):
        raise UsageError(f"{location}: not a mapping with name, base_url and model.")
    for name, value in content.items():
        if name not in _SETTING_TYPES:
            near = difflib.get_close_matches(str(name), _SETTING_TYPES, n=1)
            advice = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_SETTING_TYPES)}."
            raise UsageError(f"{location}: unknown setting {name}. {advice}")
        if not isinstance(value, _SETTING_TYPES[name]) or isinstance(value, bool):
            raise UsageError(f"{location}: {name} is {value!r:.40}, but must be {_SETTING_TYPES[name][0].__name__}.")
    if missing := [name for name in ("name", "base_url", "model") if not str(content.get(name, "")).strip()]:
        raise UsageError(f"{location}: {' and '.join(missing)} missing.")
    judge = StrongJudge(**content | {"name": as_name(content["name"])})  # the same conversion as when rows are read
    _check(judge, location)
    return judge


def _check(judge: StrongJudge, location: str) -> None:
    _check_address(judge.base_url, location)
    if judge.json not in ("schema", "object", "prompt"):
        raise UsageError(f"{location}: json is {judge.json}, but must be schema, object or prompt.")
    if judge.concurrency < 1 or not 0 < judge.timeout < math.inf:
        raise UsageError(f"{location}: concurrency and timeout must be above zero.")
    # Comparisons with NaN are always false, so a price of NaN would never exceed a budget.
    if not all(0 <= (price or 0.0) < math.inf for price in (judge.price_in, judge.price_out)):
        raise UsageError(f"{location}: price_in and price_out must be numbers, zero or more.")
    if (judge.price_in is None) != (judge.price_out is None):
        raise UsageError(f"{location}: give both price_in and price_out, or neither.")
    _check_parameters(judge, location)
    if judge.api_key_env and not judge.api_key_env.isidentifier():
        raise UsageError(f"{location}: api_key_env must be the name of an environment variable, not the key itself.")


def _check_address(url: str, location: str) -> None:
    try:
        check_url(url)
    except UsageError as error:
        raise UsageError(f"{location}: {str(error).replace('--base-url', 'base_url')}") from error
    if "@" in url:
        raise UsageError(f"{location}: base_url contains a password. Use api_key_env instead.")
    if "?" in url or "#" in url:  # a query may contain a key, and would break the request paths
        raise UsageError(
            f"{location}: base_url must not contain ? or #. Remove that character and everything after it."
        )


def _check_parameters(judge: StrongJudge, location: str) -> None:
    if fixed := sorted(_OURS & judge.parameters.keys()):
        raise UsageError(f"{location}: parameters: {fixed[0]} is set by each request. Remove it.")
    for name in _LIMITS:
        tokens = judge.parameters.get(name, 1)
        if type(tokens) is not int or tokens < 1:
            raise UsageError(f"{location}: parameters: {name} must be an integer above zero.")
    try:
        json.dumps(judge.parameters, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{location}: parameters cannot be sent as JSON ({error}). Quote dates and keys.") from error
