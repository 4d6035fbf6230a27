"""Encoders of other projects, with weights that are not the initial ones."""

import pytest
import torch
import torchvision
from torch import nn


@pytest.fixture
def shaken():
    """`shaken(model)`: parameters and running statistics away from where they start; eval mode."""

    @torch.no_grad()
    def shake(model):
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.mul_(1 + torch.rand(value.shape))
            elif value.is_floating_point():
                value.add_(0.05 * torch.randn(value.shape))
        return model.eval()

    return shake


@pytest.fixture
def resnet18(shaken):
    """A torchvision ResNet without its classifier, in eval mode; with a 3x3 stem on request."""

    def make(padding=None, name="resnet18"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name)
        model.fc = nn.Identity()
        if padding is not None:
            model.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
            model.maxpool = nn.Identity()
        return shaken(model)

    return make
