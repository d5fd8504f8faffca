"""The folders of the demo's models: built once, whole or not at all."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prmkit.errors import DataError
from prmkit.files import read_json, write_json

RECIPE_FILE = "recipe.json"


def build_once(folder: Path, recipe: Mapping[str, Any], build: Callable[[Path], None]) -> bool:
    """Build a model folder, unless it holds the one of this recipe already.

    Args:
        folder: of the model.
        recipe: everything that the model depends on.
        build: writes the model into the folder that it is given.

    Returns:
        Whether it was built now.

    Raises:
        DataError: `folder` holds something that is not a model of the demo.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / RECIPE_FILE).exists():
            raise DataError(f"{folder}: holds something that is not the demo's model. Choose another folder.")
        if read_json(folder / RECIPE_FILE) == recipe:
            return False
    # Built beside its place and moved there at the end, so a folder of this name is always whole.
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    build(unfinished)
    write_json(unfinished / RECIPE_FILE, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return True
