"""Tensors in, features out: encoders, shared by agents and generative models."""

from .encoder import (
    ENCODERS,
    MLP,
    Encoder,
    Impala,
    MinAtarCNN,
    NatureCNN,
    NormImpala,
    NormMinAtarCNN,
    NormMLP,
    NormNatureCNN,
    TanhMLP,
    default_encoder,
    describe_encoder,
    load_encoder,
    make_encoder,
    refuse_imports,
)
from .spaces import is_image, space_from_json, space_to_json
from .weights import find_weights, read_weights, write_weights

__all__ = [
    "ENCODERS",
    "MLP",
    "Encoder",
    "Impala",
    "MinAtarCNN",
    "NatureCNN",
    "NormImpala",
    "NormMLP",
    "NormMinAtarCNN",
    "NormNatureCNN",
    "TanhMLP",
    "default_encoder",
    "describe_encoder",
    "find_weights",
    "is_image",
    "load_encoder",
    "make_encoder",
    "read_weights",
    "refuse_imports",
    "space_from_json",
    "space_to_json",
    "write_weights",
]
