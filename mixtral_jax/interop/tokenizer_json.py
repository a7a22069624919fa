"""A SentencePiece tokenizer as the files that transformers' AutoTokenizer reads.

Given tokenizer.model alone, transformers 5 makes ids of its own: it leaves out the space before a
text. So the tokenizer is spelled out here, and is the same id for id, but for one thing: the
tokenizers library looks for special tokens in any text, so that "</s>", "<unk>" or, from v2 on,
"[INST]" typed by a user is the control id, and the text after it begins with a space of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mixtral_jax.data.sentencepiece_model import PieceType, SentencePieceModel, read_model
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.interop import chat_templates

SPACE = "\u2581"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, by name, for transformers 4.45 and newer.

    BOS goes before every text, as transformers does for Mixtral. The chat template holds what
    `encode_chat` takes, tools aside, and gives the same ids; there is none for the versions that
    `encode_chat` does not know.

    Returns:
      The files; none for a model that tokenizer.json cannot spell: one that is not BPE, that
      normalises letters, or whose spaces or characters are not pieces as in Mistral's.
    Source: the file format of Hugging Face's tokenizers 0.20.
    """
    model = read_model(tokenizer.model_bytes)
    if not _can_be_spelled(model):
        return {}
    texts = [piece.text for piece in model.pieces]
    bos, eos = texts[tokenizer.bos_id], texts[tokenizer.eos_id]
    unk = next(piece.text for piece in model.pieces if piece.type is PieceType.UNKNOWN)
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _special_tokens(model),
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": _pre_tokenizer(model),
        "post_processor": _bos_before(bos, tokenizer.bos_id),
        "decoder": {"type": "Sequence", "decoders": _decoders(model)},
        "model": _bpe(model, unk),
    }
    config = {
        # The class that takes tokenizer.json as it is, in transformers 4 and 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{"bos_token": bos, "eos_token": eos, "unk_token": unk},
        **{"add_bos_token": True, "add_eos_token": False},
        "clean_up_tokenization_spaces": False,
    }
    if template := _chat_template(tokenizer.version, model):
        config["chat_template"] = template
    return {TOKENIZER_JSON: _json(values), TOKENIZER_CONFIG: _json(config, indent=2)}


def _json(values: dict[str, Any], indent: int | None = None) -> bytes:
    return (json.dumps(values, ensure_ascii=False, indent=indent) + "\n").encode()


def _can_be_spelled(model: SentencePieceModel) -> bool:
    if not model.bpe or model.character_map or model.whitespace_suffix:
        return False
    if not model.escape_whitespaces or any(p.type is PieceType.UNUSED for p in model.pieces):
        return False
    # SentencePiece joins characters that are no pieces themselves; tokenizers makes bytes of them.
    normal = {piece.text for piece in model.pieces if piece.type is PieceType.NORMAL}
    return SPACE in normal and normal.issuperset("".join(normal))


# ---- the parts of tokenizer.json ---------------------------------------------------------------


def _special_tokens(model: SentencePieceModel) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": piece.text, **flags, "special": True}
        for number, piece in enumerate(model.pieces)
        if piece.type in (PieceType.UNKNOWN, PieceType.CONTROL)
    ]


def _normalizers(model: SentencePieceModel) -> list[dict[str, Any]]:
    def replace(regex: str, content: str) -> dict[str, Any]:
        return {"type": "Replace", "pattern": {"Regex": regex}, "content": content}

    made = []
    if model.remove_extra_whitespaces:
        # At the end, SentencePiece takes away what looks like a space by then.
        made += [replace(rf"\A +|[ {SPACE}]+\z", ""), replace(" {2,}", " ")]
    if model.dummy_prefix:  # to each text between special tokens, unless it is empty
        made.append({"type": "Prepend", "prepend": SPACE})
    return [*made, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]


def _user_defined(model: SentencePieceModel) -> list[str]:
    return [piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED]


def _pre_tokenizer(model: SentencePieceModel) -> dict[str, Any] | None:
    """Cuts out the user-defined pieces, the longest that fits.

    As added tokens they would have a space put before the text that follows them.
    """
    longest_first = sorted(_user_defined(model), key=len, reverse=True)
    if not longest_first:
        return None
    pattern = "|".join(map(re.escape, longest_first))
    return {
        **{"type": "Split", "pattern": {"Regex": pattern}},
        **{"behavior": "Isolated", "invert": False},
    }


def _bos_before(bos: str, bos_id: int) -> dict[str, Any]:
    def bos_and(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": bos_and("A", 0),
        "pair": bos_and("A", 0) + bos_and("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _decoders(model: SentencePieceModel) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.dummy_prefix:
        made.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return made


def _bpe(model: SentencePieceModel, unk: str) -> dict[str, Any]:
    return {
        "type": "BPE",
        **{"dropout": None, "unk_token": unk},
        **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
        **{"fuse_unk": True, "byte_fallback": model.byte_fallback},
        # No merges lead to a user-defined piece. For any other text, what is in the vocabulary is
        # what its merges give; all but the name of a byte, <0x0A>, right behind such a piece.
        "ignore_merges": bool(_user_defined(model)),
        "vocab": {piece.text: number for number, piece in enumerate(model.pieces)},
        "merges": merges(model),
    }


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """All pairs of normal pieces that make one, in the order in which they are to be merged.

    SentencePiece merges the pair whose whole has the best score, and among equals the leftmost.
    Here, pairs have an order of their own, so those of equal score are put longest left part first:
    spaces, which all have one score in Mistral's models, are then gathered from the left, too.
    """
    scores = {p.text: p.score for p in model.pieces if p.type is PieceType.NORMAL}
    pairs = [
        (left, right)
        for whole in scores
        for cut in range(1, len(whole))
        if (left := whole[:cut]) in scores and (right := whole[cut:]) in scores
    ]
    pairs.sort(key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0]), -len(pair[1])))
    return pairs


def _chat_template(version: str | None, model: SentencePieceModel) -> str | None:
    if version != "v1":
        return chat_templates.CONTROLS if version else None
    # An answer stands behind "[/INST]" in one text with it: no piece may hold parts of both.
    parted = not any(f"]{SPACE}" in piece.text for piece in model.pieces)
    return chat_templates.PLAIN if parted and model.dummy_prefix else None
