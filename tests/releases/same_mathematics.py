"""Releases that nobody made, but somebody may: they compute what the installed one computes, by another way in, with
other private code, or under other names."""

from __future__ import annotations

import re
import textwrap

from invented_release import BERT, LAST_PARAMETER, MASKS, OUTPUT, ROBERTA, Release, both, forward_of
from overlay import Edit, chain, sub, within, word

# --- arguments ------------------------------------------------------------------------------------------------------


def _cache_renamed(text: str) -> str:
    old = "cache" if re.search(r"^        cache: ", text, re.MULTILINE) else "past_key_values"
    text = word(rf"{old}(_length)?", r"kv\1")(text).replace('new_name="cache"', 'new_name="kv"')
    # Fields of outputs and arguments of what creates masks are named in other files.
    return re.sub(
        r"((?:Output\w*|CrossAttentions|create_causal_mask)\()([^()]*)\)",
        lambda call: call[1] + call[2].replace("kv=", f"{old}=") + ")",
        text,
    )


def _public_mask_renamed(text: str) -> str:
    text = word("attention_mask", "visible")(text)
    return re.sub(
        r"(create_\w+_mask\()([^()]*)\)", lambda c: c[1] + c[2].replace("visible=", "attention_mask=") + ")", text
    )


def _layers_mask_renamed(prefix: str) -> Edit:
    parts = ("SelfAttention", "CrossAttention", "Attention", "Layer", "Encoder")
    return chain(
        *(within(f"class {prefix}{part}(", word("attention_mask", "visible")) for part in parts),
        sub(r"(self\.encoder\(\n\s+embedding_output,\n\s+)attention_mask=", r"\1visible=", times=1),
    )


def _arguments_added(prefix: str) -> Edit:
    return chain(
        forward_of(
            f"{prefix}SelfAttention",
            chain(
                sub(LAST_PARAMETER, r"        head_gate=None,\n\g<0>", times=1),
                sub(
                    r"^        return attn_output, attn_weights\n",
                    "        if head_gate is not None:\n            attn_output = attn_output * head_gate\n\\g<0>",
                    times=1,
                ),
            ),
        ),
        forward_of(
            f"{prefix}Layer",
            chain(
                sub(LAST_PARAMETER, r"        layer_gate=None,\n\g<0>", times=1),
                sub(
                    r"return layer_output\n",
                    "return layer_output if layer_gate is None else layer_output * layer_gate\n",
                ),
            ),
        ),
        forward_of(
            f"{prefix}Model",
            chain(
                sub(LAST_PARAMETER, r"        model_gate=None,\n\g<0>", times=1),
                sub(
                    r"sequence_output = encoder_outputs\.last_hidden_state\n",
                    "\\g<0>        if model_gate is not None:\n"
                    "            sequence_output = sequence_output * model_gate\n",
                    times=1,
                ),
            ),
        ),
    )


ARGUMENTS = [
    # What 5.24 did.
    Release("cache_argument_renamed", both(lambda prefix: _cache_renamed)),
    Release(
        "hidden_states_argument_renamed",
        both(
            lambda prefix: chain(
                word("hidden_states", "states"),
                sub(r"\bstates=outputs\.hidden_states", "hidden_states=outputs.hidden_states"),
            )
        ),
    ),
    Release("mask_argument_of_layers_renamed", both(_layers_mask_renamed)),
    # A call that gives it gives what is not known.
    Release(
        "mask_argument_of_models_renamed",
        both(lambda prefix: _public_mask_renamed),
        fuses="none",
        names={"attention_mask": "visible"},
    ),
    Release(
        "position_ids_argument_renamed",
        both(lambda prefix: word("position_ids", "places")),
        fuses="some",
        names={"position_ids": "places"},
    ),
    Release(
        "arguments_added",
        both(_arguments_added),
        given={
            "head_gate": ("float", (4, 11, 32)),
            "layer_gate": ("float", (4, 11, 32)),
            "model_gate": ("float", (4, 11, 32)),
        },
        unfused=("given", "given, training"),
    ),
    Release(
        "arguments_of_models_reordered",
        both(
            lambda prefix: chain(
                forward_of(
                    f"{prefix}Model",
                    sub(r"(        attention_mask: .*\n)(        token_type_ids: .*\n)", r"\2\1", times=1),
                ),
                forward_of(
                    f"{prefix}Embeddings",
                    sub(r"(        input_ids: .*\n)(        token_type_ids: .*\n)", r"\2\1", times=1),
                ),
            )
        ),
    ),
    Release(
        "arguments_of_layers_reordered",
        both(
            lambda prefix: chain(
                forward_of(
                    f"{prefix}Layer",
                    sub(r"(        attention_mask: .*\n)((?:        encoder_.*\n){2})", r"\2\1", times=1),
                ),
                forward_of(
                    f"{prefix}Encoder",
                    sub(
                        r"^( +)attention_mask,\n +encoder_hidden_states,.*\n",
                        r"\1encoder_hidden_states,\n\1attention_mask=attention_mask,\n",
                        times=1,
                    ),
                ),
            )
        ),
        fuses="none",
    ),
    # Two tensors of one shape, so that nothing but the answers tells which is which.
    Release(
        "arguments_of_outputs_reordered",
        both(
            lambda prefix: chain(
                *(
                    forward_of(
                        f"{prefix}{part}",
                        sub(r"(hidden_states: torch\.Tensor), (input_tensor: torch\.Tensor)", r"\2, \1", times=1),
                    )
                    for part in ("SelfOutput", "Output")
                ),
                within(
                    f"class {prefix}Attention(",
                    sub(
                        r"self\.output\(attention_output, hidden_states\)",
                        "self.output(hidden_states, attention_output)",
                        times=1,
                    ),
                ),
                within(
                    f"class {prefix}Layer(",
                    sub(
                        r"self\.output\(intermediate_output, attention_output\)",
                        "self.output(attention_output, intermediate_output)",
                        times=1,
                    ),
                ),
            )
        ),
        fuses="none",
    ),
]

