"""PPO for language models, after "Fine-Tuning Language Models from Human Preferences" (Ziegler et al., 2019,
arXiv:1909.08593): the arithmetic, to import, and a whole run, `gpt2-value ppo` or `train(PPOSettings(...))`.

It reads from top to bottom: settings, arithmetic, what a run is given, one iteration, what is on the disk, the loop,
the command. What comes from outside is loaded and checked in `inputs.py`; what trains a critic beforehand is in
`critic.py`. Importing it needs torch alone; a run needs the extra `ppo`. Details follow OpenAI's lm-human-preferences,
as "The N Implementation Details of RLHF with PPO" (Huang et al., 2023) lists them: Adam with eps 1e-5, a learning rate
annealed to 0, masked and centred whitening of advantages, the score on the last token.

Tensors are `[B, T]`: one row a response, one column a token; `mask` (bool) is True for the tokens that the policy drew.
A mask may have holes: tokens that somebody else wrote between two turns. What stands where the mask is False is
ignored, whatever it is.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import json
import logging
import math
import numbers
import operator
import os
import random
import re
import sys
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gpt2_value.critic import FittedValues, create_reference, fit_values  # noqa: F401
from gpt2_value.inputs import (
    Reward,
    RewardError,
    SettingsError,
    classifier,
    digest,
    fingerprint,
    load,
    refused,
    reward_function,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gpt2_value import Rollout

log = logging.getLogger("gpt2_value.ppo")
ONE_THREAD_BELOW = 10_000_000  # parameters; a model this small waits for its threads more than they help


ABOVE_0, MOST = math.ulp(0.0), sys.float_info.max  # infinity and NaN are beyond
RANGES = {  # in words: the least, the most, and the settings; `Sampling` has its own
    "at least 1": (1, MOST, ["iterations", "save_every", "batch_size", "minibatch_size", "epochs", "max_new_tokens"]),
    "at least 0": (
        0,
        MOST,
        [
            "lora_rank",
            "critic_warmup",
            "learning_rate",
            "value_learning_rate",
            "clip",
            "clip_high",
            "value_clip",
            "value_coef",
            "kl_coef",
        ],
    ),
    "above 0": (ABOVE_0, MOST, ["adam_eps", "max_grad_norm", "kl_target", "kl_horizon", "length_adaptive_lambda"]),
    "from 0 to 1": (0, 1, ["gamma", "lam", "lam_critic"]),
    "from 0 to 2**63 - 1": (0, 2**63 - 1, ["seed"]),
    "finite": (-MOST, MOST, ["no_end_score", "no_end_penalty"]),
}


@dataclasses.dataclass(frozen=True)
class PPOSettings:
    """Train a GPT-2 with a value head by PPO, and go on where a run stopped when the same command is given again.

    Every attribute is an option of the command line.

    Attributes:
        base: A GPT-2 or a package: a folder or Hub id.
        prompts: Text file, a prompt a line.
        reward: MODULE:FUNCTION. It is called with the texts; or, if it takes two or three arguments, with prompts,
            responses (and lists of the response's token ids). It returns for each text a number, or a list with one a
            token.
        classifier: A text-classification model as the reward, in its place.
        classifier_label: Its label whose logit is the reward.
        cut_prompts: Cut each prompt at random to between so many tokens. Default: whole prompts.
        no_end_score: Score of a response without an end. Default: its own.
        no_end_penalty: Taken from the score of a response without an end.
        out: Folder of the run.
        seed: Of everything random.
        iterations: Rollouts, each followed by `epochs` passes over it.
        save_every: Iterations between checkpoints of the run.
        accept_changes: Go on with a run although settings, prompts or reward are others now.
        tracker: tensorboard, trackio, wandb: any that accelerate knows.
        push_to: A repository on the Hub that checkpoints are pushed to.
        cpu: Stay on the CPU, also where there is a GPU.
        batch_size: Responses in a rollout, in all processes together.
        minibatch_size: Responses in an update, in all processes together.
        epochs: Passes over each rollout.
        max_new_tokens: Tokens of a response, at most.
        temperature: As in rollout().
        top_k: As in rollout(); 0 is off.
        top_p: As in rollout(); 1 is off.
        learning_rate: At first; it falls to 0 in a straight line.
        adam_eps: Of Adam; torch's default of 1e-8 makes much larger steps at first.
        max_grad_norm: Gradients are clipped to this norm.
        clip: Of the probability ratio, to both sides of 1.
        clip_high: Of the ratio above 1. Default: as `clip`.
        gamma: Discount.
        lam: Of generalised advantage estimation.
        length_adaptive_lambda: Alpha of a lam of 1 - 1/(alpha * length of the response), in the place of `lam`.
        kl_coef: Of the penalty, in units of reward a nat; where the controller starts.
        kl_target: Nats a response that the controller aims at. Default: fixed.
        kl_horizon: Responses over which the controller acts.
        kl_estimator: k1, k3, or exact: over the vocabulary.
        whiten_rewards: Divide rewards by their standard deviation.
        lora_rank: Train a LoRA of this rank instead of the weights; 0 is off.
        critic: A model of its own as the critic: a folder or Hub id. Default: the head.
        detach_value_head: The body does not learn from the value loss. Default: as saved.
        critic_warmup: Iterations in which only the critic learns: the head, or the model of its own.
        value_learning_rate: Of the critic. Default: as `learning_rate`.
        value_coef: Of the value loss.
        value_clip: How far a value may move from that of the rollout.
        lam_critic: Lambda of the returns that the critic learns. Default: that of the advantages.
    """

    base: str
    prompts: Path | Sequence[str]
    reward: str | Callable[..., Any] | None = None
    classifier: str | None = None
    classifier_label: str = "POSITIVE"
    cut_prompts: Sequence[int] | None = None
    no_end_score: float | None = None
    no_end_penalty: float = 0.0
    out: str | Path = Path("runs/ppo")
    seed: int = 0
    iterations: int = 15
    save_every: int = 5
    accept_changes: bool = False
    tracker: str | None = None
    push_to: str | None = None
    cpu: bool = False
    batch_size: int = 64
    minibatch_size: int = 16
    epochs: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    learning_rate: float = 1e-4
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0
    clip: float = 0.2
    clip_high: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    length_adaptive_lambda: float | None = None
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_estimator: str = "k1"
    whiten_rewards: bool = False
    lora_rank: int = 0
    critic: str | None = None
    detach_value_head: bool | None = None
    critic_warmup: int = 0
    value_learning_rate: float | None = None
    value_coef: float = 0.1
    value_clip: float = 0.2
    lam_critic: float | None = None

    def __post_init__(self) -> None:
        if not str(self.out):
            raise SettingsError("out is empty; expected a folder.")
        object.__setattr__(self, "out", Path(self.out))
        for name, value in list(vars(self).items()):
            if isinstance(value, numbers.Number) and hasattr(value, "item"):  # NumPy's, which a checkpoint cannot hold
                object.__setattr__(self, name, value.item())

    def compared(self) -> dict[str, Any]:
        """What decides the numbers of a run, as JSON has it. `Task.facts` has hashes of what is named by a path."""
        others = ("out", "classifier", "iterations", "save_every", "accept_changes", "tracker", "push_to", "cpu")
        kept = {name: value for name, value in vars(self).items() if name not in others}
        return json.loads(json.dumps(kept, default=str))

    def check(self, processes: int) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            SettingsError: see there.
        """
        from gpt2_value import Sampling

        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for words, (least, most, names) in RANGES.items():
            for name in names:
                value, is_whole = getattr(self, name), type(defaults[name]) is int
                if value is None and defaults[name] is None:
                    continue
                kind: Any = numbers.Integral if is_whole else numbers.Real
                if not isinstance(value, kind) or not least <= value <= most:
                    raise SettingsError(f"{name}={value!r}; expected a {'whole ' * is_whole}number, {words}.")
        for name in ("batch_size", "minibatch_size"):
            if getattr(self, name) % processes:
                raise SettingsError(f"{name}={getattr(self, name)}; expected a multiple of the {processes} processes.")
        with refused("no response can be drawn"):
            Sampling(self.temperature, self.top_k, self.top_p)
        if (self.reward is None) == (self.classifier is None):
            raise SettingsError("expected one of --reward MODULE:FUNCTION and --classifier MODEL.")
        if self.kl_estimator not in ("k1", "k3", "exact"):
            raise SettingsError(f"kl_estimator={self.kl_estimator!r}; expected one of k1, k3, exact.")
        if self.cut_prompts is not None:
            with refused(f"cut_prompts={self.cut_prompts}; expected two whole numbers, 1 <= least <= most"):
                least, most = map(operator.index, self.cut_prompts)
                if not 1 <= least <= most:
                    raise ValueError(f"found {least} and {most}")
        for library in ("accelerate", "matplotlib", *(("peft",) if self.lora_rank else ())):
            if importlib.util.find_spec(library) is None:
                raise SettingsError(f"{library} cannot be imported: pip install 'gpt2-value[ppo]'")
        if self.tracker is not None:
            from accelerate.tracking import get_available_trackers

            known = [str(name) for name in get_available_trackers()]
            if self.tracker not in known:
                raise SettingsError(f"tracker={self.tracker!r} is not installed; expected one of {known}: try pip.")


# The arithmetic


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean `[]` of `x [B, T]` over the drawn tokens."""
    _check(mask, x=x)
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return `x [B, T]` with standard deviation 1 over the drawn tokens, and mean 0 or (without `shift_mean`) its own.

    0 where masked. As `whiten` of OpenAI's lm-human-preferences (utils/core.py), which divides the variance by n.
    """
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0)
    white = centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return white if shift_mean else torch.where(mask, white + mean, 0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Return estimates `[B, T]` of KL(policy || reference) in nats from drawn tokens.

    k1 is unbiased, k3 never negative (Schulman, "Approximating KL Divergence", 2020,
    http://joschu.net/blog/kl-approx.html). For the exact KL over the vocabulary, see `rescore(..., reference=)`.
    """
    if kind not in ("k1", "k3"):
        raise ValueError(f"kind={kind!r}; expected k1 or k3.")
    log_ratio = logprobs - ref_logprobs
    return log_ratio if kind == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    kl: Tensor | None = None,
) -> Tensor:
    """Return rewards `[B, T]`: the scores, less a penalty for the KL to the reference (Ziegler et al., equation 2).

    Args:
        scores: `[B]`, one for each response, which goes to its last drawn token; or `[B, T]`, one for each token.
        logprobs, ref_logprobs: of the drawn tokens under policy and reference; their difference is the KL.
        kl_coef: units of reward a nat.
        kl: `[B, T]`, another estimate of the KL; the log-probabilities are then not used.

    Raises ValueError where the shapes do not fit.
    """
    penalty = logprobs - ref_logprobs if kl is None else kl  # type: ignore[operator]
    _check(mask, penalty=penalty)
    if scores.shape == mask.shape[:1]:
        scores = on_last_token(scores.to(penalty.dtype), mask)
    _check(mask, scores=scores)
    return torch.where(mask, scores - kl_coef * penalty, 0)


def on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Return `[B, T]`: `scores [B]` at the last drawn token of each row, else 0."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, scores.unsqueeze(1), 0)


class Advantages(NamedTuple):
    """What the policy and the critic learn from, `[B, T]` both, 0 where masked."""

    advantages: Tensor
    returns: Tensor


def advantages_and_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    lam_critic: float | Tensor | None = None,
) -> Advantages:
    """Return generalised advantage estimates (Schulman et al., 2016, arXiv:1506.02438, equation 16) and returns.

    The value that follows a token is that of the next drawn token of its row.

    Args:
        rewards: `[B, T]`, on any of the drawn tokens.
        values: `[B, T]`, of the state before each token.
        gamma: discount from one drawn token to the next.
        lam: one number, or `[B]`, one for each row: see `length_adaptive_lambda`.
        bootstrap: `[B]`, the value of the state after a row's last token; 0 where the text has ended. None ends all
            rows: a response is scored as a whole also where it was cut off, so nothing is left to come.
        lam_critic: the lambda of the returns, where it is another than that of the advantages ("decoupled GAE", VC-PPO,
            arXiv:2503.01491); 1 makes them Monte Carlo returns.

    Raises ValueError where the shapes do not fit.
    """
    _check(mask, rewards=rewards, values=values)
    following = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values.dtype)  # [B]
    _check(mask[:, 0], bootstrap=following)
    after = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        after[:, t] = following
        following = torch.where(mask[:, t], values[:, t], following)
    errors = torch.where(mask, rewards + gamma * after - values, 0)

    def summed(lam: float | Tensor) -> Tensor:
        if isinstance(lam, Tensor) and lam.dim() > 0:
            _check(mask[:, 0], lam=lam)
        sums, running = torch.zeros_like(errors), torch.zeros_like(errors[:, 0])
        for t in reversed(range(errors.shape[1])):
            running = torch.where(mask[:, t], errors[:, t] + gamma * lam * running, running)
            sums[:, t] = running
        return torch.where(mask, sums, 0)

    advantages = summed(lam)
    of_critic = advantages if lam_critic is None else summed(lam_critic)
    return Advantages(advantages, torch.where(mask, of_critic + values, 0))


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Return a lambda `[B]` for each row, 1 - 1 / (alpha * its drawn tokens), and not below 0 (VAPO,
    arXiv:2504.05118, equation 7): a longer response is credited over more tokens."""
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1))).clamp(min=0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Tensor:
    """Return the clipped surrogate `[]`, a mean over drawn tokens.

    Schulman et al., 2017, arXiv:1707.06347, equation 7. The ratio is clipped to 1 - `clip` and 1 + `clip_high`, by
    default `clip` too ("Clip-Higher", DAPO, arXiv:2503.14476).
    """
    _check(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.where(mask, logprobs - old_logprobs, 0).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Return half the mean `[]` over drawn tokens of the larger squared error, of the value and of the value clipped.

    A value is clipped to within `clip` of that of the rollout, as in OpenAI's lm-human-preferences.
    """
    _check(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = values.clamp(old_values - clip, old_values + clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var[returns - values] / Var[returns] over the drawn tokens; 0 where the returns do not vary."""
    _check(mask, values=values, returns=returns)
    values, returns = values[mask].double(), returns[mask].double()
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


class AdaptiveKLController:
    """The coefficient of the KL penalty, steered towards `target` nats a response (Ziegler et al., section 2.2)."""

    def __init__(self, init: float, target: float | None, horizon: int) -> None:
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, n_steps: int) -> None:
        """Take note of a mean KL over `n_steps` responses. Without a target the coefficient stays."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n_steps / self.horizon


def _check(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse what torch would broadcast in silence, such as scores `[B, 1]`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; expected torch.bool, True for drawn tokens: try mask.bool().")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {[*tensor.shape]}; expected {[*mask.shape]}, as the mask.")


# What a run is given: models, prompts, a reward


@dataclasses.dataclass
class Task:
    """The model that learns, what it is held to, and what it is asked and paid for.

    Attributes:
        reference: a frozen copy of the model as it was; None for a LoRA, where it is the model without its adapter.
        critic: a model of its own; None where the model's own head is the critic.
        queries: all prompts, 1-D tensors of token ids.
        facts: what a run that is resumed must have again, as hashes.
    """

    model: Any
    reference: Any
    critic: Any
    tokenizer: Any
    queries: list[Tensor]
    reward: Callable[[Rollout], Tensor]
    facts: dict[str, Any]

    def package_model(self) -> Any:
        """Return the model as it is saved: with a LoRA merged into a copy of it."""
        return self.model if self.reference is not None else copy.deepcopy(self.model).merge_and_unload()


def make_task(settings: PPOSettings, device: torch.device) -> Task:
    """Load what the settings name, and check that it fits together.

    Raises:
        SettingsError: it does not load, or does not fit.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(settings.seed)  # of a new head and a new LoRA
    model, reference, critic = load("base", settings.base), None, None
    facts = {"base": fingerprint(settings.base, model)}
    if settings.critic is not None:
        critic = load("critic", settings.critic)
        facts["critic"] = fingerprint(settings.critic, critic)
    if settings.detach_value_head is not None:
        (model.detach_value_head if settings.detach_value_head else model.attach_value_head)()
    with refused(f"the tokenizer of base={settings.base!r} does not load; expected its files beside the weights"):
        tokenizer = AutoTokenizer.from_pretrained(settings.base, config=model.config, trust_remote_code=False)
    queries = make_queries(settings, tokenizer)
    longest, most = max(queries, key=len), max(tokenizer.get_vocab().values())
    for name, its in {"base": model, "critic": critic}.items():
        if its is not None and most >= its.config.vocab_size:
            raise SettingsError(
                f"the tokenizer of base={settings.base!r} has a token with the id {most}, the model of {name} "
                f"{its.config.vocab_size} tokens; expected ids below that. Take the model's own tokenizer, or resize "
                "its embeddings."
            )
        if its is not None and len(longest) + settings.max_new_tokens > its.config.n_positions:
            raise SettingsError(
                f"the longest prompt has {len(longest)} tokens ({tokenizer.decode(longest)[:60]!r}); with "
                f"max_new_tokens={settings.max_new_tokens} that is more than the {its.config.n_positions} of {name}. "
                "Shorten it, or give --cut-prompts."
            )
    model, critic = model.to(device), critic and critic.to(device)
    if critic is not None:
        model.v_head.requires_grad_(False)
    if settings.lora_rank:
        model = with_lora(model, settings.lora_rank, trains_head=critic is None)
    else:
        reference = create_reference(model)
    if settings.classifier is not None:
        function, source = classifier(settings.classifier, settings.classifier_label, device)
    else:
        function, source = reward_function(settings.reward)
    facts |= {"reward": source, "prompts": digest(json.dumps([query.tolist() for query in queries]).encode())}
    return Task(model, reference, critic, tokenizer, queries, Reward(function, tokenizer), facts)


def with_lora(model: Any, rank: int, trains_head: bool) -> Any:
    """Return the model in a LoRA of all its linear maps; its value head is trained whole."""
    import peft

    layers = ["c_attn", "c_proj", "c_fc"]
    whole = ["v_head"] if trains_head else None
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, fan_in_fan_out=True, modules_to_save=whole),
    )


