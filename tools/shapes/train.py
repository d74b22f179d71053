"""Trains models/shapes: a Flux pipeline of a few MB that draws coloured shapes from captions.

    python train.py --work out/shapes-train            # all stages, one after another
    python train.py --stage vae --minutes 14           # one stage

Stages: vae, tokenizers, text, latents, transformer, export. Each has a budget in minutes of wall
clock; learning rates follow the fraction of it that is spent, so a stage ends in time with an
annealed model. A stage writes WORK/STAGE.pt every minute and at its end; started again it goes on
from there, and a finished stage is skipped. Steps and losses go to WORK/log.jsonl.

Seeds are fixed, but how many steps fit into a budget depends on the machine.
"""

import argparse
import json
import math
import os
import random

import numpy as np
import torch
import torch.nn.functional as F

import draw
import text
from training import Average, Budget, Log, Muon, anneal, save_atomically, set_learning_rates

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SEED = 20
CHECKPOINT_SECONDS = 60.0
MINUTES = {"vae": 9.5, "text": 4.0, "latents": 4.0, "transformer": 55.0}


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def checkpoint_path(work, stage):
    return os.path.join(work, stage + ".pt")


def load_checkpoint(work, stage):
    path = checkpoint_path(work, stage)
    return torch.load(path, weights_only=False) if os.path.exists(path) else None


# --- The autoencoder ------------------------------------------------------------------------------

VAE_BATCH = 16
VAE_KL_WEIGHT = 2e-4
VAE_EDGE_WEIGHT = 4.0  # outlines are few pixels and carry the shape
VAE_ENCODER_SHARE = 0.65  # of the budget; after it the encoder is fixed


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=draw.IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64), layers_per_block=1, norm_num_groups=8,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
        force_upcast=False,
    )  # fmt: skip


