"""Dataclasses to and from plain dicts, files and dotted overrides, strictly: an unknown key is an error with a suggestion.

Also the identity of a config: the part that names a run.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

SECRET = re.compile(r"(?<=://)[^/?#\s]*:[^/?#\s]*(?=@)"
                    # A secret key may have slashes, but then a port is none.
                    r"|(?<!http://)(?<!https://)(?<=://)[^/?#\s@:]*:(?!\d+/)[^?#\s@]*(?=@)"
                    r"|(?:(?<=http://)|(?<=https://))[^/?#\s@]+(?=@)"  # a token alone
                    r"|(?<=[?&])(?:(?:[a-z_-]|%5f)*(?:key|token|secret|password|passwd|pwd|auth)|pass|sig|signature"
                    r"|awsaccesskeyid|key-pair-id|x-(?:amz|goog)-[a-z-]+)=[^&\s]*",
                    re.IGNORECASE)
"""What opens a store, in a URI: `key:secret@`, or among its options."""


def redacted(text: str) -> str:
    """The text with `***` for the secrets in its URIs."""
    return SECRET.sub("***", text)


def refuse_secrets(name: str, value: str) -> None:
    """Raise ValueError for a URI with a secret in it: settings are written down, logged and shown."""
    if SECRET.search(value):
        raise ValueError(f"{name} = {redacted(value)!r}: holds a secret, and settings are written down, logged and shown; "
                         "give it to all processes by their environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                         "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), or by the role of their machines")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass tree as JSON-ready nested dicts."""
    return dataclasses.asdict(config)


def to_toml(config: Any) -> str:
    """The dataclass tree as TOML that `load_file` reads. TOML has no null: a setting that is None is left out, which says
    the same where None is its default.

    Raises ValueError where it is not.
    """
    import tomli_w  # which only who writes needs

    return tomli_w.dumps(_without_none(config))


def _without_none(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value is None and f.default is not None:
            raise ValueError(f"{f.name} = None: TOML cannot say so, and its default is {f.default!r}; write JSON")
        if value is not None:
            found[f.name] = _without_none(value) if dataclasses.is_dataclass(value) else value
    return found


def suggestion(name: str, known: typing.Iterable[str], shown: typing.Iterable[str] = ()) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the known names, or a shorter list that stands for them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(shown or known)}"


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Build the dataclass `cls` from nested dicts; missing keys take their defaults.

    Raises ValueError for an unknown key (with the nearest known one) and for a value of the wrong type.
    """
    return override(cls(), values, where=where)


def override(config: T, values: dict[str, Any], *, where: str = "") -> T:
    """`config` with nested (or dotted) keys replaced. Raises ValueError as `from_dict` does."""
    known = {f.name for f in dataclasses.fields(config)}
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in _nest(values).items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            paths = [f"{where}.{name}" if where else name for name in known]
            raise ValueError(f"unknown setting {path!r}{suggestion(path, paths)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise ValueError(f"{path} = {value!r}: must be a table of settings")
            changes[key] = override(current, value, where=path)
        else:
            changes[key] = _checked(value, hints[key], path)
    return dataclasses.replace(config, **changes)


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested dicts: {"optim.lr": 1} -> {"optim": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict) and isinstance(nested.get(head), dict):
            nested[head] = nested[head] | value
        else:
            nested[head] = value
    return nested


def _checked(value: Any, hint: Any, path: str) -> Any:
    """`value` if it fits the annotation; an int is welcome where a float is asked, a list where a tuple is."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} = {value!r}: must be a list")
        length = len(typing.get_args(hint))
        if typing.get_args(hint)[-1] is not Ellipsis and len(value) != length:
            raise ValueError(f"{path} = {value!r}: must be a list of {length}")
        return tuple(_checked(v, typing.get_args(hint)[0], f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{path} = {value!r}: must be one of {', '.join(map(repr, typing.get_args(hint)))}")
        return value
    options = typing.get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if option is float and type(value) is int:
            return float(value)
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return _checked(value, option, path)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if type(value) is option:
            if option is str:
                refuse_secrets(path, value)
            return value
    raise ValueError(f"{path} = {value!r}: must be {' or '.join(map(_name, options))}")


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    return "None" if hint is type(None) else "a list" if typing.get_origin(hint) else hint.__name__


def load_file(cls: type[T], path: str | Path) -> T:
    """Read a config from TOML or JSON; a run's own run.json works too."""
    name, path = str(path), Path(path)
    suffix = Path(name.partition("?")[0]).suffix
    if "://" in name:
        from mdt_ray import storage  # which a local file does without

        try:
            text = storage.read_bytes(name).decode()
        except (OSError, ValueError) as error:
            raise ValueError(f"--config {name!r}: cannot be read ({error})") from error
    elif path.is_file():
        text = path.read_text()
    else:
        raise ValueError(f"--config {name!r}: no such file")
    try:
        values = tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"--config {name!r}: not valid {suffix[1:] or 'JSON'} ({error})") from error
    if "config" in values and "identity" in values:  # the run.json of an output folder
        values = values["config"]
    return from_dict(cls, values)


def identity_fields(config: Any) -> dict[str, Any]:
    """Nested dict of the fields that name a run: all but those declared operational."""
    fields = {}
    for f in dataclasses.fields(config):
        if f.metadata.get("operational"):
            continue
        value = getattr(config, f.name)
        fields[f.name] = identity_fields(value) if dataclasses.is_dataclass(value) else value
    return fields


def fingerprint(values: Any) -> str:
    """16 hex digits that name a JSON-ready value, independent of key order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per dotted key whose value differs: `optim.lr: 0.001 -> 0.002`."""
    old, new = flatten(old), flatten(new)
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]
