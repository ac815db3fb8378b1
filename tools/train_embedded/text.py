"""The tokenizer and the text encoder: one token per known word."""

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pointillist.pipelines.embedded.vocabulary import KNOWN_WORDS

TEXT_WIDTH = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case words, everything else dropped; `</s>` at the end, `<unk>` for a word never seen."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(KNOWN_WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """An untrained two-layer encoder, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=64, d_ff=256, num_layers=2, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, captions: list[str], sequence: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states and cross-attention bias that equal what `WanPipeline` feeds at `sequence` tokens.

    The pipeline pads every caption with zero rows up to 512. Those rows are all alike, so one of them with
    ln(count) added to its logit is the same softmax at a twentieth of the work.

    Returns states [B, n+1, width] (the last row is the pad) and bias [B, 1, 1, n+1].
    """
    tokens = tokenizer(captions, padding=True, return_tensors="pt").to(encoder.device)
    mask = tokens.attention_mask.bool()
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states = states * mask[..., None]
    states = torch.cat([states, torch.zeros_like(states[:, :1])], dim=1)
    real = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    pads = (sequence - mask.sum(1, keepdim=True)).float().log()
    return states, torch.cat([real, pads], dim=1)[:, None, None]
