"""FLOPs that a computation executes, and the least that a group of responses needs."""
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


def _cpu_attention(query, key, value, dropout=0.0, is_causal=False, *args, out_val=None, **kwargs) -> int:
    total = sdpa_flop_count(query.shape, key.shape, value.shape)
    return total // 2 if is_causal else total  # the kernel skips the blocks above the diagonal


def _cpu_attention_backward(grad, query, key, value, out, logsumexp, dropout, is_causal, *args, out_val=None, **kwargs) -> int:
    return _cpu_attention(query, key, value, dropout, is_causal) * 5 // 2  # five matrix products where the forward has two


# torch counts the attention kernels of GPUs only: without these two lines attention would cost nothing on a CPU.
CPU_KERNELS = {aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
               aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward}
for formula in CPU_KERNELS.values():
    formula._get_raw = True  # the counter passes tensors, not shapes


def counter() -> FlopCounterMode:
    "A context that counts the FLOPs of what runs inside it: `get_total_flops()`."
    return FlopCounterMode(display=False, custom_mapping=CPU_KERNELS)


def minimum_flops(model: nn.Module, prompt_length: int, n_tokens: int, group_size: int, grid_thw=None) -> dict[str, int]:
    """FLOPs of a forward and backward pass that does nothing twice and nothing in vain, by part.

    With P prompt tokens, G responses of C tokens, N language weights in linear layers, width d of all heads together,
    L layers, vocabulary V and hidden size h:
      linear     6 N (P + G C)                           2 a weight and token forward, 4 backward
      attention  12 L d (P(P+1)/2 + G(C P + C(C+1)/2))   visible pairs alone, nothing recomputed
      head       6 h V G C
      vision     the same counts, forward alone (2 and 4 in place of 6 and 12), because the encoder is frozen
    """
    config, language, head = model.config, model.model.language_model, model.lm_head
    text, tokens = config.text_config, prompt_length + group_size * n_tokens
    width = text.num_attention_heads * language.layers[0].self_attn.head_dim
    pairs = prompt_length * (prompt_length + 1) // 2
    pairs += group_size * (n_tokens * prompt_length + n_tokens * (n_tokens + 1) // 2)
    return dict(linear=6 * _weights(language) * tokens, attention=12 * text.num_hidden_layers * width * pairs,
                head=6 * head.weight.numel() * group_size * n_tokens,
                vision=0 if grid_thw is None else sum(_vision(model, *grid) for grid in grid_thw.tolist()))


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv3d)))


def _vision(model: nn.Module, t: int, h: int, w: int) -> int:
    visual, config = model.model.visual, model.config.vision_config
    every_patch = _weights(visual.blocks) + _weights(visual.patch_embed)
    linear = 2 * t * h * w * every_patch + 2 * t * h * w // config.spatial_merge_size**2 * _weights(visual.merger)
    whole = [(h * w) ** 2]  # a frame sees itself; most blocks of Qwen2.5-VL see windows of it
    full, windowed = len(visual.blocks), 0
    if window := getattr(config, "window_size", None):
        side = window // config.patch_size
        cut = [[min(side, size - start) for start in range(0, size, side)] for size in (h, w)]
        windowed = sum((a * b) ** 2 for a in cut[0] for b in cut[1])
        full = len(config.fullatt_block_indexes)
    pairs = t * (full * sum(whole) + (len(visual.blocks) - full) * windowed)
    width = getattr(config, "embed_dim", None) or config.hidden_size
    return linear + 4 * width * pairs
