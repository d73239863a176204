"""What a network says of a pixel: probabilities of its levels, and how a level is drawn from them.

`Softmax`: van den Oord, Kalchbrenner and Kavukcuoglu 2016 (arXiv:1601.06759, section 2). `LogisticMixture`:
Salimans et al. 2017 (arXiv:1701.05517, section 2.1 and 2.2), its logarithm without their approximation.

Values are levels 0 to `levels` - 1, int64 (B, C, H, W); a network sees them as `scale` makes them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .likelihood import LEAST_LOG_SCALE, discretized_logistic_log_prob


class Softmax:
    """A probability for each level of each channel; the network sees the channels before it."""

    def __init__(self, channels: int, levels: int):
        self.channels, self.levels = channels, levels
        self.groups = channels
        """Into how many parts the network divides its features, so that each channel sees those before it."""
        self.parameters = channels * levels
        """Numbers that a network gives for each pixel."""

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """(B, `parameters`, H, W), (B, C, H, W) int64 -> nats of each value (B, C, H, W)."""
        logits = parameters.unflatten(1, (self.channels, self.levels)).transpose(1, 2)  # (B, L, C, H, W)
        return -F.cross_entropy(logits, values, reduction="none")

    def cdf(self, parameters: Tensor, channel: int, before: Tensor, temperature: float = 1.0) -> Tensor:
        """Of one pixel (n, `parameters`): the chance of at most each level but the last, (n, levels - 1).

        `before` (n, C) are the pixel's values as the network sees them; those of earlier channels count.
        """
        logits = parameters[:, channel * self.levels : (channel + 1) * self.levels]
        if temperature != 1:
            logits = logits / temperature
        return logits.softmax(1).cumsum(1)[:, :-1]


class LogisticMixture:
    """A mixture of logistic densities, integrated over each level; the end levels take the tails.

    Of colour images the means of later channels are linear in earlier ones, and all channels share a
    component.
    """

    groups = 1

    def __init__(self, channels: int, levels: int, components: int):
        self.channels, self.levels, self.components = channels, levels, components
        self.pairs = channels * (channels - 1) // 2
        self.parameters = components * (1 + 2 * channels + self.pairs)

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """(B, `parameters`, H, W) float32 or float64, (B, C, H, W) int64 -> nats of each value (B, C, H, W).

        Of channel c: ln p(x_c | x_<c), so that the sum over channels is the pixel's. Raises TypeError for
        half precision, in which neighbouring levels are one.
        """
        if parameters.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"parameters must be float32 or float64, got {parameters.dtype}")
        scaled = scale(values, self.levels, parameters.dtype)
        weights, *channels = self.split(parameters)
        total, maps = weights, []
        for channel, (mean, log_scale, factors) in enumerate(channels):
            mean = shifted(mean, factors, scaled)
            log_prob = self.log_levels(mean, log_scale, values[:, channel : channel + 1])
            before, total = total, total + log_prob  # log w_k p_k(x_1..c), (B, K, H, W)
            maps.append(total.logsumexp(1) - before.logsumexp(1))
        return torch.stack(maps, 1)

    def log_levels(self, mean: Tensor, log_scale: Tensor, values: Tensor) -> Tensor:
        """ln of a logistic's mass on levels (B, 1, H, W), of each component (B, K, H, W)."""
        scaled = scale(values, self.levels, mean.dtype)
        return discretized_logistic_log_prob(mean, log_scale, scaled, self.levels - 1)

    def cdf(self, parameters: Tensor, channel: int, before: Tensor, temperature: float = 1.0) -> Tensor:
        """As `Softmax.cdf`. A temperature divides the logits of the components and multiplies the scales."""
        weights, *channels = self.split(parameters[..., None, None])
        before = before[..., None, None]
        if temperature != 1:
            weights = (weights / temperature).log_softmax(1)
        for earlier, (mean, log_scale, factors) in enumerate(channels[: channel + 1]):
            mean, log_scale = shifted(mean, factors, before), log_scale + math.log(temperature)
            if earlier < channel:  # which component drew it
                values = unscale(before[:, earlier : earlier + 1], self.levels)
                weights = weights + self.log_levels(mean, log_scale, values)
        edges = torch.arange(self.levels - 1, dtype=mean.dtype, device=mean.device)
        edges = (2 * edges + 1) / (self.levels - 1) - 1
        below = torch.sigmoid((edges - mean.flatten(2)) * torch.exp(-log_scale.flatten(2)))  # (n, K, L - 1)
        return (weights.flatten(1).softmax(1).unsqueeze(1) @ below).squeeze(1)

    def split(self, parameters: Tensor) -> list:
        """Log weights (B, K, H, W), then of each channel its mean, log scale and factors, all alike."""
        parts = list(parameters.unflatten(1, (-1, self.components)).unbind(1))
        weights, means = parts[0].log_softmax(1), parts[1 : 1 + self.channels]
        log_scales = parts[1 + self.channels : 1 + 2 * self.channels]
        factors = parts[1 + 2 * self.channels :]
        result: list = [weights]
        for channel, (mean, log_scale) in enumerate(zip(means, log_scales)):
            start = channel * (channel - 1) // 2
            mine = [torch.tanh(factor) for factor in factors[start : start + channel]]
            result.append((mean, log_scale.clamp(min=LEAST_LOG_SCALE), mine))
        return result


Likelihood = Softmax | LogisticMixture


def shifted(mean: Tensor, factors: list[Tensor], scaled: Tensor) -> Tensor:
    """A channel's means (B, K, H, W) with earlier channels' share in them."""
    for earlier, factor in enumerate(factors):
        mean = mean + factor * scaled[:, earlier : earlier + 1]
    return mean


def scale(values: Tensor, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels 0 to levels - 1 as numbers in [-1, 1]."""
    return values.to(dtype) * (2 / (levels - 1)) - 1


def unscale(scaled: Tensor, levels: int) -> Tensor:
    """The inverse of `scale`: int64."""
    return ((scaled + 1) * ((levels - 1) / 2)).round().to(torch.int64)
