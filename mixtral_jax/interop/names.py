"""The names of weights in each checkpoint format, and how each tensor lies there: one table.

Our parameters carry their layout in their name: `layers.attention.wq_DKGH` has dimensions D, K, G,
H behind the layer's. A format's entry says under which name the same numbers lie in its files, and
in which layout, outermost dimension first, in the same letters; a group of letters such as `KGH` is
one dimension of the file that holds those, the last changing fastest. So reading is: split the
groups, pick, transpose; and writing is the reverse.

Letters beyond those of sharding.py:

    g   2: the gate half and the up half of a fused matrix
    h p H / 2 pairs of 2. RoPE turns dimensions in pairs: i with i + H / 2 in our weights and
        Hugging Face's (H is p h), 2 i with 2 i + 1 in Mistral's own files (there it is h p)

Sources: transformers' modeling_mixtral and its conversion mappings, mistral-inference, and the
files of the releases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mixtral_jax.config import ModelConfig


class Piece(NamedTuple):
    """One matrix or vector of the model: a parameter at one layer, and at one expert of several."""

    parameter: str
    layer: int | None = None
    expert: int | None = None

    @property
    def letters(self) -> str:
        """Its dimensions in the model: layout of the parameter without layer and expert."""
        letters = letters_of(self.parameter)
        return letters if self.expert is None else letters.replace("E", "")

    def __str__(self) -> str:
        places = [f"layer {self.layer}"] if self.layer is not None else []
        places += [f"expert {self.expert}"] if self.expert is not None else []
        return ", ".join([self.parameter, *places])


class Entry(NamedTuple):
    """Where a piece lies in a format's files."""

    name: str
    """Of the tensor, with {layer} and {expert}."""
    layout: str
    """Its dimensions, separated by spaces."""
    half: int | None = None
    """Which half of letter g."""


@dataclass(frozen=True)
class Format:
    """A way of naming a model's tensors."""

    title: str
    entries: Mapping[str, Entry]
    """By parameter."""
    dense: bool = False
    """One feed-forward network instead of experts, and no router."""

    def entry(self, piece: Piece) -> Entry:
        """The piece's entry, with its layer and expert in the name."""
        entry = self.entries[piece.parameter]
        return entry._replace(name=entry.name.format(layer=piece.layer, expert=piece.expert))


def letters_of(parameter: str) -> str:
    """The layout of a parameter without the layers' dimension; the weights of norms are vectors."""
    suffix = parameter.rpartition(".")[2]
    return "D" if suffix == "weight" else suffix.rpartition("_")[2]


def sizes(config: ModelConfig) -> dict[str, int]:
    """What each letter counts in a model."""
    head = config.head_size
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "E": config.num_local_experts,
        "K": config.num_key_value_heads,
        "G": config.num_attention_heads // config.num_key_value_heads,
        "H": head,
        "h": head // 2,
        "p": 2,
        "g": 2,
    }


# ---- the table ---------------------------------------------------------------------------------

EMBEDDING, HEAD, NORM = "embedding_VD", "head_DV", "norm.weight"
ATTENTION_NORM, MOE_NORM = "layers.attention_norm.weight", "layers.moe_norm.weight"
WQ, WK = "layers.attention.wq_DKGH", "layers.attention.wk_DKH"
WV, WO = "layers.attention.wv_DKH", "layers.attention.wo_KGHD"
ROUTER, GATE = "layers.moe.router_DE", "layers.moe.gate_EDF"
UP, DOWN = "layers.moe.up_EDF", "layers.moe.down_EFD"
EXPERTS = (GATE, UP, DOWN)
OF_A_LAYER = (ATTENTION_NORM, WQ, WK, WV, WO, MOE_NORM, ROUTER, *EXPERTS)

