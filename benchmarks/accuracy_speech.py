"""Speech that espeak-ng says: sentences of docstrings, by many voices."""

from __future__ import annotations

import io
import random
import re
import shutil
import subprocess
import wave

import numpy as np
import torch
from accuracy_task import OUT
from minilm_data import load_pairs
from torch import Tensor
from tqdm import tqdm

__all__ = ["RATE", "sentences", "speech"]

RATE = 16000
"""Samples a second."""


def sentences(count: int) -> list[str]:
    """Beginnings of docstrings, words alone, 6 to 14 of them."""
    found = []
    for pair in load_pairs().held_out:
        words = re.findall(r"[A-Za-z]{2,12}", pair.body)[:14]
        if len(words) >= 6:
            found.append(" ".join(words))
    random.Random(0).shuffle(found)
    return found[:count]


def speech(voices: list[str], each: int, seed: int) -> list[list[Tensor]]:
    """Utterances of each voice, ``[samples]`` in -1 to 1; no sentence is said twice.

    Args:
        voices: espeak-ng's variants.
        each: utterances of a voice, each of another speed and pitch.
        seed: of what is said, and of the speeds.

    Raises:
        SystemExit: espeak-ng is not installed.
    """
    file = OUT / "speech" / f"{'-'.join(voices)[:80]} {len(voices)} {each} {seed}.pt"
    if file.is_file():
        return list(torch.load(file, weights_only=True))
    if shutil.which("espeak-ng") is None:
        raise SystemExit("no espeak-ng, which says the sentences: apt-get install espeak-ng")
    texts, mixer = iter(sentences(len(voices) * each)), random.Random(seed)
    made = [
        [_said(next(texts), voice, mixer) for _ in range(each)]
        for voice in tqdm(voices, desc="speaking", unit="voice")
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, file)
    return made


def _said(text: str, voice: str, mixer: random.Random) -> Tensor:
    from scipy.signal import resample_poly

    speed, pitch = mixer.randint(140, 190), mixer.randint(40, 60)
    command = ["espeak-ng", "-v", f"en-us+{voice}", "-s", str(speed), "-p", str(pitch), "--stdout"]
    done = subprocess.run([*command, text], capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as sound:
        rate = sound.getframerate()
    samples = np.frombuffer(done.stdout[44:], np.int16) / 32768.0  # its header has no length
    return torch.from_numpy(resample_poly(samples, RATE, rate)).float()
