"""Options: a dataclass field has the type, range, default and help of an option.

    @dataclass(frozen=True)
    class MapOptions:
        p: Annotated[float, option("Exponent of the attention map.", ge=1)] = 2.0

The flag `--p`, its help and the checks of YAML values and Python arguments all use this line. The
classes are plain dataclasses, which torch.compile can trace; pydantic checks them from outside.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from .errors import UserError, nearest, shown

T = TypeVar("T")
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def option(
    description: str,
    *,
    expected: str | None = None,
    default_text: str | None = None,
    allow_inf: bool = False,
    changes_numbers: bool = True,
    aliases: tuple[str, ...] = (),
    positional: bool = False,
    **bounds: float,
) -> FieldInfo:
    """The metadata of an option, for `Annotated`.

    Args:
        description: the help text, a sentence.
        expected: describes the valid values in errors; by default from the type and the bounds.
        default_text: the default in the help, if the default value does not explain itself.
        allow_inf: whether a number may be infinite.
        changes_numbers: whether a run cannot be continued with another value.
        aliases: other spellings of the flag.
        positional: whether the command line takes it without a flag.
        bounds: `ge`, `gt`, `le`, `lt`.
    """
    extra: dict[str, Any] = {
        "expected": expected,
        "default_text": default_text,
        "changes_numbers": changes_numbers,
        "aliases": aliases,
        "positional": positional,
        "bounds": dict(bounds),
    }
    numeric: dict[str, Any] = {"allow_inf_nan": False} if bounds and not allow_inf else {}
    return Field(description=description, json_schema_extra=extra, **numeric, **bounds)  # type: ignore[arg-type, no-any-return, call-overload]


def comma_separated(value: Any) -> Any:
    """`"1,2"` -> `["1", "2"]`; other values are returned unchanged."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


def by_method(value: Any) -> Any:
    """`"at=1000,symmetry=1"` -> `{"at": "1000", "symmetry": "1"}`; other values unchanged."""
    if not isinstance(value, str) or "=" not in value:
        return value
    by_name: dict[str, str] = {}
    for part in value.split(","):
        name, _, word = part.partition("=")
        if name.strip() in by_name:
            raise ValueError("a name is given twice")
        by_name[name.strip()] = word.strip()
    return by_name


def _refuse_bool(value: Any) -> Any:
    """Refuses a bool, because pydantic converts True to 1."""
    if isinstance(value, bool):
        raise ValueError("a bool is no number")
    return value


def _refuse_float(value: Any) -> Any:
    """Refuses a float, because pydantic converts 1.0 to 1."""
    if isinstance(value, float):
        raise ValueError("a float is no whole number")
    return _refuse_bool(value)


INT_LIMIT = 1 << 63  # PyTorch's integers have 64 bits
# Text is converted to a number: flags are text, and YAML reads 5e-4 as text.
Int = Annotated[int, BeforeValidator(_refuse_float), Field(lt=INT_LIMIT)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]
Bool = StrictBool
Numbers = Annotated[tuple[Float, ...], BeforeValidator(comma_separated)]
DEEPEST = 256  # Python creates the folders of a path recursively

AUTO = "auto"  # a value that the package computes


@dataclasses.dataclass(frozen=True)
class OptionSpec:
    """One option, for the command line and for errors."""

    key: str
    kind: type  # bool, int, float, str or tuple; dict for a value for each method
    choices: tuple[str, ...]
    default: Any
    help: str
    expected: str
    default_text: str | None
    changes_numbers: bool
    flags: tuple[str, ...]
    positional: bool

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


