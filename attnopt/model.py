"""The result of ``optimize``: a module with the model's own signature, its report, and methods to save and export it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import fx, nn

from attnopt.archive.load import read
from attnopt.archive.save import save
from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.split_weight import split_parameter
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration
from attnopt.capture.exported_program import exported
from attnopt.capture.plain_call import PlainCall
from attnopt.capture.signature import check_inputs, is_guard
from attnopt.compiler.origin import Origin
from attnopt.errors import AttnoptError, CaptureError, DistributedError
from attnopt.ir.call_tensor import BATCH
from attnopt.report.optimized_site import OptimizedSite
from attnopt.report.quantized_file import QuantizedFile
from attnopt.report.report import Report

if TYPE_CHECKING:
    from attnopt.onnx.export.latent_decoder import LatentDecoder

Build = Callable[[CallInputs], tuple[fx.GraphModule, Origin]]


class OptimizedModel(nn.Module):
    """The rewritten model, called like the original model.

    ``report`` lists what was done to every site, ``sites`` what each attention is now.  Inputs of other sizes than at
    capture raise CaptureError, unless their axes are dynamic.
    """

    def __init__(self, module: fx.GraphModule, origin: Origin) -> None:
        super().__init__()
        self.module: fx.GraphModule | None = module
        self._origin: Origin | None = origin
        self._plain_call = _plain_call(module, origin)
        self._build: Build | None = None
        self._model: list[nn.Module] = []

    @classmethod
    def deferred(cls, model: nn.Module, build: Build) -> OptimizedModel:
        """A model that is captured at its first call, with the inputs of that call."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.module, made._origin, made._build, made._plain_call = None, None, build, None
        made._model = [model]  # in a list: it is the user's, and no part of this module
        return made

    @property
    def origin(self) -> Origin:
        if self._origin is None:
            raise _not_captured()
        return self._origin

    @property
    def report(self) -> Report:
        """What was found, what was rewritten, and why the rest was not."""
        return self.origin.report

    @property
    def sites(self) -> tuple[OptimizedSite, ...]:
        """Every attention in its current form, in execution order, with its status."""
        return tuple(map(OptimizedSite.of, self.origin.sites, self.report.sites))

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph, with its code in ``.code``."""
        if self.module is None:
            raise _not_captured()
        return self.module

    @property
    def _whole(self) -> fx.GraphModule:
        """The graph, for what reads all weights in one process.  Raises DistributedError."""
        if (name := split_parameter(self.graph_module)) is not None:
            raise DistributedError(
                f"{name} is split over several processes (a DTensor)",
                hint="attnopt.distributed.gathered gives the same model with whole weights",
            )
        return self.graph_module

    @property
    def argument_names(self) -> tuple[str, ...]:
        """What a call may bring, by name."""
        if self._origin is None:
            return ()
        own = self.origin.signature
        return tuple(dict.fromkeys((*(p.name for p in own.parameters), *own.keywords)))

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The forward of the original model."""
        plain = self._plain_call if torch.compiler.is_compiling() else None
        if plain is not None and plain.takes(args, kwargs):
            return self.graph_module(*args, **{name: kwargs[name] for name in plain.keywords})
        inputs, give = self.arranged(args, kwargs)
        return give(run_graph(self.graph_module, inputs))

    def arranged(
        self, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[CallInputs, Callable[[Any], Any]]:
        """What the graph takes for this call, and what makes of its outputs those of the model.  Raises CaptureError."""
        if self._build is not None:
            self._capture(CallInputs(args, dict(kwargs)))
        try:
            args, kwargs = self.origin.signature.arrange(args, kwargs)
        except TypeError as e:
            raise CaptureError(f"wrong inputs: {e}", hint="call it like the original model") from None
        form, fixed = self.origin.form, self.origin.report.fixed_axes
        taken = None if form is None else form.take(args, kwargs)
        if form is None or taken is None:
            check_inputs(self.graph_module, args, kwargs, fixed, remedy=self._remedy)
            return CallInputs(args, kwargs), lambda out: out
        args, kwargs = taken.inputs
        check_inputs(self.graph_module, args, kwargs, fixed, form.inputs.is_inside, self._remedy)
        return CallInputs(args, kwargs), lambda out: form.give(out, taken)

    def _remedy(self, name: str) -> str | None:
        """What an input of passes has to be."""
        reading = [(site.name, t) for site in self.origin.sites for t in site.spec.inputs if t.input.name == name]
        if not reading:
            return None
        (first, tensor), *others = reading
        beside = f" and {len(others)} more" if others else ""
        for_all = ", where the batch may be 1 or left out" if tensor.axes[0] == BATCH else ""
        return f"{first}{beside} read{'' if others else 's'} it as {tensor.told}{for_all}, as in the example"

    def train(self, mode: bool = True) -> Self:
        """As in every module.  A graph captured for inference stays one; a warning says so once."""
        if mode and self._origin is not None and self._origin.trains_otherwise:
            self._origin = replace(self._origin, trains_otherwise=False)
            warn(
                "the model was captured in eval mode: dropout stays off and batch normalization stays fixed; optimize the "
                "model in train mode to train with them"
            )
        for module in self.modules():  # the graph's own train() refuses
            module.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> OptimizedModel:
        return self._with_state({k: copy.deepcopy(v, memo) for k, v in vars(self).items()}, memo)

    def __copy__(self) -> OptimizedModel:
        return self._with_state(vars(self), {})

    def _with_state(self, state: Mapping[str, object], memo: dict[int, object]) -> OptimizedModel:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(state)
        return made

    def __reduce_ex__(self, protocol: object) -> Any:
        raise AttnoptError(
            "an optimized model cannot be pickled: its graph contains process-local torch objects",
            hint="save it with fast.save(path) and load it with attnopt.load(path); its state_dict can be pickled",
        )

    def _capture(self, inputs: CallInputs) -> None:
        with compiling():
            if self._build is None:  # another thread was faster
                return
            self.module, self._origin = self._build(inputs)
            self._plain_call = _plain_call(self.module, self._origin)
            self._build, self._model = None, []

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model atomically to the folder ``path``, for ``attnopt.load``.  Raises ArchiveError."""
        save(self._whole, self.origin, path)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        flavor: Literal["onnxruntime", "standard"] = "onnxruntime",
        opset: int | None = None,
        external_data: bool | Literal["auto"] = "auto",
        verify: bool = True,
        quantize: Literal["int8", "int4"] | None = None,
    ) -> QuantizedFile | None:
        """Write an ONNX model, checked against ONNX Runtime before it is written.  Raises ExportError.

        Each attention takes its fastest form in ONNX Runtime on CPU; ``flavor="standard"`` uses only standard ONNX
        operators.
        ``opset``: 23 (the default) to 25.  ``external_data``: store weights in a file beside the model; "auto" does so
        if they exceed the size limit.  The metadata of the model records what was done, under keys that begin with
        "attnopt.".
        ``quantize``: weights of products in int8 (activations too, at run time) or int4, by ONNX Runtime's own quantizer;
        attentions stay in float.  The result says what it cost.
        """
        from attnopt.onnx.export.export import export_onnx

        return export_onnx(
            self._whole,
            self.origin,
            path,
            flavor=flavor,
            opset=opset,
            external_data=external_data,
            verify=verify,
            quantize=quantize,
        )

    def export_decoder(
        self,
        folder: str | os.PathLike[str],
        *,
        context_length: int,
        eos_token_id: int | Sequence[int],
        tokenizer: object = None,
        windows: Literal["masked", "rolling"] = "masked",
        kv: Literal["float32", "int8", "latent"] = "float32",
        calibration: Iterable[Batch] | Calibration | None = None,
        pad_heads: bool = False,
        quantize: Literal["int8", "int4"] | None = None,
    ) -> QuantizedFile | None:
        """Write a language model with a key/value cache as a folder for onnxruntime-genai.  Raises ExportError.

        The model takes ``input_ids`` and optionally ``attention_mask`` and ``position_ids``, all [batch, length] with
        both axes dynamic, and returns logits [batch, length, vocabulary].  Its attentions are causal or have a causal
        window.
        One file serves prompt and generation, with one buffer of at most ``context_length`` tokens.  ``tokenizer``: a
        transformers tokenizer to save in the folder.
        ``windows="rolling"``: a layer with a window keeps only the window's keys and values, in a buffer of its own length;
        needs ONNX Runtime 1.31.  "masked" keeps all of them, for any runtime.
        ``kv="int8"``: type of the kept keys and values, with scales from ``calibration``, batches of the model's inputs, or
        from the example.
        "latent" keeps what ``latent_decoder`` does, in operators of ONNX alone, for ONNX Runtime without onnxruntime-genai.
        ``pad_heads``: layers may differ in heads; heads of zeros make them alike in the cache, as the runtime needs it.
        Before anything is written, ONNX Runtime processes two prompts, continues token by token, and must reproduce the
        logits of this model.  ``quantize``: see ``export_onnx``.
        """
        from attnopt.onnx.export.cache_forms import CacheOptions
        from attnopt.onnx.export.decoder import export_decoder

        return export_decoder(
            self._whole,
            self.origin,
            folder,
            context_length=context_length,
            eos_token_id=eos_token_id,
            tokenizer=tokenizer,
            cache=CacheOptions(windows, kv, pad_heads, calibration),
            quantize=quantize,
        )

    def latent_decoder(self) -> LatentDecoder:
        """The language model as a module that takes some tokens at a time, over a cache of latents: of a token and layer, the
        fewest numbers that determine its keys and values, such as the ``rank`` of ``LatentKv``.  Raises ExportError.

        The model is one for ``export_decoder``; ``export_decoder(kv="latent")`` writes the same as a file.  Each step computes
        the keys and values of all tokens anew.  Before it is returned, it processes two prompts, continues token by token,
        and must reproduce the logits of this model.
        """
        from attnopt.onnx.export.latent_file import checked_decoder

        return checked_decoder(self.graph_module, self.origin)[0]

    def export_package(self, path: str | os.PathLike[str]) -> None:
        """Write a package ``path`` (.pt2), compiled by torch's AOTInductor for this kind of machine.  Raises ExportError.

        ``torch._inductor.aoti_load_package`` runs it in Python, AOTIModelPackageLoader in C++, without attnopt.  It takes what
        ``export_program`` takes.  Attentions are torch operators: attnopt's CPU kernel is no part of it.  It is compared
        with this model before it is written.
        """
        from attnopt.archive.package import export_package

        export_package(self._whole, self.origin, path)

    def export_program(self) -> torch.export.ExportedProgram:
        """The graph as an ExportedProgram, with the dynamic shapes of the capture."""
        return exported(self._whole, self.origin.inputs)


def _plain_call(module: fx.GraphModule, origin: Origin) -> PlainCall | None:
    return PlainCall.of(module, origin.signature) if origin.form is None else None


def run_graph(module: fx.GraphModule, inputs: CallInputs) -> Any:
    """What the graph gives.  Raises CaptureError where one of its constraints does not hold."""
    try:
        return module(*inputs.args, **inputs.kwargs)
    except AssertionError as e:
        if not is_guard(e):
            raise
        raise CaptureError(
            f"the inputs do not fit the captured graph: {e}", hint="optimize with example inputs of that size"
        ) from None


def _not_captured() -> AttnoptError:
    return AttnoptError("the model has not been captured yet", hint="call it once, or pass example inputs to optimize")


def load(path: str | os.PathLike[str], *, classes: Iterable[type] = ()) -> OptimizedModel:
    """Load the model that ``save`` wrote to the folder ``path``, bit for bit.

    ``classes``: your own classes that the model builds and returns, such as a cache; those of transformers are known.
    Raises ArchiveError.  Nothing in the files is executed.
    """
    return OptimizedModel(*read(path, classes))
