"""examples/ppo.py on real models: it learns, resumes, and measures what it says."""

import dataclasses
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import ppo
import ppo_rewards
import pytest
import torch
import typer
from ppo_task import SettingsError
from train_small_gpt2 import Recipe, small_gpt2
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from generation_gpt2_value import rescore, rollout
from hub_tools import inspect_package
from sampler_audit import find_kept_sets, rollout_from_tokens

ROOT = Path(__file__).parent.parent
QUICK = Recipe(vocab_size=400, n_positions=256, n_embd=32, n_layer=1, n_head=2, steps=12, batch_size=8)
VOWELS = "ppo_rewards:vowels"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint that was trained for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return str(small_gpt2(QUICK).folder)


@pytest.fixture
def quick(base, tmp_path):
    """Settings of a run of six iterations that takes a second."""
    sizes = {"batch_size": 8, "minibatch_size": 4, "epochs": 2, "max_new_tokens": 8, "save_every": 2}
    return ppo.Settings(
        out=tmp_path / "run", base=base, reward=VOWELS, iterations=6, learning_rate=1e-3, cpu=True, **sizes
    )


def without_seconds(metrics):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics]


def trained(settings):
    """The metrics of a run, without the time that it took."""
    return without_seconds(ppo.train(settings).read())


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def elsewhere(settings, name):
    return dataclasses.replace(settings, out=settings.out.with_name(name))


# Resuming


def test_a_run_that_failed_continues_with_the_same_numbers(quick, monkeypatch):
    whole = trained(quick)
    broken = elsewhere(quick, "broken")
    monkeypatch.setattr(ppo_rewards, "calls", 0)
    monkeypatch.setattr(ppo_rewards, "FAILS_AT", 5)  # the checkpoint is of four iterations
    with pytest.raises(ppo_rewards.Stopped):
        ppo.train(broken)
    monkeypatch.setattr(ppo_rewards, "FAILS_AT", None)
    assert len(lines_of(broken.out)) == 5
    with (broken.out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')  # a write that a kill cut off
    assert trained(broken) == whole
    states = [torch.load(settings.out / "checkpoint.pt", weights_only=True) for settings in (quick, broken)]
    assert all(torch.equal(weight, states[1]["model"][name]) for name, weight in states[0]["model"].items())


def test_a_run_killed_at_random_moments_continues_with_the_same_numbers(quick, monkeypatch):
    quick = dataclasses.replace(quick, iterations=12, kl_target=1.0)
    whole = trained(quick)
    killed = elsewhere(quick, "killed")
    file = killed.out / "metrics.jsonl"
    # Processes are forked from one that has imported everything, so that most of their time is the run's own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests"))))
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["ppo"])
    dice, kills = random.Random(0), 0
    while True:
        process = forks.Process(target=ppo.train, args=(killed,))
        process.start()
        seen = len(file.read_bytes()) if file.exists() else 0
        while process.is_alive() and (len(file.read_bytes()) if file.exists() else 0) <= seen:
            time.sleep(0.002)
        if kills < 10:
            process.join(dice.uniform(0, 0.25))  # somewhere in the next iterations
            kills += process.is_alive()
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
    assert kills >= 3
    assert without_seconds(lines_of(killed.out)) == whole


def test_a_folder_of_another_run_is_refused(quick):
    ppo.train(dataclasses.replace(quick, iterations=2))
    with pytest.raises(SettingsError, match=r"iterations=2, and got 6\. Give the same settings"):
        ppo.train(quick)


def test_a_finished_run_is_left_as_it_is(quick):
    first = ppo.train(quick).read()
    assert ppo.train(quick).read() == first  # seconds too


# What is measured


def test_the_first_pass_over_a_rollout_changes_nothing(quick):
    """The policy is still the one that drew: ratios are 1, and so the clipped loss is minus the mean advantage, 0."""
    one = dataclasses.replace(quick, iterations=1, epochs=1, minibatch_size=8)
    (metrics,) = trained(one)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["approxkl"] == pytest.approx(0, abs=1e-9)
    assert metrics["clip_fraction"] == 0
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-6)  # a new head says 0 everywhere


