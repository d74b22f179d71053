// A progress bar over the layers of a model that is being quantized.
#pragma once

#include <memory>
#include <string>

#include "command.h"
#include "ferry/base/progress.h"
#include "ferry/models/model.h"

namespace ferry::cli {

// Appears with the first layer: what is in the cache already shows none.
class QuantizingBar {
 public:
  QuantizingBar(std::string label, const Context& context)
      : label_(std::move(label)), context_(context) {}

  // `options` report here and stop with the program; this bar has to outlive their use.
  void attach(models::QuantizeOptions& options) {
    options.stop = context_.stop;
    options.on_layer = [this](const models::QuantizedLayer&, size_t layer_count) {
      if (!bar_) {
        bar_ = std::make_unique<ProgressBar>(label_, layer_count,
                                             ProgressOptions{.mode = progress_mode(context_)});
      }
      bar_->advance();
    };
  }
  void finish() {
    if (bar_) bar_->finish();
    bar_.reset();
  }

 private:
  std::string label_;
  const Context& context_;
  std::unique_ptr<ProgressBar> bar_;
};

}  // namespace ferry::cli
