// A progress bar over the making of a lossless pack.
#pragma once

#include <string>

#include "command.h"
#include "ferry/base/progress.h"
#include "ferry/models/packing.h"

namespace ferry::cli {

class PackingBar {
 public:
  // Says "<label>, MB". REQUIRES: a model from load_model().
  PackingBar(const std::string& label, const models::Model& model, const Context& context)
      : bar_(label + ", MB", model.binding()->checkpoint->total_bytes() / 1'000'000,
             {.mode = progress_mode(context)}),
        options_(models::pack_options(model)) {
    options_.stop = context.stop;
    options_.progress = [this](uint64_t bytes) { bar_.set(bytes / 1'000'000); };
  }
  PackingBar(const PackingBar&) = delete;
  PackingBar& operator=(const PackingBar&) = delete;

  // They report to this bar, which has to outlive their use.
  const weights::PackOptions& options() const { return options_; }
  ProgressBar& bar() { return bar_; }

 private:
  ProgressBar bar_;
  weights::PackOptions options_;
};

}  // namespace ferry::cli
