"""Writes tiny encoders with random weights in the formats of published encoders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

WORDS = ("a", "photo", "of", "cat", "the")
CLIP_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 20,
}  # fmt: skip


def shake(model: torch.nn.Module) -> None:
    """Adds noise to all parameters, because norms of ones and biases of zeros would hide errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().requires_grad_(False)


def write_clip_tokenizer(folder: Path, pad_token: Any = None) -> dict[str, int]:
    """Writes a CLIP tokenizer with the 256 bytes ('!' is 0), the same at the end of a word, and WORDS."""
    letters = sorted(ByteLevel.alphabet())
    tokens, merges = letters + [letter + "</w>" for letter in letters], []
    for word in WORDS:
        joined, *rest = [*word[:-1], word[-1] + "</w>"]
        for part in rest:
            merges.append(f"{joined} {part}")
            joined += part
            tokens.append(joined)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges), ""]), encoding="utf-8")
    if pad_token:
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad_token}))
    return vocabulary


def write_clip(folder: Path, tokenizer: Path | None = None, pad_token: Any = None, **settings: Any) -> CLIPTextModel:
    """Writes a CLIPTextModel of transformers with its tokenizer, and returns the model."""
    vocabulary = write_clip_tokenizer(tokenizer or folder, pad_token)
    config = CLIPTextConfig(vocab_size=len(vocabulary), eos_token_id=len(vocabulary) - 1, **CLIP_SIZES | settings)
    model = CLIPTextModel(config)
    shake(model)
    model.save_pretrained(folder)
    return model


def open_clip_tensors(model: CLIPTextModel) -> dict[str, torch.Tensor]:
    """Returns the weights under the names of OpenCLIP, with concatenated queries, keys and values."""
    names = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embedding.weight": theirs["embeddings.token_embedding.weight"],
        "positional_embedding": theirs["embeddings.position_embedding.weight"],
        "ln_final.weight": theirs["final_layer_norm.weight"],
        "ln_final.bias": theirs["final_layer_norm.bias"],
        "text_projection": torch.zeros(3, 3),
        "logit_scale": torch.tensor(4.6),
        "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(3),
    }
    for layer in range(model.config.num_hidden_layers):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for name, other in names.items():
                tensors[f"{new}{other}.{kind}"] = theirs[f"{old}{name}.{kind}"]
            parts = [theirs[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_open_clip(folder: Path, model: CLIPTextModel, prefix: str = "") -> None:
    """Writes the model in OpenCLIP format; `prefix` is 'text.' in newer files."""
    write_clip_tokenizer(folder)
    config = model.config
    text = {
        "context_length": config.max_position_embeddings, "vocab_size": config.vocab_size, "width": config.hidden_size,
        "heads": config.num_attention_heads, "layers": config.num_hidden_layers,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
    }  # fmt: skip
    about = {"embed_dim": 3, "quick_gelu": config.hidden_act == "quick_gelu", "vision_cfg": {}, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": about, "preprocess_cfg": {}}))
    named = {
        name if name.startswith(("visual", "logit")) else prefix + name: tensor
        for name, tensor in open_clip_tensors(model).items()
    }
    save_file(named, folder / "open_clip_model.safetensors")


def write_t5(folder: Path) -> T5EncoderModel:
    """Writes a tiny T5 v1.1 encoder and a tokenizer with one piece per letter and some words; returns the encoder."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -5.0) for letter in letters] + [("▁" + word, -1.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config)
    shake(model)
    model.save_pretrained(folder)
    return model


def rewrite(file: Path, rename: Any) -> None:
    """Renames the tensors of a safetensors file."""
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
