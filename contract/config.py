"""The one configuration of an experiment: defaults < TOML file < command line. `contract.settings` has the settings."""

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from pathlib import Path

from contract import texts, urls
from contract.settings import Config

URLS = ("tracking.uri", "data.shards_url")  # settings that are URLs; others may hold one
# Settings that are a path, or may be one.
_PATHS = ("work", "data.path", "data.shards_url", "etl.tokenizer", "model.init", "tracking.uri")


def fields(cls=Config, prefix: str = ""):
    """Yields (dotted key, type, dataclass field) of every setting."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name], f


def flatten(config: Config) -> dict:
    """{dotted key: value} of every setting, in the order of the definition."""
    flat = {}
    for key, _, _ in fields():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = value
    return flat


def section(config: Config, *names: str) -> dict:
    """The JSON-ready settings of the named sections, {dotted key: value}."""
    flat = flatten(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items() if k.split(".")[0] in names}


def load(path: str, overrides: dict[str, str] | None = None) -> Config:
    """Reads a TOML file and applies `{dotted key: text}` from the command line.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown key, wrong type, value out of its choices or out of range.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"config {path} does not exist; configs/ holds those that come with the project")
    try:
        tables = tomllib.loads(texts.read_text(file))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one; so is a number of thousands of digits
        raise ValueError(f"config {path} is not valid TOML: {error}") from None
    values = {"name": file.stem, **_flatten_toml(tables)}
    types_ = {key: (type_, f) for key, type_, f in fields()}
    for key in [*values, *(overrides or {})]:
        if key not in types_:
            near = difflib.get_close_matches(key, types_, n=1, cutoff=0)[0]
            raise ValueError(f"unknown setting '{key}' in {path} or on the command line; did you mean '{near}'?")
    values = {key: _checked(key, value, *types_[key]) for key, value in values.items()}
    for key, text in (overrides or {}).items():
        values[key] = _checked(key, _parsed(key, text, types_[key][0]), *types_[key])
    values["work"] = values.get("work") or f"runs/{values['name']}"
    values |= {key: _at_home(values[key]) for key in _PATHS if key in values}
    config = _build(Config, values)
    if "history.order" not in values and not config.etl.in_time_order:
        config = replace(config, {"history.order": "set"})
    _check(config)
    return config


def _at_home(path: str) -> str:
    """`~` at the beginning is the home folder: a shell leaves it as it is in --work=~/runs, and so does TOML."""
    scheme = "sqlite:///" if path.startswith("sqlite:///~") else ""
    return scheme + os.path.expanduser(path.removeprefix(scheme))


def replace(config: Config, changes: dict) -> Config:
    """The config with {dotted key: value} changed. Raises ValueError when the settings do not go together."""
    changed = _build(Config, flatten(config) | changes)
    _check(changed)
    return changed


def to_toml(config: Config) -> str:
    """The resolved config as a TOML file that `load` reads."""
    lines, table = [], ""
    for key, value in flatten(config).items():
        head, _, name = key.rpartition(".")
        if head != table:
            lines += ["", f"[{head}]"]
            table = head
        lines.append(f"{name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        # JSON's strings are TOML's, but for one control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _flatten_toml(tables: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            flat |= _flatten_toml(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _parsed(key: str, text: str, type_):
    """A command-line text as a value of the type; tuples are separated by commas."""
    if isinstance(type_, types.GenericAlias):
        element = typing.get_args(type_)[0]
        return tuple(_parsed(key, part.strip(), element) for part in text.split(",") if part.strip())
    if type_ is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text}: must be true or false")
        return text.lower() == "true"
    try:
        return type_(text)
    except ValueError:
        raise ValueError(f"{key}={text}: must be of type {type_.__name__}") from None


def _checked(key: str, value, type_, f):
    if isinstance(type_, types.GenericAlias):
        element = typing.get_args(type_)[0]
        if element is float and isinstance(value, (list, tuple)):
            value = [float(v) if type(v) is int else v for v in value]
        if not isinstance(value, (list, tuple)) or not all(type(v) is element for v in value):
            raise ValueError(f"{key} = {value!r}: must be a list of {element.__name__}")
        if element is float and not all(map(math.isfinite, value)):
            raise ValueError(f"{key} = {list(value)}: must be finite numbers")
        choices = f.metadata["choices"]
        if choices and (unknown := [v for v in value if v not in choices]):
            raise ValueError(f"{key} = {list(value)}: {unknown[0]!r} is none of {', '.join(map(repr, choices))}")
        return tuple(value)
    if type_ is float and type(value) is int:
        value = float(value)
    if type(value) is not type_:
        raise ValueError(f"{key} = {value!r}: must be of type {type_.__name__}")
    if type_ is float and not math.isfinite(value):
        raise ValueError(f"{key} = {value}: must be a finite number")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{key} = {value!r}: must be one of {', '.join(repr(c) for c in choices)}")
    low, high = f.metadata["low"], f.metadata["high"]
    if low is not None and not low <= value <= (math.inf if high is None else high):
        raise ValueError(f"{key} = {value}: must be {low} or more" + (f", at most {high}" if high is not None else ""))
    return value


