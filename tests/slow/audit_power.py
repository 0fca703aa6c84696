"""How many dishonest samplers the audit catches, and how many honest ones it calls dishonest. Prints two tables.

python tests/slow/audit_power.py                      # about 15 minutes on one core
python tests/slow/audit_power.py --runs 2 --honest 50
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import torch  # noqa: E402
from dishonest_samplers import DISHONEST, draw, samplers  # noqa: E402
from support.settings import EOS, RAGGED  # noqa: E402
from test_sampler_audit import audit_logits, draws, make_sharp_model  # noqa: E402

from generation_gpt2_value import rollout  # noqa: E402
from sampler_audit import audit_sampler  # noqa: E402

SHAPES = ((200, 20), (40, 100))  # rows, steps: 4,000 tokens
V = 96
# Data type, copies of each of the four prompts, and the settings of `rollout`.
ROLLOUTS = (
    (torch.float32, 1, {}),
    (torch.float32, 5, {"eos_token_id": EOS}),
    (torch.float32, 5, {"temperature": 0.7, "top_k": 10, "top_p": 0.8}),
    (torch.float32, 20, {"eos_token_id": EOS, "min_new_tokens": 3, "top_p": 0.9}),
    (torch.float32, 50, {}),
    (torch.bfloat16, 50, {"top_k": 50}),
)
# Rows, steps, vocabulary, and how sharp the distributions are: standard deviation of the logits.
LOGITS = ((1, 50, 20, 2.0), (2, 25, 96, 3.0), (10, 5, 96, 2.0), (25, 8, 50, 2.0), (20, 20, 96, 1.0))


def power(runs):
    """Print how often each dishonest sampler is caught, and by which tests."""
    model = make_sharp_model(n_positions=128)
    print(f"| dishonest sampler | {' | '.join(f'{rows} x {steps} tokens' for rows, steps in SHAPES)} | caught by |")
    print("|---|---:|---:|---|")
    for name in DISHONEST:
        caught, by = Counter(), Counter()
        for shape in SHAPES * runs:
            sequences = draw(model, torch.randint(0, V, (shape[0], 3)), **samplers(*shape, V)[name])
            audit = audit_sampler(model, sequences, prompt_length=3, batch_size=64)
            caught[shape] += not audit.honest
            by.update(audit.failed)
        counts = " | ".join(f"{caught[shape]} of {runs}" for shape in SHAPES)
        print(f"| {name} | {counts} | {', '.join(test for test, _ in by.most_common())} |", flush=True)


def honest_audits(runs):
    """What honest samplers are called, and audits of them: rollouts of real models, and draws from random logits."""
    for dtype, copies, settings in ROLLOUTS:
        model, audits = make_sharp_model(n_positions=128).to(dtype), []
        while len(audits) < (runs if copies < 50 else max(12, runs // 10)):
            many = rollout(model, RAGGED, max_new_tokens=20, num_return_sequences=copies * 10, **settings)
            pieces = (many[rows] for rows in torch.randperm(len(many)).view(10, -1))
            audits += [audit_sampler(model, one, batch_size=64) for one in pieces if one.response_mask.sum() >= 50]
        yield f"rollout, {dtype}, {copies} copies, {settings}", audits
    for *shape, scale in LOGITS:
        many = (torch.randn(shape, dtype=torch.float64) * scale for _ in range(4 * runs))
        yield f"random logits, {shape}, scale {scale}", [audit_logits(logits, draws(logits)) for logits in many]


def false_alarms(runs):
    """Print how often honest samplers are called dishonest, and by which tests."""
    print("\n| honest sampler | audits | called dishonest | by |\n|---|---:|---:|---|")
    totals = Counter()
    for name, audits in honest_audits(runs):
        alarms, by = sum(not audit.honest for audit in audits), Counter(test for one in audits for test in one.failed)
        totals.update(audits=len(audits), alarms=alarms)
        print(f"| {name} | {len(audits)} | {alarms} | {dict(by) or ''} |", flush=True)
    print(f"| all | {totals['audits']} | {totals['alarms']} | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each dishonest sampler, for each shape")
    parser.add_argument("--honest", type=int, default=500, help="audits of each honest setting, about")
    asked = parser.parse_args()
    torch.manual_seed(0)
    power(asked.runs)
    false_alarms(asked.honest)
