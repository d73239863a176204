"""Models that make images: their contract, likelihoods, decoders, and one file for each kind."""

from .autoencoder import Autoencoder, AutoencoderConfig
from .decoder import make_decoder
from .gan import GAN, GANConfig
from .image_transformer import ImageTransformer, ImageTransformerConfig
from .likelihood import LIKELIHOODS, bits_per_dim, discretized_logistic_log_prob, independent_pixels
from .model import Generative, Learner, Moment
from .pixelcnn import PixelCNN, PixelCNNConfig
from .pixelrnn import PixelRNN, PixelRNNConfig
from .vae import VAE, VAEConfig
from .world_model import WorldModel, WorldModelConfig

__all__ = [
    "GAN",
    "LIKELIHOODS",
    "VAE",
    "Autoencoder",
    "AutoencoderConfig",
    "GANConfig",
    "Generative",
    "ImageTransformer",
    "ImageTransformerConfig",
    "Learner",
    "Moment",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelRNN",
    "PixelRNNConfig",
    "VAEConfig",
    "WorldModel",
    "WorldModelConfig",
    "bits_per_dim",
    "discretized_logistic_log_prob",
    "independent_pixels",
    "make_decoder",
]
