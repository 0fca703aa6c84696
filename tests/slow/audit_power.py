"""How many dishonest samplers the audit catches, and how many honest ones it calls dishonest. Prints two tables.

    python tests/slow/audit_power.py                      # about 15 minutes on one core
    python tests/slow/audit_power.py --runs 2 --honest 50

Imports the audit, the remote code, and of the tests `conftest` and `dishonest_samplers`.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import dishonest_samplers  # noqa: E402
import torch  # noqa: E402
from conftest import make_tiny_model  # noqa: E402
from test_sampler_audit import audit_logits  # noqa: E402

from generation_gpt2_value import rollout  # noqa: E402
from sampler_audit import SamplerAudit, audit_sampler  # noqa: E402

SHAPES = ((200, 20), (40, 100))  # rows, steps: 4,000 tokens
V = 96
PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]
# Copies of each of the four prompts, and the settings of `rollout`.
ROLLOUTS = (
    (1, {"max_new_tokens": 20}),
    (5, {"max_new_tokens": 20, "eos_token_id": EOS}),
    (5, {"max_new_tokens": 20, "temperature": 0.7, "top_k": 10, "top_p": 0.8}),
    (20, {"max_new_tokens": 20, "eos_token_id": EOS, "min_new_tokens": 3, "top_p": 0.9}),
    (50, {"max_new_tokens": 20}),
)
# Rows, steps, vocabulary, and how sharp the distributions are: standard deviation of the logits.
LOGITS = ((1, 50, 20, 2.0), (2, 25, 96, 3.0), (10, 5, 96, 2.0), (25, 8, 50, 2.0), (20, 20, 96, 1.0))


def sharp_model(dtype: torch.dtype = torch.float32):
    """A random GPT-2 whose distributions are about as sharp as a trained one's."""
    model = make_tiny_model(vocab_size=V, n_positions=128)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)
    return model.to(dtype)


def audit_drawn(model, sampler, rows: int, steps: int) -> SamplerAudit:
    """Audit what a sampler of `dishonest_samplers` draws after random prompts of three tokens."""
    sequences = dishonest_samplers.draw(model, torch.randint(0, V, (rows, 3)), **sampler(rows, steps, V))
    return audit_sampler(model, sequences, prompt_length=3, batch_size=64)


def power(runs: int) -> None:
    """Print how often each dishonest sampler is caught, and by which tests."""
    model = sharp_model()
    print(f"| dishonest sampler | {' | '.join(f'{rows} x {steps} tokens' for rows, steps in SHAPES)} | caught by |")
    print("|---|---:|---:|---|")
    for sampler in dishonest_samplers.DISHONEST:
        counts, by = [], Counter[str]()
        for rows, steps in SHAPES:
            audits = [audit_drawn(model, sampler, rows, steps) for _ in range(runs)]
            counts.append(f"{sum(not audit.honest for audit in audits)} of {runs}")
            by.update(name for audit in audits for name in audit.failed)
        tests = ", ".join(name for name, _ in by.most_common())
        print(f"| {sampler.__name__.replace('_', ' ')} | {' | '.join(counts)} | {tests} |", flush=True)


def false_alarms(runs: int) -> None:
    """Print how often honest samplers are called dishonest: rollouts of real models, and draws from random logits."""
    totals = Counter[str]()

    def report(name: str, audits: list[SamplerAudit]) -> None:
        wrong = Counter(test for audit in audits for test in audit.failed)
        alarms = sum(not audit.honest for audit in audits)
        below = sum(audit.p_value < 1e-2 for audit in audits)
        totals.update(alarms=alarms, below=below, audits=len(audits))
        by = ", ".join(f"{test} {count}" for test, count in wrong.items())
        tokens = sorted(audit.tokens for audit in audits)
        print(f"| {name} | {tokens[0]} to {tokens[-1]} | {len(audits)} | {below} | {alarms} | {by} |", flush=True)

    print("\n| honest sampler | tokens | audits | p < 0.01 | called dishonest | by |\n|---|---:|---:|---:|---:|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model = sharp_model(dtype)
        settings = ROLLOUTS if dtype == torch.float32 else ((50, {"max_new_tokens": 20, "top_k": 50}),)
        for copies, how in settings:
            audits = []
            while len(audits) < (runs if copies < 50 else max(12, runs // 10)):
                many = rollout(model, PROMPTS, num_return_sequences=copies * 10, **how)
                many = many[torch.randperm(len(many))]
                pieces = [many[piece::10] for piece in range(10)]
                audits += [
                    audit_sampler(model, piece, batch_size=64) for piece in pieces if piece.response_mask.sum() >= 50
                ]
            report(f"rollout, {str(dtype)[6:]}, {', '.join(f'{k}={v}' for k, v in how.items())}", audits)
    for rows, steps, vocabulary, scale in LOGITS:
        audits = []
        for _ in range(4 * runs):
            logits = torch.randn(rows, steps, vocabulary, dtype=torch.float64) * scale
            tokens = torch.multinomial(logits.softmax(-1).view(-1, vocabulary), 1).view(rows, steps)
            audits.append(audit_logits(logits, tokens))
        report(f"random logits, {rows} x {steps}, {vocabulary} tokens, scale {scale}", audits)
    print(f"| all | | {totals['audits']} | {totals['below']} | {totals['alarms']} | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each dishonest sampler, for each shape")
    parser.add_argument("--honest", type=int, default=500, help="audits of each honest setting, about")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    if asked.runs:
        power(asked.runs)
    if asked.honest:
        false_alarms(asked.honest)


if __name__ == "__main__":
    main()
