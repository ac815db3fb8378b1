"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pointillist.metrics import compare, psnr, ssim

rng = np.random.default_rng()


@pytest.mark.parametrize("size", [(11 + 1, 40), (33, 57)])
@pytest.mark.parametrize("noise", [0.01, 0.2])
def test_against_scikit_image(size, noise):
    a = rng.random((*size, 3)).astype(np.float32)
    b = np.clip(a + noise * rng.standard_normal(a.shape), 0, 1).astype(np.float32)
    assert psnr(a, b) == pytest.approx(
        peak_signal_noise_ratio(a.astype(float), b.astype(float), data_range=1), abs=1e-6
    )
    expected = structural_similarity(
        a.astype(float), b.astype(float), data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)


def test_mean_over_frames_and_cap():
    a = rng.random((3, 16, 16, 3))
    b = a.copy()
    b[1] = np.clip(b[1] + 0.1, 0, 1)
    result = compare(a, b)
    assert result.psnr_per_frame[0] == 100.0 and result.psnr_per_frame[1] < 30
    assert result.psnr == pytest.approx(np.mean(result.psnr_per_frame))
    assert not result.identical and compare(a, a).identical and compare(a, a).ssim == pytest.approx(1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\) and \(3, 16, 16, 3\)"):
        compare(np.zeros((2, 16, 16, 3)), np.zeros((3, 16, 16, 3)))
    with pytest.raises(ValueError, match="not finite"):
        compare(np.full((1, 16, 16, 3), np.nan), np.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match="larger than 10 pixels"):
        ssim(np.zeros((10, 20, 3)), np.zeros((10, 20, 3)))