def picture_batch(rng, size):
    """Pictures in -1 to 1, [n, 3, 64, 64], and their outlines, [n, 1, 64, 64]."""
    drawn = [draw.draw(draw.random_scene(rng, two_fraction=0.4), rng) for _ in range(size)]
    pictures = torch.from_numpy(np.stack([p for p, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    edges = torch.from_numpy(np.stack([e for _, e in drawn]))[:, None]
    return pictures * 2 - 1, edges


def split_parameters(named):
    """Kernels of hidden layers for Muon, the rest for AdamW."""
    muon, adam = [], []
    for name, p in named:
        outer = name.endswith(("conv_in.weight", "conv_out.weight"))
        (muon if p.ndim >= 2 and not outer else adam).append(p)
    return muon, adam


def train_vae(args):
    log = Log(args.work, "vae")
    torch.manual_seed(SEED)
    vae = make_vae()
    halves = []  # encoder, decoder: [Muon, AdamW] each
    for half in (vae.encoder, vae.decoder):
        muon, adam = split_parameters(half.named_parameters())
        halves.append([Muon(muon, lr=args.vae_muon_lr),
                       torch.optim.AdamW(adam, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)])  # fmt: skip
    average = Average([vae], 0.995)
    step, spent, peak = 0, 0.0, {}
    saved = load_checkpoint(args.work, "vae")
    if saved:
        if saved["done"]:
            return
        vae.load_state_dict(saved["vae"])
        for optimizer, state in zip(sum(halves, []), saved["optimizers"]):
            optimizer.load_state_dict(state)
        average.shadow, step, spent = saved["shadow"], saved["step"], saved["spent"]

    def save(done):
        save_atomically(
            {"vae": vae.state_dict(), "optimizers": [o.state_dict() for o in sum(halves, [])],
             "shadow": average.shadow, "step": step, "spent": budget.spent, "done": done},
            checkpoint_path(args.work, "vae"))  # fmt: skip

    budget, last_save, mean_loss = Budget(args.minutes or MINUTES["vae"], spent), spent, None
    rng = random.Random(SEED + step)
    while (fraction := budget.fraction) < 1.0:
        pictures, edges = picture_batch(rng, VAE_BATCH)
        encoder_trains = fraction < VAE_ENCODER_SHARE
        vae.encoder.requires_grad_(encoder_trains)
        with autocast():
            with torch.set_grad_enabled(encoder_trains):
                latent = vae.encode(pictures).latent_dist
            decoded = vae.decode(latent.sample()).sample
        squared = (decoded.float() - pictures) ** 2
        loss = ((1.0 + VAE_EDGE_WEIGHT * edges) * squared).mean()
        if encoder_trains:
            mean, logvar = latent.mean.float(), latent.logvar.float()
            kl = 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).mean()
            loss = loss + VAE_KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        set_learning_rates(halves[0], anneal(fraction / VAE_ENCODER_SHARE))
        set_learning_rates(halves[1], anneal(fraction))
        for optimizer in halves[1] + (halves[0] if encoder_trains else []):
            optimizer.step()
        vae.zero_grad(set_to_none=True)
        average.update(step)
        step += 1
        psnr = 10 * math.log10(4.0 / squared.mean().item())
        mean_loss = psnr if mean_loss is None else 0.98 * mean_loss + 0.02 * psnr
        if step % 50 == 0:
            log(step=step, seconds=budget.spent, psnr=mean_loss, loss=loss.item(), kl=kl.item())
        if budget.spent - last_save > CHECKPOINT_SECONDS:
            save(False)
            last_save = budget.spent
    average.swap()
    save(True)
    log(step=step, seconds=budget.spent, done=True, **vae_numbers(vae))


def load_vae(work):
    vae = make_vae()
    vae.load_state_dict(load_checkpoint(work, "vae")["vae"])
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def vae_numbers(vae, count=200):
    """PSNR of the round trip in dB, and the latents' mean and deviation."""
    pictures, _ = picture_batch(random.Random(SEED + 1), count)
    latents = vae.encode(pictures).latent_dist.mean
    error = ((vae.decode(latents).sample.clamp(-1, 1) - pictures) ** 2).mean().item()
    return {"round_trip_psnr": 10 * math.log10(4.0 / error),
            "shift": latents.mean().item(), "scale": 1.0 / latents.std().item()}  # fmt: skip


# --- Tokenizers and the warm-up of the text encoders ----------------------------------------------

TEXT_BATCH = 128
NONE = "none"
# What a caption says, one classification each. "and" reads as "left of".
SLOTS = {
    "background": list(draw.BACKGROUNDS),
    "colour 1": list(draw.COLOURS), "shape 1": list(draw.SHAPES),
    "size": [NONE, *draw.SIZES], "place": [NONE, *draw.PLACES],
    "relation": [NONE, "left of", "right of", "above", "below"],
    "colour 2": [NONE, *draw.COLOURS], "shape 2": [NONE, *draw.SHAPES],
}  # fmt: skip


def slot_labels(scene):
    """The index of the scene's value in each slot."""
    first, pair = scene["shapes"][0], scene["relation"] is not None
    second = scene["shapes"][1] if pair else {"colour": NONE, "shape": NONE}
    relation = "left of" if scene["relation"] == "and" else scene["relation"] or NONE
    values = (
        scene["background"], first["colour"], first["shape"], NONE if pair else first["size"],
        NONE if pair else first["place"], relation, second["colour"], second["shape"],
    )  # fmt: skip
    return [options.index(v) for options, v in zip(SLOTS.values(), values)]


def make_tokenizers(args):
    rng = random.Random(SEED)
    captions = [draw.caption(draw.random_scene(rng), rng) for _ in range(5000)]
    if os.path.exists(os.path.join(args.output, "tokenizer_2", "tokenizer.json")):
        return
    text.save_clip_tokenizer(os.path.join(args.output, "tokenizer"))
    text.save_t5_tokenizer(os.path.join(args.output, "tokenizer_2"), captions)
    sizes = text.check_tokenizers(args.output, captions)
    Log(args.work, "tokenizers")(clip_tokens=sizes[0], t5_tokens=sizes[1])


def text_optimizers(modules, scale):
    muon, adam = [], []
    for module in modules:
        for name, p in module.named_parameters():
            hidden = p.ndim == 2 and "embed" not in name and "shared" not in name
            hidden = hidden and "relative_attention_bias" not in name and min(p.shape) >= 64
            (muon if hidden else adam).append(p)
    return [Muon(muon, lr=0.02 * scale), torch.optim.AdamW(adam, lr=2e-3 * scale, weight_decay=0.0)]


def warm_up_text(args):
    """Teaches both encoders what captions say: CLIP's pooled output, and every T5 token.

    Without this the transformer needs far longer to find out that the text matters.
    """
    log = Log(args.work, "text")
    if load_checkpoint(args.work, "text"):
        return
    torch.manual_seed(SEED)
    clip, t5 = text.make_encoders(args.output)
    tokens = text.CaptionTokens(args.output)
    counts = [len(options) for options in SLOTS.values()]
    clip_head, t5_head = (torch.nn.Linear(text.WIDTH, sum(counts)) for _ in range(2))
    optimizers = text_optimizers([clip, t5, clip_head, t5_head], 1.0)
    rng, step, budget = random.Random(SEED), 0, Budget(args.minutes or MINUTES["text"])
    while (fraction := budget.fraction) < 1.0:
        scenes = [draw.random_scene(rng, two_fraction=0.5) for _ in range(TEXT_BATCH)]
        clip_ids, t5_ids = tokens([draw.caption(s, rng) for s in scenes])
        labels = torch.tensor([slot_labels(s) for s in scenes])
        from_clip = clip_head(clip(input_ids=clip_ids).pooler_output)  # [n, values]
        from_t5 = t5_head(t5(input_ids=t5_ids).last_hidden_state)  # [n, tokens, values]
        loss, right = 0.0, [0.0, 0.0]
        for i, logits in enumerate((from_clip[:, None], from_t5)):
            for slot, values in enumerate(logits.split(counts, dim=-1)):
                target = labels[:, slot, None].expand(values.shape[:2])
                loss = loss + F.cross_entropy(values.transpose(1, 2), target)
                right[i] += (values.argmax(-1) == target).float().mean().item() / len(counts)
        loss.backward()
        set_learning_rates(optimizers, anneal(fraction))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            log(step=step, seconds=budget.spent, loss=loss.item(), clip=right[0], t5=right[1])
    save_atomically({"clip": clip.state_dict(), "t5": t5.state_dict()},
                    checkpoint_path(args.work, "text"))  # fmt: skip
    log(step=step, seconds=budget.spent, done=True, clip=right[0], t5=right[1])


# --- Latents, computed once -----------------------------------------------------------------------

LATENT_COUNTS = {1: 24000, 2: 20000}


@torch.no_grad()
def encode_latents(args):
    """Encodes pictures of one and of two shapes; the autoencoder is fixed from here on."""
    log = Log(args.work, "latents")
    if load_checkpoint(args.work, "latents"):
        return
    vae, rng, result = load_vae(args.work), random.Random(SEED + 2), {}
    budget = Budget(args.minutes or MINUTES["latents"])
    for share, (count, total) in zip((0.55, 1.0), LATENT_COUNTS.items()):
        scenes, latents = [], []
        while len(scenes) < total and budget.fraction < share:
            batch = [draw.random_scene(rng, count=count) for _ in range(64)]
            pictures = torch.from_numpy(np.stack([draw.draw(s, rng)[0] for s in batch]))
            with autocast():
                mean = vae.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
            scenes += batch
            latents.append(mean.half())
        result[count] = {"scenes": scenes, "latents": torch.cat(latents)}
        log(shapes=count, pictures=len(scenes), seconds=budget.spent)
    both = torch.cat([r["latents"] for r in result.values()]).float()
    result["shift"], result["scale"] = both.mean().item(), 1.0 / both.std().item()
    save_atomically(result, checkpoint_path(args.work, "latents"))
    log(done=True, shift=result["shift"], scale=result["scale"])


# --- The transformer, trained together with the text encoders -------------------------------------

BATCH = 48
TWO_FRACTION = 0.35  # of the batch: pictures of two shapes
CAPTION_DROPOUT = 0.08  # to the empty caption, so that true_cfg_scale works
TEXT_SCALE = 0.3  # of the learning rates


def make_transformer():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=text.WIDTH, pooled_projection_dim=text.WIDTH,
        axes_dims_rope=(8, 12, 12), guidance_embeds=False,
    )  # fmt: skip


class TrainingAttention:
    """FluxAttnProcessor written as plain products: on a CPU in bfloat16 the backward pass of
    scaled_dot_product_attention, the float32 rotary embedding and the norms cost a third of a
    step. Swapping the halves of rotary pairs is a product with a constant matrix here."""

    def __init__(self, head_dim):
        pair = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        self.swap = torch.block_diag(*[pair] * (head_dim // 2)).bfloat16()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 image_rotary_emb=None):  # fmt: skip
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1))
            if norm is None:
                return x
            square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]
            return x * torch.rsqrt(square + norm.eps) * norm.weight.to(x.dtype)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        context = encoder_hidden_states
        if context is not None:
            query = torch.cat([heads(attn.add_q_proj(context), attn.norm_added_q), query], 1)
            key = torch.cat([heads(attn.add_k_proj(context), attn.norm_added_k), key], 1)
            value = torch.cat([heads(attn.add_v_proj(context)), value], 1)
        cos, sin = (e[None, :, None].to(query.dtype) for e in image_rotary_emb)

        def rotate(x):
            return x * cos + (x @ self.swap) * sin

        query, key, value = (x.transpose(1, 2) for x in (rotate(query), rotate(key), value))
        weights = (query * query.shape[-1] ** -0.5) @ key.mT
        weights = torch.softmax(weights, -1, dtype=weights.dtype).to(value.dtype)
        out = (weights @ value).transpose(1, 2).flatten(2)
        if context is None:
            return out
        n = context.shape[1]
        return attn.to_out[0](out[:, n:]), attn.to_add_out(out[:, :n])


