"""Releases that nobody made, but somebody may: they compute something else than the installed one, or by parts that are
not the known ones. What is fused must not stand in for them."""

from __future__ import annotations

from collections.abc import Mapping

from invented_release import BERT, OUTPUT, ROBERTA, Release, both, forward_of
from overlay import Edit, chain, sub, within


def _one_product_for_qkv(prefix: str) -> Edit:
    return within(
        f"class {prefix}SelfAttention(",
        chain(
            sub(
                r"^        self\.query = .*\n        self\.key = .*\n        self\.value = .*\n",
                "        self.qkv = nn.Linear(config.hidden_size, 3 * self.all_head_size)\n",
                times=1,
            ),
            sub(
                r"^        query_layer = .*\n        key_layer = .*\n        value_layer = .*\n",
                "        query_layer, key_layer, value_layer = (\n"
                "            part.view(*hidden_shape).transpose(1, 2)\n"
                "            for part in self.qkv(hidden_states).chunk(3, -1)\n        )\n",
                times=1,
            ),
        ),
    )


def _table_added(prefix: str, forward: str) -> Edit:
    return within(
        f"class {prefix}Embeddings(",
        chain(
            sub(
                r"^        self\.token_type_embeddings = .*\n",
                "\\g<0>        self.script_embeddings = nn.Embedding(3, config.hidden_size)\n",
                times=1,
            ),
            sub(r"^        embeddings = self\.LayerNorm\(", forward + r"\g<0>", times=1),
        ),
    )


def _table_with_an_argument(prefix: str) -> Edit:
    parameter = sub(r"^        inputs_embeds: .*\n", r"        script_ids=None,\n\g<0>", times=1)
    return chain(
        _table_added(
            prefix,
            "        if script_ids is not None:\n"
            "            embeddings = embeddings + self.script_embeddings(script_ids)\n",
        ),
        forward_of(f"{prefix}Embeddings", parameter),
        forward_of(
            f"{prefix}Model",
            chain(
                parameter, sub(r"^( +)token_type_ids=token_type_ids,\n", r"\g<0>\1script_ids=script_ids,\n", times=1)
            ),
        ),
    )


def _computes(name: str, edits: Mapping[str, Edit], *, other_answers: bool = True, **kwargs: object) -> Release:
    return Release(name, edits, fuses="none", other_answers=other_answers, **kwargs)  # type: ignore[arg-type]


