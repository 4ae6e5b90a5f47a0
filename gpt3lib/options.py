"""The options of a command: one dataclass, read from typed words or from a file of
YAML."""

# Made from book/k_options.ipynb by tools/export.py; edit the chapter.
import math
import os
import re
from contextlib import redirect_stderr, suppress
from dataclasses import fields, replace
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Annotated

import tyro
import yaml
from tyro.constructors import PrimitiveConstructorSpec


class CommandError(ValueError):
    """A command that cannot be done; the message says what would be right."""


UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def amount(text: str) -> int:
    """A whole number as people write it: 20000000, 20_000_000, 2e7 or 20M."""
    digits = r"((?:\d+(?:_\d+)*)?\.?\d+(?:e\d\d?)?)([kmb]?)"
    found = re.fullmatch(digits, text.strip().lower(), re.ASCII)
    number = Fraction(found[1]) * UNITS[found[2]] if found else Fraction(1, 2)
    if number.denominator > 1 or number >= 2**63:
        right = "write 20000000, 2e7 or 20M"
        raise ValueError(f"{text!r} is no whole number that fits; {right}")
    return int(number)


def option(kind, metavar: str, words: str, *marks, name: str | None = None):
    """The type of a field, with what --help says of it; kind int reads 20M too.

    name: of the option, where it is not the field's, as for from, a word of Python.
    """
    about = {"metavar": metavar, "help": words, "help_behavior_hint": ""}
    about = tyro.conf.arg(name=name, **about)
    if kind is int:
        spec = PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda texts: amount(texts[0]),
            is_instance=lambda value: isinstance(value, int),
            str_from_instance=lambda value: [str(value)],
        )
        return Annotated[int | None, spec, about, *marks]
    return Annotated[kind, about, *marks]


FIRST = tyro.conf.Positional  # it stands without a --name


def about_option(field):
    """What `option` told of a dataclass's field: its name, metavar and help."""
    return next(mark for mark in field.type.__metadata__ if hasattr(mark, "help"))


def called(field) -> str:
    """The name of a field's option."""
    return about_option(field).name or field.name


def short(box: str) -> str:
    """What tyro says in a box, as one line."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    while lines and not lines[0].strip("─╭╮╰╯-+"):  # a rule, or nothing
        lines = lines[1:]
    ends = [i for i, line in enumerate(lines) if not line.strip("─╭╮╰╯-+")]
    said = " ".join(lines[: min(ends, default=None)])
    with suppress(ValueError):
        guess = lines[lines.index("Perhaps you meant:") + 1]
        said += f"; perhaps you meant {guess.split()[0]}"
    return said


PATHS = {"FILE", "FILE.yaml", "FILE.jsonl", "FOLDER", "PATH", "MODEL", "TASK"}


def at_home(config):
    """The config with each ~ as one's home: in --out=~/x no shell reads it so."""
    told, home = {}, os.path.expanduser
    for field in fields(config):
        value, what = getattr(config, field.name), about_option(field).metavar
        if value and what.partition(" ")[0] in PATHS:
            single = isinstance(value, str)
            told[field.name] = home(value) if single else tuple(map(home, value))
    return replace(config, **told)


def ask(kind: type, arguments: list[str], default=None, name: str | None = None):
    """A command's config out of its arguments. Raises CommandError.

    default: a config that holds where nothing is typed; name: of the command, else that
    of the config: TrainConfig is of train.
    """
    name = name or kind.__name__.removesuffix("Config").lower()
    said, marks = StringIO(), [tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone]
    ways = {"prog": f"gpt3 {name}", "use_underscores": True, "config": marks}
    ways |= {} if default is None else {"default": default}
    try:
        with redirect_stderr(said):
            return at_home(tyro.cli(kind, args=arguments, **ways))
    except SystemExit as end:
        if not end.code:
            raise  # --help has been printed
        told = short(said.getvalue())
        found = re.match(r"Error parsing (--\S+): '(.*)' is no whole number", told)
        if found and "tokens" not in found[1]:  # nobody writes an epoch as 20M
            right = "it must be a whole number without a sign, such as 3"
            told = f"{found[1]} is {found[2]}; {right}"
        words = f"{told}; `gpt3 {name} --help` tells what there is"
        raise CommandError(words) from None


def as_arguments(kind: type, settings: dict, source) -> list[str]:
    """The fields of a YAML file as one would type them. Raises CommandError.

    kind: the command's dataclass, which has a field `config` of its own, the file.
    """
    switch = yaml.SafeLoader.bool_values  # true, yes, on, false, no, off
    known = {called(f): f for f in fields(kind) if f.name != "config"}
    arguments, names = [], ", ".join(known)
    for name, value in settings.items():
        if name not in known:
            raise CommandError(f"{source}: no field {name!r}; there are {names}")
        values = value if isinstance(value, list) else [value]
        default = known[name].default
        if isinstance(value, list) and default != ():
            raise CommandError(f"{source}: {name} must be one value, not a list")
        if any(isinstance(item, dict | list) for item in values):
            raise CommandError(f"{source}: {name} must be plain, not names in names")
        if isinstance(value, list):
            arguments += [f"--{name}", *value] if value else []
        elif default is False:
            if value.lower() not in switch:
                raise CommandError(f"{source}: {name} is {value}, not true or false")
            arguments += [f"--{name}"] * switch[value.lower()]
        elif value not in ("", "~", "null"):
            first = FIRST in known[name].type.__metadata__
            arguments.append(value if first else f"--{name}={value}")
    return arguments


def read_yaml(path: str | Path) -> dict:
    """The fields in a YAML file, each as it was typed. Raises CommandError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found, node = (f(text, yaml.BaseLoader) for f in (yaml.load, yaml.compose))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CommandError(f"{path} is no YAML that can be read: {error}") from error
    if not isinstance(found, dict):
        raise CommandError(f"{path} must hold lines such as `n_tokens: 20M`")
    names = [key.value for key, _ in node.value]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CommandError(f"{path}: {min(twice)} stands there twice; keep one line")
    return found


def write_yaml(config, path: str | Path) -> None:
    """A config as YAML, from which `as_arguments` makes it again."""
    from gpt3lib.files import write_beside

    told = {called(f): getattr(config, f.name) for f in fields(config)}
    told = {k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}
    told |= {k: "inf" for k, v in told.items() if v == math.inf}  # as one types it
    told.pop("config", None)
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    write_beside(path, text.encode())
