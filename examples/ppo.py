"""The demo of PPO, `make ppo`: `gpt2-value ppo` on a small GPT-2 that writes film reviews, rewarded by a lexicon.

    python examples/ppo.py --out runs/ppo --seed 0        # or `accelerate launch` in the place of python

Takes every option of `gpt2-value ppo`. Nothing is downloaded: the model is trained at first use. All of PPO is in
`gpt2_value/ppo.py`; here are only the demo's model, prompts and reward (`ppo_task`) and the picture (`ppo_picture`).
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

from ppo_picture import draw_run
from ppo_task import demo_settings, write_texts

from gpt2_value import GPT2ValueModel
from gpt2_value.ppo import main, make_queries, read_metrics, settings_of

SHOWN = 4  # prompts whose responses are shown before and after


def demo(arguments: list[str]) -> int:
    """Train, and draw the curves beside texts from before and after; returns the exit status."""
    options = []
    for name, value in demo_settings().items():
        options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    command = [*options, *arguments]  # of an option that is given twice, the last counts
    settings = settings_of(command, "examples/ppo.py")
    status = main(command)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        from transformers import AutoTokenizer

        texts = []
        for folder in (settings.base, settings.out / "package"):
            model = GPT2ValueModel.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, config=model.config)
            queries = make_queries(settings, tokenizer)[:SHOWN]
            how = {"max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
            texts.append(write_texts(model.eval(), tokenizer, queries, **how))
        draw_run(read_metrics(settings.out), list(zip(*texts, strict=True)), settings.out / "figure.png")
    return status


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
