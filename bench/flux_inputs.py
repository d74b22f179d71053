"""Random inputs of a Flux transformer, as safetensors. Needs torch alone.

  flux_inputs.py CONFIG.json IMAGE_TOKENS TEXT_TOKENS OUTPUT.safetensors
"""
import ctypes
import json
import struct
import sys

import torch


def main():
    config = json.load(open(sys.argv[1]))
    image, text = int(sys.argv[2]), int(sys.argv[3])
    generator = torch.Generator().manual_seed(0)
    side = int(image ** 0.5)
    if side * side != image:
        sys.exit(f"flux_inputs: {image} image tokens, expected a square number")
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    tensors = {
        "hidden_states": torch.randn(1, image, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"], generator=generator),
        "timestep": torch.full((1,), 0.5),
        "img_ids": ids.reshape(-1, 3).contiguous(),
        "txt_ids": torch.zeros(text, 3),
    }
    if config.get("guidance_embeds"):
        tensors["guidance"] = torch.full((1,), 3.5)
    header, offset = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text_header = json.dumps(header).encode()
    text_header += b" " * (-len(text_header) % 8)
    with open(sys.argv[4], "wb") as handle:
        handle.write(struct.pack("<Q", len(text_header)) + text_header)
        for tensor in tensors.values():
            handle.write(ctypes.string_at(tensor.data_ptr(), tensor.numel() * 4))


if __name__ == "__main__":
    main()
