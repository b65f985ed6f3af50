"""YAML and JSON that somebody else wrote: plain data or a ValueError, whatever they hold.

A safe loader makes no objects of foreign classes, but two things remain: aliases, by which a few
lines stand for a billion values, and nesting that is deeper than the stack of the loader in C,
which ends the process.
"""

import json
from typing import Any

import yaml

# The safe loader that is written in C where PyYAML has it: ten times as fast, as safe.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEPTH = 100  # that a file may be nested; a config has five levels


def load_yaml(text: str) -> Any:
    """Return what a YAML text says. Raises: ValueError, in one line, if it is no plain YAML."""
    depth = 0
    try:
        for event in yaml.parse(text, LOADER):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("holds an alias (*name)")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise ValueError(f"is nested more than {DEPTH} levels deep")
        return yaml.load(text, LOADER)
    except yaml.YAMLError as error:
        marked = isinstance(error, yaml.MarkedYAMLError)
        said = (error.context, error.problem) if marked else str(error).splitlines()[:1]
        raise ValueError(": ".join(filter(None, said))) from error
    except (AttributeError, LookupError, OverflowError, TypeError) as error:
        # PyYAML raises these where a tag and its value do not fit: !!bool x, !!int ''
        raise ValueError(f"holds a value that is not of its tag ({error})") from error


def load_json(text: str) -> Any:
    """Return what a JSON text says. Raises: ValueError if it is no JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
