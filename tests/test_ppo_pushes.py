"""A run of gpt2_value.ppo pushes its checkpoints."""

from slow.fault_sweep import serving
from train_small_gpt2 import Recipe, small_gpt2

from gpt2_value import PPOSettings, train


def test_checkpoints_of_a_run_are_pushed_as_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the process that pushes reads it anew
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    base = small_gpt2(Recipe(vocab_size=400, n_embd=32, n_layer=1, n_head=2, steps=12, batch_size=8)).folder
    with serving() as server:
        train(
            PPOSettings(
                out=tmp_path / "run",
                base=str(base),
                prompts=["The film", "My"],
                reward="ppo_rewards:vowels",
                iterations=2,
                batch_size=8,
                max_new_tokens=8,
                lora_rank=2,
                push_to="alice/ppo",
                cpu=True,
            )
        )
        (commit, *_) = server.repos["alice/ppo"].history()
    assert "2" in commit.title
    assert {"model.safetensors", "tokenizer.json", "modeling_gpt2_value.py"} <= set(commit.files)
