"""A configuration as LLaMA Factory reads it: one flat YAML file of its keys, and `key=value` pairs that override it."""

import io
from pathlib import Path
from typing import Any

from prmkit.errors import UsageError

LARGEST_FILE = 1 << 20
"""Bytes. The longest configuration that we have seen has 10 KB; a file this large is something else."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config the way LLaMA Factory does: `1e-4` is a float, no key may appear twice, `${x}` is plain text.

    Raises:
        UsageError: the file is missing, not YAML, or not a mapping; line and column are named where YAML knows them.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UsageError(f"{path}: larger than 1 MiB, so it is not a configuration. Check the path.")
        loaded = OmegaConf.to_container(OmegaConf.load(io.StringIO(content.decode())))
    except RecursionError as error:
        raise UsageError(f"{path}: nested too deeply. A configuration is a flat list of key: value lines.") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"{path}: not YAML that LLaMA Factory can read. {_one_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or 'not a mapping of keys to values'}.") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: not a mapping of keys to values.")
    return {str(key): value for key, value in loaded.items()}


def split_assignment(text: str) -> tuple[str, str]:
    """The key and the value of `key=value`, split at the first `=`; a leading `--` is accepted.

    Raises:
        UsageError: there is no `=`, or nothing before it.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key.strip():
        raise UsageError(f"'{text}' is not key=value. Write for example lora_rank=32.")
    return key.strip(), value


def value_of(text: str) -> Any:
    """The value that LLaMA Factory reads from the part after `key=`; None for an empty one.

    Raises:
        ValueError: it is not YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
