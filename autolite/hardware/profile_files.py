"""Profiles in YAML files: those that are shipped, and your own, which may extend another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from autolite import registry
from autolite.errors import TargetError, unknown
from autolite.hardware import LOCAL
from autolite.hardware.profile import SHORT, Profile

SUFFIXES = (".yaml", ".yml")


def profile_names() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in registry.data_dir("hardware_profiles").glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a profile by its name, or from a YAML file (a path that ends in .yaml or .yml).

    What `local` measured on another machine is called by its file, for it is no longer this machine's.

    Raises:
        TargetError: if there is no such profile (the nearest is named), or the file, field and value that are wrong.
    """
    path = _path_of(str(name_or_path), Path())
    profile = parse_profile(_read(path), str(path), path.parent)
    if profile.name == LOCAL and path.stem == LOCAL:
        raise TargetError(f"{path} would be taken for this machine, which is measured: give the file another name")
    return profile.model_copy(update={"name": path.stem}) if profile.name == LOCAL else profile


def _path_of(name_or_path: str, folder: Path) -> Path:
    """Where a profile is: one that is shipped, by its name, or a file, from this folder."""
    if Path(name_or_path).suffix in SUFFIXES:
        return folder / name_or_path
    names = profile_names()
    if name_or_path not in names:
        message = unknown("target", name_or_path, [*names, LOCAL])
        raise TargetError(f"{message}. A profile of your own is given as a path that ends in .yaml")
    return registry.data_dir("hardware_profiles") / f"{name_or_path}.yaml"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read the hardware profile {path}: {error}") from None


def parse_profile(text: str, where: str, folder: Path | None = None) -> Profile:
    """Read a profile from YAML text; `where` names it in errors, and what it `extends` is looked for from `folder`.

    Raises:
        TargetError: naming `where`, the field, its value and the remedy.
    """
    return _validated(_complete(text, where, folder or Path()), where)


def _validated(data: dict[str, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "profile"
        value = "" if isinstance(first["input"], dict) else f", but got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise TargetError(f"{where}: {field}: {message}{value}. See docs/targets.md") from None


def _complete(text: str, where: str, folder: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a profile, with those of what it extends where it has none of its own."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TargetError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise TargetError(f"{where} holds {type(data).__name__}, not a profile: see docs/targets.md for the fields")
    base = data.pop("extends", None)
    if base is None:
        return data
    for field in ("name", "description"):
        if field not in data:
            raise TargetError(f"{where}: a profile that extends '{base}' needs a {field} of its own: add it")
    try:
        path = _path_of(str(base), folder)
    except TargetError as error:
        raise TargetError(f"{where}: extends: {error}") from None
    if path.resolve() in children:
        raise TargetError(f"{where}: extends {base}, which extends it in turn: one of them has to be complete")
    parent = _complete(_read(path), str(path), path.parent, (*children, path.resolve()))
    _validated(parent, str(path))  # what is wrong there is not this file's
    parent.pop("known_as", None)  # a variant is another device
    merged: dict[str, Any] = _merged(parent, data)
    return merged


def _merged(base: Any, own: Any) -> Any:
    """`own` where it says something, else `base`: field by field, and lists of units by their names. A number is whole:
    another value has another source."""
    if isinstance(base, dict) and isinstance(own, dict) and "value" not in own:
        return {**base, **{key: _merged(base.get(key), value) for key, value in own.items()}}
    if isinstance(base, list) and isinstance(own, list) and all(map(_is_named, (*base, *own))):
        named = {each["name"]: each for each in base}
        return list((named | {each["name"]: _merged(named.get(each["name"]), each) for each in own}).values())
    return own


def _is_named(unit: Any) -> bool:
    return isinstance(unit, dict) and isinstance(unit.get("name"), str)


def dump_profile(profile: Profile) -> str:
    """Return the YAML of a profile, numbers in short form; `parse_profile` reads it back equal."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            if set(node) == set(SHORT):
                return [node[part] for part in SHORT]
            return {key: plain(value) for key, value in node.items() if value not in (None, "", {})}
        if isinstance(node, list | tuple):
            return node[0] if len(node) == 1 and isinstance(node[0], str) else [plain(item) for item in node]
        return node

    data = plain(profile.model_dump(mode="python"))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000, default_flow_style=None)
