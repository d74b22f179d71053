// What a lossless pack has to know about the model whose checkpoint it packs.
#pragma once

#include "ferry/models/model.h"
#include "ferry/weights/lossless_pack.h"

namespace ferry::models {

// Options under which embedding tables stay raw: their rows are gathered from disk at offsets.
// REQUIRES: a model from load_model().
weights::PackOptions pack_options(const Model& model);

}  // namespace ferry::models
