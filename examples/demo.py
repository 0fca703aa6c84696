"""From a GPT-2 checkpoint to a value-head package that a stranger loads, and a page: what `make demo` runs.

Imports hub_tools, the model, typer, rich and the other examples. Each step says what it does and how long it took.
Without `--base` nothing is downloaded: a small GPT-2 is trained first.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from fit_value_head import fit_value_head, own_reviews, written_reviews
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rich.columns import Columns
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from train_small_gpt2 import small_gpt2
from transformers import AutoTokenizer
from transformers.utils import logging

from gpt2_value.view import show, visible
from hub_tools import GPT2ValueHubError, save_package, verify_package
from hub_tools.errors import LoadError, SaveFailedError, SourceError
from modeling_gpt2_value import GPT2ValueModel

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["My most favourite movie is", "My least favourite movie is"]  # those of the seed notebook
STRANGER = ROOT / "examples" / "answer_prompts.py"
INSTALLED = [*(path.stem for path in ROOT.glob("*_gpt2_value.py")), "gpt2_value", "hub_tools", "sampler_audit"]
LENGTH = {"small": 80, "base": 40}  # tokens of a response at most; the small model's reviews end before that
SEED = 54  # in both of its answers the reviewer has a second thought, and the values show it
FIT_BUDGET = 20_000_000_000  # parameters times reviews: less than a minute on two cores, whatever the model's size
ANOTHER_BASE = "give a GPT-2 with its tokenizer: make demo BASE=FOLDER or BASE=openai-community/gpt2, or no BASE at all"

out = Console(highlight=False)


@contextmanager
def step(title: str) -> Iterator[Callable[[str], None]]:
    """Show a step's title, and when it is done its sentence and its time."""
    sentences: list[str] = []
    out.print(Text(title, "bold"))
    started = time.perf_counter()
    yield sentences.append
    took = f"{time.perf_counter() - started:.1f} s"
    out.print(Padding(Text.assemble(" ".join(sentences), (f" ({took})", "dim")), (0, 0, 1, 2)))


def run(base: str | None, folder: Path, seed: int) -> None:
    """The steps, in order; see `main`.

    Raises:
        GPT2ValueHubError: a step was refused; the message says what was found and what to do.
    """
    package, page = folder / "package", folder / "responses.html"
    length = LENGTH["base" if base else "small"]

    with step("1  A checkpoint") as say:
        if base is None:
            # A model this small is fastest on one thread, here and in the processes that load it: with more, each of
            # its many short operations waits for the slowest.
            torch.set_num_threads(1)
            os.environ["OMP_NUM_THREADS"] = "1"
            checkpoint = trained_here(say)
        else:
            checkpoint = given(base)
            say(f"{base}, as you asked.")
        from_hub = not Path(checkpoint).is_dir()

    with step("2  GPT2ValueModel.from_pretrained") as say:
        model, tokenizer = load(checkpoint)
        say(f"The checkpoint is a model of {model.num_parameters():,} parameters, those of the value head included.")

    with step("3  A value head that means something") as say:
        if any(weight.any() for weight in model.v_head.parameters()):
            say("The base brought a value head of its own, which stays.")
        else:
            fit(model, tokenizer, on_policy=base is None, say=say)

    with step("4  save_package, verify_package") as say:
        saved = save_package(model, package, tokenizer, base_model=checkpoint if from_hub else None)
        report = verify_package(package)
        difference = max(report.max_logit_difference, report.max_value_difference)
        say(f"A fresh interpreter loaded the package; logits and values are the recorded ones (to {difference:.1g}).")

    with step("5  A process that never heard of this repository") as say:
        answers = ask_a_stranger(package, max_new_tokens=length, seed=seed)
        say("It loaded the package with AutoModel and answered both prompts: with each token its chance and its value.")

    with step("6  A page") as say:
        queries = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        generator = torch.Generator().manual_seed(seed)  # the stranger's, so these are its tokens
        rollout = model.rollout(
            queries, max_new_tokens=length, eos_token_id=tokenizer.eos_token_id, generator=generator
        )
        model.name_or_path = Path(checkpoint).name if base else "a small GPT-2"
        show(rollout, tokenizer, model).save(page)
        say("The same tokens, coloured by value, by log-probability or by entropy.")

    out.print(Columns([table(tokens) for tokens in answers], padding=(0, 3)))
    show_end(saved.load_lines, package, page)


def trained_here(say: Callable[[str], None]) -> str:
    """The small GPT-2, trained at first use.

    Raises:
        SaveFailedError: the cache cannot be written.
    """
    try:
        small = small_gpt2()
    except OSError as error:
        raise SaveFailedError(
            f"the small GPT-2 cannot be kept in the cache: {error}",
            expected="a cache that can be written, with 5 MB free",
            next_step="name another folder for it: XDG_CACHE_HOME=FOLDER make demo",
        ) from error
    how = "trained from scratch on reviews that a grammar wrote" if small.trained_now else "trained earlier"
    say(f"A GPT-2 of {small.parameters:,} parameters, {how} (loss {small.loss:.2f} nats a token), in {small.folder}.")
    return str(small.folder)