def make_queries(settings: PPOSettings, tokenizer: Any) -> list[Tensor]:
    """Return the token ids of each prompt: whole, or cut at random if the settings ask for it."""
    lines = settings.prompts
    with refused(
        f"prompts={str(lines)[:60]} cannot be read; expected a text file, a prompt a line, or a list of texts"
    ):
        if isinstance(lines, (str, Path)):
            lines = Path(lines).read_text(encoding="utf-8-sig").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise ValueError("found no text")
        queries = [torch.tensor(ids) for ids in tokenizer(lines)["input_ids"]]
    dice = random.Random(settings.seed)
    return [query[: dice.randint(*settings.cut_prompts)] if settings.cut_prompts else query for query in queries]


# One iteration


@dataclasses.dataclass
class Batch:
    """A rollout of this process, and what PPO makes of it."""

    drawn: Rollout
    advantages: Tensor  # [B, T], whitened over all processes
    returns: Tensor  # [B, T]
    metrics: dict[str, float]  # of the whole rollout, over all processes
    started: float


class Run:
    """A run and its folder. `sample` is `rollout`, or something else that returns a `Rollout`.

    Only the main process writes. A kill at any moment leaves the old checkpoint or the new one, and metrics at least as
    new.
    """

    def __init__(
        self, settings: PPOSettings, task: Task, accelerator: Accelerator, sample: Callable[..., Rollout]
    ) -> None:
        self.settings, self.task, self.accelerator, self.sample = settings, task, accelerator, sample
        self.controller = AdaptiveKLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.out = Path(settings.out)
        self.checkpoint, self.metrics = self.out / "checkpoint.pt", self.out / "metrics.jsonl"
        self.made = [self.out / name for name in ("package", "figure.png", *(("critic",) if task.critic else ()))]
        self.facts = task.facts | {"processes": accelerator.num_processes}
        models = {"policy": task.model} if task.critic is None else {"policy": task.model, "critic": task.critic}
        named = torch.nn.ModuleDict(models).named_parameters()
        self.trained = {name: weight for name, weight in named if weight.requires_grad}
        groups = {
            is_critic: [w for n, w in self.trained.items() if ("v_head." in n or n.startswith("critic.")) == is_critic]
            for is_critic in (False, True)
        }
        adam = torch.optim.Adam(
            [{"params": weights, "is_critic": is_critic} for is_critic, weights in groups.items()],
            eps=settings.adam_eps,
        )
        self.optimizer, self.model, *own = accelerator.prepare(adam, *models.values())
        self.critic = own[0] if own else None

    def prompts(self, iteration: int) -> list[Tensor]:
        """Return this process's prompts: the list is shuffled, used up, and shuffled again."""
        size, queries, chosen = self.settings.batch_size, self.task.queries, []
        first = iteration * size + self.accelerator.process_index
        for place in range(first, (iteration + 1) * size, self.accelerator.num_processes):
            lap, position = divmod(place, len(queries))
            generator = torch.Generator().manual_seed(self.settings.seed + 7919 * lap)
            chosen.append(queries[int(torch.randperm(len(queries), generator=generator)[position])])
        return chosen

    def draw(self, queries: list[Tensor]) -> Rollout:
        """Return responses to the prompts, with the critic's values."""
        settings = self.settings
        drawn = self.sample(
            self.model,
            queries,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_token_id=self.task.tokenizer.eos_token_id,
        )
        if self.critic is None:
            return drawn
        with torch.no_grad():
            return dataclasses.replace(drawn, values=self.values_of(drawn))

    def values_of(self, drawn: Rollout) -> Tensor:
        """Return the values `[B, T]` of a critic of its own, with gradients."""
        from gpt2_value import rescore

        return rescore(self.critic, drawn, values_only=True).values

    def scored(self, drawn: Rollout) -> Tensor:
        """Return rewards `[B, T]`. Where the reward fails in one process all raise, so that none waits for another."""
        from accelerate.utils import gather_object

        cause = None
        try:
            rewards = self.task.reward(drawn)
        except RewardError as error:
            cause = error
        if failures := [text for text in gather_object([cause and str(cause)]) if text]:
            raise cause or RewardError(failures[0])
        return rewards

    def collect(self, iteration: int) -> Batch:
        """Draw responses and score them. The weights stay as they are.

        All random numbers of an iteration come from (seed, iteration, process), so no generator has to be stored.
        """
        import numpy as np
        from accelerate.utils import set_seed

        settings, accelerator, started = self.settings, self.accelerator, time.perf_counter()
        mixed = np.random.SeedSequence([settings.seed, iteration, accelerator.process_index])
        set_seed(int(mixed.generate_state(1)[0]))
        drawn: Any = self.draw(self.prompts(iteration))
        mask, values = drawn.response_mask, drawn.values
        given = scores = self.scored(drawn)  # [B, T]
        if settings.no_end_score is not None:
            fixed = on_last_token(torch.full_like(given[:, 0], settings.no_end_score), mask)
            scores = torch.where(drawn.truncated[:, None], fixed, scores)
        scores = scores - on_last_token(settings.no_end_penalty * drawn.truncated, mask)
        kl = self.kl(drawn)
        rewards = token_rewards(scores, drawn.logprobs, None, mask, self.controller.value, kl)
        if settings.whiten_rewards:
            rewards = self._whiten(rewards, mask, shift_mean=False)
        lam, alpha = settings.lam, settings.length_adaptive_lambda
        advantages, returns = advantages_and_returns(
            rewards,
            values,
            mask,
            settings.gamma,
            lam if alpha is None else length_adaptive_lambda(mask, alpha),
            lam_critic=settings.lam_critic,
        )
        told = {"scores": given.sum(1), "kl": kl, "logprobs": drawn.logprobs, "values": values, "returns": returns}
        told = accelerator.gather(told | {"mask": mask, "ended": ~drawn.truncated})
        metrics = {
            "iteration": iteration,
            "reward": told["scores"].mean().item(),
            "kl": (told["kl"] * told["mask"]).sum(1).mean().item(),  # nats a response
            "kl_coef": self.controller.value,
            # -log p of a draw from p estimates p's entropy without bias, and costs nothing.
            "entropy": -masked_mean(told["logprobs"], told["mask"]).item(),
            "explained_variance": explained_variance(told["values"], told["returns"], told["mask"]),
            "response_length": told["mask"].sum(1).float().mean().item(),
            "ended": told["ended"].float().mean().item(),
        }
        return Batch(drawn, self._whiten(advantages, mask), returns, metrics, started)

    @torch.no_grad()
    def kl(self, drawn: Any) -> Tensor:
        """Return the KL to the reference at each token, `[B, T]` nats, by the settings' estimator."""
        from gpt2_value import rescore

        reference, kind = self.task.reference, self.settings.kl_estimator
        if kind == "exact":
            return rescore(self.model, drawn, reference=reference or "disable_adapter").kl
        with contextlib.nullcontext() if reference else self.task.model.disable_adapter():
            return kl_estimate(drawn.logprobs, rescore(reference or self.model, drawn).logprobs, kind)

    def learn(self, batch: Batch) -> dict[str, float]:
        """Make all updates on a batch; returns the metrics."""
        settings, iteration = self.settings, int(batch.metrics["iteration"])
        self.controller.update(batch.metrics["kl"], settings.batch_size)
        left = 1 - iteration / settings.iterations
        of_critic = settings.learning_rate if settings.value_learning_rate is None else settings.value_learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = left * (of_critic if group["is_critic"] else settings.learning_rate)
        size = settings.minibatch_size // self.accelerator.num_processes
        updates = [
            self.update(batch, rows, is_warming=iteration < settings.critic_warmup)
            for _ in range(settings.epochs)
            for rows in torch.randperm(len(batch.drawn)).split(size)
        ]
        found = torch.tensor(updates, device=self.accelerator.device).mean(0)
        names = ("policy_loss", "value_loss", "approxkl", "ratio", "clip_fraction")
        means = zip(names, self.accelerator.reduce(found, "mean").tolist(), strict=True)
        return {
            **batch.metrics,
            **dict(means),
            "learning_rate": settings.learning_rate * left,
            "seconds": time.perf_counter() - batch.started,
        }

    def update(self, batch: Batch, rows: Tensor, is_warming: bool) -> list[float]:
        """One step on these rows, of the critic and then of the policy where they are two models; returns both losses,
        approxkl, mean ratio and clip fraction. While the critic is warming up, the policy stays."""
        from gpt2_value import rescore

        settings, drawn = self.settings, batch.drawn[rows.to(batch.returns.device)]
        advantages, returns = batch.advantages[rows], batch.returns[rows]
        old, mask, clip = drawn.logprobs, drawn.response_mask, settings.clip
        high = clip if settings.clip_high is None else settings.clip_high
        if self.critic is not None:
            of_values = value_loss(self.values_of(drawn), drawn.values, returns, mask, settings.value_clip)
            self._step(settings.value_coef * of_values, self.critic)
            if is_warming:
                return [0.0, of_values.item(), 0.0, 1.0, 0.0]
        new = rescore(self.model, drawn)
        loss = of_policy = policy_loss(new.logprobs, old, advantages, mask, clip, high)
        if self.critic is None:
            of_values = value_loss(new.values, drawn.values, returns, mask, settings.value_clip)
            loss = (not is_warming) * of_policy + settings.value_coef * of_values
        self._step(loss, self.model, is_warming)
        with torch.no_grad():
            ratio = (new.logprobs - old).exp()
            approxkl = 0.5 * masked_mean((new.logprobs - old) ** 2, mask)
            clipped = masked_mean((ratio != ratio.clamp(1 - clip, 1 + high)).float(), mask)
            return torch.stack([of_policy, of_values, approxkl, masked_mean(ratio, mask), clipped]).tolist()

    def _step(self, loss: Tensor, model: Any, is_warming: bool = False) -> None:
        """One step of the optimizer for the weights of this model; of its head alone where the critic is warming up.

        Raises:
            FloatingPointError: the gradient is not finite. The weights are as they were.
        """
        self.accelerator.backward(loss)
        for group in self.optimizer.param_groups:
            for weight in group["params"] if is_warming and not group["is_critic"] else ():
                weight.grad = None
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.settings.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite (loss {loss.item()}). {SMALLER}")
        self.optimizer.step()  # weights without a gradient stay
        self.optimizer.zero_grad()

    def _whiten(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """`whiten` by the mean and deviation of all processes."""
        white = whiten(self.accelerator.gather(x), self.accelerator.gather(mask), shift_mean)
        return white.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    # What is on the disk: one line of metrics an iteration, and a checkpoint from which the run goes on

    def resume(self) -> int:
        """Load the last checkpoint, and drop metrics that are newer; returns the next iteration.

        Without a checkpoint, or with one of before the first iteration, the run begins, and writes one.

        Raises:
            SettingsError: the folder holds a run of something else, or not all of it.
        """
        done, lines = 0, self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        if self.checkpoint.exists():
            with refused(f"{self.checkpoint} cannot be read; put it back, or begin anew with another --out"):
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
                done = state["iteration"]
        elif lines:
            raise SettingsError(f"{self.metrics} is of something else, without a checkpoint.pt; give another --out.")
        if done:
            self._compare(state["settings"], done)
            missing = f"{self.metrics} does not hold the {done} iterations of the checkpoint"
            with refused(f"{missing}; put it back, or begin anew with another --out"):
                if [json.loads(line)["iteration"] for line in lines[:done]] != [*range(done)]:
                    raise ValueError(f"found {len(lines)} lines")
            with torch.no_grad():
                for name, weight in self.trained.items():
                    weight.copy_(state["weights"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.controller.value = state["kl_coef"]
        if self.accelerator.is_main_process:
            if not done:
                self.save(0)
            replace(self.metrics, lambda file: file.write_text("".join(lines[:done]), encoding="utf-8"))
        self.accelerator.wait_for_everyone()
        return done

    def _compare(self, old: dict[str, Any], done: int) -> None:
        where, asked = f"{self.out} holds a run", self.settings.iterations
        if done > asked:
            raise SettingsError(f"{where} of {done} iterations, and got {asked}; expected as many or more.")
        new = self.settings.compared() | self.facts
        if old["reward"] is None:  # it failed, and may be mended
            del new["reward"]
        changed = [name for name in new if old.get(name) != new[name]]
        if not changed:
            return
        others = ", ".join(f"{name} ({old.get(name)}, and now {new[name]})" for name in changed)
        found = f"{where} with another {others}"
        advice = "Give what it had to go on with it, or another --out to begin anew."
        if {"base", "critic", "lora_rank"} & {*changed}:
            raise SettingsError(f"{found}. {advice}")
        if not self.settings.accept_changes:
            raise SettingsError(f"{found}. {advice} --accept-changes goes on with what is given now.")
        log.warning("%s: accepted", found)

    def record(self, metrics: dict[str, float]) -> bool:
        """Write one more line of metrics, and where it is due a checkpoint after it; returns whether it was."""
        done = int(metrics["iteration"]) + 1
        self.accelerator.log(metrics, step=done - 1)
        is_due = done % self.settings.save_every == 0 or done == self.settings.iterations
        if self.accelerator.is_main_process:
            with self.metrics.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(metrics) + "\n")
                lines.flush()
                os.fsync(lines.fileno())  # on the disk before the checkpoint that counts on it
            if is_due:
                self.save(done)
        return is_due

    def save(self, done: int, has_failed: bool = False) -> None:
        """Write a checkpoint after `done` iterations. If one has failed since, the reward may be mended for the next.

        Raises:
            FloatingPointError: a weight is not finite. The old checkpoint stays.
        """
        for name, weight in self.trained.items():
            if not weight.isfinite().all():
                raise FloatingPointError(f"{name} is not finite after iteration {done - 1}. {SMALLER}")
        facts = self.facts | {"reward": None} if has_failed else self.facts
        state = {
            "settings": self.settings.compared() | facts,
            "iteration": done,
            "weights": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "kl_coef": self.controller.value,
        }
        replace(self.checkpoint, lambda file: torch.save(state, file))

    def finish(self) -> None:
        """Save the model (and a critic of its own) as packages, and draw the curves."""
        from gpt2_value import save_package

        package, figure, *critic = self.made
        save_package(self.task.package_model(), package, self.task.tokenizer)
        for folder in critic:
            save_package(self.task.critic, folder, self.task.tokenizer)
        draw(read_metrics(self.out), figure)


SMALLER = (
    "The last checkpoint is of before that: give a smaller --learning-rate or --max-grad-norm, and --accept-changes to "
    "go on from there."
)


def read_metrics(out: str | Path) -> list[dict[str, float]]:
    """Return the metrics of all iterations of the run in a folder."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(file.name + ".draft")
    write(draft)
    with draft.open("rb+") as written:
        os.fsync(written.fileno())
    draft.replace(file)


def draw(metrics: list[dict[str, float]], file: Path) -> None:
    """Write a PNG with a panel for each curve that says whether a run is healthy."""
    from matplotlib.figure import Figure

    panels = ("reward", "kl", "explained_variance", "ratio", "clip_fraction", "response_length")
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.plot([line["iteration"] for line in metrics], [line[name] for line in metrics])
        axes.set_title(name)
        axes.grid()
    figure.savefig(file)


# The loop


def train(settings: PPOSettings, sample: Callable[..., Rollout] | None = None) -> Run:
    """Run, or go on with, what the settings describe. In a run of several processes all of them call this.

    Args:
        sample: what draws responses, in the place of `rollout` and with its arguments.

    Raises:
        SettingsError: a setting that cannot be, or a folder that holds another run; before the first iteration.
        RewardError: a reward function returned what is no reward. The same call goes on.
        FloatingPointError: gradient or weights are not finite. The last checkpoint stays as it is.
    """
    settings.check(int(os.environ.get("WORLD_SIZE", 1)))
    from accelerate import Accelerator
    from tqdm import tqdm

    from gpt2_value import CheckpointPusher, rollout

    out = Path(settings.out)
    with refused(f"out={out} cannot be written to"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").touch()
    cpu = settings.cpu or not torch.accelerator.is_available()  # where accelerate is not told, it starts no gloo there
    accelerator = Accelerator(cpu=cpu, log_with=settings.tracker, project_dir=out)
    task = make_task(settings, accelerator.device)
    threads = torch.get_num_threads()
    if sum(weight.numel() for weight in task.model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    run = Run(settings, task, accelerator, sample or rollout)
    with refused("no response can be drawn"):
        first = run.draw(task.queries[:2] * 2)
    run.scored(first)
    start, is_main = run.resume(), accelerator.is_main_process
    if settings.critic_warmup >= settings.iterations:
        log.warning("critic_warmup=%d: the policy does not learn in %d", settings.critic_warmup, settings.iterations)
    if is_main:
        log.info("iterations %d to %d, %d thread(s)", start, settings.iterations, torch.get_num_threads())
    if settings.tracker is not None:
        accelerator.init_trackers("gpt2-value-ppo", {name: str(value) for name, value in settings.compared().items()})
    pusher: Any = contextlib.nullcontext()
    if is_main and settings.push_to is not None:
        pusher = CheckpointPusher(settings.push_to, metric_for_best_model="reward", tags=["ppo"])
    with pusher as pushing:
        bar = tqdm(range(start, settings.iterations), "PPO", settings.iterations, initial=start, disable=not is_main)
        for iteration in bar:
            try:
                batch = run.collect(iteration)
            except BaseException as error:
                if is_main:
                    run.save(iteration, has_failed=isinstance(error, Exception))
                raise
            try:
                metrics = run.learn(batch)
            except ValueError as error:  # weights that are not finite give no scores
                raise FloatingPointError(f"{error} {SMALLER}") from error
            is_saved, numbers = run.record(metrics), {name: metrics[name] for name in ("reward", "kl")}
            bar.set_postfix({name: f"{number:.2f}" for name, number in numbers.items()}, refresh=False)
            if is_saved and pushing is not None:
                pushing.push(task.package_model(), step=iteration + 1, metrics=numbers, tokenizer=task.tokenizer)
    # DistributedDataParallel, if it is the last to hold the process group, waits while holding Python's lock for a
    # thread that needs the lock (torch 2.13). So it goes first.
    run.model, run.critic = task.model, task.critic
    accelerator.free_memory()
    accelerator.end_training()
    torch.set_num_threads(threads)
    if is_main and (start < settings.iterations or not all(made.exists() for made in run.made)):
        run.finish()
    return run


# The command


SECTIONS = {
    "base": "what is trained, on what",
    "out": "the run",
    "batch_size": "sizes and sampling",
    "learning_rate": "the policy",
    "critic": "the critic",
}


def settings_of(arguments: Sequence[str] | None = None, prog: str | None = None) -> PPOSettings:
    """Return the settings that a command line gives."""
    about, _, attributes = inspect.getdoc(PPOSettings).partition("Attributes:")  # type: ignore[union-attr]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE))
    parser = section = argparse.ArgumentParser(prog, description=about)
    hints = typing.get_type_hints(PPOSettings)
    for field in dataclasses.fields(PPOSettings):
        if field.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[field.name])  # type: ignore[assignment]
        kind = (typing.get_args(hints[field.name]) or (hints[field.name],))[0]  # of a union, what can be typed
        how: dict[str, Any] = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "NAME")}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind == Sequence[int]:
            how = {"type": int, "nargs": 2, "metavar": ("LEAST", "MOST")}
        is_required, name = field.default is dataclasses.MISSING, f"--{field.name.replace('_', '-')}"
        shown = "" if field.default in (None, False) or is_required else f" Default: {field.default}."
        section.add_argument(name, default=field.default, required=is_required, help=texts[field.name] + shown, **how)
    return PPOSettings(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train as a command line says; returns the exit status: 0 done, 1 refused or failed, 130 interrupted."""
    from gpt2_value import GPT2ValueHubError

    try:
        settings = settings_of(arguments, prog)
        from transformers.utils import logging as of_transformers

        of_transformers.set_verbosity_error()
        of_transformers.disable_progress_bar()
        logging.basicConfig(format="%(message)s")
        log.setLevel(logging.INFO)
        run = train(settings)
    except (SettingsError, FloatingPointError, GPT2ValueHubError) as error:
        if isinstance(error, RewardError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)  # where the user's own code failed
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    if run.accelerator.is_main_process:
        first, *_, last = read_metrics(settings.out) * 2
        print(f"reward {first['reward']:.2f} -> {last['reward']:.2f} at a KL of {last['kl']:.1f} nats: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(prog=f"python -m {__spec__.name}" if __spec__ else None))
