"""Writes docs/reference/settings.md and command_lines.md from the library: ``python docs/hooks/reference.py``.

The settings come from the pydantic models of the JSON's sections, the commands from argparse. Both pages are committed,
so that they can be read without the site; `tests/unit/test_documents.py` compares them with what this file makes of the
library today.
"""

import argparse
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import pydantic
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[2]
_WHOLE = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_GENERATED = "<!-- Written by docs/hooks/reference.py from the library; change it there. -->\n"
#: on a phone each row is read as a paragraph (docs/stylesheets/extra.css)
_STACKED = '<div class="stacked {}" markdown>\n\n'

INTRODUCTION = f"""{_GENERATED}
# Settings

One JSON file holds DeepSpeed's own config and up to three sections more, one for each method. A section that is absent,
or has `"enabled": false`, changes nothing. In Megatron-LM and Megatron-Bridge the file holds the sections alone.

The sections are validated before anything is built. An unknown key, a wrong type, a number out of its range or a
conflict between two settings is one error that names the field, the value it got and what to write. Values are not
coerced: `"8"` is not 8, and `true` is not 1.

"""

OF_THE_SCRIPT = """The two sections below are read by `launch_scripts/pretrain_gpt.py` alone, the example application.
[`configs/quickstart.json`](../../configs/quickstart.json) is a complete file of it.
"""

OF_THE_COMMAND = """`ds-plugin` and `python -m ds_plugin` are the same command. What can be mended, a wrong argument or
file, is one line on stderr and exit code 2; Ctrl-C is exit code 130. `ds-plugin COMMAND --help` prints the same.
"""

OF_MEGATRON = """`python -m megatron_patches SCRIPT.py ... --ds-plugin-config FILE` runs a script of Megatron-LM's with
the methods of FILE; so does `ds-plugin run --config FILE SCRIPT.py ...`. The rest of the line is the script's own.
`--ds-plugin-no-verify` leaves out the comparison of a checkpoint's files with what was saved.
"""

OF_PRETRAIN_GPT = """The example application, which `bash launch_scripts/quickstart.sh` starts with the same arguments.
Flags override the JSON.
"""


