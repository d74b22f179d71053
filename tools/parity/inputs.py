"""Random named inputs for each model class. `options` fixes shapes: batch, tokens, text_tokens, height,
width, mask (bool), position_ids (bool); what is not given has a small default."""

import torch


def make(class_name, config, seed, method="forward", options=None):
    generator = torch.Generator().manual_seed(seed + 1)
    return MAKERS[class_name](config, method, dict(options or {}), generator)


def flux(config, method, options, generator):
    batch, height, width = options.get("batch", 1), options.get("height", 4), options.get("width", 4)
    text_tokens = options.get("text_tokens", 5)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    named = {
        "hidden_states": torch.randn(batch, height * width, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text_tokens, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": img_ids,
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    if config.guidance_embeds:
        named["guidance"] = 1 + 4 * torch.rand(batch, generator=generator)
    return named


def autoencoder_kl(config, method, options, generator):
    batch, height, width = options.get("batch", 1), options.get("height", 8), options.get("width", 8)
    if method == "decode":
        return {"z": torch.randn(batch, config.latent_channels, height, width, generator=generator)}
    scale = 2 ** (len(config.block_out_channels) - 1)
    shape = (batch, config.in_channels, height * scale, width * scale)
    return {"sample": torch.rand(shape, generator=generator) * 2 - 1}


def clip_text(config, method, options, generator):
    batch, tokens = options.get("batch", 2), options.get("tokens", 12)
    ids = torch.randint(3, config.vocab_size - 2, (batch, tokens), generator=generator)
    ends = torch.randint(tokens // 2, tokens, (batch,), generator=generator)
    # The end token is the largest id for the legacy rule (eos_token_id 2), which takes the argmax of ids.
    end_id = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    ids[ids == end_id] = 3 if end_id != 3 else 4
    for row, end in enumerate(ends.tolist()):
        ids[row, end:] = end_id
    named = {"input_ids": ids}
    if options.get("mask"):
        named["attention_mask"] = (torch.arange(tokens)[None] <= ends[:, None]).long()
    if options.get("position_ids"):
        named["position_ids"] = torch.randperm(config.max_position_embeddings, generator=generator)[None, :tokens]
    return named


def t5_encoder(config, method, options, generator):
    batch, tokens = options.get("batch", 2), options.get("tokens", 12)
    named = {"input_ids": torch.randint(0, config.vocab_size, (batch, tokens), generator=generator)}
    if options.get("mask"):
        lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        named["attention_mask"] = (torch.arange(tokens)[None] < lengths).long()
    return named


MAKERS = {
    "FluxTransformer2DModel": flux,
    "AutoencoderKL": autoencoder_kl,
    "CLIPTextModel": clip_text,
    "CLIPTextModelWithProjection": clip_text,
    "T5EncoderModel": t5_encoder,
}