@cache
def option_specs(cls: type) -> dict[str, OptionSpec]:
    """The options of a dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _spec(f, hints[f.name]) for f in dataclasses.fields(cls)}


def own_options(cls: type) -> Iterator[OptionSpec]:
    """The options that a dataclass adds to those of its bases."""
    own = inspect.get_annotations(cls)
    return (spec for key, spec in option_specs(cls).items() if key in own)


def _spec(field: dataclasses.Field[Any], hint: Any) -> OptionSpec:
    hint, *metadata = typing.get_args(hint)
    info = metadata[-1]  # the type itself may have constraints before it
    assert isinstance(info, FieldInfo), field.name
    extra = typing.cast(dict[str, Any], info.json_schema_extra)
    kind, choices = _kind(hint)
    return OptionSpec(
        key=field.name,
        kind=kind,
        choices=choices,
        default=field.default,
        help=str(info.description),
        expected=extra["expected"] or _expected(kind, choices, extra["bounds"]),
        default_text=extra["default_text"],
        changes_numbers=extra["changes_numbers"],
        flags=("--" + field.name.replace("_", "-"), *extra["aliases"]),
        positional=extra["positional"],
    )


def _kind(hint: Any) -> tuple[type, tuple[str, ...]]:
    """The plain type of an annotation, without None, and the choices of a Literal."""
    if typing.get_origin(hint) is Annotated:
        return _kind(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        members = [m for m in typing.get_args(hint) if m is not types.NoneType]
        if len(members) > 1:
            return dict, ()
        return _kind(members[0])
    return typing.get_origin(hint) or hint, ()


def _expected(kind: type, choices: tuple[str, ...], bounds: Mapping[str, float]) -> str:
    if choices:
        return f"one of {', '.join(choices)}"
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    limits = " and ".join(f"{_BOUNDS[name]} {value:g}" for name, value in bounds.items())
    return f"{noun.get(kind, 'a list of numbers')} {limits}".rstrip()


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """A checked instance of an options dataclass.

    Raises:
        UserError: for an unknown key and for a wrong value; the nearest valid one is named.
    """
    specs = option_specs(cls)  # type: ignore[arg-type]  # python/mypy#11470
    for key in values:
        if key not in specs:
            raise UserError(
                f"unknown option {key!r}{nearest(key, specs)} (options: {', '.join(specs)})"
            )
        value = values[key]
        for text in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(text, str | Path):
                _check_text(specs[key], str(text))
    try:
        return typing.cast(T, _adapter(cls).validate_python(dict(values)))  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(_explain(specs[str(first["loc"][0])], values)) from None


def _check_text(spec: OptionSpec, text: str) -> None:
    """Raises `UserError` for text that cannot name a file, before anything is computed."""
    if "\0" in text:
        raise UserError(f"{spec.key} is {text!r}: expected text without the character NUL")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UserError(f"{spec.key} is {text!r}: expected valid Unicode text") from None
    if text.isspace() or (spec.kind is Path and not text):
        raise UserError(f"{spec.key} is {text!r}: expected text that is not blank")
    if spec.kind is Path and len(Path(text).parents) > DEEPEST:
        raise UserError(
            f"{spec.key} is {shown(text)}: expected a path of at most {DEEPEST} folders"
        )


def _explain(spec: OptionSpec, values: Mapping[str, Any]) -> str:
    if spec.key not in values:
        return f"{spec.flags[0]} is required: {spec.help}"
    value = values[spec.key]
    hint = nearest(str(value), spec.choices)
    text = _shown(value)
    # 2^63 has 19 digits.
    if spec.kind is int and len(text) > 18:
        hint = ", below 2^63"
    return f"{spec.key} is {text}: expected {spec.expected}{hint}"


def _shown(value: Any) -> str:
    """A value for a message; a number that was given as text is shown as a number."""
    try:
        float(value)
    except OverflowError:
        return "a number of over 300 digits"
    except (TypeError, ValueError):
        return shown(value)
    return str(value)


def checked(options: T) -> T:
    """The options, if every value is valid.

    Raises:
        UserError: for a wrong value.
    """
    for key, spec in option_specs(type(options)).items():  # type: ignore[arg-type]
        # pydantic converts "2" to 2: right for YAML and the command line, a mistake in Python.
        if spec.kind in (int, float) and isinstance(getattr(options, key), str):
            raise UserError(_explain(spec, vars(options)))
    return from_mapping(type(options), vars(options))


def subset(options: Any, cls: Callable[..., T]) -> T:
    """An instance of the dataclass `cls` with the values of the larger `options`."""
    return cls(**{key: getattr(options, key) for key in option_specs(cls)})  # type: ignore[arg-type]