# --- what is private ------------------------------------------------------------------------------------------------


def _mask_method_gone(prefix: str) -> Edit:
    def edit(text: str) -> str:
        method = re.search(
            r"^    def _create_attention_masks\((?:.*\n)*?        return attention_mask, encoder_attention_mask\n",
            text,
            re.MULTILINE,
        )
        assert method is not None
        function = textwrap.dedent(method.group()).replace("def _create_attention_masks", "def masks_of")
        text = text.replace(method.group(), "").replace("self._create_attention_masks(", "masks_of(\n            self,")
        return sub(rf"^class {prefix}Pooler\(", function.replace("\\", "\\\\") + r"\n\n\g<0>", times=1)(text)

    return edit


def _mask_method_takes_other_arguments(prefix: str) -> Edit:
    return within(
        f"class {prefix}Model(",
        chain(
            sub(
                r"            attention_mask=attention_mask,\n"
                r"            encoder_attention_mask=encoder_attention_mask,\n(            embedding_output=)",
                r"            masks=(attention_mask, encoder_attention_mask),\n\1",
                times=1,
            ),
            sub(
                r"(def _create_attention_masks\(\n        self,\n)        attention_mask,\n"
                r"        encoder_attention_mask,\n((?:        .*\n)*    \):\n)",
                r"\1        masks,\n\2        attention_mask, encoder_attention_mask = masks\n",
                times=1,
            ),
        ),
    )


def _mask_method_returns_a_dict(prefix: str) -> Edit:
    return within(
        f"class {prefix}Model(",
        chain(
            sub(
                r"attention_mask, encoder_attention_mask = (self\._create_attention_masks\([^()]*\))",
                "masks = \\1\n        attention_mask, encoder_attention_mask = masks['own'], masks['cross']",
                times=1,
            ),
            sub(
                r"return attention_mask, encoder_attention_mask\n",
                "return {'own': attention_mask, 'cross': encoder_attention_mask}\n",
                times=1,
            ),
        ),
    )


