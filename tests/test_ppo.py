"""gpt2_value.ppo on real models: it learns, resumes, measures what it says, and refuses what it can know to fail."""

import dataclasses
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import ppo_rewards
import pytest
import torch
from ppo_task import demo_settings
from train_small_gpt2 import Recipe, small_gpt2
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt2_value import (
    GPT2ValueModel,
    PPOSettings,
    inspect_package,
    rollout,
    save_package,
    train,
)
from gpt2_value.ppo import Reward, RewardError, SettingsError, main, read_metrics, settings_of

ROOT = Path(__file__).parent.parent
QUICK = Recipe(vocab_size=400, n_positions=256, n_embd=32, n_layer=1, n_head=2, steps=12, batch_size=8)
PROMPTS = ["The film was", "I have never seen such a", "My", "A review:", "Last night", "It is"]
EXPECTED = "expected for each response a finite number.*the same command goes on"
NUMBERS = [field.name for field in dataclasses.fields(PPOSettings) if field.type.split()[0] in ("int", "float")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that was trained for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return str(small_gpt2(QUICK).folder)


@pytest.fixture
def quick(base, tmp_path):
    """Settings of a run of six iterations that takes a second."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return PPOSettings(
        base=base,
        prompts=tmp_path / "prompts.txt",
        reward="ppo_rewards:vowels",
        out=tmp_path / "run",
        iterations=6,
        save_every=2,
        batch_size=8,
        minibatch_size=4,
        epochs=2,
        max_new_tokens=8,
        learning_rate=1e-3,
        cpu=True,
    )


def numbers(folder):
    """The metrics of a run, without the time that it took."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_metrics(folder)]


def trained(settings):
    train(settings)
    return numbers(settings.out)


def elsewhere(settings, name, **changes):
    return dataclasses.replace(settings, out=settings.out.with_name(name), **changes)


def as_command(settings):
    parts = []
    for name, value in vars(settings).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            parts += [f"--{option}", str(value)]
    return parts


def started(command, launcher=(), **variables):
    """A process that runs the command."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "gpt2_value.ppo", *command],
        env=os.environ | {"PYTHONPATH": paths} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["weights"]


# Resuming


@pytest.mark.parametrize("kind", ["weights", "LoRA", "a critic of its own"])
def test_a_run_whose_reward_fails_goes_on_with_the_same_numbers_and_loses_nothing(quick, base, kind, monkeypatch):
    quick = dataclasses.replace(quick, lora_rank=2 * (kind == "LoRA"), critic=base if "critic" in kind else None)
    whole = trained(quick)
    broken = elsewhere(quick, "broken")
    monkeypatch.setattr(ppo_rewards, "calls", -1)  # the first call is the trial
    monkeypatch.setattr(ppo_rewards, "FAILS_AT", 5)  # the last checkpoint but this is of four iterations
    with pytest.raises(RewardError, match=rf"ppo_rewards:vowels returned nan for response 7, .*{EXPECTED}"):
        train(broken)
    assert torch.load(broken.out / "checkpoint.pt", weights_only=True)["iteration"] == 5
    with (broken.out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')  # a write that a kill cut off
    mended = dataclasses.replace(broken, reward=lambda texts: ppo_rewards.vowels(texts))  # code that is another now
    assert trained(mended) == whole
    found, expected = weights(broken.out), weights(quick.out)
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_a_run_killed_or_interrupted_at_random_moments_continues_with_the_same_numbers(quick):
    quick = dataclasses.replace(quick, iterations=12, kl_target=1.0)
    whole = trained(quick)
    killed = elsewhere(quick, "killed")
    file = killed.out / "metrics.jsonl"
    dice, stopped = random.Random(0), []
    while True:
        process = started(as_command(killed))
        seen = file.stat().st_size if file.exists() else 0
        while process.poll() is None and (file.stat().st_size if file.exists() else 0) <= seen:
            time.sleep(0.002)
        if len(stopped) < 4:
            time.sleep(dice.uniform(0, 0.25))  # somewhere in the next iterations
            process.send_signal(signal.SIGINT if len(stopped) % 2 else signal.SIGKILL)
        said = process.communicate()[1]
        if process.returncode == 0:
            break
        stopped.append(process.returncode)
    assert {-signal.SIGKILL, 130} == set(stopped), said
    assert numbers(killed.out) == whole


def test_more_iterations_go_on_from_the_last_and_fewer_are_refused(quick):
    first = trained(dataclasses.replace(quick, iterations=4))
    longer = trained(quick)
    assert longer[:4] == first
    rates = [line["learning_rate"] / quick.learning_rate for line in longer]
    assert rates == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 2 / 6, 1 / 6])  # from there on, of a run of the new length
    package = quick.out / "package" / "model.safetensors"
    written, learnt = package.stat().st_mtime_ns, package.read_bytes()
    assert trained(quick) == longer  # a finished run is left as it is
    assert package.stat().st_mtime_ns == written
    shutil.rmtree(package.parent)
    assert trained(quick) == longer  # what is missing is made again
    assert package.read_bytes() == learnt
    with pytest.raises(SettingsError, match="a run of 6 iterations, and got 5"):
        train(dataclasses.replace(quick, iterations=5))


def test_another_task_in_the_same_folder_is_refused_by_name(quick, base, tmp_path):
    quick = dataclasses.replace(quick, iterations=2)
    train(quick)
    weights, config = (shutil.copytree(base, tmp_path / name) for name in ("weights", "config"))
    model = GPT2LMHeadModel.from_pretrained(base)
    torch.nn.init.zeros_(model.transformer.h[0].mlp.c_proj.bias)
    model.save_pretrained(weights)
    said = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(said | {"layer_norm_epsilon": 1e-3}))
    longer = dataclasses.replace(quick, iterations=3)
    for changes, named in (
        ({"learning_rate": 2e-3}, r"learning_rate \(0.001, and now 0.002\)\. .*--accept-changes"),
        ({"prompts": [*PROMPTS[:-1], "It was"], "reward": "ppo_rewards:answers"}, "prompts .*, reward .*--accept-ch"),
        ({"base": str(weights)}, r"base .*to begin anew\.$"),
        ({"base": str(config), "accept_changes": True}, r"base .*to begin anew\.$"),
    ):
        with pytest.raises(SettingsError, match=f"holds a run with another {named}"):
            train(dataclasses.replace(longer, **changes))
    shutil.copy(quick.prompts, tmp_path / "moved.txt")  # what counts is what is in the file
    moved = {"prompts": tmp_path / "moved.txt", "reward": "ppo_rewards:answers"}
    assert len(trained(dataclasses.replace(longer, accept_changes=True, **moved))) == 3


def test_a_folder_that_holds_not_all_of_a_run_is_refused_and_left_as_it_is(quick):
    train(dataclasses.replace(quick, iterations=2))
    for name, content, said in (
        ("checkpoint.pt", b"", "checkpoint.pt cannot be read; put it back"),
        ("checkpoint.pt", None, "without a checkpoint.pt; give another --out"),
        ("metrics.jsonl", (quick.out / "metrics.jsonl").read_bytes()[:-9], "does not hold the 2 iterations"),
        ("metrics.jsonl", None, "does not hold the 2 iterations"),
    ):
        shutil.copy(quick.out / name, quick.out / "kept")
        (quick.out / name).unlink()
        if content is not None:
            (quick.out / name).write_bytes(content)
        with pytest.raises(SettingsError, match=said):
            train(quick)
        (quick.out / "kept").replace(quick.out / name)
    assert len(trained(quick)) == 6


# Rewards


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda texts: 1.0, "returned 1.0 for 4 responses"),
        (lambda texts: [1.0], "returned 1 rewards for 4 responses"),
        (lambda texts: [0.0] * 3, "returned 3 rewards for 4 responses"),
        (lambda texts: None, "returned None for 4 responses"),
        (lambda texts: torch.zeros(4, 1), r"returned \[0.0\] for response 0, of 6 tokens"),
        (lambda texts: [[0.0] * 6, 0.0, None, 0.0], "returned None for response 2"),
        (lambda texts: [0.0, [1.0] * 5, 0.0, 0.0], r"returned \[1.0, .* for response 1"),
        (lambda texts: [0.0, 0.0, 0.0, math.inf], "returned inf for response 3"),
        (lambda texts: [0.0, 0.0, 1e300, 10**400], "returned 1e.300 for response 2"),
        (lambda texts: [0.0, 0.0, 0.0, 10**400], "returned 10* for response 3"),
        (lambda texts: [[math.nan] * 6] * 4, r"returned \[nan, .* for response 0"),
        (lambda texts: [{"score": 1.0}] * 4, "for response 0"),
        (lambda texts: texts[4], r"raised IndexError\(.*"),
    ],
)
def test_a_reward_that_is_none_is_refused_where_it_arrives(base, returned, said):
    reward, drawn = reward_of(base, returned)
    expected = "the same command goes on" if "raised" in said else EXPECTED
    with pytest.raises(RewardError, match=rf"test_ppo:.*{said}.*{expected}"):
        reward(drawn)


def reward_of(base, function):
    """The function as the run calls it, and a rollout of four responses of six tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    queries = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS[:4]]
    drawn = rollout(GPT2LMHeadModel.from_pretrained(base), queries, max_new_tokens=6, eos_token_id=None)
    return Reward(function, tokenizer), drawn