_LAYER = "model.layers.{layer}."
_HUGGING_FACE_TRUNK = {
    EMBEDDING: Entry("model.embed_tokens.weight", "V D"),
    HEAD: Entry("lm_head.weight", "V D"),
    NORM: Entry("model.norm.weight", "D"),
    ATTENTION_NORM: Entry(_LAYER + "input_layernorm.weight", "D"),
    MOE_NORM: Entry(_LAYER + "post_attention_layernorm.weight", "D"),
    WQ: Entry(_LAYER + "self_attn.q_proj.weight", "KGH D"),
    WK: Entry(_LAYER + "self_attn.k_proj.weight", "KH D"),
    WV: Entry(_LAYER + "self_attn.v_proj.weight", "KH D"),
    WO: Entry(_LAYER + "self_attn.o_proj.weight", "D KGH"),
}
_SPARSE = _LAYER + "block_sparse_moe."
HUGGING_FACE = Format(
    "Hugging Face",
    _HUGGING_FACE_TRUNK
    | {
        ROUTER: Entry(_SPARSE + "gate.weight", "E D"),
        GATE: Entry(_SPARSE + "experts.{expert}.w1.weight", "F D"),
        UP: Entry(_SPARSE + "experts.{expert}.w3.weight", "F D"),
        DOWN: Entry(_SPARSE + "experts.{expert}.w2.weight", "D F"),
    },
)
_MLP = _LAYER + "mlp."
HUGGING_FACE_FUSED = Format(
    "Hugging Face, fused experts",
    _HUGGING_FACE_TRUNK
    | {
        ROUTER: Entry(_MLP + "gate.weight", "E D"),
        GATE: Entry(_MLP + "experts.gate_up_proj", "E gF D", half=0),
        UP: Entry(_MLP + "experts.gate_up_proj", "E gF D", half=1),
        DOWN: Entry(_MLP + "experts.down_proj", "E D F"),
    },
)
HUGGING_FACE_DENSE = Format(
    "Hugging Face, dense",
    _HUGGING_FACE_TRUNK
    | {
        GATE: Entry(_MLP + "gate_proj.weight", "F D"),
        UP: Entry(_MLP + "up_proj.weight", "F D"),
        DOWN: Entry(_MLP + "down_proj.weight", "D F"),
    },
    dense=True,
)

_LAYER = "layers.{layer}."
_FEED_FORWARD = _LAYER + "feed_forward."
_MISTRAL_TRUNK = {
    EMBEDDING: Entry("tok_embeddings.weight", "V D"),
    HEAD: Entry("output.weight", "V D"),
    NORM: Entry("norm.weight", "D"),
    ATTENTION_NORM: Entry(_LAYER + "attention_norm.weight", "D"),
    MOE_NORM: Entry(_LAYER + "ffn_norm.weight", "D"),
    WQ: Entry(_LAYER + "attention.wq.weight", "KGhp D"),
    WK: Entry(_LAYER + "attention.wk.weight", "Khp D"),
    WV: Entry(_LAYER + "attention.wv.weight", "KH D"),
    WO: Entry(_LAYER + "attention.wo.weight", "D KGH"),
}
MISTRAL = Format(
    "Mistral",
    _MISTRAL_TRUNK
    | {
        ROUTER: Entry(_FEED_FORWARD + "gate.weight", "E D"),
        GATE: Entry(_FEED_FORWARD + "experts.{expert}.w1.weight", "F D"),
        UP: Entry(_FEED_FORWARD + "experts.{expert}.w3.weight", "F D"),
        DOWN: Entry(_FEED_FORWARD + "experts.{expert}.w2.weight", "D F"),
    },
)
_SPARSE = _LAYER + "block_sparse_moe."
MISTRAL_PARTS = Format(
    "Mistral, eight parts",
    _MISTRAL_TRUNK
    | {
        ROUTER: Entry(_SPARSE + "gate.weight", "E D"),
        GATE: Entry(_SPARSE + "w1", "EF D"),
        UP: Entry(_SPARSE + "w3", "EF D"),
        DOWN: Entry(_SPARSE + "w2", "EF D"),
    },
)
MISTRAL_DENSE = Format(
    "Mistral, dense",
    _MISTRAL_TRUNK
    | {
        GATE: Entry(_FEED_FORWARD + "w1.weight", "F D"),
        UP: Entry(_FEED_FORWARD + "w3.weight", "F D"),
        DOWN: Entry(_FEED_FORWARD + "w2.weight", "D F"),
    },
    dense=True,
)
FORMATS = (
    *(HUGGING_FACE, HUGGING_FACE_FUSED, HUGGING_FACE_DENSE),
    *(MISTRAL, MISTRAL_PARTS, MISTRAL_DENSE),
)


def pieces(config: ModelConfig) -> Iterator[Piece]:
    """Every piece of a model, a layer at a time, in the order in which they are written."""
    yield Piece(EMBEDDING)
    for layer in range(config.num_hidden_layers):
        for parameter in OF_A_LAYER:
            if parameter in EXPERTS:
                for expert in range(config.num_local_experts):
                    yield Piece(parameter, layer, expert)
            else:
                yield Piece(parameter, layer)
    yield Piece(NORM)
    yield Piece(HEAD)