def pack(latents):
    """[n, 4, 16, 16] -> [n, 64, 16], as FluxPipeline._pack_latents."""
    n, c, h, w = latents.shape
    x = latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, h * w // 4, c * 4)


def image_ids(side=8):
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return ids.view(-1, 3)


def train_transformer(args):
    log = Log(args.work, "transformer")
    torch.manual_seed(SEED)
    transformer = make_transformer()
    clip, t5 = text.make_encoders(args.output)
    start = load_checkpoint(args.work, "text")
    clip.load_state_dict(start["clip"])
    t5.load_state_dict(start["t5"])
    data = load_checkpoint(args.work, "latents")
    tokens = text.CaptionTokens(args.output)
    muon, adam = [], []
    for name, p in transformer.named_parameters():
        (muon if p.ndim == 2 and "blocks." in name else adam).append(p)
    optimizers = [Muon(muon, lr=0.02), torch.optim.AdamW(adam, lr=1.2e-3, weight_decay=0.0)]
    optimizers += text_optimizers([clip, t5], TEXT_SCALE)
    modules = {"transformer": transformer, "clip": clip, "t5": t5}
    average = Average(modules.values(), 0.99)
    step, spent = 0, 0.0
    saved = load_checkpoint(args.work, "transformer")
    if saved:
        if saved["done"]:
            return
        for name, module in modules.items():
            module.load_state_dict(saved["modules"][name])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        average.shadow, step, spent = saved["shadow"], saved["step"], saved["spent"]
    for module in transformer.modules():
        if hasattr(module, "norm_q"):
            module.set_processor(TrainingAttention(32))
    minutes = args.minutes or MINUTES["transformer"]
    budget, last_save, mean_loss = Budget(minutes, spent), spent, None

    def save(done):
        state = {"optimizers": [o.state_dict() for o in optimizers], "shadow": average.shadow,
                 "modules": {n: m.state_dict() for n, m in modules.items()},
                 "step": step, "spent": budget.spent, "loss": mean_loss, "done": done}  # fmt: skip
        average.swap()
        state["averaged"] = {
            name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()
        }
        average.swap()
        save_atomically(state, checkpoint_path(args.work, "transformer"))

    rng, generator = random.Random(SEED + step), torch.Generator().manual_seed(SEED + step)
    img_ids, txt_ids = image_ids(), torch.zeros(text.T5_LENGTH, 3)
    two = round(BATCH * TWO_FRACTION)
    while (fraction := budget.fraction) < 1.0:
        scenes, picked = [], []
        for count, size in ((1, BATCH - two), (2, two)):
            rows = [rng.randrange(len(data[count]["scenes"])) for _ in range(size)]
            scenes += [data[count]["scenes"][i] for i in rows]
            picked.append(data[count]["latents"][rows])
        captions = [
            "" if rng.random() < CAPTION_DROPOUT else draw.caption(s, rng) for s in scenes
        ]
        clip_ids, t5_ids = tokens(captions)
        latents = pack((torch.cat(picked).float() - data["shift"]) * data["scale"])
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.sigmoid(torch.randn(BATCH, generator=generator) + 0.2)
        noisy = torch.lerp(latents, noise, t[:, None, None])
        with autocast():
            velocity = transformer(
                hidden_states=noisy, timestep=t, img_ids=img_ids, txt_ids=txt_ids,
                pooled_projections=clip(input_ids=clip_ids).pooler_output,
                encoder_hidden_states=t5(input_ids=t5_ids).last_hidden_state, return_dict=False,
            )[0]  # fmt: skip
        loss = F.mse_loss(velocity.float(), noise - latents)
        loss.backward()
        set_learning_rates(optimizers, anneal(fraction))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(step)
        step += 1
        value = loss.item()
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            log(step=step, seconds=budget.spent, loss=mean_loss)
        if budget.spent - last_save > CHECKPOINT_SECONDS:
            save(False)
            last_save = budget.spent
    save(True)
    log(step=step, seconds=budget.spent, done=True, loss=mean_loss)


