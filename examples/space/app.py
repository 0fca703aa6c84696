"""A Space on the Hub that samples from one model and colours each token by its value.

It stands alone: `requirements.txt` is all that it needs. The model brings its own sampler, in code that
`gpt2-value inspect MODEL --diff` shows; the Space runs that code, at the commit below and at no other.
"""

import html
import math
import os

import gradio as gr
import torch
from transformers import AutoModel, AutoTokenizer

MODEL = os.environ.get("MODEL", "me/my-model")
COMMIT = os.environ.get("COMMIT")  # set it, so that nobody who can push to the model can change what runs here
MOST_CHARACTERS, MOST_RESPONSES, MOST_TOKENS = 2_000, 4, 128
EXAMPLE = "My most favourite movie is"

model = AutoModel.from_pretrained(MODEL, revision=COMMIT, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL, revision=COMMIT, trust_remote_code=True)


def chip(text: str, logprob: float, value: float, largest: float) -> str:
    """A token in orange below 0 and purple above, with its numbers on hover; what cannot be seen is an escape."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:100]) or "(empty)"
    colour, strength = ("#b35806" if value < 0 else "#542788"), min(1.0, abs(value) / largest)
    style = (
        f"background:color-mix(in srgb, {colour} {60 * strength:.0f}%, transparent);border-radius:4px;padding:2px 3px"
    )
    facts = f"value before {value:+.3f}, log-probability {logprob:.3f} ({math.exp(logprob):.1%})"
    return f'<span tabindex="0" title="{facts}" style="{style}">{html.escape(shown)}</span>'


def sample(prompt: str, responses: float, tokens: float, temperature: float) -> str:
    """Draw responses to one prompt, as HTML. Everything is bounded before it costs anything."""
    if not isinstance(prompt, str) or not 0 < len(prompt) <= MOST_CHARACTERS:
        raise gr.Error(f"The prompt has to have 1 to {MOST_CHARACTERS:,} characters.")
    if not (1 <= responses <= MOST_RESPONSES and 1 <= tokens <= MOST_TOKENS and 0.1 <= temperature <= 10):
        raise gr.Error(f"At most {MOST_RESPONSES} responses of {MOST_TOKENS} tokens, at a temperature from 0.1 to 10.")
    ids = tokenizer(prompt)["input_ids"]
    if not 0 < len(ids) <= model.config.max_position_embeddings - tokens:
        raise gr.Error(f"The prompt has {len(ids):,} tokens, which leaves no room for {tokens:.0f}.")
    rollout = model.rollout(
        [torch.tensor(ids)],
        max_new_tokens=int(tokens),
        num_return_sequences=int(responses),
        temperature=float(temperature),
        eos_token_id=tokenizer.eos_token_id,
    )
    largest = float(rollout.values.abs().max()) or 1.0
    rows = []
    for row in range(len(rollout)):
        mask = rollout.response_mask[row]
        columns = (rollout.responses, rollout.logprobs, rollout.values)
        drawn = zip(*(column[row][mask].tolist() for column in columns), strict=True)
        chips = (chip(tokenizer.decode([id]), logprob, value, largest) for id, logprob, value in drawn)
        rows.append(f'<p style="line-height:2">{html.escape(prompt)} {"".join(chips)}</p>')
    return "".join(rows)


with gr.Blocks(title=MODEL, analytics_enabled=False) as page:
    gr.Markdown(
        f"# {MODEL}\nOrange: the model expects a low return. Purple: a high one. Point at a token for its numbers."
    )
    with gr.Row():
        prompt = gr.Textbox(EXAMPLE, label="Prompt", max_length=MOST_CHARACTERS, scale=4)
        draw = gr.Button("Draw", variant="primary", scale=1)
    with gr.Row():
        responses = gr.Slider(1, MOST_RESPONSES, 2, step=1, label="Responses")
        tokens = gr.Slider(1, MOST_TOKENS, 32, step=1, label="Tokens at most")
        temperature = gr.Slider(0.1, 3, 1, label="Temperature")
    shown = gr.HTML()
    gr.on([page.load, draw.click, prompt.submit], sample, [prompt, responses, tokens, temperature], shown)
page.queue(max_size=16, default_concurrency_limit=1, api_open=False)

if __name__ == "__main__":
    page.launch(share=False, max_file_size=0, footer_links=["gradio"])
