"""Functions that a user names in a config: `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vz_ray.utils.errors import UserError


def load_function(config_key: str, function_path: str, argument_names: Sequence[str]) -> Callable[..., Any]:
    """The function that `function_path` names.

    Args:
        config_key: The config key that holds it, for errors.
        function_path: `package.module:function`.
        argument_names: Names of the arguments that it is called with, in order.

    Raises:
        UserError: There is none, or it does not take so many.
    """
    module_name, _, name = function_path.partition(":")
    if not module_name or not name:
        raise UserError(f"{config_key} is {function_path!r}; write it as package.module:name")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        absent = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        hint = "; install it, or put its directory on PYTHONPATH, of Ray's nodes too" if absent else ""
        raise UserError(
            f"{config_key} {function_path!r}: importing {module_name} raised {type(error).__name__}: {error}{hint}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [other for other, value in vars(module).items() if inspect.isfunction(value)]
        known = f"its functions are {', '.join(there)}" if there else "it has no functions"
        raise UserError(f"{config_key} {function_path!r}: {module_name} has no function {name!r}; {known}")
    try:
        inspect.signature(function).bind(*argument_names)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{config_key} {function_path!r} cannot be called with ({', '.join(argument_names)}): {error}"
        ) from error
    found: Callable[..., Any] = function
    return found
