"""Small random models of every family of causal language models that transformers knows."""

import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from generation_gpt2_value import rescore, rollout

VOCABULARY, COLUMNS = 96, 10
PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12, 60, 7, 81, 22, 11])] * 2
ENDS = [*range(1, 17)]  # so many that most rows of a random model end early
# Fields of configs by what they count. A config takes those that it has.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "context_length", "max_seq_len"), 64),
    **dict.fromkeys(("head_dim", "kv_channels", "rotary_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"), 1),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# What a family needs besides: small, and with each kind of its layers.
SPECIAL = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1], "partial_rotary_factor": 1.0},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "falcon_mamba": {"time_step_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "nemotron_h": {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 8, "mamba_head_dim": 8},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 16},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "hidden_size": 32, "embedding_dim": 32},
    "zamba": {
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "layers_block_type": ["mamba", "hybrid"],
        "use_mamba_kernels": False,
    },
}
ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family, **fields):
    """A model whose logits differ from token to token, in eval mode. Raises whatever its class raises."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoConfig.for_model(family)
        small = {name: value for name, value in SMALL.items() if name in plain.to_dict()}
        config = AutoConfig.for_model(family, **{**small, **SPECIAL.get(family, {}), **fields})
        if sum(hasattr(config, name) for name in ("is_decoder", "is_encoder_decoder")) == 2:
            config.is_decoder = True
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > 2_000_000:
            raise ValueError(f"its fields are not known here: {size:,} weights")
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.mul_(4)
    return model


@torch.no_grad()
def alone(model, drawn, row):
    """Log-probabilities of the drawn tokens of a row, by the model's own forward: no padding, no cache, no rollout."""
    tokens = drawn.sequences[row][drawn.attention_mask[row].bool()][None]
    length = int(drawn.response_mask[row].sum())
    logits = model(tokens, use_cache=False).logits[0, -length - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, tokens[0, -length:, None])[:, 0]


def difference(model, **settings):
    """The largest difference, in nats, of a rollout and of its rescoring from what each row gives alone."""
    drawn = rollout(model, PROMPTS, max_new_tokens=COLUMNS, generator=torch.Generator().manual_seed(0), **settings)
    with torch.no_grad():
        scored = rescore(model, drawn).logprobs
    largest = 0.0
    for row in range(len(drawn)):
        expected, mask = alone(model, drawn, row), drawn.response_mask[row]
        for found in (drawn.logprobs, scored):
            largest = max(largest, (found[row][mask] - expected).abs().max().item())
    return largest
