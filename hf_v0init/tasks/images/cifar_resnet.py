"""transformers' ResNet with the stem for small images: a 3x3 convolution of stride 1 and no pooling.

It is the usual ResNet for CIFAR (He et al., 2016, as ResNet-18/34 are adapted to 32x32): an image keeps its size up to the
second stage. Importing this file makes it known to `AutoConfig` and `AutoModelForImageClassification`. It is saved with the
model, so others load it from the Hub with `trust_remote_code=True`; it therefore imports nothing of this package.
"""

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class CifarResNetConfig(ResNetConfig):
    """As `ResNetConfig`; `embedding_size` is the channels of the 3x3 stem."""

    model_type = "cifar_resnet"


class CifarResNetForImageClassification(ResNetForImageClassification):
    """As `ResNetForImageClassification`, with the stem for small images."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, activation=config.hidden_act
        )
        stem.pooler = nn.Identity()
        self.post_init()  # draws the new stem's weights as those of the other convolutions


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
