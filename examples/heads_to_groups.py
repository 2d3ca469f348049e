"""From one key/value head per query head to groups: a smaller checkpoint, which transformers loads without attnopt.

    python examples/heads_to_groups.py build/grouped

First, the 3 key/value heads of SmolLM2 are expanded to 9, one per query head, as an input with redundancy.  Merged in groups of
three again, the model gives identical output with a third of the cache.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import smollm2
import torch

import attnopt
from attnopt.passes import GroupedQuery


def with_repeated_heads(model: Any) -> Any:
    """The same model with a separate key/value head per query head."""
    config = copy.deepcopy(model.config)
    groups, config.num_key_value_heads = config.num_key_value_heads, config.num_attention_heads
    repeated, weights = type(model)(config).eval(), dict(model.state_dict())
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (groups, -1))
            weights[name] = heads.repeat_interleave(config.num_attention_heads // groups, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    return repeated


def regrouped(model: Any, prompt: torch.Tensor, kv_heads: int, folder: Path) -> Any:
    """The model with fewer key/value heads, saved to ``folder`` and loaded again."""
    converted = attnopt.convert(model, GroupedQuery(kv_heads, merge="mean"), prompt)
    print(converted.attnopt_report.headline)
    converted.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def main() -> None:
    model, tokenizer = smollm2.load()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/grouped")
    prompt = tokenizer("Paris is the capital of France, and Rome that of Italy.", return_tensors="pt").input_ids
    repeated = with_repeated_heads(model)
    loaded = regrouped(repeated, prompt, model.config.num_key_value_heads, folder)
    with torch.no_grad():
        before, after = repeated(prompt), loaded(prompt)
    held = [
        sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers) for out in (before, after)
    ]
    apart = (before.logits - after.logits).abs().max().item()
    print(f"{folder}: largest difference of the logits {apart:.1e}, cache {held[0] / held[1]:.1f} times smaller")


if __name__ == "__main__":
    main()
