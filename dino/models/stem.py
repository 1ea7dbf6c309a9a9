"""A small convolutional stem for a ViT (Xiao et al. 2021, "Early convolutions help transformers see better")."""

from torch import Tensor, nn

from dino.models.layers import check_images


class ConvStem(nn.Module):
    """3×3 convolutions of stride 2, each with GroupNorm and GELU, then a projection to the width.

    A patch of 8 takes three, of width/8, width/4 and width/2 channels (rounded up to whole groups of 8), and a 1×1
    projection. Where the patch is no power of two, the projection strides over the odd factor that remains: one
    convolution and 7×7 for a patch of 14.

    A token sees a little of the patches next to its own (7 pixels around a patch of 8), so that a masked patch shows at
    the edges of its neighbours: mask tokens replace what comes out of here. What is predicted from masked patches
    (iBOT) is then somewhat easier than with `PatchEmbed`.

    Weights begin as PyTorch draws them, by fan-in; the norms take the scale of all but the projection's away.

    Raises:
        ValueError: an odd patch size, which no stride of 2 reaches.
    """

    num_patches: int  # of an image of the size that the model is for

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if patch_size % 2:
            raise ValueError(f"a convolutional stem halves its images: patch_size {patch_size} is odd")
        self.patch_size, self.in_chans = patch_size, in_chans
        halvings = (patch_size & -patch_size).bit_length() - 1  # twos in the patch size
        layers: list[nn.Module] = []
        before = in_chans
        for halving in reversed(range(halvings)):
            after = -(-embed_dim // (2 * 2**halving * 8)) * 8
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU()]
            before = after
        self.layers = nn.Sequential(*layers)
        rest = patch_size >> halvings
        self.proj = nn.Conv2d(before, embed_dim, rest, stride=rest)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D).

        Raises:
            ValueError: height or width is not a multiple of the patch size, or the channels differ.
        """
        check_images(images, self.patch_size, self.in_chans)
        return self.proj(self.layers(images)).flatten(2).mT
