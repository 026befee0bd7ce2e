# SPDX-License-Identifier: Apache-2.0
"""From a YAML file and a command line to a :class:`TrainConfig`, with sentences for what does not fit."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fvm_fast.configs.schema import TrainConfig

_FOLDER = Path(__file__).parent
_RESUME = "'auto' continues the newest valid checkpoint of the run folder; or the path of a checkpoint"


def bundled_configs() -> list[str]:
    """Names that ``--config`` takes besides paths."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_config(name_or_path: str) -> Path:
    """The file of a bundled configuration or of a path.

    Raises:
        FileNotFoundError: neither exists; names the nearest bundled one.
    """
    for path in (Path(name_or_path), _FOLDER / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name_or_path, bundled_configs(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
        f"--config: no file and no bundled configuration is called {name_or_path!r}; {hint}"
        f"bundled: {', '.join(bundled_configs())}"
    )


def parse_config(argv: Sequence[str]) -> tuple[TrainConfig, str | None]:
    """Read the command line of ``fvm-fast train``.

    Returns:
        The configuration, and the value of ``--resume`` (None when not given).

    Raises:
        ImportError: jsonargparse is not installed.
        ValueError: an unknown key, or a value of the wrong type.
        FileNotFoundError: the configuration file is missing.
    """
    parser = _parser()
    try:
        namespace = parser.parse_args(_with_paths(argv))
    except argparse.ArgumentError as error:
        raise ValueError(_sentence(str(error))) from None
    config = parser.instantiate(namespace)
    stored = Path(config.run.out or ".") / "config.yaml"
    if config.resume and not config.config and config.run.out and stored.is_file():
        return parse_config(["--config", str(stored), *argv])  # a run that goes on, goes on as it was
    sections = {section.name: config[section.name] for section in dataclasses.fields(TrainConfig)}
    return TrainConfig(**sections), config.resume


def to_yaml(config: TrainConfig) -> str:
    """The configuration as a YAML file that ``--config`` reads back to the same values."""
    import yaml

    plain = dataclasses.asdict(config)
    plain["optimizer"]["betas"] = list(plain["optimizer"]["betas"])
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def _parser() -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        raise ImportError(
            "training reads its configuration with jsonargparse, which is not installed: pip install 'fvm_fast[train]'"
        ) from None
    parser = ArgumentParser(
        prog="fvm-fast train", exit_on_error=False, description="Train a model; evaluate it; draw the figures."
    )
    parser.add_argument("--config", action="config", help=f"a path, or one of: {', '.join(bundled_configs())}")
    parser.add_argument("--resume", type=str | None, default=None, help=_RESUME)
    for section in dataclasses.fields(TrainConfig):
        factory = section.default_factory
        parser.add_class_arguments(factory, section.name)
    return parser


def _with_paths(argv: Sequence[str]) -> list[str]:
    """Replace the name of a bundled configuration by its path."""
    words, previous = [], ""
    for word in argv:
        if previous == "--config":
            word = str(find_config(word))
        elif word.startswith("--config="):
            word = f"--config={find_config(word.removeprefix('--config='))}"
        words.append(word)
        previous = word
    return words


def _sentence(message: str) -> str:
    """Turn the parser's message into one that says what was expected, what was got, and what is near."""
    text = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (\S+)", text):
        return f"there is no option {found[1]}{_near(found[1].lstrip('-'))}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '(\w+)'", text):
        return f"the configuration has no key {found[1]}.{found[2]}{_near(f'{found[1]}.{found[2]}')}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        return f"the configuration has no key {found[1]}{_near(found[1])}"
    if found := re.search(r"Parser key \"([\w.]+)\": Expected a <class '(\w+)'>. Got value: (.*)", text):
        return f"{found[1]} should be of type {found[2]}, got {found[3]}"
    return text


def _near(key: str) -> str:
    near = difflib.get_close_matches(key, list(_keys()), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; fvm-fast train --help lists them all"


def _keys() -> Iterator[str]:
    for section in dataclasses.fields(TrainConfig):
        for option in dataclasses.fields(section.default_factory):
            yield f"{section.name}.{option.name}"