def _build(cls, values: dict, prefix: str = ""):
    hints = typing.get_type_hints(cls)
    arguments = {}
    for f in dataclasses.fields(cls):
        key = prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _build(hints[f.name], values, key + ".")
        elif key in values:
            arguments[f.name] = values[key]
    return cls(**arguments)


def _check(config: Config) -> None:
    """What concerns several settings at once, and all texts. Raises ValueError."""
    for key, value in flatten(config).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str):
                _check_text(key, text)
    if not config.eval.cutoffs or min(config.eval.cutoffs) < 1:
        raise ValueError(f"eval.cutoffs = {list(config.eval.cutoffs)}: give at least one, all of them 1 or more")
    for name in ("hybrid", "neighbours"):
        if -1 < (weight := getattr(config.eval, name)) < 0:
            raise ValueError(f"eval.{name} = {weight}: must be 0 or more, or -1 to choose it on valid")
    if max(config.eval.cutoffs) > config.eval.beams:
        raise ValueError(f"eval.beams = {config.eval.beams}: must be at least the largest of eval.cutoffs")
    _check_encoding(config.data.encoding)
    etl = config.etl
    if etl.repeats != "first" and config.eval.mask_seen:
        raise ValueError(f"etl.repeats = {etl.repeats!r} makes seen items targets: set eval.mask_seen = false as well")
    if etl.repeats != "first" and etl.split == "random":
        raise ValueError("etl.split = 'random' would put an item's repeats into train and test: etl.repeats = 'first'")
    if len(etl.split_shares) != 3 or min(etl.split_shares) < 0 or not math.isclose(sum(etl.split_shares), 1):
        raise ValueError(f"etl.split_shares = {list(etl.split_shares)}: give train, valid and test, adding up to 1")
    if etl.event_weights and len(etl.event_weights) != len(etl.events):
        raise ValueError(
            f"etl.event_weights = {list(etl.event_weights)}: give one for each of etl.events = {list(etl.events)}"
        )
    if etl.event_weights and not 0 < max(etl.event_weights) >= min(etl.event_weights) >= 0:
        raise ValueError(f"etl.event_weights = {list(etl.event_weights)}: none may be negative, not all 0")
    if etl.split == "otto" and len(etl.events) < 2:
        raise ValueError("etl.split = 'otto' needs etl.events, clicks first, such as ['clicks', 'carts', 'orders']")
    if etl.split in ("temporal", "otto") and config.data.time_unit == "order":
        raise ValueError(f"etl.split = {etl.split!r} goes by the clock, and data.time_unit = 'order' knows no dates")
    history = config.history
    if history.attention == "causal" and history.encoding != "pooled":
        raise ValueError(
            f"history.attention = 'causal' needs encoding 'pooled', not {history.encoding!r}: set history.attention = "
            "'full'"
        )
    if config.model.item_table == "none" and not config.history.content:
        raise ValueError("model.item_table = 'none' and history.content = false: the encoder would know no item apart")
    if not any(config.loss.weights.values()):
        raise ValueError("all weights of [loss] are 0: nothing would be learned")


def _check_encoding(name: str) -> None:
    """Files are cut into lines as bytes, so an encoding must leave ASCII as it is."""
    ascii_ = bytes(range(128)) + rb" \u0041"  # which unicode_escape would change
    try:
        fits = ascii_.decode(name) == ascii_.decode("ascii")
    except (LookupError, ValueError):  # unknown, no encoding of texts, or not of single bytes
        fits = False
    if not fits:
        raise ValueError(
            f"data.encoding = {name!r}: no encoding that extends ASCII, such as utf-8, latin-1 or cp1252; "
            "convert files in UTF-16 or UTF-32 first: iconv -f UTF-16 -t UTF-8 old > new"
        )


def _check_text(key: str, text: str) -> None:
    """What no setting may hold. Raises ValueError, without a secret in its message."""
    if what := urls.secret(text, key in URLS):
        raise ValueError(f"{key} holds {what}: {urls.REMEDY}")
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{key} = {text!r}: holds a NUL character or bytes that are not UTF-8, which no file can keep")
    # They become names of folders, of jobs and of what MLflow shows.
    if key.partition(".")[0] in ("name", "work", "tracking") and re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"{key} = {text!r}: holds a control character; leave it out")
