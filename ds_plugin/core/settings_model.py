"""The pydantic base of every section this project reads, and how its errors are worded. Unknown keys are forbidden and
defaults validated, as by DeepSpeed; but values are not coerced (``"8"`` is not 8, nor ``true`` 1), and nothing is
dropped in silence (DeepSpeed drops ``"auto"``)."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field
from pydantic_core import ErrorDetails

from ds_plugin.core.errors import ConfigError

Section = TypeVar("Section", bound=pydantic.BaseModel)

# Every number has an upper limit: what no run reaches, far below where loops, memory or arithmetic give way.
Steps = Annotated[int, Field(ge=1, le=10**9)]  # three years at ten steps a second
Waiting = Annotated[int, Field(ge=1, le=10_000)]  # of each step a loss waits on the device until it is read
Tokens = Annotated[int, Field(ge=1, le=10**15)]  # twenty-five times what the largest runs train
Length = Annotated[int, Field(ge=1, le=2**24)]  # of a sample in tokens; the longest contexts have ten million
Width = Annotated[int, Field(ge=1, le=2**20)]
Heads = Annotated[int, Field(ge=1, le=10_000)]  # and experts
Layers = Annotated[int, Field(ge=1, le=10_000)]
Ranks = Annotated[int, Field(ge=1, le=100_000)]
MOST_RATE = 1e3  # of learning rates, weight decay and eps: weights overflow soon above it
Rate = Annotated[float, Field(ge=0, le=MOST_RATE)]
Ratio = Annotated[float, Field(ge=1e-6, le=1e6)]
LossRatio = Annotated[float, Field(gt=1.0, le=1e3)]  # a thousand times the lowest loss is no spike but the end


class SectionConfig(pydantic.BaseModel):
    """One section of the JSON: strict types, unknown keys rejected, immutable once read."""

    model_config = {"extra": "forbid", "strict": True, "frozen": True, "validate_default": True, "allow_inf_nan": False}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name a user most likely meant, or None when nothing is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def parse_section(model: type[Section], name: str, raw: Any) -> Section:
    """Validate the JSON value ``raw`` of section ``name``. Raises ConfigError: one message listing every wrong field as
    ``section.field``, the value it got, and the remedy."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f'"{name}" must be a JSON object like {{"enabled": true}}, got {raw!r}')
    try:
        return model.model_validate(dict(raw))
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_sentence(model, name, item) for item in error.errors())) from None


def _sentence(model: type[pydantic.BaseModel], name: str, item: ErrorDetails) -> str:
    location = [str(part) for part in item["loc"]]
    field = ".".join(filter(None, [name, *location]))
    kind, value, context = item["type"], repr(item["input"]), item.get("ctx", {})
    value = value if len(value) <= 300 else f"{value[:300]}..."
    if kind in ("extra_forbidden", "missing"):
        fields = _model_at(model, location[:-1]).model_fields
        if kind == "missing":
            found = fields[location[-1].replace("-", "_")]  # where it has an alias
            return f"{field}: missing; write {found.description or 'a value'}"
        guess = nearest(location[-1], sorted(fields))
        hint = f'did you mean "{guess}"?' if guess else f"known keys are {', '.join(sorted(fields))}"
        return f"{field}: unknown key (value {value}); {hint}"
    if kind in ("model_type", "dict_type"):
        return f"{field}: {value}; write a JSON object {{...}}, or leave it out"
    if kind == "value_error":  # our own validators word the whole remedy
        return f"{field}: {context['error']}" if location else str(context["error"])
    return f"{field}: {item['msg'][0].lower()}{item['msg'][1:]}, got {value}"


def _model_at(model: type[pydantic.BaseModel], path: list[str]) -> type[pydantic.BaseModel]:
    for part in path:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(o for o in options if isinstance(o, type) and issubclass(o, pydantic.BaseModel))
    return model
