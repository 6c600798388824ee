"""Models of `transformers`, each built from a small config: nothing is downloaded."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from watched import check_model, check_rows, layers

from singd_torch import SINGD
from singd_torch.step.curvatures import curvature as curvature_of

transformers = pytest.importorskip("transformers")

ENTRIES, LENGTH, CLASSES = 32, 12, 5
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokens() -> Tensor:
    return torch.randint(ENTRIES, (4, LENGTH), generator=torch.Generator().manual_seed(1))


def next_token(model: nn.Module) -> Tensor:
    """transformers shifts the labels itself; the mean is over the batch and the sequence."""
    return model(input_ids=tokens(), labels=tokens(), use_cache=False).loss


def gpt2(**given: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=ENTRIES, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **NO_TOKENS, **given,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_trains_with_conv1d_and_a_tied_head_preconditioned() -> None:
    model = gpt2()
    optimizer = check_model(model, next_token, 10, loss_average="batch+sequence")
    block = model.transformer.h[0]
    assert type(block.attn.c_attn).__name__ == "Conv1D"
    owned = {layer.weight for layer in layers(optimizer)}
    assert {block.attn.c_attn.weight, block.mlp.c_proj.weight, model.lm_head.weight} <= owned
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gpt2_with_activation_checkpointing_gives_the_same_rows() -> None:
    model = gpt2().double()
    model.activation_checkpointing_enable({"use_reentrant": False})
    check_rows(model.train(), next_token, loss_average="batch+sequence")


def test_gpt2_under_bfloat16_autocast_trains() -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.dtype == torch.float32):
            return next_token(model)

    check_model(gpt2(), loss, 10, loss_average="batch+sequence")


def test_llama_trains() -> None:
    config = transformers.LlamaConfig(
        vocab_size=ENTRIES, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=LENGTH, **SMALL, **NO_TOKENS,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    check_model(model, next_token, 16, loss_average="batch+sequence")


def test_vit_trains() -> None:
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, num_attention_heads=2, num_labels=CLASSES,
        **SMALL, **NO_DROPOUT,
    )  # fmt: skip
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(CLASSES, (4,))

    def loss(model: nn.Module) -> Tensor:
        return model(pixel_values=images.to(model.dtype), labels=labels).loss

    check_model(transformers.ViTForImageClassification(config), loss, 14)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=ENTRIES, num_attention_heads=2, num_labels=CLASSES,
        max_position_embeddings=LENGTH, **SMALL, **NO_DROPOUT,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def test_bert_trains() -> None:
    labels = torch.randint(CLASSES, (4,))
    check_model(bert(), lambda model: model(input_ids=tokens(), labels=labels).loss, 17)


def test_the_padding_of_bert_is_left_out_of_the_factors() -> None:
    """A masked batch has the same factors as the batch that was never padded."""
    model, labels = bert().double(), torch.randint(CLASSES, (4,))

    def factors(length: int) -> dict[str, Tensor]:
        optimizer = SINGD(model)
        x, mask = tokens()[:, :length], torch.arange(length).expand(4, length) < 7
        optimizer.mask_rows(mask)
        model(input_ids=x, attention_mask=mask.long(), labels=labels).loss.backward()
        return {
            f"{layer.name} {name}": array
            for layer in layers(optimizer)
            # one row of positions stands for all sequences: it has no batch that a mask could fit
            if "position_embeddings" not in layer.name
            for name, array in curvature_of([layer], 1.0).named_arrays()
        }

    # frequencies of entries are counted in float32
    torch.testing.assert_close(factors(LENGTH), factors(7), rtol=1e-6, atol=1e-12)
