"""Keys and passwords in runs, masked before anything is written: sessions of coding agents are full of them.

Patterns are those that issuers publish for their tokens, plus the usual ways to write a secret next to its name. A
pattern finds what looks like a secret, not all that are one.
"""

import re
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from typing import Any

_PATTERNS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    "anthropic key": r"\bsk-ant-[\w-]{20,}",
    "openai key": r"\bsk-(?:proj-|svcacct-|or-v1-)?[A-Za-z0-9_-]{20,}",
    "github token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "gitlab token": r"\bglpat-[\w-]{20,}",
    "aws key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "google key": r"\bAIza[\w-]{35}",
    "slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "hugging face token": r"\bhf_[A-Za-z0-9]{30,}",
    "npm token": r"\bnpm_[A-Za-z0-9]{36}",
    "stripe key": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{20,}",
    "sendgrid key": r"\bSG\.[\w-]{20,}\.[\w-]{20,}",
    "json web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "password in a url": r"(?<=://)[^\s:/@]{1,64}:[^\s:/@]{3,}(?=@)",
    "authorization header": r"(?i)(?<=authorization: )(?:bearer|basic) +[\w.~+/=-]{12,}",
}
_NAMED = re.compile(
    # NAME=value, "name": "value". Without quotes the value has a digit: `password = ask()` is code and no secret, and
    # a placeholder is no secret either (that an agent left it in may be its error, which a judge should see).
    r"""(?ix)
    ((?:api[_-]?key|secret(?:[_-]?(?:access)?[_-]?key)?|access[_-]?token|auth[_-]?token|passw(?:or)?d|client[_-]?secret)
    \\?["']?\s*[=:]\s*)
    (?:(\\?["'])(?!\[secret:|your|my[_-]|example|placeholder|x{3})([^\s"'\\]{8,})
    |(?=[^\s"'\\,;]*\d)([^\s"'\\,;}{)(<>$\[\]]{8,}))""",
)
_ANY = re.compile(
    "|".join(f"(?:{pattern})" for pattern in (p.replace("(?i)", "") for p in _PATTERNS.values())), re.S | re.I
)
_EACH = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _PATTERNS.items()}
_HINT = re.compile(r"(?i)key|secret|token|passw")


def mask(value: Any, found: Counter[str]) -> Any:
    """The value with every secret in its strings replaced by `[secret: …]`.

    Args:
        value: a string, a JSON value or a dataclass; all of its strings are searched, the names of fields are not.
        found: counts what was replaced, by kind.
    """
    if isinstance(value, str):
        return _mask_text(value, found)
    if isinstance(value, list):
        return [mask(each, found) for each in value]
    if isinstance(value, tuple):
        return tuple(mask(each, found) for each in value)
    if isinstance(value, dict):
        return {key: _mask_entry(key, each, found) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: mask(getattr(value, field.name), found) for field in fields(value)}
        return replace(value, **changes)
    return value


def _mask_entry(key: Any, value: Any, found: Counter[str]) -> Any:
    """`{"password": "…"}` is a secret for its name, which a search of the string alone does not see."""
    if isinstance(value, str) and isinstance(key, str) and _NAMED.fullmatch(f'{key}="{value}'):
        found["named secret"] += 1
        return "[secret: named secret]"
    return mask(value, found)


def _mask_text(text: str, found: Counter[str]) -> str:
    counts = Counter[str]()
    if _ANY.search(text):  # one search for all: most texts hold none
        for kind, pattern in _EACH.items():
            text, counts[kind] = pattern.subn(f"[secret: {kind}]", text)
    if _HINT.search(text):
        text, counts["named secret"] = _NAMED.subn(r"\1\2[secret: named secret]", text)
    found.update(+counts)
    return text
