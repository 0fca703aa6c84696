"""`make families`: rollouts of every family of causal language models, against what each row gives alone.

    python tests/slow/families.py [FAMILY...]    # a table in Markdown; exit status 1 where a number is wrong

A family is right (with the largest difference in nats), or refused by name before or after the draw. It is never wrong
in silence. One that is right is not refused in 16 bits either, whatever the settings.
"""

import copy
import sys
from collections import defaultdict
from pathlib import Path

import torch
import transformers

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
from support.families import ALL, COLUMNS, ENDS, PROMPTS, build, difference  # noqa: E402

from generation_gpt2_value import rollout  # noqa: E402
from scoring_gpt2_value import SelfCheckError  # noqa: E402


def outcome(family):
    """`right`, `refused`, `WRONG` or `not built`, and the number or the message."""
    try:
        model = build(family)
        model(torch.tensor([[5, 17]]))
    except Exception as error:  # whatever a class of transformers raises for a config that it cannot take
        return "not built", f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        largest = max(difference(model, eos_token_id=ends) for ends in (None, ENDS))
    except Exception as error:
        typed = isinstance(error, (TypeError, ValueError, SelfCheckError)) and type(model).__name__ in str(error)
        return "refused" if typed else "WRONG", f"{type(error).__name__}: {error}"
    if largest > 1e-4:
        return "WRONG", f"{largest:.0e}"
    return refusal_in_16_bits(model) or ("right", f"{largest:.0e}")


def refusal_in_16_bits(model):
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(model).to(dtype)
        for settings in ({"eos_token_id": None, "top_k": 5}, {"eos_token_id": ENDS, "top_p": 0.8, "temperature": 0.5}):
            try:
                rollout(low, PROMPTS, max_new_tokens=COLUMNS, **settings)
            except SelfCheckError as error:
                return "WRONG", f"{dtype}, {settings}: {error}"
            except (RuntimeError, ValueError):  # a layer without this dtype, or numbers that it cannot hold
                break
    return None


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found = defaultdict(dict)
    for family in sys.argv[1:] or ALL:
        kind, what = outcome(family)
        found[kind][family] = what
        print(f"{family}: {kind}, {what}", file=sys.stderr, flush=True)
    print(f"transformers {transformers.__version__}\n\n| | families |\n|---|---|")
    right = found.pop("right", {})
    print(f"| right, at most {max(map(float, right.values()), default=0):.0e} nats off | {', '.join(right)} |")
    for kind, families in found.items():
        for family, what in families.items():
            print(f"| {kind}: {what[:200]} | {family} |")
    sys.exit("WRONG" in found)


if __name__ == "__main__":
    main()
