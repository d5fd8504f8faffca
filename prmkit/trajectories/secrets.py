"""Mask keys and passwords in runs before anything is written: sessions of coding agents contain many of them.

The patterns are those that issuers publish for their tokens, plus the usual ways to write a secret next to its name.
They find strings that look like secrets, but cannot find every secret.
"""

import re
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from typing import Any

_PATTERNS: dict[str, tuple[tuple[str, ...], str]] = {
    "private key": (
        ("PRIVATE KEY",),
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    ),
    "anthropic key": (("sk-ant-",), r"\bsk-ant-[\w-]{20,}"),
    "openai key": (("sk-",), r"\bsk-(?:proj-|svcacct-|or-v1-)?[A-Za-z0-9_-]{20,}"),
    "github token": (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    ),
    "gitlab token": (("glpat-",), r"\bglpat-[\w-]{20,}"),
    "aws key": (("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "google key": (("AIza",), r"\bAIza[\w-]{35}"),
    "slack token": (("xox",), r"\bxox[abeoprs]-[\w-]{10,}"),
    "hugging face token": (("hf_",), r"\bhf_[A-Za-z0-9]{30,}"),
    "npm token": (("npm_",), r"\bnpm_[A-Za-z0-9]{36}"),
    "stripe key": (("sk_live_", "sk_test_", "rk_live_", "rk_test_"), r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{20,}"),
    "sendgrid key": (("SG.",), r"\bSG\.[\w-]{20,}\.[\w-]{20,}"),
    "json web token": (("eyJ",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "password in a url": (("://",), r"(?<=://)[^\s:/@]{1,64}:[^\s:/@]{3,}(?=@)"),
    "environment variable": (
        ("_TOKEN=", "_KEY=", "_SECRET="),
        r"(?:(?<=[A-Z]_TOKEN=)|(?<=[A-Z]_KEY=)|(?<=[A-Z]_SECRET=))(?=[^\s\"'\\]*\d)[^\s\"'\\${}()<>\[\]]{12,}",
    ),
    "authorization header": (
        ("Authorization: ", "authorization: "),
        r"(?<=uthorization: )(?i:bearer|basic) +[\w.~+/=-]{12,}",
    ),
}
"""Kind -> substrings, at least one of which a match contains, and the pattern. Searching for a substring is a hundred
times faster, and most strings do not contain a secret."""
_COMPILED = {kind: (needles, re.compile(pattern, re.DOTALL)) for kind, (needles, pattern) in _PATTERNS.items()}
_HINTS = (
    "secret", "passw", "apikey", "api-key", "api_key", "accesstoken", "access-token", "access_token", "authtoken",
    "auth-token", "auth_token",
)  # fmt: skip
"""Lower-case words; the name of every named secret contains one of them."""
_NEEDLES = tuple(needle.encode() for needles, _ in _PATTERNS.values() for needle in needles)
_NAMED = re.compile(
    # NAME=value, "name": "value". Without quotes the value has a digit: `password = ask()` is code, not a secret, and
    # neither is a placeholder (leaving it in may be an error of the agent, which a judge should see).
    r"""(?ix)
    ((?:api[_-]?key|secret(?:[_-]?(?:access)?[_-]?key)?|access[_-]?token|auth[_-]?token|passw(?:or)?d|client[_-]?secret)
    \\?["']?\s*[=:]\s*)
    (?:(\\?["'])(?!\[secret:|your|my[_-]|example|placeholder|x{3})([^\s"'\\]{8,})
    |(?=[^\s"'\\,;]*\d)([^\s"'\\,;}{)(<>$\[\]]{8,}))""",
)


def may_hold_secrets(text: bytes) -> bool:
    """Return whether the full search is worthwhile; this check is a hundred times faster."""
    text = text.replace(b"task-", b"")  # otherwise an id such as task-1 would look like a key that begins with sk-
    lowered = text.lower()
    return any(needle in text for needle in _NEEDLES) or any(hint.encode() in lowered for hint in _HINTS)


def mask(value: Any, counts: Counter[str]) -> Any:
    """Replace every secret in the strings of a value by `[secret: …]`.

    Args:
        value: a string, a JSON value or a dataclass; all strings in it are searched, except field names.
        counts: the number of replacements by kind; it is updated.
    """
    if isinstance(value, str):
        return _mask_text(value, counts)
    if isinstance(value, list):
        return [mask(each, counts) for each in value]
    if isinstance(value, tuple):
        return tuple(mask(each, counts) for each in value)
    if isinstance(value, dict):
        return {key: _mask_entry(key, each, counts) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: mask(getattr(value, field.name), counts) for field in fields(value)}
        return replace(value, **changes)
    return value


def _mask_entry(key: Any, value: Any, counts: Counter[str]) -> Any:
    """Mask a value; `{"password": "…"}` is a secret because of its name, which a search of the string would miss."""
    if isinstance(value, str) and isinstance(key, str) and _NAMED.fullmatch(f'{key}="{value}'):
        counts["named secret"] += 1
        return "[secret: named secret]"
    return mask(value, counts)


def _mask_text(text: str, counts: Counter[str]) -> str:
    for kind, (needles, pattern) in _COMPILED.items():
        if any(needle in text for needle in needles):
            text, count = pattern.subn(f"[secret: {kind}]", text)
            counts.update({kind: count} if count else {})
    lowered = text.lower()
    if any(hint in lowered for hint in _HINTS):
        text, count = _NAMED.subn(r"\1\2[secret: named secret]", text)
        counts.update({"named secret": count} if count else {})
    return text
