"""A user's own rerankers and rewards, named by their dotted path where a shipped one is named by a word."""

import importlib
from typing import Any

from lit_rec.errors import UserError

PACKAGES = ("callbacks.", "lit_rec.")  # code from elsewhere is not run because a configuration names it


def is_path(name: object) -> bool:
    """Whether a name is the path of something in `callbacks/` or `lit_rec/`.

    >>> is_path("callbacks.mine.Pointwise"), is_path("dlcm"), is_path("os.system")
    (True, False, False)
    """
    return isinstance(name, str) and name.startswith(PACKAGES) and all(map(str.isidentifier, name.split(".")))


def find(path: str, key: str) -> Any:
    """The class or function that a path names.

    Args:
        path: Such as `callbacks.mine.Pointwise`, in callbacks/mine.py.
        key: The configuration key that names it.

    Raises:
        UserError: There is none, or it is not defined in `callbacks/` or `lit_rec/`.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"there is no {path}",
            where=f"config key {key}",
            why=str(error)[:200],
            fix=f"define {name} in {module.replace('.', '/')}.py",
        ) from error
    if not callable(found) or not f"{getattr(found, '__module__', '')}.".startswith(PACKAGES):
        raise UserError(
            f"{path} is nothing of your own",
            where=f"config key {key}",
            why="only classes and functions that are defined in callbacks/ or lit_rec/ are used",
            fix=f"define {name} in {module.replace('.', '/')}.py",
        )
    return found