def type_of(annotation: Any, metadata: list[Any]) -> str:
    """A field's type in words, with its bounds: ``whole number, 1 to 1000``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_of(arguments[0], [*arguments[1:], *metadata])
    if origin in (typing.Union, types.UnionType):
        words = [type_of(each, metadata) for each in arguments if each is not type(None)]
        joint = "; or " if any("," in each for each in words) else " or "
        return joint.join([*words, *(["null"] if type(None) in arguments else [])])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(each)}`" for each in arguments)
    if origin is list:
        return f"list of {_plural(type_of(arguments[0], []))}{_most(metadata)}"
    if origin is dict:
        return f"object of {_plural(type_of(arguments[0], []))} to {_plural(type_of(arguments[1], []))}"
    if inspect.isclass(annotation) and issubclass(annotation, pydantic.BaseModel):
        return "object, below"
    bounds = _bounds(metadata) if annotation in (int, float) else ""
    return f"{_WHOLE[annotation]}{bounds}"


def _plural(words: str) -> str:
    head, comma, bounds = words.partition(",")
    return f"{head if head.startswith('text') else f'{head}s'}{comma}{bounds}"


def _most(metadata: list[Any]) -> str:
    most = next((each.max_length for each in _flat(metadata) if isinstance(each, annotated_types.MaxLen)), None)
    return "" if most is None else f"; at most {most:,} of them"


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _flat(each.metadata)
        elif isinstance(each, annotated_types.GroupedMetadata):
            yield from each
        else:
            yield each


def _bounds(metadata: list[Any]) -> str:
    low: list[tuple[Any, str]] = []
    high: list[tuple[Any, str]] = []
    for each in _flat(metadata):
        if isinstance(each, annotated_types.Ge):
            low.append((each.ge, f"{_number(each.ge)}"))
        elif isinstance(each, annotated_types.Gt):
            low.append((each.gt, f"above {_number(each.gt)}"))
        elif isinstance(each, annotated_types.Le):
            high.append((each.le, f"{_number(each.le)}"))
        elif isinstance(each, annotated_types.Lt):
            high.append((each.lt, f"below {_number(each.lt)}"))
    if not low and not high:
        return ""
    least, most = max(low, default=(0, ""))[1], min(high, default=(0, ""))[1]
    return f", {least} to {most}" if least and most else f", at least {least}" if least else f", at most {most}"


def _number(value: Any) -> str:
    if isinstance(value, float) and (value >= 1e6 or 0 < value < 1e-3):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def default_of(field: FieldInfo) -> str:
    """A field's default as JSON; ``required`` where there is none."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, pydantic.BaseModel):
        default = default.model_dump(mode="json")
    return f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    """Text that a table's cell and HTML may hold."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    for each in (annotation, *typing.get_args(annotation)):
        if inspect.isclass(each) and issubclass(each, pydantic.BaseModel):
            yield each


def table_of(model: type[pydantic.BaseModel], name: str, level: int = 2) -> Iterator[str]:
    """The lines of a section: its table, and those of the sections in it."""
    yield f"{'#' * level} `{name}`\n"
    yield f"{inspect.cleandoc(model.__doc__ or '')}\n"
    yield f"{_STACKED.format('settings')}| setting | type | default | meaning |\n|---|---|---|---|"
    inner = []
    for key, field in model.model_fields.items():
        if not field.description:
            raise ValueError(f"{model.__name__}.{key} has no description; write Field(..., description=...)")
        key = field.alias or key
        kind = type_of(field.annotation, field.metadata)
        yield f"| `{key}` | {kind} | {default_of(field)} | {_cell(field.description)} |"
        inner += [(each, f"{name}.{key}") for each in _models_in(field.annotation)]
    yield "\n</div>\n"
    for each, where in inner:
        yield from table_of(each, where, level + 1)


def settings_page() -> str:
    """docs/reference/settings.md."""
    from ds_plugin.config import SECTIONS
    from ds_plugin.sequence_length_warmup.config import PRESETS, SCHEDULES
    from launch_scripts.gpt.settings import TrainingConfig
    from megatron_patches.models.gpt import GPTConfig

    lines: list[str] = []
    for name, model in SECTIONS.items():
        lines += table_of(model, name)
        if name == "sequence_length_warmup":
            lines.append(f"The built-in schedules are {', '.join(f'`{json.dumps(each)}`' for each in SCHEDULES)}.\n")
            lines += [
                f'`"preset": {json.dumps(key)}` stands for `{json.dumps(value)}`.\n' for key, value in PRESETS.items()
            ]
    lines.append("## The example application\n")
    lines.append(OF_THE_SCRIPT)
    lines += [*table_of(GPTConfig, "model", 3), *table_of(TrainingConfig, "training", 3)]
    return INTRODUCTION + "\n".join(lines).rstrip() + "\n"


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """name -> (parser, what it does)."""
    for action in parser._actions:  # argparse has no public way to ask
        if isinstance(action, argparse._SubParsersAction):
            said = {each.dest: each.help or "" for each in action._choices_actions}
            return {name: (each, said[name]) for name, each in action.choices.items()}
    return {}


def _written(action: argparse.Action) -> str:
    """An argument as one writes it."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = ""
    if action.nargs != 0:
        name = action.metavar or (
            f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
        )
        value = f" {name}"
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.required and action.nargs not in ("*", argparse.REMAINDER):
        return "required"
    if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
        return ""
    default = action.default
    text = ",".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)
    return f"`{text}`" if text and action.dest != "workers" else ""  # of merge, it is the machine's


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"{_STACKED.format('arguments')}| argument | default | meaning |\n|---|---|---|"
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        said, default = (action.help or "").replace("%(default)s", str(action.default)), _default(action)
        said = re.sub(r" \(default [^)]*\)$", "", said) if default else said  # it has a column
        yield f"| {_written(action)} | {default} | {_cell(said)} |"
    yield "\n</div>\n"


def command_lines_page() -> str:
    """docs/reference/command_lines.md."""
    from ds_plugin.cli.main import command_line
    from launch_scripts.gpt import settings

    parser = command_line()
    commands = _subparsers(parser)
    lines = [f"{_GENERATED}\n# Command lines\n", OF_THE_COMMAND]
    lines.append("| command | what it does |\n|---|---|")
    lines += [f"| [`ds-plugin {name}`](#ds-plugin-{name}) | {_cell(said)} |" for name, (_, said) in commands.items()]
    lines.append("")
    for name, (each, said) in commands.items():
        lines.append(f"## ds-plugin {name}\n")
        lines.append(f"What it does: {said}.\n")
        if any(not isinstance(action, argparse._HelpAction) for action in each._actions):
            lines += _arguments(each)
    lines += ["## python -m megatron_patches\n", OF_MEGATRON]
    lines += ["## launch_scripts/pretrain_gpt.py\n", OF_PRETRAIN_GPT]
    lines += _arguments(settings.parser())
    return "\n".join(lines).rstrip() + "\n"


def flags() -> dict[str, set[str]]:
    """What may follow each command, ``ds-plugin NAME`` by its name and a script by its path."""
    from ds_plugin.cli.main import command_line
    from launch_scripts.gpt import settings

    parsers = {name: parser for name, (parser, _) in _subparsers(command_line()).items()}
    parsers["launch_scripts/pretrain_gpt.py"] = settings.parser()
    return {name: {flag for a in parser._actions for flag in a.option_strings} for name, parser in parsers.items()}


PAGES = {"docs/reference/settings.md": settings_page, "docs/reference/command_lines.md": command_lines_page}


def main() -> int:
    """Write both pages."""
    sys.path.insert(0, str(ROOT))
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