@pytest.mark.parametrize("way", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}], ids=str)
def test_the_kl_of_an_untrained_policy_is_zero_by_every_estimator_and_setting(quick, way):
    for kind in ("k1", "k3", "exact"):
        settings = dataclasses.replace(elsewhere(quick, kind), iterations=1, kl_estimator=kind, **way)
        assert trained(settings)[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_estimators_agree_on_a_trained_policy(quick):
    """k1 and k3 are estimates of the exact KL; after some training all three are of the same size."""
    found = {}
    larger = {"batch_size": 64, "minibatch_size": 16, "kl_coef": 0.0, "iterations": 4, "learning_rate": 3e-3}
    for kind in ("k1", "k3", "exact"):
        settings = dataclasses.replace(elsewhere(quick, kind), kl_estimator=kind, **larger)
        found[kind] = trained(settings)[-1]["kl"]
    assert found["exact"] > 0.2
    assert found["k3"] == pytest.approx(found["exact"], rel=0.3)
    assert found["k1"] == pytest.approx(found["exact"], abs=0.5 * found["exact"])


def test_metrics_have_a_line_an_iteration_and_their_names(quick):
    ppo.train(quick)
    for number, line in enumerate(lines_of(quick.out)):
        assert line["iteration"] == number
        assert {"reward", "kl", "entropy", "explained_variance", "response_length", "seconds"} <= set(line)
        assert all(isinstance(value, (int, float)) for value in line.values())
    assert lines_of(quick.out)[-1]["learning_rate"] == pytest.approx(quick.learning_rate / 6)


def test_the_command_leaves_a_package_and_a_figure(quick):
    ppo.main(**vars(quick))
    assert inspect_package(quick.out / "package").n_embd == QUICK.n_embd
    assert (quick.out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_go_to_tensorboard(quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ppo.train(dataclasses.replace(quick, tracker="tensorboard"))
    events = EventAccumulator(str(quick.out / "gpt2-value-ppo"))
    events.Reload()
    told = [event.value for event in events.Scalars("reward")]
    assert told == pytest.approx([line["reward"] for line in lines_of(quick.out)], abs=1e-6)


# LoRA


def test_the_reference_of_a_lora_is_its_base_without_a_second_copy(quick, base):
    run = ppo.train(dataclasses.replace(quick, lora_rank=2, learning_rate=1e-2))
    task = run.trainer.task
    assert task.reference is None
    plain = GPT2LMHeadModel.from_pretrained(base).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        learnt = task.model(tokens).logits
        torch.testing.assert_close(task.package_model()(tokens).logits, learnt, atol=1e-5, rtol=0)
        with task.as_reference(task.model) as reference:
            assert torch.equal(reference(tokens).logits, plain(tokens).logits)
    assert not torch.allclose(learnt, plain(tokens).logits, atol=1e-3)
    assert all("lora" in name or "v_head" in name for name in torch.load(run.checkpoint, weights_only=True)["model"])


def test_a_lora_resumes_and_becomes_a_package(quick):
    quick = dataclasses.replace(quick, lora_rank=2)
    whole = trained(quick)
    again = elsewhere(quick, "again")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rewards, "calls", 0)
        patch.setattr(ppo_rewards, "FAILS_AT", 3)
        with pytest.raises(ppo_rewards.Stopped):
            ppo.train(again)
    ppo.main(**vars(again))
    assert without_seconds(lines_of(again.out)) == whole
    assert inspect_package(again.out / "package").n_embd == QUICK.n_embd


# Prompts and rewards


def test_every_prompt_is_used_once_before_any_is_used_again(quick):
    task = ppo.make_task(quick, torch.device("cpu"))
    task.queries = [torch.tensor([number]) for number in range(10)]
    seen = [int(query) for iteration in range(5) for query in task.prompts(iteration, 4)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert [int(query) for query in task.prompts(2, 4)] == seen[8:12]  # of any iteration, without those before


def test_a_classifier_gives_the_logit_of_its_label(quick, base, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=400, id2label={0: "BAD", 1: "GOOD"}, pad_token_id=0)
    judge = GPT2ForSequenceClassification(config).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(base, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "judge")
    settings = dataclasses.replace(quick, classifier=str(tmp_path / "judge"), classifier_label="GOOD")
    reward = ppo.make_task(settings, torch.device("cpu")).reward
    with torch.no_grad():
        alone = judge(torch.tensor([tokenizer("a good film")["input_ids"]])).logits[0, 1].item()
    assert reward(["a good film", "a film that is much longer"])[0] == pytest.approx(alone, abs=1e-5)
    with pytest.raises(SettingsError, match="expected one of BAD, GOOD"):
        ppo.make_task(dataclasses.replace(settings, classifier_label="BEST"), torch.device("cpu"))


def test_prompts_come_from_a_file(quick, tmp_path):
    (tmp_path / "prompts.txt").write_text("The first line\n\nAnother one, longer than eight tokens of any kind\n")
    settings = dataclasses.replace(quick, prompts=tmp_path / "prompts.txt", prompt_tokens_min=8)
    task = ppo.make_task(settings, torch.device("cpu"))
    assert len(task.queries) == 2
    assert "The first line".startswith(task.tokenizer.decode(task.queries[0]))
    assert task.tokenizer.decode(task.queries[1]).startswith("An")
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(SettingsError, match="a prompt a line"):
        ppo.make_task(settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"reward": "nowhere:f"}, "nowhere"),
        ({"reward": "ppo_rewards:f"}, "MODULE:FUNCTION"),
        ({"reward": "vadr"}, "MODULE:FUNCTION"),
        ({"kl_estimator": "k2"}, "one of k1, k3, exact"),
        ({"kl_estimator": "exact", "lora_rank": 2}, "take k1 or k3"),
        ({"prompt_tokens_min": 9}, "1 <= min <= max"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_with_what_to_type(quick, wrong, said):
    with pytest.raises(SettingsError, match=said):
        ppo.train(dataclasses.replace(quick, **wrong))


def test_the_command_refuses_wrong_settings_in_one_sentence(quick):
    with pytest.raises(typer.BadParameter, match="k1, k3, exact"):
        ppo.main(out=quick.out, kl_estimator="k2")


# Several processes


@pytest.mark.shows("Accelerate", "examples/ppo.py in two processes learns what one does")
def test_two_processes_learn_what_one_does(quick):
    """The same prompts and settings: rewards of the first iteration agree within noise, and both runs go on."""
    quick = dataclasses.replace(quick, batch_size=64, minibatch_size=16, iterations=3, cpu=False)
    one = trained(quick)
    two = elsewhere(quick, "two")
    changed = {name: value for name, value in two.plain().items() if value != ppo.Settings(out=two.out).plain()[name]}
    options = [part for name, value in changed.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", ROOT / "examples" / "ppo.py", "--out", two.out, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert done.returncode == 0, done.stderr
    lines = lines_of(two.out)
    assert [line["iteration"] for line in lines] == list(range(3))
    for name in ("reward", "response_length", "entropy"):
        assert lines[0][name] == pytest.approx(one[0][name], rel=0.15)
    assert lines[0]["reward"] != one[0]["reward"]  # other random numbers: two processes did draw


# Learning


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A checkpoint that was trained for seconds, until it wrote some of the grammar's words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return str(small_gpt2(Recipe(vocab_size=768, n_embd=64, n_layer=1, steps=200)).folder)


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_sentiment_of_a_lexicon_rises(writer, tmp_path, lora_rank):
    settings = ppo.Settings(
        out=tmp_path,
        base=writer,
        iterations=12,
        batch_size=48,
        max_new_tokens=24,
        learning_rate=1e-2 if lora_rank else 1e-3,
        lora_rank=lora_rank,
        cpu=True,
    )
    metrics = ppo.train(settings).read()
    reward, kl, explained = ([line[name] for line in metrics] for name in ("reward", "kl", "explained_variance"))
    assert sum(reward[-3:]) / 3 > sum(reward[:2]) / 2 + 0.3
    assert min(kl) > -0.1
    assert kl[-1] > 0.5
    assert max(explained[-3:]) > 0.1
    assert metrics[0]["clip_fraction"] > metrics[-1]["clip_fraction"]


# Tokens of another engine


def test_tokens_that_an_engine_hands_over_train_as_those_of_a_rollout(quick):
    """The engine is `rollout`, of which only the tokens come back: sets and numbers are found by scoring."""

    def engine(model, queries, **settings):
        drawn = rollout(model, queries, **settings)
        tokens = [row[mask].tolist() for row, mask in zip(drawn.responses, drawn.response_mask, strict=True)]
        back = find_kept_sets(model, rollout_from_tokens(queries, tokens, sampling=drawn.sampling))
        with torch.no_grad():
            scored = rescore(model, back)
        return dataclasses.replace(back, logprobs=scored.logprobs, values=scored.values)

    settings = dataclasses.replace(quick, top_k=20, temperature=0.8, iterations=3)
    expected = trained(settings)
    found = without_seconds(ppo.train(elsewhere(settings, "engine"), sample=engine).read())
    assert len(found) == len(expected) == 3
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)
