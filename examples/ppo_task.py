"""What PPO is given: a model with its reference, prompts, and a reward. `ppo.py` knows nothing of films or sentiment.

Imports torch, transformers, the demo's grammar and small GPT-2, and the package's public names; vaderSentiment and peft
where they are asked for.
"""

import contextlib
import copy
import importlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from review_grammar import write_reviews
from torch import Tensor
from train_small_gpt2 import small_gpt2
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from generation_gpt2_value import Rollout, rollout
from modeling_gpt2_value import GPT2ValueModel

Reward = Callable[[list[str]], Sequence[float]]
REVIEWS = 1024  # of the grammar, whose openings are the prompts by default
KL_ESTIMATORS = ("k1", "k3", "exact")
SHOWN = 4  # prompts whose responses are shown before and after


class SettingsError(ValueError):
    """A setting that cannot be; the message says what was found, what was expected and what to type."""


@dataclass
class Task:
    """The model that learns, what it is held to, and what it is asked and paid for.

    Attributes:
        reference: a frozen copy of the model as it was; None for a LoRA, where it is the model without its adapter.
        queries: all prompts, 1-D tensors of token ids.
        reward: of texts, prompt and response together.
    """

    model: torch.nn.Module
    reference: GPT2ValueModel | None
    tokenizer: Any
    queries: list[Tensor]
    reward: Reward
    seed: int

    def prompts(self, iteration: int, number: int) -> list[Tensor]:
        """The prompts of an iteration: the list is shuffled, used up, and shuffled again."""
        chosen = []
        for place in range(iteration * number, (iteration + 1) * number):
            lap, position = divmod(place, len(self.queries))
            order = torch.randperm(len(self.queries), generator=torch.Generator().manual_seed(self.seed + 7919 * lap))
            chosen.append(self.queries[int(order[position])])
        return chosen

    def texts(self, drawn: Rollout) -> list[str]:
        """Prompt and response of each row, without padding and end-of-text."""
        rows = zip(drawn.sequences, drawn.attention_mask.bool(), strict=True)
        return [self.tokenizer.decode(tokens[mask], skip_special_tokens=True) for tokens, mask in rows]

    @contextlib.contextmanager
    def as_reference(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The reference, for as long as the block lasts."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():
                yield model

    def package_model(self) -> GPT2ValueModel:
        """The model as it is saved: with a LoRA merged into a copy of it."""
        if self.reference is not None:
            return self.model
        return copy.deepcopy(self.model).merge_and_unload()

    def before_and_after(self, max_new_tokens: int) -> list[tuple[str, str]]:
        """Texts of the reference and of the model, for the same prompts and the same random numbers."""
        queries = self.queries[:SHOWN]

        def responses(of: torch.nn.Module) -> list[str]:
            generator = torch.Generator(queries[0].device).manual_seed(self.seed)
            ends = self.tokenizer.eos_token_id
            return self.texts(
                rollout(of, queries, max_new_tokens=max_new_tokens, eos_token_id=ends, generator=generator)
            )

        with self.as_reference(self.model) as reference:
            before = responses(reference)
        return list(zip(before, responses(self.model), strict=True))


def make_task(settings: Any, device: torch.device) -> Task:
    """Load and make everything that the settings name.

    Raises:
        SettingsError: a setting that cannot be.
    """
    if settings.kl_estimator not in KL_ESTIMATORS:
        raise SettingsError(f"kl_estimator={settings.kl_estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}.")
    if settings.kl_estimator == "exact" and settings.lora_rank:
        raise SettingsError("kl_estimator=exact needs a second model, which a LoRA does without; take k1 or k3.")
    base = settings.base
    if base is None:
        torch.set_num_threads(1)  # a model this small is fastest so; with more, each short operation waits
        base = str(small_gpt2().folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(settings.seed)  # of a new head and a new LoRA
    reference = None
    model = load(base, settings).to(device)
    if settings.lora_rank:
        model = with_lora(model, settings.lora_rank)
    else:
        reference = load(base, settings).to(device).requires_grad_(False)
    reward = classifier(settings, device) if settings.classifier else reward_named(settings.reward)
    return Task(model, reference, tokenizer, make_queries(settings, tokenizer), reward, settings.seed)


def load(base: str, settings: Any) -> GPT2ValueModel:
    """The base as a model with a value head; a plain GPT-2 gets a new one."""
    model = GPT2ValueModel.from_pretrained(base, value_head_initializer_range=settings.value_head_std)
    if settings.detach_value_head:
        model.detach_value_head()
    return model.eval()


def with_lora(model: GPT2ValueModel, rank: int) -> torch.nn.Module:
    """The model in a LoRA of all its linear maps; its value head is trained whole."""
    try:
        import peft
    except ImportError as error:
        raise SettingsError(f"lora_rank={rank} needs peft, which cannot be imported: pip install peft") from error
    layers = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, config)
    for weight in model.v_head.parameters():
        weight.requires_grad_(True)
    return wrapped


def make_queries(settings: Any, tokenizer: Any) -> list[Tensor]:
    """Token ids of the first words of each line of a file, or of the demo's reviews: from `min` to `max` tokens."""
    least, most = settings.prompt_tokens_min, settings.prompt_tokens_max
    if not 1 <= least <= most:
        raise SettingsError(f"prompt_tokens_min={least}, prompt_tokens_max={most}; expected 1 <= min <= max.")
    if settings.prompts is None:
        lines = [review.text for review in itertools.islice(write_reviews(seed=1), REVIEWS)]
    else:
        lines = [line.strip() for line in settings.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise SettingsError(f"prompts={settings.prompts} holds no line of text; expected a prompt a line.")
    dice = random.Random(settings.seed)
    return [torch.tensor(ids[: dice.randint(least, most)]) for ids in tokenizer(lines)["input_ids"]]


def reward_named(name: str) -> Reward:
    """`vader`, or the function that MODULE:FUNCTION names.

    Raises:
        SettingsError: there is no such function.
    """
    if name == "vader":
        return vader()
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"reward={name!r} cannot be imported: {error}. Expected `vader`, or MODULE:FUNCTION with the module on "
            "PYTHONPATH."
        ) from error


def vader() -> Reward:
    """The compound score in [-1, 1] of a sentiment lexicon (Hutto and Gilbert, "VADER", ICWSM 2014)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise SettingsError("reward=vader needs a lexicon that is not installed: pip install vaderSentiment") from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda texts: [analyzer.polarity_scores(text)["compound"] for text in texts]


def classifier(settings: Any, device: torch.device) -> Reward:
    """The logit of one label of a text-classification model.

    Raises:
        SettingsError: the model has no such label.
    """
    tokenizer = AutoTokenizer.from_pretrained(settings.classifier)
    model = AutoModelForSequenceClassification.from_pretrained(settings.classifier).to(device).eval()
    labels = {name: number for number, name in model.config.id2label.items()}
    label = settings.classifier_label
    if label not in labels:
        raise SettingsError(f"classifier_label={label!r}; expected one of {', '.join(sorted(labels))}.")

    @torch.no_grad()
    def reward(texts: list[str]) -> list[float]:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        return model(**inputs).logits[:, labels[label]].tolist()

    return reward
