"""Small models of the constructs that torchvision's and timm's are made of."""

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 3


class BasicBlock(nn.Module):
    """ResNet: activations in place, and a sum in place."""

    def __init__(self, cin, cout, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = norm(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = norm(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, cin=1, width=4, norm=nn.BatchNorm2d, classes=CLASSES):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, padding=1, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(width, width, norm=norm)
        self.layer2 = BasicBlock(width, 2 * width, 2, norm=norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(scale), inplace=True)), inplace=True)


class StochasticDepth(nn.Module):
    """Drops whole samples of a branch. The masks that it draws can be kept and played again, a row at a time."""

    def __init__(self, p):
        super().__init__()
        self.p, self.masks, self.row = p, [], None

    def forward(self, x):
        if self.row is not None:
            return x * self.masks[0][self.row]
        if not self.training or self.p == 0:
            return x
        mask = torch.empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.p).div_(1 - self.p)
        self.masks = [mask]
        return x * mask


class MobileNet(nn.Module):
    """Depthwise convolutions, squeeze and excitation, stochastic depth."""

    def __init__(self, cin=1, width=8, norm=nn.BatchNorm2d, drop=0.0):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(cin, width, 3, 2, 1, bias=False), norm(width), nn.Hardswish(inplace=True)
        )
        self.expand = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), norm(2 * width), nn.ReLU6(True)
        )
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.depthwise_norm = norm(2 * width)
        self.excite = SqueezeExcite(2 * width, 4)
        self.project = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), norm(width))
        self.drop = StochasticDepth(drop)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        h = F.relu6(self.depthwise_norm(self.depthwise(self.expand(x))), inplace=True)
        x = x + self.drop(self.project(self.excite(h)))
        return self.fc(x.mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of an image, as ConvNeXt has it."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A scale for each channel that is a parameter of the block itself."""

    def __init__(self, width, drop=0.0):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        h = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        h = self.fc2(self.drop(F.gelu(self.fc1(h))))
        return x + (h * self.gamma).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, cin=1, width=8, drop=0.0):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(cin, width, 2, 2), LayerNorm2d(width))
        self.block = ConvNeXtBlock(width, drop)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.block(self.stem(x)).mean((2, 3))))


class ViT(nn.Module):
    """Tokens and positions that are parameters of the model itself; attention that is torch's."""

    def __init__(self, cin=1, width=8, dropout=0.0):
        super().__init__()
        self.patch = nn.Conv2d(cin, width, 3, 3)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 5, width))
        self.encoder = nn.TransformerEncoderLayer(width, 2, 16, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        return self.head(self.encoder(tokens)[:, 0])


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: a BatchNorm whose forward runs dropout and an activation as well."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def pretrain(model, steps=3, shape=(1, 6, 6)):
    """Give its BatchNorms statistics and affine parameters that are no longer those of the start."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=g))
                module.bias.copy_(0.5 * torch.randn(module.num_features, generator=g))
        for _ in range(steps):
            model.train()(torch.randn(32, *shape, generator=g) * 2 + 0.5)
    return model