def test_a_reward_gets_what_it_takes_and_gives_numbers_or_a_list_for_each_token(base):
    seen = {}

    def three(prompts, responses, tokens, scale=1.0):
        seen.update(prompts=prompts, responses=responses, tokens=tokens)
        return [1, True, torch.arange(6), (0.5,) * 6]

    reward, drawn = reward_of(base, three)
    expected = torch.zeros(4, 6)
    expected[:2, -1], expected[2], expected[3] = 1, torch.arange(6), 0.5
    assert torch.equal(reward(drawn), expected)
    assert seen["prompts"] == PROMPTS[:4]
    assert seen["tokens"] == drawn.responses.tolist()
    both = [prompt + response for prompt, response in zip(PROMPTS, seen["responses"], strict=False)]
    texts, _ = reward_of(base, lambda texts: seen.update(texts=texts) or torch.ones(4))
    assert texts(drawn)[:, -1].tolist() == [1] * 4
    assert seen["texts"] == both
    for other in (lambda a, b, c, d: [], lambda *texts: [], lambda texts, *, scale: [], max):
        with pytest.raises(SettingsError, match=r"cannot be called as a reward; expected \(texts\), \(prompts"):
            Reward(other, None)


@pytest.mark.parametrize(
    ("source", "raised"),
    [("def f(", "SyntaxError"), ("1 / 0", "ZeroDivisionError"), ("raise SystemExit", "SystemExit")],
)
def test_a_reward_whose_file_fails_is_refused_with_the_place(quick, source, raised, tmp_path, monkeypatch, capsys):
    (tmp_path / "wave.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert main(as_command(dataclasses.replace(quick, reward="wave:f"))) == 1
    shown = capsys.readouterr().err
    assert 'wave.py", line 1' in shown
    assert f"cannot be imported: {raised}(" in shown
    assert shown.endswith("mend it, and the same command goes on.\n")


def test_a_classifier_gives_the_logit_of_its_label_and_gets_a_pad_token(quick, base, tmp_path):
    torch.manual_seed(0)
    labels = {"id2label": {0: "BAD", 1: "GOOD"}}
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=400, n_positions=20, **labels)
    judge = GPT2ForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "judge")
    settings = dataclasses.replace(
        quick, reward=None, classifier=str(tmp_path / "judge"), classifier_label="GOOD", iterations=1
    )
    logit = train(settings).task.reward.function
    for text in ("a good film", "a film that is much longer " * 20):
        with torch.no_grad():
            alone = judge(torch.tensor([tokenizer(text)["input_ids"][:20]])).logits[0, 1].item()
        assert logit(["short", text])[1] == pytest.approx(alone, abs=1e-5)
    judge.save_pretrained(tmp_path / "bare")
    for changes, said in (
        ({"classifier_label": "BEST"}, "expected one of BAD, GOOD"),
        ({"classifier": base}, "found no score.weight"),
        (
            {"classifier": str(tmp_path / "bare")},
            "found no vocabulary|sentencepiece|expected str, bytes or",
        ),
    ):
        with pytest.raises(SettingsError, match=said):
            train(dataclasses.replace(settings, **changes))