# --- The pipeline's folder ------------------------------------------------------------------------


def export(args):
    """Writes the diffusers folder in bfloat16, from the averaged weights so far."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    vae, transformer = load_vae(args.work), make_transformer()
    clip, t5 = text.make_encoders(args.output)
    saved, data = load_checkpoint(args.work, "transformer"), load_checkpoint(args.work, "latents")
    weights = saved["averaged"] if saved else load_checkpoint(args.work, "text")
    if saved:
        transformer.load_state_dict(weights["transformer"])
    clip.load_state_dict(weights["clip"])
    t5.load_state_dict(weights["t5"])
    numbers = vae_numbers(vae)
    latents = data or numbers  # before the latents are there, their estimate
    vae.register_to_config(scaling_factor=latents["scale"], shift_factor=latents["shift"])
    clip_tokenizer, t5_tokenizer = text.load_tokenizers(args.output)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae, transformer=transformer,
        text_encoder=clip, tokenizer=clip_tokenizer,
        text_encoder_2=t5, tokenizer_2=t5_tokenizer,
    )  # fmt: skip
    pipeline.to(torch.bfloat16).save_pretrained(args.output)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads the dtype that the config names, diffusers float32 unless told: the
        # same for both, so that from_pretrained without torch_dtype works.
        path = os.path.join(args.output, name, "config.json")
        with open(path) as f:
            config = json.load(f)
        config["dtype"] = "float32"
        with open(path, "w") as f:
            json.dump(config, f, indent=2, sort_keys=True)
            f.write("\n")
    Log(args.work, "export")(step=saved["step"] if saved else 0, **numbers)
    for folder, _, files in os.walk(args.output):
        for name in files:
            os.chmod(os.path.join(folder, name), 0o644)


STAGES = {
    "vae": train_vae, "tokenizers": make_tokenizers, "text": warm_up_text,
    "latents": encode_latents, "transformer": train_transformer, "export": export,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=["all", *STAGES], default="all")
    parser.add_argument("--work", default=os.path.join(ROOT, "out", "shapes-train"))
    parser.add_argument("--output", default=os.path.join(ROOT, "models", "shapes"))
    parser.add_argument("--minutes", type=float, help="budget of the stage; with --stage only")
    parser.add_argument("--vae-muon-lr", type=float, default=0.02)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.work, exist_ok=True)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
