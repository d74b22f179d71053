#!/usr/bin/env python
"""Writes single-file checkpoints of tiny models and what Python's converters make of them
(tests/fixtures/quant/single_file):

flux_bfl.safetensors  Flux with guidance, float16, Black Forest Labs' names, prefix model.diffusion_model.
flux_bfl.gguf         Flux without guidance, blocks of several types, the same names
flux_forward.safetensors  inputs of flux_bfl.gguf and diffusers' output, float32
ae_ldm.safetensors    an autoencoder, float16, latent diffusion's names
t5.gguf               a T5 encoder, llama.cpp's names
*.json                parameter name -> shape, type and SHA-256 of what the converter returned: of the
                      bytes as they are stored; for t5 of the float32 values

The files are made by inverting diffusers' names here; that the converters give back the weights that
went in is asserted."""

import argparse
import hashlib
import inspect
import re
from pathlib import Path

import common
import gguf
import numpy as np
import reference
import torch
from gguf import GGMLQuantizationType as Type

SEED = 41
FLUX = {"attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "in_channels": 16}
VAE = {
    "block_out_channels": [4, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 16, "layers_per_block": 2, "norm_num_groups": 2, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
T5 = {"d_ff": 64, "d_kv": 16, "d_model": 32, "num_heads": 2, "num_layers": 2, "vocab_size": 64, "feed_forward_proj": "gated-gelu"}

FLUX_NAMES = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
}  # fmt: skip
DOUBLE = {
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
}  # fmt: skip
NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm",
}  # fmt: skip


def to_bfl(state, config):
    out = {}
    for kind in ("weight", "bias"):
        for ours, theirs in FLUX_NAMES.items():
            if f"{ours}.{kind}" in state:
                out[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for i in range(config["num_layers"]):
            a, b = f"transformer_blocks.{i}.", f"double_blocks.{i}."
            for ours, theirs in DOUBLE.items():
                out[f"{b}{theirs}.{kind}"] = state[f"{a}{ours}.{kind}"]
            for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                out[f"{b}{stream}_attn.qkv.{kind}"] = torch.cat([state[f"{a}attn.{n}.{kind}"] for n in names])
            for ours, theirs in NORMS.items():
                out[f"{b}{theirs}.scale"] = state[f"{a}{ours}.weight"]
        for i in range(config["num_single_layers"]):
            a, b = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{b}linear1.{kind}"] = torch.cat([state[f"{a}{n}.{kind}"] for n in names])
            out[f"{b}linear2.{kind}"] = state[f"{a}proj_out.{kind}"]
            out[f"{b}modulation.lin.{kind}"] = state[f"{a}norm.linear.{kind}"]
            for n, theirs in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
                out[f"{b}norm.{theirs}.scale"] = state[f"{a}attn.{n}.weight"]
    return out


def flux_converter(inner_dim):
    """diffusers' converter, whose width is a constant, for another width."""
    from diffusers.loaders import single_file_utils

    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    scope = vars(single_file_utils).copy()
    exec(source.replace("inner_dim = 3072", f"inner_dim = {inner_dim}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def expectation(tensor, kind=None):
    tensor = tensor.detach().cpu()
    array = tensor.contiguous().numpy()
    names = {torch.float16: "F16", torch.float32: "F32"}
    return {"shape": list(tensor.shape), "type": kind or names[tensor.dtype], "sha256": digest(array)}


def write_gguf(path, arch, tensors, extra=()):
    """tensors: name -> (array, Type or None)"""
    writer = gguf.GGUFWriter(path, arch)
    for add in extra:
        add(writer)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_flux_plain(out):
    config = {**FLUX, "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2], "guidance_embeds": True, "num_layers": 1, "num_single_layers": 2}
    state = {k: v.half() for k, v in reference.build("FluxTransformer2DModel", config, SEED).state_dict().items()}
    bfl = to_bfl(state, config)
    common.save_tensors({f"model.diffusion_model.{k}": v for k, v in bfl.items()}, out / "flux_bfl.safetensors")
    converted = flux_converter(16)(common.load_tensors(out / "flux_bfl.safetensors"))
    assert converted.keys() == state.keys() and all(torch.equal(converted[k], state[k]) for k in state)
    common.save_json({k: expectation(v) for k, v in sorted(converted.items())}, out / "flux_bfl.json")


def write_flux_gguf(out):
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    config = {**FLUX, "guidance_embeds": False, "num_layers": 2, "num_single_layers": 1}
    model = reference.build("FluxTransformer2DModel", config, SEED + 1)
    kinds = [Type.Q8_0, Type.Q4_0, Type.Q5_1, Type.Q4_1, Type.Q5_0]
    tensors = {}
    for i, (name, value) in enumerate(to_bfl(model.state_dict(), config).items()):
        array = value.numpy()
        if array.ndim == 1:
            tensors[name] = (array, None)
        elif array.shape[1] % 32 != 0:
            tensors[name] = (array.astype(np.float16), None)
        else:
            kind = Type.Q8_0 if "adaLN" in name else kinds[i % len(kinds)]
            tensors[name] = (gguf.quants.quantize(array, kind), kind)
    write_gguf(out / "flux_bfl.gguf", "flux", tensors)

    converted = flux_converter(32)(load_gguf_checkpoint(str(out / "flux_bfl.gguf")))
    expected, values = {}, {}
    for name, tensor in sorted(converted.items()):
        kind = getattr(tensor, "quant_type", None)
        raw = tensor.as_tensor() if kind is not None else tensor
        expected[name] = expectation(raw, kind.name if kind is not None else None)
        array = raw.detach().numpy()
        values[name] = torch.from_numpy(gguf.quants.dequantize(array, kind)) if kind is not None else raw.float()
    common.save_json(expected, out / "flux_bfl_gguf.json")
    model.load_state_dict(values)
    generator = torch.Generator().manual_seed(SEED)
    inputs = {
        "hidden_states": torch.randn(1, 6, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.tensor([[0.0, i // 3, i % 3] for i in range(6)]),
        "txt_ids": torch.zeros(3, 3),
    }
    output = reference.evaluate(model, inputs)["sample"]
    common.save_tensors({**{f"input.{k}": v for k, v in inputs.items()}, "expected": output}, out / "flux_forward.safetensors")


def to_ldm(state, config):
    blocks = len(config["block_out_channels"])
    out = {}
    for name, value in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            if value.ndim == 2:
                value = value[:, :, None, None]
        out[name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")] = value
    return out


def write_autoencoder(out):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = {k: v.half() for k, v in reference.build("AutoencoderKL", VAE, SEED + 2).state_dict().items()}
    common.save_tensors(to_ldm(state, VAE), out / "ae_ldm.safetensors")
    converted = convert_ldm_vae_checkpoint(common.load_tensors(out / "ae_ldm.safetensors"), VAE)
    assert converted.keys() == state.keys() and all(torch.equal(converted[k], state[k]) for k in state)
    common.save_json({k: expectation(v) for k, v in sorted(converted.items())}, out / "ae_ldm.json")


def write_t5(out):
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = reference.build("T5EncoderModel", T5, SEED + 3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5["num_layers"])
    tensors = {}
    kinds = [Type.Q8_0, Type.Q5_0, Type.Q4_0]
    for i, (name, value) in enumerate(model.state_dict().items()):
        if name == "encoder.embed_tokens.weight":
            continue  # the same table
        array = value.numpy()
        kind = kinds[i % 3] if array.ndim == 2 and array.shape[1] % 32 == 0 else None
        stem, suffix = name.rsplit(".", 1)
        stored = gguf.quants.quantize(array, kind) if kind else array
        tensors[f"{names.get_name(stem)}.{suffix}"] = (stored, kind)
    path = out / "t5.gguf"
    extra = [
        lambda w: w.add_block_count(T5["num_layers"]), lambda w: w.add_embedding_length(32), lambda w: w.add_feed_forward_length(64),
        lambda w: w.add_head_count(2), lambda w: w.add_key_length(16), lambda w: w.add_layer_norm_rms_eps(1e-5),
        lambda w: w.add_name("tiny"), lambda w: w.add_token_list([f"t{i}" for i in range(64)]),
    ]  # fmt: skip
    write_gguf(path, "t5encoder", tensors, extra)
    with torch.device("meta"):
        empty = transformers.T5EncoderModel(transformers.T5Config(**T5))
    loaded = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    expected = {k: expectation(v.float()) for k, v in sorted(loaded.items())}
    missing = set(model.state_dict()) - set(expected)
    assert missing <= {"encoder.embed_tokens.weight", "shared.weight"}, missing
    common.save_json(expected, out / "t5.json")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests/fixtures/quant/single_file")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    common.quiet()
    write_flux_plain(out)
    write_flux_gguf(out)
    write_autoencoder(out)
    write_t5(out)


if __name__ == "__main__":
    main()
