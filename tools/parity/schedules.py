#!/usr/bin/env python
"""The Python side of `ferry schedule`: set_timesteps and a trajectory with given model outputs."""

import argparse
import json
from unittest import mock

import common
import torch

STEP_ARGUMENTS = ("s_churn", "s_tmin", "s_tmax", "s_noise")


def trajectory(config, inputs, steps=None, args=None, class_name="FlowMatchEulerDiscreteScheduler"):
    """`inputs`: model_outputs [n, ...], sample, optional noise [n, ...], timesteps [n], sigmas [n].
    Gives timesteps, sigmas, init_noise_sigma and trajectory [n + 1, ...] (sample first)."""
    args = dict(args or {})
    step_args = {k: args.pop(k) for k in STEP_ARGUMENTS if k in args}
    scheduler = common.find_class(class_name)(**config)
    for name in ("timesteps", "sigmas"):
        if name in inputs:
            args[name] = inputs[name].tolist()
    scheduler.set_timesteps(steps, **args)
    noise = iter(inputs["noise"]) if "noise" in inputs else None

    def given_noise(shape, **_):
        return next(noise)

    samples = [inputs["sample"]]
    module = type(scheduler).__module__
    with mock.patch(f"{module}.randn_tensor", given_noise):
        for timestep, model_output in zip(scheduler.timesteps, inputs["model_outputs"]):
            samples.append(scheduler.step(model_output, timestep, samples[-1], return_dict=False, **step_args)[0])
    return {
        "timesteps": scheduler.timesteps,
        "sigmas": scheduler.sigmas,
        # flow matching schedulers have no init_noise_sigma: the noise is taken as it is
        "init_noise_sigma": torch.tensor(float(getattr(scheduler, "init_noise_sigma", 1.0))),
        "trajectory": torch.stack(samples),
    }


def make_inputs(case, seed, shape=(2, 3, 4)):
    """The input tensors of a case of configs.schedules()."""
    generator = torch.Generator().manual_seed(seed)
    count = case["steps"] or len(case.get("sigmas") or case.get("timesteps"))
    named = {
        "model_outputs": torch.randn(count, *shape, generator=generator),
        "sample": torch.randn(*shape, generator=generator),
    }
    if case["config"].get("stochastic_sampling"):
        named["noise"] = torch.randn(count, *shape, generator=generator)
    for name in ("sigmas", "timesteps"):
        if case.get(name):
            named[name] = torch.tensor(case[name], dtype=torch.float32)
    return named


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="scheduler_config.json")
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    a = parser.parse_args()
    config = {k: v for k, v in common.load_json(a.config).items() if not k.startswith("_")}
    args = {k: json.loads(v) for k, _, v in (item.partition("=") for item in a.arg)}
    common.save_tensors(trajectory(config, common.load_tensors(a.inputs), a.steps, args), a.output)


if __name__ == "__main__":
    main()