NORMED = "nn.functional.layer_norm({0}, {0}.shape[-1:]) * 1.5"
OTHER_MATHEMATICS = [
    _computes(
        "scaling_halved",
        both(
            lambda prefix: within(
                f"class {prefix}SelfAttention(", sub(r"self\.attention_head_size\*\*-0\.5", r"\g<0> * 0.5", times=1)
            )
        ),
    ),
    _computes(
        "scaling_halved_in_the_call",
        both(
            lambda prefix: forward_of(
                f"{prefix}SelfAttention", sub(r"scaling=self\.scaling,", "scaling=self.scaling * 0.5,", times=1)
            )
        ),
    ),
    _computes(
        "queries_scaled",
        both(lambda prefix: forward_of(f"{prefix}SelfAttention", sub(r"(query_layer = .*)\n", r"\1 * 0.5\n", times=1))),
    ),
    _computes("one_product_for_qkv", both(_one_product_for_qkv)),
    _computes(
        "layer_returns_a_tuple",
        both(
            lambda prefix: chain(
                forward_of(f"{prefix}Layer", sub(r"return layer_output\n", "return (layer_output,)\n", times=1)),
                forward_of(
                    f"{prefix}Encoder",
                    sub(r"(hidden_states = layer_module\((?:.*\n)*?            \))\n", r"\1[0]\n", times=1),
                ),
            )
        ),
        other_answers=False,
    ),
    _computes(
        "norm_added_to_layers",
        both(
            lambda prefix: within(
                f"class {prefix}Layer(",
                chain(
                    sub(
                        r"^        self\.output = .*\n",
                        "\\g<0>        self.extra_norm = nn.LayerNorm(config.hidden_size)\n",
                        times=1,
                    ),
                    sub(
                        r"self\.intermediate\(attention_output\)",
                        "self.intermediate(self.extra_norm(attention_output))",
                        times=1,
                    ),
                ),
            )
        ),
    ),
    _computes(
        "norm_added_to_layers_code",
        both(
            lambda prefix: forward_of(
                f"{prefix}Layer", sub(r"return layer_output\n", f"return {NORMED.format('layer_output')}\n", times=1)
            )
        ),
    ),
    _computes(
        "norm_added_to_encoders",
        both(
            lambda prefix: within(
                f"class {prefix}Encoder(",
                chain(
                    sub(
                        r"^        self\.layer = .*\n",
                        "\\g<0>        self.last_norm = nn.LayerNorm(config.hidden_size)\n",
                        times=1,
                    ),
                    sub(r"last_hidden_state=hidden_states", "last_hidden_state=self.last_norm(hidden_states)", times=1),
                ),
            )
        ),
    ),
    _computes(
        "norm_added_to_encoders_code",
        both(
            lambda prefix: forward_of(
                f"{prefix}Encoder",
                sub(r"last_hidden_state=hidden_states", f"last_hidden_state={NORMED.format('hidden_states')}", times=1),
            )
        ),
    ),
    _computes(
        "norm_added_to_models",
        both(
            lambda prefix: within(
                f"class {prefix}Model(",
                chain(
                    sub(
                        r"^        self\.encoder = .*\n",
                        "\\g<0>        self.last_norm = nn.LayerNorm(config.hidden_size)\n",
                        times=1,
                    ),
                    sub(
                        r"sequence_output = encoder_outputs\.last_hidden_state\n",
                        "sequence_output = self.last_norm(encoder_outputs.last_hidden_state)\n",
                        times=1,
                    ),
                ),
            )
        ),
    ),
    _computes(
        "norm_added_to_models_code",
        both(
            lambda prefix: forward_of(
                f"{prefix}Model",
                sub(
                    r"sequence_output = encoder_outputs\.last_hidden_state\n",
                    f"\\g<0>        sequence_output = {NORMED.format('sequence_output')}\n",
                    times=1,
                ),
            )
        ),
    ),
    _computes(
        "embeddings_scaled_by_models",
        both(
            lambda prefix: forward_of(
                f"{prefix}Model",
                sub(r"^            embedding_output,\n", "            embedding_output * 2,\n", times=1),
            )
        ),
    ),
    # What the pooler reads of padded rows must be what the original gives there.
    _computes(
        "poolers_and_heads_read_all_positions",
        {
            ROBERTA: chain(
                within("class RobertaPooler(", sub(r"hidden_states\[:, 0\]", "hidden_states.mean(1)", times=1)),
                within("class RobertaClassificationHead(", sub(r"features\[:, 0, :\]", "features.mean(1)", times=1)),
            ),
            BERT: within("class BertPooler(", sub(r"hidden_states\[:, 0\]", "hidden_states.mean(1)", times=1)),
        },
    ),
    _computes(
        "table_with_an_argument",
        both(_table_with_an_argument),
        other_answers=False,
        given={"script_ids": ("int", (4, 11))},
    ),
    _computes(
        "table_always_added",
        both(
            lambda prefix: _table_added(prefix, "        embeddings = embeddings + self.script_embeddings.weight[0]\n")
        ),
    ),
    _computes(
        "positions_counted_otherwise",
        {
            ROBERTA: sub(r"return incremental_indices\.long\(\) \+ padding_idx", r"\g<0> + mask.long()", times=1),
            BERT: within(
                "class BertEmbeddings(", sub(r"position_ids = self\.position_ids\[.*\]", r"\g<0> + 1", times=1)
            ),
        },
    ),
    _computes(
        "positions_shifted",
        both(
            lambda prefix: within(
                f"class {prefix}Embeddings(",
                sub(
                    r"self\.position_embeddings\(position_ids\)", "self.position_embeddings(position_ids + 1)", times=1
                ),
            )
        ),
    ),
    _computes(
        "token_types_of_one",
        both(
            lambda prefix: chain(
                within(
                    f"class {prefix}Embeddings(",
                    sub(r"torch\.zeros\((self\.position_ids\.size)", r"torch.ones(\1", times=1),
                ),
                sub(r"init\.zeros_\(module\.token_type_ids\)", "init.ones_(module.token_type_ids)", times=1),
            )
        ),
    ),
    _computes(
        "activation_of_the_same_name",
        {"activations.py": within("class GELUActivation(", sub(r"return self\.act\(input\)", r"\g<0> * 1.1", times=1))},
    ),
    _computes(
        "outputs_have_another_field",
        {
            "modeling_outputs.py": within(
                f"class {OUTPUT}(",
                sub(r"^    pooler_output: .*\n", "\\g<0>    first_token: torch.Tensor | None = None\n", times=1),
            ),
        }
        | both(
            lambda prefix: forward_of(
                f"{prefix}Model",
                sub(r"^( +)pooler_output=pooled_output,\n", r"\g<0>\1first_token=sequence_output[:, 0],\n", times=1),
            )
        ),
    ),
]
