"""Loading of functions that a config names as `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from vz_ray.utils.errors import UserError


def load_function(config_key: str, function_path: str, argument_names: Sequence[str]) -> Callable[..., Any]:
    """Import and return a function named in a config.

    Args:
        config_key: Key that holds the path, for errors.
        function_path: `package.module:function`.
        argument_names: Names of the positional arguments of a call.

    Raises:
        UserError: The function does not exist, or does not accept these arguments.
    """
    module_name, _, name = function_path.partition(":")
    if not module_name or not name:
        raise UserError(f"{config_key} is {function_path!r}; write it as package.module:name")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        missing = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        hint = "; install it, or add its directory to PYTHONPATH on all Ray nodes" if missing else ""
        raise UserError(
            f"{config_key} {function_path!r}: importing {module_name} raised {type(error).__name__}: {error}{hint}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [other for other, value in vars(module).items() if inspect.isfunction(value)]
        hint = f"its functions are {', '.join(functions)}" if functions else "it has no functions"
        raise UserError(f"{config_key} {function_path!r}: {module_name} has no function {name!r}; {hint}")
    try:
        inspect.signature(function).bind(*argument_names)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{config_key} {function_path!r} cannot be called with ({', '.join(argument_names)}): {error}"
        ) from error
    loaded: Callable[..., Any] = function
    return loaded