PRIVATE = [
    Release("mask_method_gone", both(_mask_method_gone), fuses="some"),
    Release("mask_method_takes_other_arguments", both(_mask_method_takes_other_arguments), fuses="some"),
    Release("mask_method_returns_a_dict", both(_mask_method_returns_a_dict), fuses="some"),
    Release(
        "registry_of_outputs_renamed",
        dict.fromkeys(("utils/output_capturing.py", "modeling_utils.py"), word("_CAN_RECORD_REGISTRY", "_RECORDABLE")),
    ),
    Release(
        "registry_of_outputs_gone",
        {
            "utils/output_capturing.py": chain(
                sub(r"_CAN_RECORD_REGISTRY\.get\((\w+)\)", r"(\1._can_record_outputs or {})"),
                sub(r"^_CAN_RECORD_REGISTRY = .*\n", "", times=1),
            ),
            "modeling_utils.py": chain(
                sub(r"^ +_CAN_RECORD_REGISTRY\[self\] = .*\n", "", times=1),
                sub(r"\b_CAN_RECORD_REGISTRY, ", "", times=1),
            ),
        },
    ),
    Release(
        "hidden_states_gathered_by_hand",
        both(
            lambda prefix: chain(
                within(
                    f"class {prefix}Model(",
                    chain(
                        sub(r"^    @capture_outputs\n", "", times=1),
                        sub(
                            r"^( +)pooler_output=pooled_output,\n",
                            r"\g<0>\1hidden_states=encoder_outputs.hidden_states,\n",
                            times=1,
                        ),
                    ),
                ),
                forward_of(
                    f"{prefix}Encoder",
                    chain(
                        sub(r"^( +)for i, layer_module .*\n", r"\1gathered = (hidden_states,)\n\g<0>", times=1),
                        sub(
                            r"^                \*\*kwargs,\n            \)\n",
                            "\\g<0>            gathered += (hidden_states,)\n",
                            times=1,
                        ),
                        sub(
                            r"^( +)last_hidden_state=hidden_states,\n",
                            r"\g<0>\1hidden_states=gathered if kwargs.get('output_hidden_states') else None,\n",
                            times=1,
                        ),
                    ),
                ),
            )
        ),
        fuses="none",
        other_answers=True,
    ),
    Release(
        "chunking_gone",
        {"pytorch_utils.py": sub(r"^def apply_chunking_to_forward\(", "def chunked(")}
        | both(
            lambda prefix: chain(
                sub(r"^from \.\.\.pytorch_utils import apply_chunking_to_forward\n", "", times=1),
                sub(
                    r"apply_chunking_to_forward\(\n(?:.*\n){1}        \)\n",
                    "self.feed_forward_chunk(attention_output)\n",
                    times=1,
                ),
            )
        ),
    ),
    Release(
        "feed_forward_chunk_gone",
        both(
            lambda prefix: chain(
                sub(
                    r"layer_output = apply_chunking_to_forward\(\n(?:.*\n){1}        \)\n",
                    "layer_output = self.output(self.intermediate(attention_output), attention_output)\n",
                    times=1,
                ),
                sub(r"^    def feed_forward_chunk\((?:.*\n)*?        return layer_output\n", "", times=1),
            )
        ),
        fuses="none",
    ),
    Release(
        "mask_functions_renamed",
        {
            MASKS: chain(
                word("sdpa_mask", "mask_for_sdpa"),
                word("causal_mask_function", "causal_rule"),
                word("bidirectional_mask_function", "bidirectional_rule"),
            ),
            **dict.fromkeys(
                ("integrations/sdpa_attention.py", "integrations/sdpa_paged.py", "modeling_utils.py"),
                word("sdpa_attention_forward", "attention_by_sdpa"),
            ),
        },
        interface=False,
    ),
    Release(
        "layers_without_checkpointing",
        both(
            lambda prefix: sub(
                rf"^class {prefix}Layer\(GradientCheckpointingLayer\)", f"class {prefix}Layer(nn.Module)", times=1
            )
        ),
    ),
]

# --- names ----------------------------------------------------------------------------------------------------------

NAMES = [
    Release(
        "modules_renamed",
        {},
        moved={
            ROBERTA: ROBERTA.replace("roberta.py", "roberta_core.py"),
            BERT: BERT.replace("bert.py", "bert_core.py"),
        },
        fuses="none",
    ),
    Release("layer_class_renamed", both(lambda prefix: word(f"{prefix}Layer", f"{prefix}Block")), fuses="none"),
    Release(
        "attention_classes_renamed",
        both(
            lambda prefix: chain(
                word(f"{prefix}SelfAttention", f"{prefix}Attend"), word(f"{prefix}SelfOutput", f"{prefix}AfterAttend")
            )
        ),
        fuses="none",
    ),
    # Its weights are others, as they are drawn by their names.
    Release(
        "parts_renamed",
        both(lambda prefix: sub(r"self\.intermediate\b", "self.widen")),
        fuses="none",
        other_answers=True,
    ),
    # The feed-forward's kernel is chosen by what it computes, or stays the original.
    Release("activation_class_renamed", {"activations.py": word("GELUActivation", "GaussianErrorUnit")}, fuses="some"),
    Release(
        "output_class_renamed",
        {"modeling_outputs.py": word(OUTPUT, "EncoderOutput")} | both(lambda prefix: word(OUTPUT, "EncoderOutput")),
    ),
]


SAME_MATHEMATICS = [*ARGUMENTS, *PRIVATE, *NAMES]
