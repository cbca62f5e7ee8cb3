"""Calls reward functions: selects arguments, runs async ones together, locates failures."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

from grpo_fused.trainer.run.errors import TrainingError, locate, shorten

# Arguments of a reward function that do not have one value per completion.
NO_COLUMNS = ("trainer_state", "log_metric", "log_extra")
# Arguments that the trainer has besides the columns of the data.
OF_TRAINER = ("prompts", "completions", "completion_ids", *NO_COLUMNS)


def call_all(functions: dict[str, Callable], arguments: dict[str, Any]) -> dict[str, Any]:
    """Calls every function with the arguments it takes; async functions run concurrently.

    Args:
        functions: reward functions by name.
        arguments: all arguments by name; each function gets those that its signature names.

    Returns:
        What each function returned, by name.

    Raises:
        ValueError: a function requires an argument that does not exist.
        TrainingError: a function raised; the message says where and, of a function with the
            attribute `pure`, on which example.
    """
    selected = {name: select_arguments(name, f, arguments) for name, f in functions.items()}
    results = {}
    for name, function in functions.items():
        if not is_async(function):
            try:
                results[name] = function(**selected[name])
            except Exception as error:
                raise _locate(name, function, selected[name], error, arguments) from error
    names = [name for name, function in functions.items() if is_async(function)]
    answers = run_async([(functions[name], selected[name]) for name in names])
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, Exception):
            raise _locate(name, functions[name], selected[name], answer, arguments) from answer
        results[name] = answer
    return {name: results[name] for name in functions}


def select_arguments(name: str, function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a function takes; all of them if it ends in `**kwargs`.

    Raises:
        ValueError: a required parameter is not among the arguments.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature
        return arguments
    for this in parameters:
        if this.default is this.empty and this.kind not in (this.VAR_POSITIONAL, this.VAR_KEYWORD):
            if this.name not in arguments or this.kind is this.POSITIONAL_ONLY:
                raise ValueError(
                    f"reward {name} requires {this.name}, which is not a column of the data; "
                    f"available are {', '.join(arguments)}"
                )
    if any(this.kind is this.VAR_KEYWORD for this in parameters):
        return arguments
    taken = {this.name for this in parameters}
    return {key: value for key, value in arguments.items() if key in taken}


def is_async(function: Callable) -> bool:
    """Returns whether a function, or the `__call__` of an object, is a coroutine function."""
    call = type(function).__call__ if not inspect.isroutine(function) else function
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def run_async(calls: list[tuple[Callable, dict[str, Any]]]) -> list[Any]:
    """Runs async calls concurrently; an exception becomes a result."""
    if not calls:
        return []

    async def gather():
        coroutines = [function(**arguments) for function, arguments in calls]
        return await asyncio.gather(*coroutines, return_exceptions=True)

    return asyncio.run_coroutine_threadsafe(gather(), _event_loop()).result()


@functools.cache
def _event_loop():
    """Starts the event loop of the process, in a thread: the caller may run in another loop.

    There is one loop because clients and locks that a reward keeps are bound to the loop of their
    first use.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _locate(name, function, selected, error, arguments):
    """Returns a TrainingError that says where a function failed.

    Of a function with the attribute `pure`, on which example: it is called again on each alone. Any
    other may cost money or count its calls.
    """
    size, line = len(arguments["completions"]), locate(error, function)
    reason = f"{type(error).__name__}: {error}"
    if not getattr(function, "pure", False):
        return TrainingError(
            f"reward {name} failed{line} on a batch of {size} completions ({reason}); its first "
            f"prompt: {shorten(arguments['prompts'][0])}; {name}.pure = True lets the trainer call "
            "it on each alone to find the example"
        )
    for i in range(size):
        alone = {
            key: values if key in NO_COLUMNS else values[i : i + 1]
            for key, values in selected.items()
        }
        try:
            if is_async(function):
                (answer,) = run_async([(function, alone)])
                if isinstance(answer, Exception):
                    raise answer
            else:
                function(**alone)
        except Exception as again:
            prompt, completion = arguments["prompts"][i], arguments["completions"][i]
            return TrainingError(
                f"reward {name} failed{locate(again, function)} on example {i} of {size} "
                f"({type(again).__name__}: {again}); prompt: {shorten(prompt)}; "
                f"completion: {shorten(completion)}"
            )
    return TrainingError(
        f"reward {name} failed{line} on {size} examples together, but on none alone ({reason})"
    )
