"""The zoo's text models: encoders, decoders, encoder-decoders."""

from __future__ import annotations

from functools import partial
from typing import Any

from zoo_base import OTHER_LENGTH, ZooEntry, entry, text, text_to_text

__all__ = ["OTHER_TEXT", "SEQ2SEQ", "SMALL", "TEXT"]

OTHER_TEXT = partial(text, length=OTHER_LENGTH)
OTHER_TEXT_TO_TEXT = partial(text_to_text, length=OTHER_LENGTH)

TOKENS: dict[str, Any] = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.14,  # for weights outside linears and convolutions
}

SMALL: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}

LAYER = {"num_hidden_layers": 1}
"""Two layers capture, export and compile twice as long; a few architectures show that they work."""
TWO_LAYERS = {"num_hidden_layers": 2}

SEQ2SEQ: dict[str, Any] = {
    **TOKENS,
    "init_std": 0.14,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
    "use_cache": False,
}


def encoder(name: str, model: str, note: str = "", **config: Any) -> ZooEntry:
    options = {**SMALL, **LAYER, **config}
    return entry(name, model, options, text, OTHER_TEXT, "text", note=note)


def decoder(name: str, model: str, note: str = "", **config: Any) -> ZooEntry:
    options = {**SMALL, **LAYER, "use_cache": False, **config}
    return entry(name, model, options, text, OTHER_TEXT, "text", note=note)


def seq2seq(name: str, model: str, note: str = "", **config: Any) -> ZooEntry:
    return entry(
        name, model, {**SEQ2SEQ, **config}, text_to_text, OTHER_TEXT_TO_TEXT, "text", note=note
    )


ENCODERS = [
    encoder("bert", "BertModel", **TWO_LAYERS),
    encoder("bert_eager", "BertModel", "matmul and softmax", attn_implementation="eager"),
    encoder("bert_classifier", "BertForSequenceClassification", num_labels=5),
    encoder("roberta", "RobertaForMaskedLM", "positions counted from the padding, tied head"),
    encoder("distilbert", "DistilBertModel", dim=32, hidden_dim=64, n_heads=4),
    encoder("electra", "ElectraForPreTraining", "a logit for each token", embedding_size=16),
    encoder(
        "albert",
        "AlbertModel",
        "one layer's weights, called three times",
        embedding_size=16,
        num_hidden_layers=3,
    ),
    encoder(
        "deberta",
        "DebertaModel",
        "relative positions, gathered from products of activations",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    ),
    encoder(
        "deberta_v2",
        "DebertaV2Model",
        "as deberta, with logarithmic buckets and shared keys",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
    ),
    encoder(
        "mobilebert",
        "MobileBertModel",
        "bottlenecks; norms that are only a scale and a shift",
        embedding_size=16,
        intra_bottleneck_size=16,
        num_feedforward_networks=2,
    ),
    encoder(
        "squeezebert", "SqueezeBertModel", "grouped 1-D convolutions for linears", embedding_size=32
    ),
    encoder("mpnet", "MPNetModel", "a learnt bias by distance"),
    entry(
        "funnel",
        "FunnelModel",
        {
            **TOKENS,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
        },
        text,
        OTHER_TEXT,
        "text",
        note="pools the sequence, then repeats it",
    ),
    encoder("convbert", "ConvBertModel", "convolution kernels from the input", embedding_size=32),
    encoder("roformer", "RoFormerModel", "rotary positions", embedding_size=32),
    encoder(
        "modernbert",
        "ModernBertModel",
        "a full and a local layer, gated feed-forward",
        **TWO_LAYERS,
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
    ),
    entry(
        "fnet",
        "FNetModel",
        SMALL,
        lambda batch: {"input_ids": text(batch)["input_ids"]},
        lambda batch: {"input_ids": OTHER_TEXT(batch)["input_ids"]},
        "text",
        note="a Fourier transform mixes the tokens; no mask",
    ),
]

DECODERS = [
    decoder("gpt2", "GPT2LMHeadModel", "Conv1D: addmm, weights (in, out); tied head", **TWO_LAYERS),
    decoder("gpt2_cache", "GPT2LMHeadModel", "returns a cache object", use_cache=True),
    decoder(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "attention unscaled, global then local",
        **TWO_LAYERS,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        window_size=8,
    ),
    decoder("gpt_neox", "GPTNeoXForCausalLM", "fused qkv, parallel residual, partly rotary"),
    decoder("gptj", "GPTJForCausalLM", "interleaved rotary", n_positions=32, rotary_dim=4),
    decoder(
        "opt", "OPTForCausalLM", "ReLU; positions from the mask", ffn_dim=64, word_embed_proj_dim=32
    ),
    decoder("llama", "LlamaForCausalLM", "RMSNorm, rotary, gated", num_key_value_heads=2),
    decoder(
        "llama_cache",
        "LlamaForCausalLM",
        "returns a cache object",
        num_key_value_heads=2,
        use_cache=True,
        **TWO_LAYERS,
    ),
    decoder(
        "mistral", "MistralForCausalLM", "sliding window", num_key_value_heads=2, sliding_window=8
    ),
    decoder("qwen2", "Qwen2ForCausalLM", "biased qkv", num_key_value_heads=2),
    decoder("qwen3", "Qwen3ForCausalLM", "normed q and k", num_key_value_heads=2, head_dim=8),
    decoder("phi", "PhiForCausalLM", "parallel attention and feed-forward"),
    decoder("phi3", "Phi3ForCausalLM", "fused qkv and gate", num_key_value_heads=2),
    decoder("gemma", "GemmaForCausalLM", "norms of 1 + weight", num_key_value_heads=1, head_dim=8),
    decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        "soft caps by tanh, four norms a layer",
        **TWO_LAYERS,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
    ),
    decoder("bloom", "BloomForCausalLM", "ALiBi by baddbmm", n_head=4),
    decoder("falcon", "FalconForCausalLM", "one key and value head", ffn_hidden_size=64),
    decoder("mpt", "MptForCausalLM", "ALiBi, no bias", d_model=32, n_heads=4, max_seq_len=32),
    decoder(
        "mixtral",
        "MixtralForCausalLM",
        "experts chosen by the data, weights in one 3-D parameter",
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
]

ENCODER_DECODERS = [
    entry(
        "t5",
        "T5ForConditionalGeneration",
        {
            **TOKENS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "use_cache": False,
        },
        text_to_text,
        OTHER_TEXT_TO_TEXT,
        "text",
        note="scores unscaled, a learnt bias by distance",
    ),
    seq2seq("bart", "BartModel"),
    seq2seq("bart_cache", "BartModel", "returns a cache object", use_cache=True),
    seq2seq("marian", "MarianMTModel", "sinusoidal positions, tied head and a buffer for bias"),
    seq2seq("pegasus", "PegasusForConditionalGeneration", "norms before, positions sinusoidal"),
]

TEXT = [*ENCODERS, *DECODERS, *ENCODER_DECODERS]
