#include "ferry/pipelines/stop_hook.h"

#include <algorithm>

namespace ferry::pipelines {
namespace {

constexpr const char* kName = "stop";

class StopHook : public nn::ModuleHook {
 public:
  explicit StopHook(StopToken stop) : stop_(std::move(stop)) {}
  void before(nn::Module&) override { stop_.throw_if_stopped(); }

 private:
  StopToken stop_;
};

bool is_list_entry(const std::string& path) {
  size_t dot = path.rfind('.');
  std::string last = dot == std::string::npos ? path : path.substr(dot + 1);
  return !last.empty() &&
         std::all_of(last.begin(), last.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

StopHooks::StopHooks(models::Model& root, const StopToken& stop) : root_(root) {
  root.set_load_stop(stop);
  auto hook = std::make_shared<StopHook>(stop);
  for (const auto& entry : root.named_modules()) {
    auto* module = dynamic_cast<nn::Module*>(entry.value().get());
    if (!module || !is_list_entry(entry.key()) || module->find_hook(kName)) continue;
    module->add_hook(kName, hook);
    hooked_.push_back(module);
  }
}

StopHooks::~StopHooks() {
  root_.set_load_stop({});
  for (nn::Module* module : hooked_) module->remove_hook(kName);
}

}  // namespace ferry::pipelines
