"""What makes a run this run, each part by content: another of any of these does not go on in its folder."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

from autolite.errors import RunError
from autolite.files import sha256
from autolite.hardware.profile_files import load_profile
from autolite.search.settings import Settings, is_file_of_a_profile
from autolite.space import Space
from autolite.store import Store
from autolite.tasks.custom import identity_of

LAYOUT = "3"  # of what trials remember: a run with another is not gone on with. What teachers took of a trial since 3


def run_identity(settings: Settings, space: Space) -> dict[str, str]:
    """Return what makes a run this run, each part by content; cheap, so that a finished run answers at once."""
    data = settings.data
    columns = f"{data.text},{data.text_pair},{data.label},{data.max_length}"
    demo = f"demo on Python {platform.python_version()}"
    stride = {} if data.stride is None else {"stride": str(data.stride)}
    own = {what: identity_of(getattr(settings, what)) for what in ("loss", "metric", "augment")}
    unlabelled = {} if data.unlabelled is None else {"unlabelled": _content(data.unlabelled)}
    return {
        "model": "demo" if settings.model is None else _content(settings.model),
        "data": f"{demo if data.source is None else _content(data.source)} columns {columns}",
        "task": settings.task,
        "target": _target_identity(settings.target),
        "search space": hashlib.sha256(space.model_dump_json().encode()).hexdigest(),
        "workload": settings.workload or "default",
        "runtime": settings.runtime,
        "seed": str(settings.seed),
        "layout": LAYOUT,
        **({"other targets": ",".join(map(_target_identity, settings.others))} if settings.others else {}),
        **({"seeds": str(settings.seeds)} if settings.seeds > 1 else {}),
        **unlabelled,
        **stride,
        **{what: name for what, name in own.items() if name},
    }


def _target_identity(target: str) -> str:
    """A shipped profile is known by its name, one of the user's own by its content, that of what it extends included,
    wherever it lies."""
    return load_profile(target).digest if is_file_of_a_profile(target) else target


def _content(source: str) -> str:
    """SHA-256 over a file's bytes, or those of a folder's own files (what lies deeper, such as runs, is not read as
    a model or data); a hub name stands for itself."""
    path = Path(source).expanduser()
    if not path.exists():
        return f"hub:{source}"
    inside = [p for p in sorted(path.glob("*")) if p.is_file() and not p.name.startswith(".")]
    files = inside if path.is_dir() else [path]
    return hashlib.sha256("".join(f"{f.name} {sha256(f)} " for f in files).encode()).hexdigest()


def check_same_run(store: Store, current: dict[str, str], out: Path) -> None:
    """Compare a run with what it was made with, if it got so far as to be made.

    Raises:
        RunError: naming what differs.
    """
    known = store.get("identity", current)
    different = [key for key in {**current, **known} if known.get(key) != current.get(key)]
    if different:
        was, now = known.get(different[0]), current.get(different[0])
        raise RunError(
            f"{out} was made with another {', '.join(different)} ({different[0]} was {str(was)[:60]}, is now "
            f"{str(now)[:60]}): choose another directory with --out, or use the same settings to go on"
        )
