"""Run by gsm_symbolic.py in a process of its own: python -I -S _gsm_generate.py FOLDER.

Imports the generator functions unpacked in FOLDER and prints one JSON row a line.
"""

import importlib
import json
import random
import sys

PER_TEMPLATE = 24
# The package's own list of templates that need repair: wrong or unrounded numbers in the answers.
FLAWED = {32, 35, 37, 61, 63, 65, 74, 76, 77, 79, 86, 87, 90, 97, 98}


def main(folder: str) -> None:
    """Print up to PER_TEMPLATE different problems of every sound template."""
    sys.path.insert(0, folder)
    package = "reasoning_gym.arithmetic.gsm_symbolic"
    halves = [importlib.import_module(f"{package}.generators_{n}") for n in ("00_49", "50_99")]
    for template in sorted(set(range(100)) - FLAWED):
        generate = getattr(halves[template // 50], f"generate_{template}")
        rng = random.Random(template)
        problems = {}
        for _ in range(PER_TEMPLATE):
            problem = generate(rng, 1.0)  # 1.0 is the only difficulty it supports
            problems.setdefault(problem["question"], problem["metadata"]["answer_cot"])
        for question, answer in problems.items():
            # ASCII: the encoding of standard output is the machine's
            print(json.dumps({"question": question, "answer": answer, "template": template}))


if __name__ == "__main__":
    main(sys.argv[1])