# What is refused before the first iteration


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"reward": "nowhere:f"}, "No module named 'nowhere'"),
        ({"reward": "code:f"}, r"no such function in <module 'code' from .*code.py'>; expected MODULE:FUNCTION"),
        ({"reward": None}, "one of --reward MODULE:FUNCTION and --classifier"),
        ({"reward": lambda texts: [0.0]}, "returned 1 rewards for 4 responses"),
        ({"kl_estimator": "k2"}, "one of k1, k3, exact"),
        ({"cut_prompts": (3, 2)}, "1 <= least <= most"),
        ({"iterations": 0}, "iterations=0; expected a whole number, at least 1"),
        ({"tracker": "nobody"}, "tracker='nobody' is not installed; expected one of .*tensorboard"),
        ({"prompts": ["word " * 260]}, r"longest prompt has \d+ tokens \('word word.*more than the 256 of base.*--cut"),
        ({"prompts": [" ", ""]}, "a prompt a line, or a list of texts .*found no text"),
        ({"prompts": [1, 2]}, r"prompts=\[1, 2\] cannot be read; expected a text file"),
        ({"prompts": Path("nowhere.txt")}, "nowhere.txt"),
        ({"base": "/nowhere"}, "'/nowhere' does not load"),
        ({"top_p": 2.0}, "no response can be drawn .*top_p"),
        ({"out": "/dev/null/run"}, "cannot be written to"),
        ({"out": ""}, "out is empty; expected a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_before_the_first_iteration(quick, wrong, said):
    with pytest.raises(SettingsError, match=said):
        train(dataclasses.replace(quick, **wrong))
    assert not (quick.out / "checkpoint.pt").exists()


def test_a_number_out_of_its_range_is_refused_before_the_first_iteration(quick):
    assert len(NUMBERS) > 25
    cases = [(name, wrong) for name in NUMBERS for wrong in (math.nan, math.inf, -math.inf, "1")]
    cases += [("epochs", 1.5), ("lam", 1.1), ("length_adaptive_lambda", 0), ("seed", -1), ("clip", -0.1)]
    for name, wrong in cases:
        with pytest.raises(SettingsError, match=f"{name}='?{wrong}'?; expected"):
            train(dataclasses.replace(quick, **{name: wrong}))


def test_a_model_that_cannot_be_trained_is_refused_by_name(quick, base, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(base)
    for name in ("truncated", "small", "broken"):
        shutil.copytree(base, tmp_path / name)
    os.truncate(tmp_path / "truncated" / "model.safetensors", 1000)
    model.save_pretrained(tmp_path / "bare")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "small")
    torch.nn.init.constant_(model.transformer.ln_f.bias, math.nan)
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    for role in ("base", "critic"):
        for name, said in {
            "empty": f"{role}='.*' does not load; expected a GPT-2 .*found no config.json",
            "truncated": f"{role}='.*' does not load; expected a GPT-2 .*SafetensorError",
            "broken": f"the weights of {role}='.*' are not finite: transformer.ln_f.bias",
            "small": f"a token with the id 399, the model of {role} 300 tokens",
        }.items():
            with pytest.raises(SettingsError, match=said):
                train(dataclasses.replace(quick, **{role: str(tmp_path / name)}))
    with pytest.raises(SettingsError, match=r"tokenizer of base='.*bare' does not load; expected its files"):
        train(dataclasses.replace(quick, base=str(tmp_path / "bare")))


def test_weights_that_are_not_finite_are_never_written(quick):
    quick = dataclasses.replace(quick, save_every=1)
    train(dataclasses.replace(quick, iterations=2))
    for changes in ({"learning_rate": 1e38}, {"learning_rate": 1e30, "clip": 1e30, "max_grad_norm": 1e30}):
        with pytest.raises(FloatingPointError, match=r"finite.*smaller --learning-rate.*--accept-changes"):
            train(dataclasses.replace(quick, accept_changes=True, **changes))
        assert all(weight.isfinite().all() for weight in weights(quick.out).values())
    assert len(trained(quick)) == 6  # what was there before goes on


# What is measured


def test_the_first_pass_over_a_rollout_changes_nothing(quick):
    """The policy is still the one that drew: ratios are 1, and so the clipped loss is minus the mean advantage, 0."""
    (metrics,) = trained(dataclasses.replace(quick, iterations=1, epochs=1, minibatch_size=8))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["approxkl"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_fraction"] == 0
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-6)  # a new head says 0 everywhere


@pytest.mark.parametrize(
    "way",
    [{"temperature": 0.7, "top_k": 20, "learning_rate": 5e-3}, {"top_p": 0.8, "lora_rank": 2, "learning_rate": 5e-2}],
    ids=["weights", "LoRA"],
)
def test_estimators_of_the_kl_are_0_at_first_and_agree_on_a_trained_policy(quick, way):
    larger = {"batch_size": 48, "minibatch_size": 12, "kl_coef": 0.0, "iterations": 3}
    first, last = {}, {}
    for kind in ("k1", "k3", "exact"):
        lines = trained(elsewhere(quick, kind, kl_estimator=kind, **larger, **way))
        first[kind], last[kind] = lines[0]["kl"], lines[-1]["kl"]
    assert first == pytest.approx(dict.fromkeys(first, 0), abs=1e-4)
    assert last["exact"] > 0.1
    assert last["k3"] == pytest.approx(last["exact"], rel=0.3)
    assert last["k1"] == pytest.approx(last["exact"], abs=0.5 * last["exact"])


def test_a_response_without_an_end_is_scored_as_the_options_say(quick):
    """The reward is the score before any penalty, so what the options do shows in what the critic learns."""
    one = {"iterations": 1, "epochs": 1, "minibatch_size": 8, "kl_coef": 0.0, "lam": 1.0, "max_new_tokens": 1}
    losses = {
        name: trained(elsewhere(quick, name, reward=lambda texts: [1.0] * len(texts), **one, **how))[0]["value_loss"]
        for name, how in {"own": {}, "fixed": {"no_end_score": -3.0}, "less": {"no_end_penalty": 0.5}}.items()
    }
    assert losses == pytest.approx({"own": 0.5, "fixed": 4.5, "less": 0.125})  # half the squared return


def test_the_run_leaves_metrics_a_package_and_a_figure(quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = trained(
        dataclasses.replace(quick, tracker="tensorboard", out=str(quick.out), learning_rate=np.float64(1e-3))
    )
    assert [line["iteration"] for line in lines] == list(range(6))
    assert torch.load(quick.out / "checkpoint.pt", weights_only=True)["iteration"] == 6
    assert all(isinstance(value, (int, float)) for line in lines for value in line.values())
    assert inspect_package(quick.out / "package").n_embd == QUICK.n_embd
    assert (quick.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(quick.out / "gpt2-value-ppo"))
    events.Reload()
    told = [event.value for event in events.Scalars("reward")]
    assert told == pytest.approx([line["reward"] for line in lines], abs=1e-6)


# The command


def test_every_setting_is_an_option_whose_name_is_shown_in_full(quick, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--help"])
    with pytest.raises(SystemExit), pytest.warns(RuntimeWarning, match=r"in sys.modules"):
        runpy.run_module("gpt2_value.ppo", run_name="__main__", alter_sys=True)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m gpt2_value.ppo ")
    assert "--length-adaptive-lambda X" in shown
    assert all(f"--{field.name.replace('_', '-')}" in shown for field in dataclasses.fields(PPOSettings))
    assert max(map(len, shown.splitlines())) <= 80
    settings = dataclasses.replace(quick, lam_critic=1.0, detach_value_head=False, tracker="tensorboard")
    assert settings_of(as_command(settings)) == settings
    assert settings_of([*as_command(quick), "--cut-prompts", "2", "8"]).cut_prompts == [2, 8]


def test_importing_the_run_needs_torch_alone():
    others = "accelerate", "matplotlib", "peft", "safetensors", "transformers"
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import gpt2_value.ppo"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_file_alone_runs_where_the_project_is_installed(quick, tmp_path):
    shutil.copy(ROOT / "gpt2_value" / "ppo.py", tmp_path)
    (tmp_path / "wave.py").write_text("def f(texts):\n    return [len(text) / 100 for text in texts]\n")
    command = [sys.executable, "ppo.py", *as_command(dataclasses.replace(quick, reward="wave:f", iterations=1))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "iterations 0 to 1, 1 thread(s)" in done.stderr
    assert done.stdout.startswith("reward ")


# The critic


@pytest.mark.parametrize("critic", ["body", "own"])
def test_while_the_critic_warms_up_the_policy_stays(quick, base, critic, caplog):
    quick = dataclasses.replace(quick, critic=base if critic == "own" else None, critic_warmup=2, iterations=2)
    plain = GPT2ValueModel.from_pretrained(base).state_dict()

    def changed(model):
        return {name for name, weight in model.state_dict().items() if not torch.equal(weight, plain[name])}

    run = train(quick)
    assert "critic_warmup=2: the policy does not learn in 2" in caplog.text
    head = {"v_head.summary.weight", "v_head.summary.bias"}
    assert changed(run.task.model) == (set() if critic == "own" else head)
    assert all(line["approxkl"] == 0 or critic == "body" for line in numbers(quick.out))
    assert all(line["ratio"] == pytest.approx(1, abs=1e-5) for line in numbers(quick.out))
    run = train(dataclasses.replace(quick, iterations=4))
    assert len(changed(run.task.model) - head) > 4
    if critic == "own":
        assert changed(run.task.critic) > head
        assert not changed(run.task.model) & head
        assert inspect_package(quick.out / "critic").n_embd == QUICK.n_embd


def test_every_option_of_the_critic_and_of_the_advantages_changes_what_is_learnt(quick):
    quick = dataclasses.replace(quick, iterations=2, learning_rate=1e-2)
    plain = trained(quick)[-1]
    for number, change in enumerate(
        ({"lam_critic": 0.5}, {"length_adaptive_lambda": 0.5}, {"clip_high": 0.01}, {"value_learning_rate": 1e-1})
    ):
        found = trained(elsewhere(quick, str(number), **change))[-1]
        assert found["policy_loss"] != plain["policy_loss"], change
        assert found["learning_rate"] == plain["learning_rate"]


def test_a_package_is_a_base_that_asks_nothing_and_is_attached_where_it_is_told(quick, base, tmp_path):
    model = GPT2ValueModel.from_pretrained(base)
    model.detach_value_head()
    save_package(model, tmp_path / "detached", AutoTokenizer.from_pretrained(base))
    quick = dataclasses.replace(quick, base=str(tmp_path / "detached"), iterations=1)
    for number, (asked, expected) in enumerate(((None, True), (False, False), (True, True))):
        run = train(elsewhere(quick, str(number), detach_value_head=asked))
        assert run.task.model.config.detach_value_head is expected


# LoRA


def test_a_lora_has_its_base_as_reference_and_becomes_a_package(quick, base):
    quick = dataclasses.replace(quick, lora_rank=2, learning_rate=1e-2)
    run = train(quick)
    assert run.task.reference is None
    assert all("lora" in name or "v_head" in name for name in weights(quick.out))
    tokens = torch.arange(12)[None]
    plain, package = GPT2LMHeadModel.from_pretrained(base), GPT2ValueModel.from_pretrained(quick.out / "package")
    with torch.no_grad():
        learnt = run.task.model(tokens).logits
        torch.testing.assert_close(package(tokens).logits, learnt, atol=1e-5, rtol=0)
        with run.task.model.disable_adapter():
            assert torch.equal(run.task.model(tokens).logits, plain.eval()(tokens).logits)
    assert not torch.allclose(learnt, plain(tokens).logits, atol=1e-3)


# Prompts


def test_prompts_are_taken_whole_and_cut_where_it_is_asked_for(quick):
    long = "Question: What is the name of the film that you saw last night?"
    quick.prompts.write_bytes(f"\ufeff{long}\r\n \nMy\u2028film\fwas\n\nIt is".encode())
    quick = dataclasses.replace(quick, iterations=1)
    task = train(quick).task
    assert task.tokenizer.batch_decode(task.queries) == [long, "My\u2028film\fwas", "It is"]
    cut = train(elsewhere(quick, "cut", cut_prompts=(2, 3))).task.queries
    assert {len(query) for query in cut} <= {1, 2, 3}
    assert torch.equal(cut[0], task.queries[0][: len(cut[0])])


def test_every_prompt_is_used_once_before_any_is_used_again(quick):
    run = train(dataclasses.replace(quick, iterations=1, batch_size=4))
    run.task.queries = [torch.tensor([number]) for number in range(10)]
    seen = [int(query) for iteration in range(5) for query in run.prompts(iteration)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


# Several processes


def test_two_processes_learn_what_one_does_and_end_together(quick):
    """The same prompts and settings: rewards of the first iteration agree within noise, and both runs go on."""
    quick = dataclasses.replace(quick, batch_size=64, minibatch_size=16, iterations=3, cpu=False)
    one = trained(quick)
    two = elsewhere(quick, "two")
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    failed = started(as_command(two), launcher, FAILS_IN_RANK="1")
    said = failed.communicate()[1]
    done = started(as_command(two), launcher)
    assert failed.returncode != 0
    assert said.count("error: ppo_rewards:vowels raised OSError('in rank 1')") == 2
    assert "iterations 1 to 3" in done.communicate()[1]  # one was done before the reward failed
    assert done.returncode == 0
    lines = numbers(two.out)
    assert [line["iteration"] for line in lines] == list(range(3))
    for name in ("reward", "response_length", "entropy"):
        assert lines[0][name] == pytest.approx(one[0][name], rel=0.15)
    assert lines[0]["reward"] != one[0]["reward"]  # other random numbers: two processes did draw
    longer = dataclasses.replace(two, iterations=4)
    with pytest.raises(SettingsError, match=r"another processes \(2, and now 1\)"):
        train(longer)
    assert len(trained(dataclasses.replace(longer, accept_changes=True))) == 4


# Learning


def test_the_sentiment_of_a_lexicon_rises(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writer = demo_settings(Recipe(vocab_size=768, n_embd=64, n_layer=1, steps=200))  # it writes the grammar's words
    settings = PPOSettings(
        **writer,
        out=tmp_path / "run",
        iterations=12,
        batch_size=48,
        max_new_tokens=24,
        learning_rate=1e-3,
        cpu=True,
    )
    metrics = trained(settings)
    reward, kl, explained = ([line[name] for line in metrics] for name in ("reward", "kl", "explained_variance"))
    assert sum(reward[-3:]) / 3 > sum(reward[:2]) / 2 + 0.3
    assert min(kl) > -0.1
    assert kl[-1] > 0.5
    assert max(explained[-3:]) > 0.1
    assert metrics[0]["clip_fraction"] > metrics[-1]["clip_fraction"]