def given(base: str) -> str:
    """The base as transformers takes it: a folder, or an id on the Hub.

    Raises:
        SourceError: it is neither.
    """
    if not Path(base).is_dir():
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise SourceError(f"BASE={base} is no folder here, and no id on the Hub", next_step=ANOTHER_BASE) from error
    return base


def load(checkpoint: str) -> tuple[GPT2ValueModel, Any]:
    """The checkpoint as a value-head model, with a new head unless it has one, and its tokenizer.

    Raises:
        SourceError: it is not a GPT-2, or has no tokenizer.
    """
    try:
        model = GPT2ValueModel.from_pretrained(checkpoint, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:  # a TypeError is what transformers 4 says of a missing vocabulary
        raise SourceError(f"{checkpoint} does not load: {error}", next_step=ANOTHER_BASE) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers 5 makes where there are no files
        raise SourceError(f"{checkpoint} has no tokenizer", next_step=ANOTHER_BASE)
    return model, tokenizer


def fit(model: GPT2ValueModel, tokenizer: Any, *, on_policy: bool, say: Callable[[str], None]) -> None:
    """Fit the new head: to the model's own reviews if it writes reviews, else to the grammar's.

    Raises:
        SourceError: the base's config asks for a head that is not linear.
    """
    if on_policy:
        scored, whose = own_reviews(model, tokenizer), "reviews that it wrote itself"
    else:
        number = min(512, max(32, FIT_BUDGET // model.num_parameters()))
        scored, whose = written_reviews(tokenizer, number=number), "reviews that the grammar wrote"
    try:
        result = fit_value_head(model, scored)
    except ValueError as error:
        raise SourceError(str(error), next_step=ANOTHER_BASE) from error
    say(
        f"A new head says 0 everywhere; this one now predicts a judge's score of the finished text, learnt from "
        f"{result.texts} {whose} (explained variance on held-out reviews: {result.explained_variance:.2f})."
    )


def ask_a_stranger(package: Path, *, max_new_tokens: int, seed: int) -> list[list[dict[str, Any]]]:
    """The answers of `answer_prompts.py`, run isolated (`python -I`) in an empty folder, offline.

    Raises:
        LoadError: the process failed; `details` is what it printed on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2-value-demo-") as home:
        script, result = Path(home, STRANGER.name), Path(home, "answers.json")
        shutil.copyfile(STRANGER, script)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-I", script, package, *PROMPTS, "--out", result]
        command += ["--max-new-tokens", str(max_new_tokens), "--seed", str(seed), "--hide", *INSTALLED]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=home, env=environment)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise LoadError(
                f"the fresh process failed (exit status {done.returncode}): {last}",
                next_step=f"see what it says by itself: gpt2-value verify {package}",
                details=done.stderr,
            )
        told = json.loads(result.read_text(encoding="utf-8"))
    if not told["class"].startswith("transformers_modules."):  # where transformers puts a package's own code
        raise LoadError(
            f"AutoModel gave the fresh process a {told['class']}",
            expected="the package's own GPT2ValueModel",
            next_step=f"gpt2-value inspect {package}",
        )
    answers: list[list[dict[str, Any]]] = told["answers"]
    return answers


def table(tokens: Sequence[dict[str, Any]]) -> Table:
    """A row for each token of a response."""
    prompt = "".join(token["text"] for token in tokens if "logprob" not in token)
    rows = Table(title=f"{prompt} …", title_justify="left", title_style="bold", box=None, header_style="dim")
    rows.add_column("token", no_wrap=True)
    for heading in ("log-prob", "value before", "value after"):
        rows.add_column(heading, justify="right")
    for token in tokens:
        if "logprob" in token:
            numbers = f"{token['logprob']:.2f}", f"{token['value_before']:+.2f}", f"{token['value']:+.2f}"
            rows.add_row(Text(visible(token["text"])), *numbers)
    return rows


def show_end(load_lines: str, package: Path, page: Path) -> None:
    """Where everything is, how it is loaded, and what to type next."""
    command = Path(sys.executable).with_name("gpt2-value")
    here = Path.cwd()

    def short(path: Path) -> str:
        return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))

    respond = f'{short(command)} respond {short(package)} "The worst thriller I have ever seen is"'
    for heading, text in (
        ("The package", str(package)),
        ("The page", str(page)),
        ("What loads it, anywhere", load_lines),
        (
            "What to type next",
            f"{short(command)} app {short(package)}\n{respond}\nmake demo BASE=openai-community/gpt2",
        ),
    ):
        out.print(Text(f"\n{heading}", "bold"))
        out.print(Text(text, "cyan"), soft_wrap=True)  # whole lines, to be copied


def main(
    base: Annotated[
        str | None, typer.Option(help="A GPT-2 checkpoint: a folder, or an id on the Hub. Default: one trained here.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the package and the page.")] = ROOT / "demo",
    seed: Annotated[int, typer.Option(help="Of the two responses.")] = SEED,
) -> None:
    """Make a value-head package, let a fresh Python process load it and answer two prompts, and show the answers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        run(base, folder.resolve(), seed)
    except GPT2ValueHubError as error:
        Console(stderr=True).print(Text(f"error: {error}", "red"), soft_wrap=True)
        raise typer.Exit(1) from None
    out.print(f"\n[dim]{time.perf_counter() - started:.0f} s in all[/]")


if __name__ == "__main__":
    typer.run(main)
