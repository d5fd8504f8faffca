"""A configuration as LLaMA Factory reads it: one flat YAML of its keys, and `key=value` texts that go before it."""

from pathlib import Path
from typing import Any

from prmkit.errors import UsageError


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config the way LLaMA Factory does: `1e-4` is a float, a key may stand only once, `${x}` is plain text.

    Raises:
        UsageError: the file is missing, not YAML, or not a mapping; line and column are named where YAML knows them.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a YAML that LLaMA Factory can read. {_one_line(error)}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or 'not a mapping of keys to values'}.") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: not a mapping of keys to values.")
    return {str(key): value for key, value in loaded.items()}


def split_assignment(text: str) -> tuple[str, str]:
    """The key and the value of `key=value`, split at the first `=`; a leading `--` is forgiven.

    Raises:
        UsageError: there is no `=`, or nothing before it.
    """
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key.strip():
        raise UsageError(f"'{text}' is not key=value. Write for example lora_rank=32.")
    return key.strip(), value


def value_of(text: str) -> Any:
    """What LLaMA Factory takes the text behind `key=` for; None for an empty one.

    Raises:
        ValueError: the text is not YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
