"""Log-mel features of sound, as Whisper takes them. NumPy only.

Source: Radford et al. 2022, arXiv:2212.04356, section 2.2; the mel scale is Slaney's (Auditory
Toolbox, 1998): linear below 1000 Hz, logarithmic above.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mmopt_kernels.errors import InputError

Floats = npt.NDArray[np.float32]

# Slaney's scale: 3 mel for 200 Hz up to 1000 Hz, then 27 for each factor of 6.4.
_LINEAR = 200 / 3
_EDGE_HZ = 1000.0
_EDGE_MEL = _EDGE_HZ / _LINEAR
_STEP = np.log(6.4) / 27
_MOST_HZ = 8000.0
# Powers below it are silence, and what is 8 decades under the loudest is raised to there.
_FLOOR = 1e-10
_DECADES = 8.0


def log_mel(sounds: Sequence[Floats], constants: Mapping[str, Any]) -> Floats:
    """`input_features`, float32 `[B, bins, frames]`, of windows of one length.

    Args:
        sounds: samples `[n]` in [-1, 1]; shorter ones are filled with silence.
        constants: `manifest.preprocessing["audio"]`: `sampling_rate`, `bins`, `fft` (samples of a
            frame), `hop` (samples between frames) and `window` (samples of a sound).

    Raises:
        InputError: no sound, one that is longer than the window, or one that is not finite.
    """
    if not sounds:
        raise InputError("no sounds were given, expected at least one.")
    size, hop, length = constants["fft"], constants["hop"], constants["window"]
    filters = mel_filters(constants["bins"], size, constants["sampling_rate"])
    # Periodic: its first sample would be the one after its last.
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    features = np.empty((len(sounds), constants["bins"], length // hop), dtype=np.float32)
    for index, sound in enumerate(sounds):
        if sound.ndim != 1 or len(sound) > length:
            raise InputError(
                f"sound {index} has the shape {sound.shape}, expected at most {length} samples."
            )
        if not np.isfinite(sound).all():
            raise InputError(f"sound {index} holds NaN or Inf, expected samples in [-1, 1].")
        filled = np.zeros(length, dtype=np.float64)
        filled[: len(sound)] = sound
        around = np.pad(filled, size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(around, size)[::hop][: length // hop]
        power = np.abs(np.fft.rfft(frames * shape, axis=1)) ** 2
        decades = np.log10(np.maximum(power @ filters, _FLOOR)).T
        features[index] = (np.maximum(decades, decades.max() - _DECADES) + 4.0) / 4.0
    return features


@lru_cache(maxsize=4)
def mel_filters(bins: int, size: int, sampling_rate: int) -> npt.NDArray[np.float64]:
    """Triangles over the spectrum, `[size // 2 + 1, bins]`, each of area 1 in Hz."""
    edges = _to_hz(np.linspace(0.0, _to_mel(min(_MOST_HZ, sampling_rate / 2)), bins + 2))
    heard = np.linspace(0, sampling_rate / 2, size // 2 + 1)
    rising = (heard[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - heard[:, None]) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters: npt.NDArray[np.float64] = triangles * (2.0 / (edges[2:] - edges[:-2]))
    return filters


def _to_mel(hz: float) -> float:
    return hz / _LINEAR if hz < _EDGE_HZ else float(_EDGE_MEL + np.log(hz / _EDGE_HZ) / _STEP)


def _to_hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    above = _EDGE_HZ * np.exp(_STEP * (mel - _EDGE_MEL))
    hz: npt.NDArray[np.float64] = np.where(mel < _EDGE_MEL, mel * _LINEAR, above)
    return hz
