"""bfcl: a function's signature and a request in English -> the call, as JSON.

The single-call categories of the Berkeley Function-Calling Leaderboard, version 4. It is a
benchmark: a model trained on these rows has no meaningful BFCL score.

Fields: signature, description, request, call.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from peftlab.sources import Row, Rows, open_wheel, packaged_id, read_text

VERSION = 1  # raise it whenever the rows change
LONGEST = 1200  # characters of a prompt: leaves out one, whose prompt alone fills a block
CATEGORIES = ("simple_python", "live_simple", "simple_java", "simple_javascript")


def content_id(dataset: Mapping[str, Any]) -> str:
    """Return the identity of the rows."""
    return packaged_id(dataset, "bfcl", VERSION)


def load(dataset: Mapping[str, Any]) -> Rows:
    """Return the questions of the four categories, in the package's order."""
    with open_wheel("bfcl") as archive:
        rows = []
        for category in CATEGORIES:
            questions = _json_lines(archive, f"bfcl_eval/data/BFCL_v4_{category}.json")
            answers = _json_lines(
                archive, f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json"
            )
            truth = {answer["id"]: answer["ground_truth"] for answer in answers}
            rows += [_row(question, truth[question["id"]]) for question in questions]
    prompts = ("signature", "description", "request")
    return Rows([row for row in rows if sum(len(row[key]) for key in prompts) <= LONGEST], None)


def _json_lines(archive, member: str) -> Iterator[Any]:
    return (json.loads(line) for line in read_text(archive, member).split("\n") if line)


def _row(question: Mapping[str, Any], truth: list[Mapping[str, Any]]) -> Row:
    (function,) = question["function"]
    ((name, accepted),) = truth[0].items()
    parameters = function["parameters"]
    required = parameters.get("required", ())
    arguments = ", ".join(
        f"{key}{'' if key in required else '?'}: {kind['type']}"
        for key, kind in parameters["properties"].items()
    )
    return {
        "signature": f"{function['name']}({arguments})",
        "description": function["description"].strip(),
        "request": question["question"][0][-1]["content"].strip(),  # after a system message, if any
        "call": json.dumps({"name": name, "arguments": _first(accepted, required)}),
    }


def _first(accepted: Mapping[str, Any], required=()) -> dict[str, Any]:
    """Of the accepted values of each argument take the first; "" says it may be left out."""
    chosen = {}
    for key, values in accepted.items():
        if not isinstance(values, list):  # one answer of the package lacks the list
            chosen[key] = values
            continue
        given = [value for value in values if value != ""]
        if values and values[0] == "" and not (key in required and given):
            continue
        chosen[key] = _plain(given[0]) if given else []
    return chosen


def _plain(value: Any) -> Any:
    """Dictionaries, alone or in a list, again hold a list of accepted values for each key."""
    if isinstance(value, dict):
        return _first(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value
