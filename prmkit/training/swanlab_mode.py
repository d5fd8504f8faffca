"""Where SwanLab can put a run: in its cloud, on this machine, or nowhere.

LLaMA Factory finds out only after the model has loaded, and then the run dies. What is tried here takes at most two
seconds, and only when somebody is logged in.
"""

import netrc
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_HOST = "https://api.swanlab.cn"
CONNECT_SECONDS = 2.0


@dataclass(frozen=True)
class SwanLabChoice:
    """Whether SwanLab is used, how, and why so."""

    mode: str | None
    """A value of `swanlab_mode`; None turns SwanLab off."""
    reason: str


def resolve_swanlab(
    values: Mapping[str, Any], packages: Mapping[str, str], environment: Mapping[str, str] | None = None
) -> SwanLabChoice:
    """Choose where SwanLab puts the run.

    Args:
        values: LLaMA Factory's keys; `use_swanlab` is true.
        packages: installed versions by name; `swanlab` and `swanboard` are looked at.
        environment: the process's own when it is None.
    """
    environment = os.environ if environment is None else environment
    asked: str | None = values.get("swanlab_mode")
    if "swanlab" not in packages:
        return SwanLabChoice(None, "swanlab is not installed")
    if asked in ("offline", "disabled", "local") and (asked != "local" or "swanboard" in packages):
        return SwanLabChoice(asked, "as asked")
    reason = "its dashboard is not installed" if asked == "local" else _why_not_cloud(environment)
    if reason is None:
        return SwanLabChoice("cloud", "logged in")
    if asked != "local" and "swanboard" in packages:
        return SwanLabChoice("local", f"{reason}; look at the run with: swanlab watch")
    # A local run that was recorded without swanboard can never be shown, not even after it is installed.
    return SwanLabChoice(None, f"{reason}; for local runs: pip install 'swanlab[dashboard]'")


def _why_not_cloud(environment: Mapping[str, str]) -> str | None:
    host = _host_of_login(environment)
    if host is None:
        return "nobody is logged in to SwanLab"
    address = urlsplit(host if "//" in host else f"//{host}")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return f"{host} cannot be reached"
    return None


def _host_of_login(environment: Mapping[str, str]) -> str | None:
    """The server that somebody is logged in to: by the environment, in this folder, or in the home folder."""
    host = environment.get("SWANLAB_API_HOST")
    if environment.get("SWANLAB_API_KEY"):
        return host or DEFAULT_HOST
    home = environment.get("SWANLAB_ROOT") or environment.get("SWANLAB_SAVE_DIR") or str(Path.home() / ".swanlab")
    for folder in (Path(".swanlab"), Path(home)):
        try:
            hosts = netrc.netrc(folder / ".netrc").hosts
        except (OSError, netrc.NetrcParseError):
            continue
        for machine, (_login, _account, password) in hosts.items():
            if password:
                return host or machine
    return None
