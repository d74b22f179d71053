// The models ferry has: an include and a line each. A class names its config struct `Config` and is
// constructed from it.
#include "ferry/models/autoencoders/autoencoder_kl.h"
#include "ferry/models/config.h"
#include "ferry/models/model.h"
#include "ferry/models/text_encoders/clip_text_model.h"
#include "ferry/models/text_encoders/t5_encoder_model.h"
#include "ferry/models/transformers/transformer_flux.h"

namespace ferry::models {

namespace {

template <class M>
std::shared_ptr<Model> make(const nlohmann::ordered_json& config, const std::string& where) {
  return std::make_shared<M>(config_from_json<typename M::Config>(config, where));
}

}  // namespace

const std::vector<ModelClass>& model_classes() {
  static const std::vector<ModelClass> classes = {
      {"AutoencoderKL", make<AutoencoderKL>},
      {"CLIPTextModel", make<CLIPTextModel>},
      {"CLIPTextModelWithProjection", make<CLIPTextModelWithProjection>},
      {"FluxTransformer2DModel", make<FluxTransformer2DModel>},
      {"T5EncoderModel", make<T5EncoderModel>},
  };
  return classes;
}

}  // namespace ferry::models
