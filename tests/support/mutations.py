"""Is every fault noticed?  Each of these is planted in a copy of the package, and a few tests have to fail there.

Run by ``make mutants``; the tree itself is never touched.  A fault that survives fails the command, as does one whose
place is no longer in the source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from places import ROOT

SOURCES = ("attnopt", "passes", "backends")
COPIED = (*SOURCES, "tests", "pyproject.toml")


@dataclass(frozen=True)
class Fault:
    """``old``, which stands once in the whole source, becomes ``new``; ``tests``: a file's name, and pytest's arguments."""

    name: str
    old: str
    new: str
    tests: str


FAULTS = (
    # capturing
    Fault("inputs under the names of their nodes", "named = {input_name(n): _shape(n, new) for n in inputs}",
          "named = {n.name: _shape(n, new) for n in inputs}",
          "test_valid_sizes.py -k builtins"),
    Fault("a size that only the example has, left free", "    stuck = cannot_vary(program)\n    if not stuck:",
          "    stuck = set[Place]()\n    if not stuck:",
          "test_valid_sizes.py -k example"),
    Fault("another part of a split", "return made if part is None else made[part.args[1]]",
          "return made if part is None else made[0]",
          "test_functionalize.py -k hsplit"),
    # matching and raising
    Fault("a permuted key", "r.k.node, r.k.axes, (r.batch, kv_heads, r.keys, r.features)",
          "r.k.node, r.k.axes[:-2] + r.k.axes[:-3:-1], (r.batch, kv_heads, r.keys, r.features)",
          "test_laws.py -k law_fuse-and-roberta"),
    Fault("wrong scale of a fused call", 'shape(given["query"])[-1] ** -0.5', 'shape(given["query"])[-1] ** -0.49',
          "test_dynamic_batch.py -k other_batches"),
    Fault("which K/V head a query head reads", "            g = g * atom.size + place[atom]",
          "            g = (g * atom.size + place[atom] + 1) % math.prod(a.size for a in kv_heads)",
          "test_laws.py -k law_fuse-and-qwen3"),
    Fault("a dropped mask", "mask = visible if mask is None else emit.call(aten.bitwise_and.Tensor, mask, visible)",
          "mask = mask",
          "test_meta.py -k without_values"),
    Fault("a mask the other way round",
          "visible = emit.call(aten.bitwise_not.default, condition) if step.when else condition",
          "visible = condition if step.when else emit.call(aten.bitwise_not.default, condition)",
          "test_meta.py -k without_values"),
    Fault("a large number written on what is seen",
          "hidden = condition if step.when else emit.call(aten.bitwise_not.default, condition)",
          "hidden = emit.call(aten.bitwise_not.default, condition) if step.when else condition",
          "test_spellings.py -k must_match"),
    Fault("a proof that always holds", "    return difference([got], [want.masked_fill(blind, 0.0)])",
          "    return 0.0", "test_meta.py -k one"),
    Fault("a bias with the wrong sign", "    if step.coefficient != 1.0:",
          "    term = emit.call(aten.neg.default, term)\n    if step.coefficient != 1.0:",
          "test_laws.py -k law_fuse-and-bloom"),
    Fault("weights that another mask zeroes", "    return place == where and computes_same(node, other)",
          "    return place == where", "test_zeroed_weights.py -k another_attention"),
    Fault("a mask transposed on the weights", "    return place == where and computes_same(node, other)",
          "    return computes_same(node, other)", "test_zeroed_weights.py -k another_attention"),
    Fault("a moderate number that another mask leaves to be seen",
          "    if any(i > place or may_hide(node, step.fill) for i, node in added):", "    if False:",
          "test_zeroed_weights.py -k another_attention"),
    Fault("a mask taken for a bias", "        return bool(large) or any(", "        return any(",
          "test_zeroed_weights.py -k another_attention"),
    Fault("a mask that is subtracted, taken for a bias", "if abs(x) > limit]", "if x < -limit]",
          "test_zeroed_weights.py -k another_attention"),
    Fault("numbers that hide for good, unsaid", "    if not given and not any(", "    if not any(",
          "test_fully_masked_rows.py"),
    Fault("an overwritten -inf, unsaid", "        if any(s.fill == -math.inf for s in hides[:i]):",
          "        if False:", "test_fully_masked_rows.py"),
    Fault("a shift that a sink sees", "seen_by_sinks = scores.before_sinks if scores.sinks is not None else 0",
          "seen_by_sinks = 0",
          "test_zeroed_weights.py -k another_attention"),
    Fault("powers of 2 taken for powers of e", "return operand(node), math.log(2)",
          "return operand(node), 1.0", "test_anchors.py -k one_attention"),
    Fault("a sink that keeps its size where scores are scaled", "sink_rate=s.sink_rate * factor",
          "sink_rate=s.sink_rate", "test_anchors.py -k sink"),
    Fault("known numbers taken for flags", "bool(((x == 0) | (x == 1)).all())", "True",
          "test_anchors.py -k no_flags"),
    Fault("ones for zeros", "    if is_call(node, aten.ones_like.default, aten.new_ones.default):\n        return 1\n",
          "    if is_call(node, aten.ones_like.default, aten.new_ones.default):\n        return 0\n",
          "test_anchors.py -k form_of"),
    Fault("a shift along the queries", "step.operand.node in inside and not atoms_of(step.operand.axes) & set(keys)",
          "step.operand.node in inside",
          "test_zeroed_weights.py -k another_attention"),
    Fault("a sum of weights taken for values",
          "        if (right - left) if product.left is weights else (left - right):", "        if left or right:",
          "test_seen_in_models.py -k no_mixture"),
    Fault("a mask looked at nearby alone", "    if growing and times > 2:", "    if False:",
          "test_lengths.py -k longer"),
    Fault("multiples of a size forgotten", "    for s in sizes:\n        for symbol in",
          "    for s in ():\n        for symbol in",
          "test_lengths.py -k multiple"),
    Fault("operators that change anywhere", "    if not is_regular or any(x", "    if any(x",
          "test_lengths.py -k far_from"),
    Fault("lengths as values", "for part in (0, more, -more))", "for part in (0, q_len, more))",
          "test_lengths.py -k far_from"),
    Fault("sums of numbers in the place of products", "        known[node] = min(1e18, max(1, together) * times)",
          "        known[node] = max(1, together) + times", "test_lengths.py -k far_from"),
    Fault("whole numbers alone", "max(abs(x), 1 / abs(x)) for x", "abs(x) for x",
          "test_lengths.py -k far_from"),
    Fault("a table looked at in some lines", "    if numbers.anywhere:", "    if False:",
          "test_lengths.py -k far_from"),
    Fault("batches near the example's alone", "    if others:", "    if False:",
          "test_lengths.py -k batch"),
    Fault("lengths that are equal in every sample", "within(graph, sizes) for sizes in wanted",
          "within(graph, {s: example[s] + 3 for s in sizes}) for sizes in wanted",
          "test_lengths.py -k two_lengths"),
    Fault("the end of a band that was never seen", "    if varies and not (",
          "    if False and not (",
          "test_lengths.py -k longer"),
    Fault("a length beyond every sample", "    return None if reach > _TOO_FAR else", "    return",
          "test_lengths.py -k far"),
    Fault("entries of a slice that starts at 0", "start + step * index[axis]", "step * index[axis]",
          "test_entries.py"),
    Fault("places counted from the end", "torch.where(inner < 0, inner + sizes[axis], inner)", "inner",
          "test_entries.py"),
    Fault("windows taken for heads", "    if not heads and not _is_projected(r):", "    if not heads:",
          "test_lengths.py -k windows"),
    Fault("a number that leaves something of a score", "return FLOOR if _hides_alone(r, step) else step.fill",
          "return step.fill", "test_fully_masked_rows.py"),
    Fault("a mask that is kept, unsaid", "    if keeps_a_mask(", "    if False and keeps_a_mask(",
          "test_lengths.py -k longer"),
    Fault("sizes taken for a stream of tokens", "return _is_source(node) or is_number(node)",
          "return _is_source(node)", "test_token_streams.py -k another_sequence"),
    Fault("a memory given twice taken for one sequence", "return not _hold_same(k, v) or _hold_same(q, k)",
          "return True", "test_token_streams.py -k another_sequence"),
    Fault("a memory projected before taken for one sequence",
          "    if len({any(map(_is_source, ancestors(n, stop=_ends))) for n in operands}) != 1:", "    if False:",
          "test_token_streams.py -k another_sequence"),
    Fault("inputs of two lengths taken for one sequence", 'return "assumed" if as_long else "inputs-apart"',
          'return "assumed"', "test_token_streams.py -k vary_apart"),
    Fault("keys at the end taken for a past", "    *earlier, own = arg(join, 0)",
          "    own, *earlier = arg(join, 0)", "test_token_streams.py -k other_joined"),
    Fault("learned keys taken for a past", " and all(map(_is_held, earlier))", "",
          "test_token_streams.py -k other_joined"),
    Fault("one tensor's axes in two roles", "q=Operand(q, q_axes)", "q=Operand(q, k_axes)",
          "test_one_tensor_in_two_roles.py -k vary"),
    Fault("keys' new weights in queries of the same rows",
          "p.weight == mine.weight and bool(own & set(p.rows[edit.head]))", "False",
          "test_one_tensor_in_two_roles.py -k merged"),
    Fault("a bare tanh that is no softcap of 1", "return replace(s, softcap=1.0)",
          "return replace(s, softcap=2.0)", "test_seen_in_models.py -k bare_tanh"),
    Fault("a softcap that keeps its sign", "softcap=s.softcap * abs(factor)",
          "softcap=s.softcap * factor", "test_seen_in_models.py -k bare_tanh"),
    Fault("a factor that a low floor does not hide", "(kept == 0) & ~visible & (hidden <= _HIDDEN)",
          "kept == 0", "test_seen_in_models.py -k nothing_hides"),
    Fault("blocks that are not asked", "    if _blocks_disagree(gm, block_mask, scores, seen):",
          "    if False:", "test_flex_attention.py -k hide_more"),
    Fault("a call that loses its kernel", "        form.replace_all_uses_with(result)\n", "",
          "test_flex_attention.py -k keeps_its_kernel"),
    Fault("a mask_mod the other way round", "modified, hidden, -math.inf", "modified, seen, -math.inf",
          "test_flex_attention.py -k compiled"),
    Fault("heads pruned that no weight has", "    if len(roles) < 4 or not site.parameters:",
          "    if True:", "test_refusals.py -k nothing-to-remove"),
    Fault("names that a second optimization loses", "    graph.forward = named\n",
          "    graph.forward = graph.forward\n", "test_optimized_again.py -k names"),
    # patterns
    Fault("a window one too short", "return (j >= i - self.left) &", "return (j > i - self.left) &",
          "test_algebra.py"),
    Fault("a causal triangle one too wide", "        return j <= i\n", "        return j <= i + 1\n",
          "test_algebra.py"),
    Fault("queries aligned with the first key", ".unsqueeze(1) + (kv_len - q_len)", ".unsqueeze(1)",
          "test_algebra.py"),
    Fault("a block layout that lacks blocks",
          "return Reach.between(first - self.left, last + self.right + 1, last - self.left, first + self.right + 1)",
          "return Reach.between(first - self.left + 8, last + self.right + 1, last - self.left + 8, first + "
          "self.right + 1)",
          "test_algebra.py"),
    # spec and passes
    Fault("pruned heads keep their places' K/V", "tuple(used.index(self.kv_of_head[i]) for i in places)",
          "tuple(used.index(self.kv_of_head[places[-1 - n]]) for n, i in enumerate(places))", "test_passes.py"),
    Fault("a window shifted by one", "Window(self.left, ahead)", "Window(self.left + 1, ahead)",
          "test_passes.py"),
    Fault("a causal window that looks ahead", "(0 if is_causal else self.left)", "(self.left)",
          "test_passes.py"),
    Fault("gains of other heads", "float(gains.get(h, 1.0)) for h in self.heads}",
          "float(gains.get(h + 1, 1.0)) for h in self.heads}", "test_passes.py"),
    Fault("the wrong heads pruned", "if h not in self.heads]", "if h + 1 not in self.heads]",
          "test_passes.py"),
    Fault("a sparse pattern forgotten", "pattern=_both(self.pattern, pattern)", "pattern=self.pattern",
          "test_passes.py"),
    # operators
    Fault("bytes read as other numbers taken for a reshape", 'Op("view", Kind.RESHAPE, only=("default",))',
          'Op("view", Kind.RESHAPE)', "test_rules.py -k same_bytes"),
    Fault("a rounded division taken for a factor", 'named("div.Tensor div.Scalar")', 'named("div")',
          "test_rules.py -k rounds"),
    Fault("a value that is not needed any more", "                self.values.pop(n, None)", "                pass",
          "test_interpreter.py -k memory"),
    Fault("sizes read from a projection", "    _write_sizes(gm.graph)\n", "",
          "test_selector.py -k smaller_projections"),
    # surgery
    Fault("two heads swapped in the weights", "torch.as_tensor(idx, device=tensor.device)",
          "torch.as_tensor(list(idx)[::-1], device=tensor.device)", "test_dynamic_batch.py"),
    Fault("joined biases in another order", "weights.join(names, 0)", "weights.join(names[::-1], 0)",
          "test_selector.py -k smaller_projections"),
    Fault("uneven groups in another order", "rows += mine[last]", "rows = [*mine[last], *rows]",
          "test_selector.py -k groups_that_lose"),
    Fault("a packed weight kept whole for another role", "for one, other in permutations(operands, 2)",
          "for one, other in permutations([], 2)", "test_selector.py -k norm_across"),
    Fault("an output projection that keeps its columns", "weight * gain)", "weight)",
          "test_laws.py -k law_gains-and-roberta"),
    # lowerings
    Fault("the reference forgets the scale", "s = spec.scale * (q.to(wide)", "s = (q.to(wide)",
          "test_backends.py -k formula"),
    Fault("the reference forgets the sink", "total = total + torch.exp(sinks - base)",
          "total = total + 0", "test_backends.py -k formula"),
    Fault("SDPA aligns its triangle with the first key", "statically_known_true(q.shape[2] == k.shape[2])",
          "True", "test_backends.py -k equals_reference"),
    Fault("SDPA shares K/V heads in another order", "and all(g == h // r for h, g in enumerate(self.kv_of_head))",
          "and True",
          "test_backends.py -k equals_reference"),
    Fault("a block that reads its neighbour's keys", "_keys(t.k, of_cols, cols)",
          "_keys(t.k, of_cols - (of_cols > 0), cols)", "test_blocked.py -k first_keys"),
    Fault("blocks without their inner mask", "mask=_folded(seen, B, H)",
          "mask=_folded(torch.ones_like(seen), B, H)", "test_blocked.py -k equal_the_reference"),
    # ONNX
    Fault("an ONNX band one too wide", "return (Band(-self.left, self.right),)",
          "return (Band(-self.left - 1, self.right),)", "test_forms.py"),
    Fault("ONNX heads back in the wrong order", "[order.index(h) for h in range(site.spec.num_heads)]",
          "order", "test_forms.py -k fixed_lengths-and-PerHead"),
    Fault("ONNX heads that share K/V read other heads'",
          "    shared = site.spec.kv_of_head\n", "    shared = site.spec.kv_of_head[::-1]\n",
          "test_forms.py -k share_keys"),
    Fault("a group of ONNX heads with K/V of other heads", "heads, kv_heads = alone.spec.heads, alone.spec.kv_heads",
          "heads, kv_heads = alone.spec.heads, range(alone.spec.num_kv_heads)", "test_forms.py -k share_keys"),
    Fault("a loaded attention with the spec of another", "zip(attention_calls(module.graph), noted, strict=True)",
          "zip(reversed([*attention_calls(module.graph)]), noted, strict=True)",
          "test_canonical.py -k a_loaded_model"),
    Fault("an attention whose pattern is forgotten", "        note(node, Lowered(part.site,",
          "        (lambda *_: None)(node, Lowered(part.site,",
          "test_canonical.py -k know_their"),
    Fault("an ONNX file taken at its word", "return difference([got], [want]) <= ROOM", "return True or ROOM",
          "test_in_place.py -k computes_otherwise"),
    Fault("a softmax of today in an old file", "if opset < _CHANGED.get(kind, 0)",
          "if opset < 0", "test_in_place.py -k opset_says"),
    Fault("a size that depends on values taken for fixed", "            if readers <= unread:", "            if True:",
          "test_in_place.py -k depend_on_values"),
    Fault("rows of packed weights by the next one's scale", "np.take(array, list(index), axis)",
          "np.take(array, [i - 1 for i in index], axis)",
          "test_in_place.py -k packed"),
    Fault("a free axis that is fixed without a word", "    if fixed:\n        warnings.warn(",
          "    if not fixed:\n        warnings.warn(", "test_in_place.py -k fixed_by_the_caller"),
    Fault("old nodes beside the new ones", "dead = before - after", "dead = set()",
          "test_in_place.py -k every_opset[17]"),
    Fault("an axis of one row that a tracer fixes", "SMALLEST = 2", "SMALLEST = 1",
          "test_in_place.py -k not_read"),
    Fault("another default of an ONNX attribute", 'a.get("keepdims", 1)',
          'a.get("keepdims", 0)', "test_load.py -k an_operator_is"),
    Fault("another default axis of an ONNX softmax", 'torch.softmax(tensor(x), a.get("axis", -1))',
          'torch.softmax(tensor(x), a.get("axis", 1))',
          "test_load.py -k an_operator_is"),
    Fault("another default epsilon", 'a.get("epsilon", 1e-5)', 'a.get("epsilon", 1e-3)',
          "test_load.py -k an_operator_is"),
    Fault("the other default triangle", 'if a.get("upper", 1)', 'if a.get("upper", 0)',
          "test_load.py -k an_operator_is"),
    Fault("another default axis of an ONNX split", 'axis = a.get("axis", 0)\n    given',
          'axis = a.get("axis", -1)\n    given', "test_load.py -k an_operator_is"),
    # generation
    Fault("a cache that keeps one token too few", "t[..., length - recent :, :]",
          "t[..., length - recent + 1 :, :]", "test_hf_cache.py -k thousands"),
    Fault("a cropped cache that counts on", "            self.cumulative_length += tokens_to_remove\n", "",
          "test_hf_cache.py -k taken_back"),
    Fault("a cropped cache that loses the first tokens",
          "self.keys[..., :tokens_to_remove, :], self.values[..., :tokens_to_remove, :]",
          "self.keys[..., -tokens_to_remove:, :], self.values[..., -tokens_to_remove:, :]",
          "test_hf_cache.py -k taken_back"),
    Fault("a past without its dilation", "Past(0, self.left * self.dilation)", "Past(0, self.left)",
          "test_hf_cache.py -k how_much"),
    Fault("a past for the narrowest of its patterns", "max(p.recent for p in known)",
          "min(p.recent for p in known)", "test_hf_cache.py -k how_much"),
    Fault("a cache for the first reader of its keys", "look_back for h in heads), []).append(g)",
          "look_back for h in heads[:1]), []).append(g)", "test_head_groups.py -k share_keys"),
    Fault("heads that come back in the order of their groups", "[:, :, [order.index(h) for h in range(len(order))]]",
          "[:, :, order]", "test_head_groups.py -k full_cache"),
    Fault("the mask of other heads", "else scores[:, list(heads)]", "else scores[:, : len(heads)]",
          "test_head_groups.py -k stay_its_own"),
    Fault("tokens that some heads alone take back", "            layer.require_removable(-tokens_to_remove)\n",
          "            pass\n", "test_head_groups.py -k taken_back_from"),
    Fault("keys that nobody notices to be gone", "torch.full((), torch.nan,", "torch.full((), 0.0,",
          "test_head_groups.py -k later_on"),
    Fault("heads that are stored together after all", "        self.keys = self.values = None\n        return self._updated",
          "        return self._updated", "test_head_groups.py -k can_see"),
    Fault("a past that some heads do not record", "        if self._records:\n            self.activate_past_recording()\n", "",
          "test_head_groups.py -k recorded"),
    Fault("a promise about latents", "isinstance(layer, HeadGroupsLayer) and any(group.past is not None",
          "isinstance(layer, HeadGroupsLayer) and all(group.past is not None", "test_head_groups.py -k converted_model"),
    Fault("a budget without the query's own key", "budget, recent = budget - 1, recent - 1  # the next query brings its own key",
          "recent = recent - 1", "test_eviction.py -k memory"),
    Fault("attention received long ago, forgotten", "votes[..., : self.received.shape[-1]] += self.received", "pass",
          "test_eviction.py -k oracle"),
    Fault("keys at other positions", "self.positions = self.positions.gather(-1, index)",
          "self.positions = self.positions[..., : index.shape[-1]]", "test_eviction.py -k oracle"),
    Fault("padding that has a vote", "own > torch.finfo(own.dtype).min / 2", "own > -torch.inf",
          "test_eviction.py -k oracle"),
    Fault("votes that are not pooled", "if self.eviction.pool > 1:", "if self.eviction.pool > 99:",
          "test_eviction.py -k oracle"),
    Fault("generated tokens that evict a prompt", "return min(self.eviction.recent, new) if new > 1 else 0",
          "return min(self.eviction.recent, new)", "test_eviction.py -k memory"),
    Fault("the lightest keys kept", "earlier.sort(dim=-1, descending=True, stable=True)",
          "earlier.sort(dim=-1, descending=False, stable=True)", "test_eviction.py -k oracle"),
    Fault("votes without the sink", "s_aux.to(dtype).view(1, -1, 1, 1)", "(s_aux.to(dtype) - 1e9).view(1, -1, 1, 1)",
          "test_eviction.py -k stay_its_own"),
    Fault("votes of one reader", "p.view(B, G, -1, S).sum(2)", "p.view(B, G, -1, S)[:, :, 0]",
          "test_eviction.py -k oracle"),
    Fault("a pattern on the wrong keys", "range(total - new + start, total - new + stop)", "range(start, stop)",
          "test_eviction.py -k stay_its_own"),
    Fault("one query of a run that does not vote", "stop = min(start + ROWS, new)", "stop = min(start + ROWS - 1, new)",
          "test_eviction.py -k long_prompts"),
    Fault("beams with the attention of others", "            None if t is None else t[rows.to(t.device)]",
          "            None if t is None else t[rows.sort().values.to(t.device)]", "test_eviction.py -k beams"),
    Fault("a graph that should evict", "rewrite.spec.eviction is not None and not decodes", "False",
          "test_eviction.py -k graph_cannot"),
    Fault("a window one too wide for its budget", "Window(self.budget - sinks - 1, 0)", "Window(self.budget - sinks, 0)",
          "test_eviction.py -k sinks_and"),
    # what third parties write
    Fault("operands that a pass makes up, unsaid", '"has_bias", "has_mask", "has_sinks")', ")",
          "test_plugin_faults.py -k broken_rule"),
    Fault("new weights of any size", "made.shape != known.shape", "made.dim() != known.dim()",
          "test_plugin_faults.py -k broken_rule"),
    Fault("heads that a pass makes up, unsaid", "or not set(named) <= set(known)", "",
          "test_plugin_faults.py -k broken_rule"),
    Fault("a reach that is believed", "(surely & ~seen_LS).any() or (seen_LS & ~(maybe | surely)).any()",
          "(surely & ~seen_LS).any()", "test_plugin_faults.py -k contradict"),
    Fault("a backend's sizes that are believed", "if got != wanted or o.dtype != dtype:",
          "if o.dtype != dtype:", "test_plugin_faults.py -k looked_at"),
    Fault("a backend's fault said to be the pass's", "        if is_ours(plan.backend):",
          "        if True:", "test_plugin_faults.py -k wrong_numbers"),
    Fault("keys that are not broadcast to the queries", "        return made & (i == i) & (j == j)",
          "        return made", "test_plugin_faults.py -k nobody_knows"),
    Fault("a namesake taken for ours", "        return parse(pattern.to_json()) == pattern",
          "        return bool(parse(pattern.to_json()))", "test_plugin_faults.py -k another_class_has"),
    Fault("a text that keeps the meaning of a class that is gone", "        self.changes += 1",
          "        pass", "test_plugin_faults.py -k defined_again"),
    Fault("a name that any class may take", "if holder is not None and not _is_same(holder, made):", "if False:",
          "test_plugin_faults.py -k registering"),
    Fault("plugins that a saved model does not name", "    _require(data)\n", "",
          "test_plugin_faults.py -k not_saved"),
    Fault("passes said to accept that were not asked", "        asked = list(answers)",
          "        asked = list(plugins.passes())", "test_plugin_faults.py -k asked_accept"),
    Fault("a cache of bfloat16 counted as float32", "value(n).element_size()", "4",
          "test_plugin_faults.py -k half_precision"),
    Fault("a warning that points at torch", '("attnopt", "torch", "contextlib", "functools")',
          '("attnopt",)', "test_plugin_faults.py -k users_line"),
    Fault("an import of everything", "from attnopt.backends import attention_operator as attention_operator",
          "from attnopt.backends import attention_operator as attention_operator\nfrom attnopt.compiler import "
          "compile as compile", "test_imports.py -k heavy"),
    # heads for each token
    Fault("tokens routed to the worst heads", "scores_BRL.topk(count, 1)",
          "scores_BRL.topk(count, 1, largest=False)", "test_head_routing.py -k gates_by_hand"),
    Fault("routes of other heads", "{h: i for i, h in enumerate(self.routed)}",
          "{h: i for i, h in enumerate(reversed(self.routed))}", "test_head_routing.py -k gates_by_hand"),
    Fault("a router that forgets its last row", "@ router[:-1] + router[-1]", "@ router[:-1]",
          "test_head_routing.py -k linear_router_by_hand"),
    Fault("ties that route to too many heads", "(tied & (tied.cumsum(1) <= left))", "tied",
          "test_head_routing.py -k gates_by_hand"),
    # what is added to heads
    Fault("a shift that later gains leave as it is", "added = {h: by * dict(gains).get(h, 1.0) for h, by in added.items()}",
          "added = dict(added)", "test_head_additions.py -k move_to_the_end"),
    Fault("a shift moved behind a route", "left, added = list(edits[:n]), {}", "pass",
          "test_head_additions.py -k before_a_route"),
    Fault("a shift that reaches no bias", "out_bias=_moved(found, plan, bias, added)", "out_bias=plan.out_bias",
          "test_steer.py -k cost_nothing"),
    Fault("shifts of other heads", "self.by.tensor()[torch.tensor(places)]", "self.by.tensor()[: len(places)]",
          "test_head_additions.py -k heads_that_stay"),
    Fault("positions that forget the cache", "torch.arange(queries, device=o.device) + (length - queries)",
          "torch.arange(queries, device=o.device)", "test_steer.py -k cache"),
    Fault("a token that counts from both ends", "(last >= 0) & ~among(first, last, length)", "last >= 0",
          "test_tokens.py -k any_length"),
    Fault("positions that a sequence lacks", "torch.cat([ahead < length, listed_once])",
          "torch.cat([ahead >= 0, listed_once])", "test_tokens.py -k any_length"),
    Fault("values of later tokens", "    if isinstance(pattern, Full):\n        return None", "    if True:\n        return None",
          "test_add_values.py -k reaches"),
    Fault("values that the mask hides", "sees = [] if mask is None else [mask.index_select(3, at)]", "sees = list[Tensor]()",
          "test_head_additions.py -k by_hand"),
    Fault("values that a bias hides", "bias.index_select(3, at) > self.hidden_below", "bias.index_select(3, at) > -torch.inf",
          "test_add_values.py -k padded_keys"),
    Fault("a bias that may hide, unsaid", "if site.spec.has_bias and self.hidden_below is None:", "if False:",
          "test_refusals.py -k unknown-mask"),
    Fault("positions that a decoder is given one at a time", "(e for e in site.spec.after if e.reads_positions)",
          "(e for e in site.spec.after if False)", "test_decoder.py -k steered"),
    Fault("blocks chosen after values were added, unsaid", "for edit in site.spec.after if edit.reads_masks]",
          "for edit in site.spec.after if False]", "test_add_values.py -k what_is_refused"),
    # pooled keys
    Fault("pools that count as all their keys", "pooled.to(dtype) * -math.log(self.tokens)", "pooled.to(dtype) * 0.0",
          "test_pooled_keys.py -k formula"),
    Fault("pools of other tokens", "[3 + 2 * i for i in range(len(self.size))]", "[2 + 2 * i for i in range(len(self.size))]",
          "test_pooled_keys.py -k formula"),
    Fault("pools that read other heads' keys", "tuple(spec.kv_heads.index(g) for g in whole.kv_heads)",
          "tuple(range(whole.num_kv_heads))", "test_pooled_keys.py -k follows"),
    Fault("heads that pool in other places", "home[place] for place in sorted(home)", "home[place] for place in home",
          "test_pooled_keys.py -k follows"),
    Fault("a pattern that pools forget", "bare.pattern.for_head(place) == FULL and not tells", "not tells",
          "test_pooled_keys.py -k follows"),
    Fault("pools that outweigh a sink", "(pooling.prefix > 0 or spec.has_sinks)", "pooling.prefix > 0",
          "test_pooled_keys.py -k follows"),
    Fault("padding that enters a mean", "if site.spec.has_mask or site.bias_hides:", "if site.spec.has_mask:",
          "test_pool_keys.py -k padding"),
    Fault("later keys that enter a mean", "        if causal is not None:", "        if False:",
          "test_pool_keys.py -k cannot_be_applied"),
    Fault("a length that is a multiple in the example alone", " and step % self.tokens == 0", "",
          "test_pooled_models.py -k multiples"),
    Fault("pools that a file loses", 'PooledKeys.from_json(spec["pooling"])', "None",
          "test_pooled_models.py -k multiples"),
    Fault("calls that are said to compute other heads", "computed[i * len(computed) // len(calls)]", "computed[0]",
          "test_pooled_export.py -k calls_know"),
    Fault("pools counted as all their keys", "_products(part.spec, site.q_len, part.kv_len(site.kv_len))",
          "_products(part.spec, site.q_len, site.kv_len)", "test_pool_keys.py -k costs"),
    # calibration
    Fault("a refit toward nothing", "right = m.zy + reg * toward", "right = m.zy - reg * toward",
          "test_compensation.py -k argmin"),
    Fault("a compensating bias of the wrong sign", "out_bias=bias.double() + wrong",
          "out_bias=bias.double() - wrong", "test_compensation.py -k bias_takes"),
    Fault("queries that do not follow their merged keys", "if role == \"k\" else _output(site, h, m) for h, m in read]",
          "if role == \"k\" else _output(site, h, m) for h, m in read if role == \"v\"]",
          "test_compensation.py -k another_basis"),
    Fault("values fitted once more though that is worse", "held_out_error(turned, second) < held_out_error(after, first)",
          "held_out_error(turned, second) > held_out_error(after, first)", "test_compensation.py -k refined"),
    Fault("a statistic measured for each that asks", "            if key not in now.memo:", "            if True:",
          "test_part_faults.py -k measured_once"),
    Fault("a budget that forgets what a compensation gives", "left.error(weights[_features(",
          "left.error(fittable_weights(site)[_features(", "test_part_faults.py -k budget_measures"),
    Fault("a partition taken at its word",
          "        if len(groups) != count or not all(groups) or sorted(", "        if False and sorted(",
          "test_part_faults.py -k names_the_part"),
    Fault("the matcher's own fault, unsaid", "            if debugging() and not _is_empty(node):", "            if False:",
          "test_refusals.py -k debugged"),
    # files
    Fault("damage that is not noticed", "if digest_of_file(file) != digest:", "if False:",
          "test_untrusted.py -k flipped"),
    Fault("ONNX weights from any folder", "if not place.is_relative_to(folder) or not place.is_file():",
          "if not place.is_file():",
          "test_hostile_onnx.py -k elsewhere"),
    Fault("a policy's tags that are read", "if event.tag is not None:", "if False:",
          "test_policy.py -k bad_files"),
    Fault("a function that is no operator let through", "        check_operators(",
          "        (lambda _: None)(", "test_untrusted.py -k hostile"),
    # which axes vary
    Fault("a remainder taken for certain", "return rest if _is_within(rest, b, bounds) else _mod(rest, b)",
          "return rest", "test_guards.py -k can_fail"),
    Fault("an unequal size taken for an equal one", "if c == -d:", "if True:",
          "test_guards.py -k equal_sizes"),
    Fault("a lower bound from the wrong end", "(low if coefficient > 0 else high)",
          "(high if coefficient > 0 else low)", "test_guards.py -k always"),
    Fault("a second example of another meaning", "return difference(got, longer) <= 10 * tolerance(longer)",
          "return True",
          "test_dynamic_axes.py -k one_from_several"),
    Fault("the user's own example that is left out", "        if _takes(program, model, inputs):",
          "        if True:", "test_dynamic_axes.py -k own_example"),
    Fault("a batch that len fixes", "return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)",
          "return len(x)", "test_dynamic_axes.py -k len_tells"),
    Fault("keywords under one name",
          "    if is_variadic(forward):\n        return named_arguments(forward, args, kwargs)[0]\n", "",
          "test_dynamic_axes.py -k land_in_kwargs-and-auto-and-keyword"),
    Fault("a remedy that is not told", "        if any(\"/torch/distributions/\" in",
          "        if False and any(\"/torch/distributions/\" in",
          "test_bad_input.py -k distributions_checks"),
    Fault("axes that nobody hears of", "    return (*_few(inputs), *written,",
          "    return (*written,", "test_dynamic_axes.py -k report_is_short"),
    Fault("torch's fast path in the comparison", "            torch.backends.mha.set_fastpath_enabled(False)",
          "            pass",
          "test_dynamic_axes.py -k padding_of_torchs"),
    Fault("no end of relations", "if self._length > LONGEST:", "if False:",
          "test_dynamic_axes.py -k too_much"),
    Fault("a maximum lost beside the sum", "relative = [(own - top) + log for", "relative = [(own + log) - top for",
          "test_weight_gains.py -k hidden_keys_alone"),
    Fault("a later segment that counts first", "if earlier else self.segments[index]", "if False else self.segments[index]",
          "test_weight_gains.py -k earlier_segments"),
    # guidance
    Fault("tensors that copies of a graph share", "return x.detach() if isinstance(x, Tensor) else x", "return x",
          "test_guidance.py -k told_apart"),
    Fault("no layer runs once", "        return bool(sdpa_arguments(node).dropout_p)", "        return True",
          "test_guidance.py -k run_once"),
    Fault("a state that two branches change", "if n.op == \"call_function\" and has_effects(n)", "if False",
          "test_guidance.py -k refused"),
    # gains on weights
    Fault("a log-sum-exp without its maximum", "? 0.f : std::log(total[n][r]);", "? 0.f : std::log(2.f * total[n][r]);",
          "test_weight_gains.py -k log_sum_exps"),
    Fault("the sink lost in a merge", "    relative += [] if sink is None else [sink - top]\n", "",
          "test_weight_gains.py -k merged_parts"),
    Fault("segments that overlap", "reduce(lambda p, before: p & ~before, listed[:i], pattern)", "pattern",
          "test_weight_gains.py -k merged_parts"),
    Fault("gains in the order of the trained heads", "tuple(p.gains[i] for i in places)", "p.gains[: len(places)]",
          "test_weight_gains.py -k keeping_heads"),
    Fault("rows that change although they may not", "& (held <= self.share * both + SLACK)", "",
          "test_weight_gains.py -k redistribute"),
    Fault("a soft mask of three values", "if len(values) != 2 or", "if", "test_weight_gains.py -k other_factors"),
    Fault("a backend that knows no gains", "if site.spec.weight_gains is not None and not backend.weight_gains:", "if False:",
          "test_weight_gains.py -k bad_sites"),
    # caches and other objects
    Fault("a cache that is not brought up to date", "            build.fill(taken.objects[place], node)",
          "            pass", "test_caches.py -k an_empty_cache"),
    Fault("a buffer that is not written", "                taken.leaves[to].copy_(leaves[place])",
          "                pass", "test_caches.py -k caller_holds"),
    Fault("memory that two tensors share", "_overlap(leaves[i], other):", "False:",
          "test_caches.py -k memory_that"),
    Fault("a fixed number that may be another", "if not (Fixed(x) == part or", "if not (True or",
          "test_caches.py -k number_that_a_call"),
    Fault("a counter that stays", "if path in after and after[path] != x)", "if False)",
          "test_caches.py -k shapes_for_all"),
    Fault("a file that names any class", "or _cache_class(name)",
          "or _cache_class(name) or __import__('pydoc').locate(name.replace(':', '.'))",
          "test_caches.py -k class_that_a_file"),
    Fault("an attribute that a file sets", "if not str(key).isidentifier() or", "if False and",
          "test_caches.py -k attribute_that_no_file"),
)  # fmt: skip


def sources(root: Path) -> Iterator[Path]:
    """Every file of the package, each once."""
    for name in SOURCES:
        for file in (root / name).rglob("*"):
            linked = name == "attnopt" and file.relative_to(root).parts[1] in SOURCES
            if file.suffix in (".py", ".cpp", ".j2") and not linked:
                yield file


def misplaced() -> list[str]:
    """The faults whose place is no longer in the source, or is there more than once."""
    texts = [file.read_text(encoding="utf-8") for file in sources(ROOT)]
    counts = ((f, sum(text.count(f.old) for text in texts)) for f in FAULTS)
    return [f"{f.name}: {f.old!r} stands {n} times in the source" for f, n in counts if n != 1]


def planted(fault: Fault, folder: Path) -> None:
    """A copy of the package and its tests with the fault in it."""
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", *(SOURCES if name == "attnopt" else ()))
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    for file in sources(folder):
        text = file.read_text(encoding="utf-8")
        if fault.old in text:
            file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    for name in SOURCES[1:]:
        (folder / "attnopt" / name).symlink_to(f"../{name}")


def caught_by(fault: Fault) -> tuple[str | None, float]:
    """The first test that fails with the fault in place, None where all pass; and the seconds that it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        planted(fault, Path(folder))
        file, *chosen = fault.tests.replace("-and-", " and ").split(" ", 2)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            str(next(Path(folder, "tests").rglob(file))),
            *chosen,
        ]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return None, seconds
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode != 1 or not failed:
        raise SystemExit(f"{fault.name}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[0].split(" ", 1)[1].partition(" - ")[0], seconds


def main(names: list[str]) -> int:
    if lost := misplaced():
        print(*lost, sep="\n", file=sys.stderr)
        return 1
    chosen = [f for f in FAULTS if not names or any(n in f.name for n in names)]
    start, survived = time.monotonic(), 0
    with ThreadPoolExecutor(int(os.environ.get("JOBS", "2"))) as pool:
        for fault, (test, seconds) in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += test is None
            print(f"{seconds:4.0f} s  {fault.name:50} {test or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught in {time.monotonic() - start:.0f} s")
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
