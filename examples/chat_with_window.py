"""Chat with SmolLM2 with a local window and a few sinks in every layer: the cache does not grow with the conversation.

python examples/chat_with_window.py "What is the capital of France?" "And of Italy?"
"""

import sys
from collections.abc import Sequence
from typing import Any

import smollm2
import torch

import attnopt
from attnopt.passes import LocalWindow


def windowed(model: Any, prompt: torch.Tensor, window: int, sinks: int) -> Any:
    """A copy of the model in which each token sees the first ``sinks`` tokens and the last ``window``, including itself."""
    return attnopt.convert(model, LocalWindow(window - 1, sinks=sinks), prompt)


def chat(model: Any, tokenizer: Any, questions: Sequence[str], length: int = 60) -> list[str]:
    """The answers of one conversation, with one shared cache."""
    from transformers import DynamicCache

    cache, answers, ids = DynamicCache(config=model.config), list[str](), torch.empty(1, 0, dtype=torch.int64)
    for question in questions:
        ids = torch.cat([ids, turn(tokenizer, question, ids)], dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            past_key_values=cache,
            pad_token_id=tokenizer.eos_token_id,
        )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 2**20
        print(f"> {question}\n{answers[-1]}\n  ({cache.get_seq_length()} tokens, {held:.1f} MiB in the cache)\n")
        ids = out
    return answers


def turn(tokenizer: Any, question: str, before: torch.Tensor) -> torch.Tensor:
    """The tokens of a question after those of the conversation so far, which are kept as generated."""
    message = {"role": "user", "content": question}
    if not before.numel():
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    else:
        end = "" if before[0, -1] == tokenizer.eos_token_id else "<|im_end|>"
        text = f"{end}\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids  # type: ignore[no-any-return]


def main() -> None:
    model, tokenizer = smollm2.load()
    example = tokenizer("Paris is the capital of France, and Rome that of Italy.", return_tensors="pt").input_ids
    small = windowed(model, example, window=64, sinks=4)
    print(small.attnopt_report.headline)
    chat(small, tokenizer, sys.argv[1:] or ["What is the capital of France?", "Name a river there.", "And a museum?"])


if __name__ == "__main__":
    main()
