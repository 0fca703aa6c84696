"""What a run of PPO is given from outside: models, and a reward, which is a function or a text classifier.

All of it is checked where it arrives, and refused in plain words. Imports torch, and in the functions transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2_value import Rollout


class SettingsError(ValueError):
    """A setting that cannot be; the message says what was found, what was expected and what to type."""


class RewardError(SettingsError):
    """A reward function failed, or returned what is no reward; the message says which function, and what."""


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn what libraries raise about their input into a `SettingsError`, with the first line of what they say."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    spoiled = (EOFError, pickle.PickleError, SafetensorError, StrictDataclassError)
    try:
        yield
    except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, *spoiled) as error:
        said = str(error) if isinstance(error, SettingsError) else str(error).partition("\n")[0]
        raise SettingsError(f"{what} ({type(error).__name__}: {said})") from error


# Models


def load(name: str, source: str) -> Any:
    """Return a GPT-2 or a package as a model with a value head, in float32, by this installation's code.

    Args:
        name: of the setting, for errors.

    Raises:
        SettingsError: it is none, or its weights are not finite.
    """
    from transformers import PretrainedConfig

    from gpt2_value import GPT2ValueModel
    from hub_tools.package.weights import not_finite

    with refused(f"{name}={source!r} does not load; expected a GPT-2 or a package of one, as a folder or Hub id"):
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type", "no config.json with a model_type")
        if kind not in ("gpt2", "gpt2_value", "gpt2_value_seed"):
            raise ValueError(f"found {kind}")
        model = GPT2ValueModel.from_pretrained(source, dtype=torch.float32).eval()
    if broken := not_finite(model.state_dict()):
        raise SettingsError(f"the weights of {name}={source!r} are not finite: {broken[0]}; expected numbers in all.")
    return model


def digest(*parts: Any) -> str:
    """Return a hash of bytes, or of what can be read as bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def fingerprint(source: str, model: torch.nn.Module) -> str:
    """Return a hash of all weights, and of config.json but for where and by which version it was saved."""
    from transformers import PretrainedConfig

    config = PretrainedConfig.get_config_dict(source)[0]
    for name in ("_commit_hash", "_name_or_path", "transformers_version"):
        config.pop(name, None)
    weights = (weight.detach().cpu().contiguous().view(-1) for weight in model.state_dict().values())
    return digest(json.dumps(config, sort_keys=True).encode(), *(w.view(torch.uint8).numpy() for w in weights))


# Rewards


def reward_function(reward: Any) -> tuple[Callable[..., Any], str]:
    """Return the function that MODULE:FUNCTION names (or that was given), and a hash of its source.

    Raises:
        RewardError: its module cannot be imported.
        SettingsError: there is no such function.
    """
    function = module = reward
    if isinstance(reward, str):
        name, _, attribute = reward.partition(":")
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            found = f"reward={reward!r} cannot be imported: {error!r}; expected MODULE:FUNCTION, here or on PYTHONPATH."
            raise RewardError(f"{found} {MENDED}") from error
        function = getattr(module, attribute, None)
    if not callable(function):
        raise SettingsError(f"reward={reward!r}: found no such function in {module!r}; expected MODULE:FUNCTION.")
    try:
        source = inspect.getsource(sys.modules[function.__module__])
    except (AttributeError, KeyError, OSError, TypeError):  # made in a session, or not in Python
        source = ""
    return function, digest(f"{getattr(function, '__qualname__', type(function))} {source}".encode())


