"""Architectures of other libraries, built tiny from their configs: nothing is downloaded.

The first are drawn with a fixed seed from all language models and image classifiers of
`transformers` whose configs take the values below. The others have a layer of a kind that once
went wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Loss = Callable[[nn.Module], Tensor]
Built = tuple[nn.Module, Loss]

_HIDDEN = "hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim dim"
_TWO = (
    "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads num_key_value_heads num_experts_per_tok"
)
_INNER = (
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner moe_intermediate_size "
    "hidden_dim"
)
_FOUR = "num_local_experts num_experts n_routed_experts state_size time_step_rank rotary_dim"
_LENGTHS = "max_position_embeddings n_positions max_source_positions max_target_positions"
_NONE = "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob"
_TINY: dict[str, Any] = {
    **dict.fromkeys(_HIDDEN.split(), 16),
    **dict.fromkeys(_TWO.split(), 2),
    **dict.fromkeys(_INNER.split(), 24),
    **dict.fromkeys(_FOUR.split(), 4),
    **dict.fromkeys(_LENGTHS.split(), 32),
    **dict.fromkeys(_NONE.split(), 0.0),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], 1),
    **dict.fromkeys(["head_dim", "d_kv", "patch_size", "num_mel_bins"], 8),
    "vocab_size": 64,
    "image_size": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}

CAUSAL = [
    "bart",
    "bert",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot-small",
    "diffllama",
    "exaone_moe",
    "flint",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "granitemoe_swa",
    "hrm_text",
    "hunyuan_v1_moe",
    "internlm3",
    "iquestcoder",
    "laguna",
    "lfm2",
    "llama",
    "mamba",
    "mbart",
    "minimax",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "olmo3",
    "olmo_hybrid",
    "opt",
    "phi3",
    "roberta",
    "roformer",
    "smollm3",
    "solar_open",
    "starcoder2",
    "whisper",
]
SEQUENCES = ["mt5", "seamless_m4t", "t5"]
MASKED = ["eurobert", "flaubert", "layoutlm", "longformer", "nomic_bert", "tapas"]


def _tokens() -> Tensor:
    return torch.arange(14).reshape(2, 7) % 50 + 5


def _from_labels(**given: Any) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(**given).loss
        return found

    return loss


def _built(auto: Any, kind: str) -> nn.Module:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]
    plain = config()
    known = vars(plain).keys() | getattr(plain, "attribute_map", {}).keys()
    tiny = config(**{name: value for name, value in _TINY.items() if name in known})
    model: nn.Module = auto.from_config(tiny)
    return model.train()


def causal(kind: str) -> Built:
    """A language model that predicts the next token."""
    from transformers import AutoModelForCausalLM

    ids = _tokens()
    return _built(AutoModelForCausalLM, kind), _from_labels(input_ids=ids, labels=ids)


def sequences(kind: str) -> Built:
    """One that reads a sequence and writes another."""
    from transformers import AutoModelForSeq2SeqLM

    ids = _tokens()
    loss = _from_labels(input_ids=ids, decoder_input_ids=ids, labels=ids)
    return _built(AutoModelForSeq2SeqLM, kind), loss


def masked(kind: str) -> Built:
    """One that fills in tokens."""
    from transformers import AutoModelForMaskedLM

    ids = _tokens()
    return _built(AutoModelForMaskedLM, kind), _from_labels(input_ids=ids, labels=ids)


def swin(kind: str) -> Built:
    """Windows of an image, folded into the batch."""
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4,
        num_labels=3,
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = transformers.SwinForImageClassification(config).train()
    return model, _from_labels(pixel_values=images, labels=torch.tensor([0, 1]))


def parakeet(kind: str) -> Built:
    """Speech; its head is a subclass of a convolution that is called with the channels last."""
    import transformers

    encoder = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 24, "subsampling_conv_channels": 8, "num_mel_bins": 16,
    }  # fmt: skip
    config = transformers.ParakeetCTCConfig(vocab_size=12, pad_token_id=11, encoder_config=encoder)
    sound = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    model = transformers.ParakeetForCTC(config).train()
    mask, labels = torch.ones(2, 64, dtype=torch.bool), torch.tensor([[1, 2], [3, 4]])
    return model, _from_labels(input_features=sound, attention_mask=mask, labels=labels)


IMAGES = [
    "coat_tiny",
    "convit_tiny",
    "convnext_atto",
    "deit_tiny_patch16_224",
    "densenet121",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_dw",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "ghostnet_100",
    "hardcorenas_a",
    "hgnetv2_b0",
    "lcnet_050",
    "levit_128s",
    "mambaout_femto",
    "maxvit_pico_rw_256",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "nf_resnet26",
    "pit_ti_224",
    "pvt_v2_b0",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m0_9",
    "resnest14d",
    "resnet10t",
    "rexnet_100",
    "shvit_s1",
    "starnet_s1",
    "swiftformer_xs",
    "tf_efficientnet_b0",
    "tf_mobilenetv3_small_075",
    "tiny_vit_5m_224",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
    "resnet18",
    "seresnet18",
    "skresnet18",
    "visformer_tiny",
]


def images(kind: str) -> Built:
    """A classifier of `timm`."""
    import timm

    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    try:
        model = timm.create_model(kind, num_classes=3, img_size=64)
    except TypeError:  # a convolutional network, which takes any size
        model = timm.create_model(kind, num_classes=3)

    def loss(model: nn.Module) -> Tensor:
        z = model(x)
        return cross_entropy(z[0] if isinstance(z, tuple) else z, y)

    return model.train(), loss
