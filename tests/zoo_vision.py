"""The zoo's vision models: convolutional, transformers, and between."""

from __future__ import annotations

from typing import Any

from models import normal
from zoo_base import ZooEntry, entry, pixels

__all__ = ["PATCHES", "VISION"]

OTHER_SIZE = 48

PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}


def conv_net(
    name: str,
    model: str,
    note: str = "",
    *,
    size: int = 32,
    other: int = OTHER_SIZE,
    shift: float = 0.0,
    **config: Any,
) -> ZooEntry:
    """With a gain that makes up for what a rectifier takes."""
    options, sizes = {"num_labels": 10, **config}, (pixels(size), pixels(other))
    return entry(name, model, options, *sizes, "vision", gain=1.3, shift=shift, note=note)


def patch_net(name: str, model: str, note: str = "", *, size: int = 32, **config: Any) -> ZooEntry:
    options, sizes = {**PATCHES, **config}, (pixels(size), pixels(OTHER_SIZE))
    return entry(name, model, options, *sizes, "vision", note=note)


def staged_net(
    name: str,
    model: str,
    note: str = "",
    *,
    size: int = 32,
    other: int = OTHER_SIZE,
    shift: float = 0.0,
    **config: Any,
) -> ZooEntry:
    options = {"num_labels": 10, "image_size": size, **config}
    sizes = (pixels(size), pixels(other))
    return entry(name, model, options, *sizes, "vision", shift=shift, note=note)


CONVOLUTIONAL = [
    conv_net(
        "resnet",
        "ResNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 2, 1],
        layer_type="basic",
    ),
    conv_net(
        "resnet_bottleneck",
        "ResNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 1],
    ),
    conv_net(
        "regnet",
        "RegNetForImageClassification",
        "grouped, with squeeze and excite",
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 2],
        groups_width=8,
    ),
    conv_net(
        "mobilenet_v1",
        "MobileNetV1ForImageClassification",
        "depthwise",
        size=64,
        other=32,
        shift=0.75,
        depth_multiplier=0.25,
    ),
    conv_net(
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        "depthwise, inverted residuals",
        size=64,
        shift=0.75,
        depth_multiplier=0.35,
    ),
    conv_net(
        "efficientnet",
        "EfficientNetForImageClassification",
        "depthwise, swish, squeeze and excite",
        size=64,
        image_size=64,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        kernel_sizes=[3, 5, 3],
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 32],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 4, 4],
        hidden_dim=1280,
    ),
    conv_net(
        "bit",
        "BitForImageClassification",
        "weight-standardized convolutions, group norms",
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 2],
        num_groups=4,
    ),
    conv_net(
        "convnext",
        "ConvNextForImageClassification",
        "depthwise 7x7, norms over channels, layer scale",
        hidden_sizes=[16, 32],
        depths=[1, 2],
        num_stages=2,
        layer_scale_init_value=0.5,
    ),
    conv_net(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        "global response normalization",
        hidden_sizes=[16, 32],
        depths=[1, 2],
        num_stages=2,
    ),
    conv_net(
        "poolformer",
        "PoolFormerForImageClassification",
        "average pools in place of attention",
        size=64,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
        num_encoder_blocks=2,
        layer_scale_init_value=0.5,
    ),
    conv_net(
        "focalnet",
        "FocalNetForImageClassification",
        "gated depthwise contexts",
        image_size=32,
        embed_dim=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
]

TRANSFORMERS = [
    patch_net("vit", "ViTForImageClassification", num_hidden_layers=2),
    patch_net("deit", "DeiTForImageClassificationWithTeacher", "two class tokens, two heads"),
    patch_net(
        "beit",
        "BeitForImageClassification",
        "a learnt bias by distance, layer scale",
        use_relative_position_bias=True,
        layer_scale_init_value=0.5,
    ),
    patch_net("dinov2", "Dinov2ForImageClassification", "layer scale", mlp_ratio=2),
    patch_net(
        "dinov2_swiglu",
        "Dinov2ForImageClassification",
        "gated feed-forward",
        mlp_ratio=2,
        use_swiglu_ffn=True,
    ),
    patch_net(
        "yolos",
        "YolosForObjectDetection",
        "logits and boxes for each query",
        image_size=[32, 32],
        num_detection_tokens=5,
        num_hidden_layers=2,
    ),
    entry(
        "vit_mae",
        "ViTMAEModel",
        PATCHES,
        lambda batch: {**pixels(32)(batch), "noise": normal(batch, 16)},
        lambda batch: {**pixels(OTHER_SIZE)(batch), "noise": normal(batch, 36)},
        "vision",
        note="keeps the patches that `noise` ranks first",
    ),
    staged_net(
        "swin",
        "SwinForImageClassification",
        "shifted windows",
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        patch_size=2,
    ),
    staged_net(
        "swinv2",
        "Swinv2ForImageClassification",
        "cosine attention, a bias from a small network",
        embed_dim=16,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        patch_size=2,
    ),
    staged_net(
        "segformer",
        "SegformerForSemanticSegmentation",
        "a map of logits; keys and values on a coarser grid",
        size=64,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    ),
    staged_net(
        "pvt_v2",
        "PvtV2ForImageClassification",
        "depthwise in the feed-forward",
        size=64,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    ),
    staged_net(
        "mobilevit",
        "MobileViTForImageClassification",
        "unfolds to patches between convolutions",
        size=64,
        shift=0.75,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
    ),
    staged_net(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        "linear attention in 1x1 convolutions",
        size=64,
        other=96,
        shift=1.0,
        width_multiplier=0.125,
        n_attn_blocks=[1, 1, 1],
        base_attn_unit_dims=[128, 128, 256],
    ),
    staged_net(
        "levit",
        "LevitForImageClassification",
        "linears with batch norms, hardswish",
        size=64,
        shift=1.75,
        hidden_sizes=[32, 48],
        num_attention_heads=[2, 3],
        depths=[1, 1],
        key_dim=[8, 8],
        mlp_ratio=[2, 2],
        attention_ratio=[2, 2],
        down_ops=[["Subsample", 8, 4, 2, 2, 2]],
    ),
    staged_net(
        "cvt",
        "CvtForImageClassification",
        "depthwise projections to q, k and v",
        embed_dim=[16, 32],
        num_heads=[1, 2],
        depth=[1, 2],
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    ),
]

VISION = [*CONVOLUTIONAL, *TRANSFORMERS]
