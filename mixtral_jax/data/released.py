"""The tokenizers that Mistral released, in the files of the package mistral-common.

mistral-v1 (32,000 pieces) belongs to Mixtral 8x7B and its Instruct, mistral-v3 (32,768 pieces) to
Mixtral 8x22B Instruct.
"""

from __future__ import annotations

import importlib.util
import pathlib

from mixtral_jax.config import InputError

VERSIONS = {f"mistral-{version}": version for version in ("v1", "v2", "v3")}


def released_file(name: str) -> pathlib.Path | None:
    """The file of a released tokenizer, or None if the name is not one of VERSIONS.

    The package is looked at and not imported, which would take seconds.

    Raises:
      InputError: if the package is not installed, or holds no such file.
    """
    if name not in VERSIONS:
        return None
    spec = importlib.util.find_spec("mistral_common")
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        found = sorted(pathlib.Path(folder, "data").glob(f"*.model.{VERSIONS[name]}"))
        if found:
            return found[-1]  # names carry dates
    missing = f"the installed mistral-common has no file for it: {folders[0]}" if folders else ""
    raise InputError(
        f"tokenizer {name}: {missing or 'pip install mistral-common'}, or give the path of a file"
    )
