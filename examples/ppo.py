"""PPO for language models as in "Fine-Tuning Language Models from Human Preferences" (Ziegler et al., 2019,
arXiv:1909.08593), in one file: `python examples/ppo.py --out runs/ppo --seed 0`, or `accelerate launch` in its place.

Imports the package's public names, accelerate, typer, and of the examples `ppo_task` (model, prompts, reward),
`ppo_run` (what is on the disk) and `ppo_picture`. It reads from top to bottom: settings, arithmetic, one iteration, the
loop. Details follow OpenAI's lm-human-preferences, as "The N Implementation Details of RLHF with PPO" (Huang et al.,
2023) lists them: Adam with eps 1e-5, a learning rate annealed to 0, masked and centred whitening of advantages, the
score on the last token.

A killed run continues from its last checkpoint when the same command is given again. All random numbers of an iteration
come from (seed, iteration, process), so no generator has to be stored.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import numpy as np
import torch
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from ppo_picture import draw_run
from ppo_run import Run
from ppo_task import SettingsError, Task, make_task
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

from generation_gpt2_value import Rescored, Rollout, rescore, rollout
from hub_tools import CheckpointPusher, save_package


def option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


@dataclass(frozen=True)
class Settings:
    """Train a GPT-2 with a value head by PPO, and go on where a killed run stopped."""

    out: Annotated[Path, option("Folder of the run: metrics.jsonl, checkpoint.pt, figure.png, package/.")]
    seed: Annotated[int, option("Of everything random.")] = 0
    iterations: Annotated[int, option("Rollouts, each followed by `epochs` passes over it.")] = 15
    base: Annotated[str | None, option("A GPT-2 or a package: a folder or Hub id. Default: the demo's.")] = None
    prompts: Annotated[Path | None, option("Text file, a prompt a line. Default: the demo's reviews.")] = None
    prompt_tokens_min: Annotated[int, option("Each prompt is cut at random between this and the next.")] = 2
    prompt_tokens_max: Annotated[int, option("See above.")] = 8
    reward: Annotated[str, option("`vader`, or MODULE:FUNCTION, from a list of texts to floats.")] = "vader"
    classifier: Annotated[str | None, option("A text-classification model as the reward, in its place.")] = None
    classifier_label: Annotated[str, option("Its label whose logit is the reward.")] = "POSITIVE"
    no_end_score: Annotated[float | None, option("Score of a response without an end; default: its own.")] = None
    no_end_penalty: Annotated[float, option("Taken from the score of a response without an end.")] = 0.0
    batch_size: Annotated[int, option("Responses in a rollout, in all processes together.")] = 64
    minibatch_size: Annotated[int, option("Responses in an update, in all processes together.")] = 16
    epochs: Annotated[int, option("Passes over each rollout.")] = 4
    max_new_tokens: Annotated[int, option("Tokens of a response, at most.")] = 48
    temperature: Annotated[float, option("As in rollout().")] = 1.0
    top_k: Annotated[int, option("As in rollout(); 0 is off.")] = 0
    top_p: Annotated[float, option("As in rollout(); 1 is off.")] = 1.0
    learning_rate: Annotated[float, option("At first; it falls to 0 in a straight line.")] = 1e-4
    adam_eps: Annotated[float, option("Adam's eps: torch's default of 1e-8 makes much larger steps at first.")] = 1e-5
    max_grad_norm: Annotated[float, option("Gradients are clipped to this norm.")] = 1.0
    kl_coef: Annotated[float, option("Of the penalty, in units of reward a nat; where the controller starts.")] = 0.05
    kl_target: Annotated[float | None, option("Nats a response that the controller aims at. Default: fixed.")] = None
    kl_horizon: Annotated[int, option("Responses over which the controller acts.")] = 10_000
    kl_estimator: Annotated[str, option("k1, k3, or exact: over the vocabulary.")] = "k1"
    gamma: Annotated[float, option("Discount.")] = 1.0
    lam: Annotated[float, option("Of generalised advantage estimation.")] = 0.95
    clip: Annotated[float, option("Of the probability ratio.")] = 0.2
    value_clip: Annotated[float, option("How far a value may move from that of the rollout.")] = 0.2
    value_coef: Annotated[float, option("Of the value loss.")] = 0.1
    whiten_rewards: Annotated[bool, option("Divide rewards by their standard deviation.")] = False
    detach_value_head: Annotated[bool, option("The body does not learn from the value loss.")] = False
    value_head_std: Annotated[float, option("Of a new value head's weights; 0 starts all values at 0.")] = 0.0
    lora_rank: Annotated[int, option("Train a LoRA of this rank instead of the weights; 0 is off.")] = 0
    save_every: Annotated[int, option("Iterations between checkpoints of the run.")] = 5
    tracker: Annotated[str | None, option("tensorboard, trackio, wandb: any that accelerate knows.")] = None
    push_to: Annotated[str | None, option("A repository on the Hub that checkpoints are pushed to.")] = None
    cpu: Annotated[bool, option("Stay on the CPU, also where there is a GPU.")] = False

    def plain(self) -> dict[str, Any]:
        """What decides the numbers of a run, as JSON has it."""
        elsewhere = ("out", "save_every", "tracker", "push_to", "cpu")
        values = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


# The arithmetic. Tensors are [B, T]: one row a response, one column a token; `mask` is True for tokens that were drawn.


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean `[]` of `x [B, T]` over the drawn tokens."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x [B, T]` with standard deviation 1 over the drawn tokens, and mean 0 or (without `shift_mean`) its own."""
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0)
    white = centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return white if shift_mean else torch.where(mask, white + mean, 0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimates `[B, T]` of KL(policy || reference) from drawn tokens: k1 is unbiased, k3 never negative
    (Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html)."""
    log_ratio = logprobs - ref_logprobs
    return log_ratio if kind == "k1" else torch.expm1(-log_ratio) + log_ratio


def final_scores(scores: Tensor, truncated: Tensor, replaced_by: float | None, penalty: float) -> Tensor:
    """`scores [B]`, where `truncated [B]` replaced by a fixed score, and less a penalty."""
    if replaced_by is not None:
        scores = torch.where(truncated, replaced_by, scores)
    return torch.where(truncated, scores - penalty, scores)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, kl: Tensor | None = None
) -> Tensor:
    """Rewards `[B, T]`: minus `kl_coef` times the per-token log-ratio (or `kl [B, T]`, another estimate), plus `scores
    [B]` at the last token that was drawn; 0 where masked. Ziegler et al., equation 2."""
    penalty = logprobs - ref_logprobs if kl is None else kl
    rewards = torch.where(mask, -kl_coef * penalty, 0)
    return rewards.scatter_add(1, _last(mask), scores.unsqueeze(1).to(rewards.dtype))


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, `[B, T]` both, 0 where masked (Schulman et al., 2016,
    arXiv:1506.02438, equation 16).

    Args:
        values: of the state before each token.
        bootstrap: `[B]`, the value of the state after a row's last token; 0 where the text has ended. None ends all
            rows: a response is scored as a whole also where it was cut off, so nothing is left to come.
    """
    values = torch.where(mask, values, 0)
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    if bootstrap is not None:
        after = after.scatter(1, _last(mask), bootstrap.unsqueeze(1).to(after.dtype))
    errors = torch.where(mask, rewards + gamma * after - values, 0)
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = errors[:, t] + gamma * lam * running  # 0 after the end
        advantages[:, t] = running
    return advantages, advantages + values


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """The clipped surrogate `[]` (Schulman et al., 2017, arXiv:1707.06347, equation 7), a mean over drawn tokens."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0).exp()
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the mean `[]` over drawn tokens of the larger squared error, of the value and of the value clipped."""
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var[returns - values] / Var[returns] over the drawn tokens; 0 where the returns do not vary."""
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


def _last(mask: Tensor) -> Tensor:
    """The column `[B, 1]` of each row's last drawn token."""
    return (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1, keepdim=True)


# One iteration


@dataclass
class Batch:
    """A rollout of this process, and what PPO makes of it."""

    drawn: Rollout
    advantages: Tensor  # [B, T], whitened over all processes
    returns: Tensor  # [B, T]


class Trainer:
    """What an iteration needs. `sample` is `rollout`, or something else that returns a `Rollout`."""

    def __init__(
        self, settings: Settings, task: Task, accelerator: Accelerator, sample: Callable[..., Rollout]
    ) -> None:
        self.settings, self.task, self.accelerator, self.sample = settings, task, accelerator, sample
        trained = [weight for weight in task.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, eps=settings.adam_eps)
        self.model, self.optimizer = accelerator.prepare(task.model, optimizer)
        self.controller = AdaptiveKLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)

    def iterate(self, iteration: int) -> dict[str, float]:
        """Draw responses, score them, and learn from them; returns the metrics."""
        accelerator, settings, started = self.accelerator, self.settings, time.perf_counter()
        mixed = np.random.SeedSequence([settings.seed, iteration, accelerator.process_index])
        set_seed(int(mixed.generate_state(1)[0]))
        rate = settings.learning_rate * (1 - iteration / settings.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch, metrics = self.collect(iteration)
        updates = [
            self.update(batch, rows)
            for _ in range(settings.epochs)
            for rows in torch.randperm(len(batch.drawn)).split(settings.minibatch_size // accelerator.num_processes)
        ]
        means = accelerator.reduce(torch.tensor(updates, device=accelerator.device).mean(0), "mean").tolist()
        metrics |= dict(zip(("policy_loss", "value_loss", "approxkl", "ratio", "clip_fraction"), means, strict=True))
        return {**metrics, "learning_rate": rate, "seconds": time.perf_counter() - started}

    def collect(self, iteration: int) -> tuple[Batch, dict[str, float]]:
        """A batch, and the metrics `iteration`, `reward`, `kl` ... of the whole rollout, over all processes."""
        settings, accelerator = self.settings, self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        queries = self.task.prompts(iteration, settings.batch_size)[rank::processes]
        drawn = self.sample(
            self.model,
            queries,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_token_id=self.task.tokenizer.eos_token_id,
        )
        mask, values = drawn.response_mask, drawn.values
        scores = torch.tensor(self.task.reward(self.task.texts(drawn)), dtype=torch.float32, device=mask.device)
        scored = final_scores(scores, drawn.truncated, settings.no_end_score, settings.no_end_penalty)
        with torch.no_grad(), self.task.as_reference(self.model) as reference:
            ref_logprobs = rescore(reference, drawn).logprobs
            if settings.kl_estimator == "exact":
                kl = rescore(self.model, drawn, reference=reference).kl
            else:
                kl = kl_estimate(drawn.logprobs, ref_logprobs, settings.kl_estimator)
        rewards = token_rewards(scored, drawn.logprobs, ref_logprobs, mask, self.controller.value, kl)
        if settings.whiten_rewards:
            rewards = self._whiten(rewards, mask, shift_mean=False)
        advantages, returns = advantages_and_returns(rewards, values, mask, settings.gamma, settings.lam)

        told = {"scores": scores, "kl": kl, "logprobs": drawn.logprobs, "values": values, "returns": returns}
        told |= {"mask": mask, "ended": ~drawn.truncated}
        told = accelerator.gather(told)
        nats = (told["kl"] * told["mask"]).sum(1).mean().item()  # a response
        metrics = {
            "iteration": iteration,
            "reward": told["scores"].mean().item(),
            "kl": nats,
            "kl_coef": self.controller.value,
            # -log p of a draw from p estimates p's entropy without bias, and costs nothing.
            "entropy": -masked_mean(told["logprobs"], told["mask"]).item(),
            "explained_variance": explained_variance(told["values"], told["returns"], told["mask"]),
            "response_length": told["mask"].sum(1).float().mean().item(),
            "ended": told["ended"].float().mean().item(),
        }
        self.controller.update(nats, settings.batch_size)
        return Batch(drawn, self._whiten(advantages, mask), returns), metrics

    def update(self, batch: Batch, rows: Tensor) -> list[float]:
        """One step of the optimizer on these rows; returns both losses, approxkl, mean ratio and clip fraction."""
        settings, drawn = self.settings, batch.drawn[rows.to(batch.returns.device)]
        advantages, returns = batch.advantages[rows], batch.returns[rows]
        old, mask = drawn.logprobs, drawn.response_mask
        new = self.score(drawn)
        of_policy = policy_loss(new.logprobs, old, advantages, mask, settings.clip)
        of_values = value_loss(new.values, drawn.values, returns, mask, settings.value_clip)
        self.accelerator.backward(of_policy + settings.value_coef * of_values)
        self.accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            ratio = (new.logprobs - old).exp()
            approxkl = 0.5 * masked_mean((new.logprobs - old) ** 2, mask)
            clipped = masked_mean(((ratio - 1).abs() > settings.clip).float(), mask)
            return torch.stack([of_policy, of_values, approxkl, masked_mean(ratio, mask), clipped]).tolist()

    def score(self, drawn: Rollout) -> Rescored:
        """Log-probabilities and values of drawn tokens under the model as it is now, with gradients."""
        return rescore(self.model, drawn)

    def _whiten(self, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        """`whiten` by the mean and deviation of all processes."""
        rows = slice(self.accelerator.process_index * len(x), (self.accelerator.process_index + 1) * len(x))
        return whiten(self.accelerator.gather(x), self.accelerator.gather(mask), shift_mean)[rows]


# The loop


def train(settings: Settings, sample: Callable[..., Rollout] = rollout) -> Run:
    """Run, or go on with, what the settings describe. In a run of several processes all of them call this.

    Raises:
        SettingsError: a setting that cannot be, or a folder that holds another run.
    """
    cpu = settings.cpu or not torch.accelerator.is_available()  # where accelerate is not told, it starts no gloo there
    accelerator = Accelerator(cpu=cpu, log_with=settings.tracker, project_dir=settings.out)
    for name, size in (("batch_size", settings.batch_size), ("minibatch_size", settings.minibatch_size)):
        if size % accelerator.num_processes:
            raise SettingsError(f"{name}={size} cannot be split among {accelerator.num_processes} processes.")
    task = make_task(settings, accelerator.device)
    trainer = Trainer(settings, task, accelerator, sample)
    run = Run(trainer)
    start = run.resume()
    if settings.tracker is not None:
        config = {name: "" if value is None else value for name, value in settings.plain().items()}
        accelerator.init_trackers("gpt2-value-ppo", config=config)
    is_main = accelerator.is_main_process
    with pushing(settings) if is_main else contextlib.nullcontext() as pusher:
        bar = tqdm(range(start, settings.iterations), "PPO", settings.iterations, initial=start, disable=not is_main)
        for iteration in bar:
            metrics = trainer.iterate(iteration)
            is_saved = run.record(metrics)
            bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "kl")}, refresh=False)
            if pusher is not None and is_saved:
                numbers = {name: metrics[name] for name in ("reward", "kl")}
                pusher.push(task.package_model(), step=iteration + 1, metrics=numbers, tokenizer=task.tokenizer)
    # DistributedDataParallel, if it is the last to hold the process group, waits while holding Python's lock for a
    # thread that needs the lock (torch 2.13). So it goes first.
    trainer.model = accelerator.unwrap_model(trainer.model)
    accelerator.free_memory()
    accelerator.end_training()
    return run


def pushing(settings: Settings) -> contextlib.AbstractContextManager[CheckpointPusher | None]:
    """What pushes checkpoints to the Hub, if the settings name a repository."""
    if settings.push_to is None:
        return contextlib.nullcontext()
    return CheckpointPusher(settings.push_to, metric_for_best_model="reward", tags=["ppo"])


def main(**options: Any) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = Settings(**options)
    try:
        run = train(settings)
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error
    trainer, task = run.trainer, run.trainer.task
    if trainer.accelerator.is_main_process:
        metrics = run.read()
        save_package(task.package_model(), settings.out / "package", task.tokenizer)
        draw_run(metrics, task.before_and_after(settings.max_new_tokens), settings.out / "figure.png")
        first, last = metrics[0], metrics[-1]
        print(f"reward {first['reward']:.2f} -> {last['reward']:.2f} at a KL of {last['kl']:.1f} nats: {settings.out}")


main.__doc__ = Settings.__doc__
main.__signature__ = inspect.signature(Settings)  # type: ignore[attr-defined]  # every setting is an option
main.__annotations__ = get_type_hints(Settings, include_extras=True)

if __name__ == "__main__":
    typer.run(main)
