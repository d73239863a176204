"""Tensors in, features out: encoders, shared by agents and generative models, and what trains them."""

from .augment import make_augment
from .backbone import Backbone
from .backbone_encoder import BackboneEncoder
from .backbones import BACKBONES, make_backbone
from .classifier import Classifier, ClassifierConfig, check_dataset
from .datasets import Dataset, batches, binarize, folds, load_dataset, quantize
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
from .knn import KNN, KNNConfig
from .model import Model, resolve_device
from .readers import Split
from .spaces import is_image, space_from_json, space_to_json
from .weights import find_weights, read_weights, write_weights

__all__ = [
    "BACKBONES",
    "ENCODERS",
    "KNN",
    "MLP",
    "Backbone",
    "BackboneEncoder",
    "Classifier",
    "ClassifierConfig",
    "Dataset",
    "Encoder",
    "Impala",
    "KNNConfig",
    "MinAtarCNN",
    "Model",
    "NatureCNN",
    "NormImpala",
    "NormMLP",
    "NormMinAtarCNN",
    "NormNatureCNN",
    "Split",
    "TanhMLP",
    "batches",
    "binarize",
    "check_dataset",
    "default_encoder",
    "describe_encoder",
    "find_weights",
    "folds",
    "is_image",
    "load_dataset",
    "load_encoder",
    "make_augment",
    "make_backbone",
    "make_encoder",
    "quantize",
    "read_weights",
    "refuse_imports",
    "resolve_device",
    "space_from_json",
    "space_to_json",
    "write_weights",
]
