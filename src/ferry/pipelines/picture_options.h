// From the options of the facade to the arguments of a pipeline.
#pragma once

#include "ferry/ferry.h"
#include "ferry/pipelines/pipeline.h"

namespace ferry::pipelines {

// What `options` say, with one generator for `seed`. `options` must outlive the arguments: the
// progress callback refers to them. `options.stop` and `options.seed` are the caller's.
TextToImageArguments arguments_of(const PictureOptions& options, uint64_t seed);

// options.seed, or a random one.
uint64_t seed_of(const PictureOptions& options);

}  // namespace ferry::pipelines
