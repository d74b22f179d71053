// The bars of a pipeline's stages, one after the other, and how long each took.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "ferry/base/progress.h"
#include "ferry/base/trace.h"

namespace ferry::cli {

// Thread-safety: none; updates come from the generating thread.
class StageBars {
 public:
  // `trace` may be null.
  explicit StageBars(ProgressMode mode, Trace* trace = nullptr) : mode_(mode), trace_(trace) {}

  // `stage` "encode", "denoise" or "decode"; `step` of `total` are done.
  void update(const std::string& stage, int64_t step, int64_t total) {
    if (stage != stage_) begin(stage, total);
    if (bar_) bar_->set(step);
    if (step == total) end();
  }
  // Of the stages that have ended.
  const nlohmann::ordered_json& seconds() const { return seconds_; }

 private:
  using Clock = std::chrono::steady_clock;

  void begin(const std::string& stage, int64_t total) {
    end();
    stage_ = stage;
    start_ = Clock::now();
    static const std::map<std::string, std::string> texts = {
        {"encode", "encoding the prompt"}, {"denoise", "denoising"}, {"decode", "decoding"}};
    auto text = texts.find(stage_);
    bar_ = std::make_unique<ProgressBar>(text == texts.end() ? stage_ : text->second, total,
                                         ProgressOptions{.mode = mode_, .output = {}, .now = {}});
  }
  void end() {
    if (!bar_) return;
    bar_->finish();
    bar_.reset();
    auto now = Clock::now();
    seconds_[stage_] = std::chrono::duration<double>(now - start_).count();
    if (trace_) trace_->complete("stage", stage_, start_, now, "stages");
  }

  ProgressMode mode_;
  Trace* trace_;
  std::string stage_;
  Clock::time_point start_;
  std::unique_ptr<ProgressBar> bar_;
  nlohmann::ordered_json seconds_ = nlohmann::ordered_json::object();
};

}  // namespace ferry::cli