def classifier(name: str, label: str, device: torch.device) -> tuple[Callable[[list[str]], list[float]], str]:
    """Return a function that gives the logit of one label of a text-classification model, and a hash of the model.

    Texts are cut at as many tokens as the model has positions.

    Raises:
        SettingsError: the model does not load, lacks weights, has no such label, or cannot pad.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with refused(f"classifier={name!r} does not load; expected a text classifier and its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True
        )
        if len(tokenizer) < 2 or info["missing_keys"]:
            raise ValueError(f"found no {', '.join(info['missing_keys']) or 'vocabulary'}")
    labels = {text: number for number, text in model.config.id2label.items()}
    if label not in labels:
        raise SettingsError(f"classifier_label={label!r}; expected one of {', '.join(sorted(labels))}.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise SettingsError(f"classifier={name!r}: its tokenizer has no pad token; set one and save it.")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    most = tokenizer.model_max_length
    tokenizer.model_max_length = min(most, getattr(model.config, "max_position_embeddings", most))
    model.to(device).eval()

    @torch.no_grad()
    def logit(texts: list[str]) -> list[float]:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        return model(**inputs).logits[:, labels[label]].tolist()

    return logit, fingerprint(name, model)


class Reward:
    """A reward function as the run calls it: what it returns is checked where it arrives."""

    def __init__(self, function: Callable[..., Any], tokenizer: Any) -> None:
        self.function, self.tokenizer = function, tokenizer
        self.name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', function)}"
        expected = "(texts), (prompts, responses) or (prompts, responses, token_ids)"
        with refused(f"{self.name} cannot be called as a reward; expected {expected}"):
            signature = inspect.signature(function)
            self.takes = sum(
                p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
                for p in signature.parameters.values()
            )
            signature.bind(*range(self.takes))  # no keyword is missing
            if not 1 <= self.takes <= 3:
                raise ValueError(f"found {signature}")

    def __call__(self, drawn: Rollout) -> Tensor:
        """Return rewards `[B, T]` float32 of the drawn tokens: a response's number stands on its last.

        Raises:
            RewardError: the function did not return a finite number for each response, or for each of its tokens.
        """
        mask, P = drawn.response_mask.cpu(), drawn.sequences.shape[1] - drawn.responses.shape[1]

        def decoded(columns: slice) -> list[str]:
            rows = zip(drawn.sequences[:, columns], drawn.attention_mask[:, columns].bool(), strict=True)
            return [self.tokenizer.decode(tokens[seen], skip_special_tokens=True) for tokens, seen in rows]

        ids = [tokens[its].tolist() for tokens, its in zip(drawn.responses.cpu(), mask, strict=True)]
        texts = decoded(slice(None))
        asked = [texts] if self.takes == 1 else [decoded(slice(P)), decoded(slice(P, None)), ids]
        try:
            given = as_list(self.function(*asked[: self.takes]))
        except Exception as error:  # whatever the user's own code raises
            raise RewardError(f"{self.name} raised {error!r}. {MENDED}") from error
        if not isinstance(given, list) or len(given) != len(mask):
            found = f"{len(given)} rewards" if isinstance(given, list) else repr(given)[:60]
            raise RewardError(f"{self.name} returned {found} for {len(mask)} responses; {EXPECTED} {MENDED}")
        rewards = torch.zeros(mask.shape)
        for row, reward in enumerate(map(as_list, given)):
            columns = mask[row].nonzero().squeeze(1)[slice(None) if isinstance(reward, list) else slice(-1, None)]
            try:
                numbers = torch.tensor(reward, dtype=torch.float32).view(-1)
            except (OverflowError, RuntimeError, TypeError, ValueError):  # None, texts, lists of them
                numbers = torch.tensor([])
            if numbers.shape != columns.shape or not numbers.isfinite().all():
                found = f"{repr(reward)[:60]} for response {row}, of {len(ids[row])} tokens"
                raise RewardError(f"{self.name} returned {found} ({texts[row][-60:]!r}); {EXPECTED} {MENDED}")
            rewards[row, columns] = numbers
        return rewards.to(drawn.response_mask.device)


EXPECTED = "expected for each response a finite number, or a list of one for each of its tokens, its end included."
MENDED = "Nothing is lost: mend it, and the same command goes on."


def as_list(given: Any) -> Any:
    """Return tensors, arrays and tuples as lists."""
    return list(given) if isinstance(given, tuple) else given.tolist() if hasattr(given, "tolist") else given
