"""The zoo's models of sound, and of pictures with text."""

from __future__ import annotations

from typing import Any

import torch
from models import images, tokens
from torch import Tensor
from zoo_base import ZooEntry, entry, text, wave
from zoo_text import OTHER_TEXT, SEQ2SEQ, SMALL
from zoo_vision import PATCHES

__all__ = ["AUDIO", "MULTIMODAL"]

SAMPLES, OTHER_SAMPLES = 1600, 1120
FRAMES, OTHER_FRAMES = 32, 24
MELS = 16

WAVE: dict[str, Any] = {
    **SMALL,
    "vocab_size": 32,
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 4, 4],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
}


def waves(name: str, model: str, note: str = "", **config: Any) -> ZooEntry:
    options = {**WAVE, **config}
    return entry(name, model, options, wave(SAMPLES), wave(OTHER_SAMPLES), "audio", note=note)


def spectrogram(batch: int, count: int = FRAMES) -> Tensor:
    """Smooth, with the mels last."""
    return images(batch, FRAMES, 1)[:, 0, :count, :MELS]


def frames(batch: int, ids: int = 8) -> dict[str, Any]:
    """A smooth spectrogram with the time last, and ids for the decoder."""
    smooth = images(batch, FRAMES, 1)[:, 0, :MELS]
    return {"input_features": smooth, "decoder_input_ids": tokens(batch, ids, 128, low=3)}


def padded_frames(batch: int, count: int = FRAMES) -> dict[str, Any]:
    """A spectrogram, its mask, and ids for the decoder."""
    kept = count - 8 * ((torch.arange(batch) + 1) % 3)
    return {
        "input_features": spectrogram(batch, count),
        "attention_mask": (torch.arange(count) < kept[:, None]).long(),
        "decoder_input_ids": tokens(batch, count // 4, 128, low=3),
    }


AUDIO = [
    waves("wav2vec2", "Wav2Vec2Model", "1-D convolutions; a parametrized weight norm"),
    waves(
        "wav2vec2_ctc",
        "Wav2Vec2ForCTC",
        "norms before, layer norms between convolutions",
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
    ),
    waves("hubert", "HubertModel"),
    waves("sew", "SEWModel", "pools the sequence, then widens it", squeeze_factor=2),
    waves(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerModel",
        "depthwise 1-D convolutions with batch norms; relative positions",
        conv_depthwise_kernel_size=7,
    ),
    waves(
        "wavlm",
        "WavLMModel",
        "a gated bias by distance",
        num_buckets=16,
        max_bucket_distance=32,
    ),
    entry(
        "whisper",
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 32,
        },
        frames,
        lambda batch: frames(batch, 5),  # of frames it takes one number
        "audio",
        gain=1.2,
        note="1-D convolutions, then an encoder-decoder",
    ),
    entry(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        {
            **SEQ2SEQ,
            "input_feat_per_channel": MELS,
            "conv_channels": 32,
            "max_source_positions": FRAMES,
            "max_target_positions": 32,
        },
        padded_frames,
        lambda batch: padded_frames(batch, OTHER_FRAMES),
        "audio",
        note="strided convolutions with gates; its mask shrinks with them",
    ),
    entry(
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        {
            **PATCHES,
            "max_length": FRAMES,
            "num_mel_bins": MELS,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        lambda batch: {"input_values": spectrogram(batch)},
        lambda batch: {"input_values": spectrogram(batch, OTHER_FRAMES)},
        "audio",
        note="overlapping patches",
    ),
    entry(
        "hifigan",
        "SpeechT5HifiGan",
        {
            "model_in_dim": MELS,
            "upsample_initial_channel": 32,
            "upsample_rates": [4, 2],
            "upsample_kernel_sizes": [8, 4],
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
        },
        lambda batch: {"spectrogram": spectrogram(batch)},
        lambda batch: {"spectrogram": spectrogram(batch, OTHER_FRAMES)},
        "audio",
        gain=1.0,
        note="a vocoder: transposed and dilated 1-D convolutions, a waveform out",
    ),
]

_TEXT = {**SMALL, "projection_dim": 16}
_VISION = {**PATCHES, "projection_dim": 16}


def _captioned(batch: int) -> dict[str, Any]:
    return {**text(batch), "pixel_values": images(batch, 32)}


def _other_captioned(batch: int) -> dict[str, Any]:
    return {**OTHER_TEXT(batch), "pixel_values": images(batch, 32)}


MULTIMODAL = [
    entry(
        "clip",
        "CLIPModel",
        {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 16},
        _captioned,
        _other_captioned,
        "multimodal",
        note="logits of every picture with every text: (batch, batch)",
    ),
    entry(
        "siglip",
        "SiglipModel",
        {
            "text_config": {**_TEXT, "max_position_embeddings": 16, "projection_size": 32},
            "vision_config": _VISION,
        },
        _captioned,
        _other_captioned,
        "multimodal",
        note="nn.MultiheadAttention pools the picture",
    ),
    entry(
        "blip",
        "BlipForImageTextRetrieval",
        {
            "text_config": {**_TEXT, "encoder_hidden_size": 32},
            "vision_config": _VISION,
            "image_text_hidden_size": 16,
        },
        _captioned,
        _other_captioned,
        "multimodal",
        note="the text attends to the picture; fused qkv",
    ),
]
