"""Direct logit attribution: the parts add up to the logit, and each is what the model does with that part alone."""

from __future__ import annotations

from typing import Any

import observed
import pytest
import torch
from observed import WIDTH, D, H
from torch import Tensor, nn

import attnopt
from attnopt.errors import CalibrationError


def language_model(kind: str) -> Any:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "GPT-2":
        return observed.far(t.GPT2LMHeadModel(observed.gpt2().model.config))
    if kind == "Llama":
        return observed.far(t.LlamaForCausalLM(observed.llama().model.config))
    return observed.far(t.BertForSequenceClassification(observed.bert().model.config))


def logit(out: Any) -> Tensor:
    found: Tensor = out.logits[:, -1, 1] - out.logits[:, -1, 0] if out.logits.dim() == 3 else out.logits[:, 1]
    return found


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_parts_add_up_to_the_logit(kind: str) -> None:
    model = language_model(kind)
    batches = [{"input_ids": torch.randint(0, 50, (n, length)), "use_cache": False} for n, length in ((2, 9), (3, 7))]
    with torch.no_grad():
        want = torch.cat([logit(model(**b)) for b in batches])
    found = attnopt.logit_attribution(model, batches, logit)
    assert found.target.shape == (5,)
    torch.testing.assert_close(found.target, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, want, rtol=1e-5, atol=1e-5)
    assert [tuple(x.shape) for x in found.heads.values()] == [(5, H)] * 2
    mlps = [n for n in found.others if "mlp" in n]
    assert len(mlps) == 2
    assert set(found.others) - set(mlps) == {"embedding"} | ({"bias"} if kind == "GPT-2" else set())
    assert "direct attribution, mean of 5 targets" in str(found)
    assert all(name in str(found) for name in (*found.heads, *found.others, "target"))


def test_each_head_by_hand() -> None:
    """Through the final norm at its own scale, and the two rows of the head that the target reads."""
    model = language_model("Llama")
    batch = {"input_ids": torch.randint(0, 50, (2, 9)), "use_cache": False}
    inputs, _, _ = observed.hooked(model, batch)
    x = inputs["model.norm"]
    scale = (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()[:, -1]
    direction = (model.lm_head.weight[1] - model.lm_head.weight[0]).detach() * model.model.norm.weight.detach()
    found = attnopt.logit_attribution(model, [batch], logit)
    for i, (name, heads) in enumerate(found.heads.items()):
        layer = model.model.layers[i]
        z = inputs[f"{name}.o_proj"].unflatten(-1, (H, D))[:, -1]
        weight = layer.self_attn.o_proj.weight.detach().T.unflatten(0, (H, D))
        added = torch.einsum("bhd,hdc->bhc", z, weight)
        torch.testing.assert_close(heads, (added * scale[:, None] * direction).sum(-1), rtol=1e-4, atol=1e-5)
    outs = observed.hooked(model, batch)[1]
    for name, x in found.others.items():
        if name != "embedding":
            part = outs[name][:, -1] * scale
            torch.testing.assert_close(x, (part * direction).sum(-1), rtol=1e-4, atol=1e-5)


class PostNorm(nn.Module):
    """Norms between the layers, as in the first transformers, and a linear head on a token."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, H, 48, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[:, 0])


def test_norms_between_layers_count_at_their_scales() -> None:
    torch.manual_seed(0)
    model, x = observed.far(PostNorm()), torch.randn(2, 6, WIDTH)
    found = attnopt.logit_attribution(model, [x], lambda y: y[:, 2])
    torch.testing.assert_close(found.total, model(x)[:, 2].detach(), rtol=1e-5, atol=1e-5)
    assert list(found.heads) == ["layers.layers.0.self_attn", "layers.layers.1.self_attn"]
    assert list(found.others) == ["embedding", "layers.layers.0.linear2", "layers.layers.1.linear2", "bias"]
    whole = attnopt.logit_attribution(model, [x], lambda y: y[:, 2].sum())
    torch.testing.assert_close(whole.target, found.target.sum()[None], rtol=1e-5, atol=1e-5)
    for name, heads in found.heads.items():
        torch.testing.assert_close(whole.heads[name], heads.sum(0)[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (lambda out: out, "expected one number for each sequence"),
        (lambda out: out[:, 0].argmax(), "expected one number for each sequence"),
        (lambda out: out.softmax(-1)[:, 0], "it is not linear"),
        (lambda out: torch.ones(2), "does not depend on any head"),
    ],
)
def test_targets_that_are_none(target: Any, told: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CalibrationError, match=told):
        attnopt.logit_attribution(observed.far(PostNorm()), [torch.randn(2, 6, WIDTH)], target)


def test_an_output_behind_something_nonlinear() -> None:
    torch.manual_seed(0)

    class Squashed(PostNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    with pytest.raises(CalibrationError, match="no attention leads to the output through linear operations alone"):
        attnopt.logit_attribution(observed.far(Squashed()), [torch.randn(2, 6, WIDTH)], lambda out: out[:, 0])
    with pytest.raises(CalibrationError, match="calibration is empty"):
        attnopt.logit_attribution(PostNorm(), [], lambda out: out[:, 0])
