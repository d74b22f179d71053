#!/usr/bin/env python
"""Writes a reference for one diffusers or transformers class: a component folder with random weights,
`inputs.safetensors` (forward argument names), `outputs.safetensors` (float32, names of the output
class) and `args.json` (method and arguments that are not tensors)."""

import argparse
import json
from pathlib import Path

import common
import torch

import inputs as input_makers


def build(class_name, config, seed):
    """The model in eval mode, float32, with the random weights of `seed`."""
    cls = common.find_class(class_name)
    torch.manual_seed(seed)
    if common.is_diffusers(cls):
        model = cls(**config)
    else:
        model = cls(cls.config_class(**config))
    randomize(model, seed)
    return model.eval().float()


@torch.no_grad()
def randomize(model, seed):
    """Weights under which every parameter matters and activations stay O(1): matrices with variance
    1/fan_in, embeddings with variance 1, norm weights near 1, biases around 0.1."""
    generator = torch.Generator().manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, torch.nn.Embedding):
                parameter.copy_(noise)
            elif parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
            elif name == "bias":
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1 + noise * 0.1)
    # T5 does not scale its attention scores, so the query projection carries 1/sqrt(head_dim).
    for module in model.modules():
        if type(module).__name__ == "T5Attention":
            module.q.weight.mul_(module.key_value_proj_dim**-0.5)


@torch.inference_mode()
def evaluate(model, inputs, method="forward", args=None):
    """Named outputs of one call; for autoencoders `encode` gives mean and logvar, `decode` sample."""
    args = dict(args or {})
    if method == "encode":
        distribution = model.encode(inputs["sample"]).latent_dist
        return {"mean": distribution.mean, "logvar": distribution.logvar}
    if method == "decode":
        return {"sample": model.decode(inputs["z"]).sample}
    return common.flatten(model(**inputs, **args))


def to_hub_form(folder, class_name):
    """Renames the weights' keys to those of older folders, such as the published FLUX.1 ones, which
    transformers reads too: CLIPTextModel under `text_model.` with its position_ids, and the T5 embedding
    under both of its names."""
    path = Path(folder) / "model.safetensors"
    tensors = common.load_tensors(path)
    if class_name.startswith("CLIPTextModel"):
        prefix = "" if class_name == "CLIPTextModelWithProjection" else "text_model."
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        count = tensors["text_model.embeddings.position_embedding.weight"].shape[0]
        tensors["text_model.embeddings.position_ids"] = torch.arange(count)[None]
    else:
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    common.save_tensors(tensors, path)


def cast(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def write(class_name, config, seed, out, method="forward", args=None, options=None, inputs=None, bf16=False, hub=False):
    """Writes the whole reference folder; gives the model and its inputs for further use."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model = build(class_name, config, seed)
    if inputs is None:
        inputs = input_makers.make(class_name, model.config, seed, method, options or {})
    outputs = evaluate(model, inputs, method, args)
    model.save_pretrained(out)
    if hub:
        to_hub_form(out, class_name)
    common.save_tensors(inputs, out / "inputs.safetensors")
    common.save_tensors(outputs, out / "outputs.safetensors")
    common.save_json(
        {"args": args or {}, "class": class_name, "method": method, "seed": seed, "versions": common.versions()},
        out / "args.json",
    )
    if bf16:
        # Loaded as a user would, so that _keep_in_fp32_modules acts.
        half = type(model).from_pretrained(out, torch_dtype=torch.bfloat16).eval()
        common.save_tensors(evaluate(half, cast(inputs, torch.bfloat16), method, args), out / "outputs_bf16.safetensors")
    return model, inputs, outputs


def read_config(text):
    """A JSON file or inline JSON; keys that start with an underscore are no arguments."""
    config = json.loads(text) if text.lstrip().startswith("{") else common.load_json(text)
    return {k: v for k, v in config.items() if not k.startswith("_") and k not in ("architectures", "model_type")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("class_name", metavar="CLASS", help="for example FluxTransformer2DModel")
    parser.add_argument("--config", default="{}", help="JSON file, or the JSON itself (default: {})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--method", choices=("forward", "encode", "decode"), default="forward")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="argument that is no tensor")
    parser.add_argument("--options", default="{}", help="JSON: shapes of the inputs, see inputs.py")
    parser.add_argument("--inputs", help="safetensors with inputs, instead of random ones")
    parser.add_argument("--hub", action="store_true", help="CLIP and T5: the keys of older, published folders")
    parser.add_argument("--bf16", action="store_true", help="also write outputs_bf16.safetensors")
    a = parser.parse_args()
    common.quiet()
    args = {}
    for item in a.arg:
        name, _, value = item.partition("=")
        try:
            args[name] = json.loads(value)
        except json.JSONDecodeError:
            args[name] = value
    given = common.load_tensors(a.inputs) if a.inputs else None
    _, inputs, outputs = write(
        a.class_name, read_config(a.config), a.seed, a.out, a.method, args, json.loads(a.options), given, a.bf16, a.hub
    )
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for name, tensor in tensors.items():
            print(f"{kind:6} {name:24} {str(tensor.dtype)[6:]:8} {list(tensor.shape)} max {tensor.abs().max():.3g}")


if __name__ == "__main__":
    main()
