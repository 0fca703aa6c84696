"""Small random models of every family of causal language models that transformers knows."""

import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gpt2_value import rescore, rollout

VOCABULARY, COLUMNS = 96, 10
PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12, 60, 7, 81, 22, 11])] * 2
ENDS = [*range(1, 17)]  # so many that most rows of a random model end early
# Names of fields in the configs by their size. A config takes those that it has.
SIZES = [
    (64, ["intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "d_ff", "ffn_hidden_size", "mamba_d_ssm"]),
    (64, ["max_position_embeddings", "n_positions", "context_length", "max_seq_len"]),
    (32, ["hidden_size", "n_embd", "d_model", "model_dim", "embedding_size", "embedding_dim", "word_embed_proj_dim"]),
    (32, ["moe_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size", "lru_width"]),
    (16, ["attention_window_size"]),
    (8, ["head_dim", "kv_channels", "rotary_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"]),
    (8, ["kv_lora_rank", "q_lora_rank", "state_size", "ssm_state_size", "mamba_d_state"]),
    (8, ["mamba_n_heads", "mamba_d_head", "mamba_num_heads", "mamba_head_dim", "mamba_headdim"]),
    (8, ["linear_key_head_dim", "linear_value_head_dim"]),
    (4, ["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads", "num_key_value_heads"]),
    (4, ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"]),
    (4, ["time_step_rank", "mamba_dt_rank", "window_size", "block_size"]),
    (2, ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"]),
    (2, ["num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token"]),
    (2, ["attn_layer_period", "expert_layer_period", "linear_num_key_heads"]),
    (1, ["n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups", "first_k_dense_replace"]),
    (1, ["attn_layer_offset", "expert_layer_offset", "num_dense_layers"]),
    (0, ["pad_token_id", "bos_token_id", "eos_token_id"]),
    (VOCABULARY, ["vocab_size"]),
    (False, ["use_mamba_kernels"]),
]
SMALL = {name: size for size, names in SIZES for name in names}
# What a family needs besides: each kind of its layers.
LINEAR, CONVOLUTION = ({"layer_types": [kind, "full_attention"]} for kind in ("linear_attention", "conv"))
SPECIAL = {
    "bamba": {"attn_layer_indices": [1], "partial_rotary_factor": 1.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "mamba2": {"num_heads": 8},
    "minimax": LINEAR,
    "nemotron_h": {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3},
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 32},
    "zamba": {"num_hidden_layers": 4},
    "zamba2": {"n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"]},
}
ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family, **fields):
    """A model whose logits differ from token to token, in eval mode. Raises whatever its class raises."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoConfig.for_model(family).to_dict()
        small = {name: value for name, value in SMALL.items() if name in plain}
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


def difference(model, prompts=PROMPTS, **settings):
    """The largest difference, in nats, of a rollout and of its rescoring from what each row gives alone."""
    drawn = rollout(model, prompts, max_new_tokens=COLUMNS, generator=torch.Generator().manual_seed(0), **settings)
    largest = 0.0
    with torch.no_grad():
        scored = rescore(model, drawn).logprobs
        for row in range(len(drawn)):
            # The model's own forward, without padding, cache or rollout.
            tokens, mask = drawn.sequences[row][drawn.attention_mask[row].bool()], drawn.response_mask[row]
            length = int(mask.sum())
            logprobs = model(tokens[None], use_cache=False).logits[0, -length - 1 : -1].float().log_softmax(-1)
            expected = logprobs.gather(-1, tokens[-length:, None])[:, 0]
            for found in (drawn.logprobs, scored):
                largest = max(largest, (found[row][mask] - expected).abs().max().item())
    return largest
