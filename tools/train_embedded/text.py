"""The tokenizer and the text encoder: one token per known word.

The encoder is trained first, on captions alone, and is then frozen: from every one of its states all four attributes
of the scene can be read off by a linear map. So the transformer's cross-attention finds the whole scene wherever it
looks, and has only to learn how a scene is drawn.
"""

import random

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pointillist.pipelines.embedded.vocabulary import BACKGROUNDS, COLORS, KNOWN_WORDS, MOTIONS, SHAPES
from train_embedded.scene import free_caption, split_words

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
    encoder = UMT5EncoderModel(config)
    with torch.no_grad():
        encoder.shared.weight.mul_(0.1)  # so that a state is not mostly its own word
    return encoder


def teach_words(
    tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, steps: int = 1000, seed: int = 0
) -> float:
    """Train `encoder` until linear maps name the attributes of a training caption from every one of its states.

    Returns the share of (state, attribute) pairs named rightly over the last fifty batches.
    """
    rng, scenes = random.Random(seed), split_words()[0]
    attributes = {
        "color": list(COLORS),
        "shape": list(SHAPES),
        "motion": list(MOTIONS),
        "background": list(BACKGROUNDS),
    }
    heads = nn.ModuleDict({name: nn.Linear(TEXT_WIDTH, len(words)) for name, words in attributes.items()})
    heads.to(encoder.device)
    encoder.requires_grad_(True)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    right: list[float] = []
    for _ in range(steps):
        words = rng.choices(scenes, k=64)
        tokens = tokenizer([free_caption(w, rng) for w in words], padding=True, return_tensors="pt").to(encoder.device)
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        real = tokens.attention_mask.bool()
        loss, hits = torch.zeros((), device=encoder.device), torch.zeros((), device=encoder.device)
        for name, head in heads.items():
            target = torch.tensor([attributes[name].index(getattr(w, name)) for w in words], device=encoder.device)
            target = target[:, None].expand(real.shape)[real]
            named = head(states)[real]
            loss = loss + F.cross_entropy(named, target)
            hits = hits + (named.argmax(1) == target).float().mean() / len(heads)
        right.append(hits.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    encoder.requires_grad_(False)
    return sum(right[-50:]) / len(right[-50:])


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
