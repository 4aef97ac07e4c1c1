"""ScatNet: the wavelet scattering transform, by kymatio."""

from torch import Tensor, nn


class Scattering(nn.Module):
    """Scattering coefficients of each colour channel, J = 2 scales and L = 8 angles (81 maps at a quarter of the side).

    Source: Bruna and Mallat, "Invariant scattering convolution networks" (2013); Andreux et al., "Kymatio" (2020).

    Args:
        size: side of the square images, in pixels.
    """

    J = 2
    L = 8

    def __init__(self, size: int):
        super().__init__()
        from kymatio.torch import Scattering2D  # here: it brings scipy along, which all others can do without

        self.size = size
        self.transform = Scattering2D(J=self.J, L=self.L, shape=(size, size))

    def __repr__(self) -> str:
        return f"Scattering(J={self.J}, L={self.L}, size={self.size})"

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, size, size] in [0, 1] -> [B, 3 * 81 * (size / 4)^2] float32."""
        self.transform.to(images.device)
        coefficients: Tensor = self.transform(images.contiguous())
        return coefficients.flatten(1)
