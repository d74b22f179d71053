#include "ferry/schedulers/scheduler.h"

#include "ferry/base/error.h"
#include "ferry/schedulers/scheduling_flow_match_euler_discrete.h"

namespace ferry::schedulers {

const std::vector<SchedulerClass>& scheduler_classes() {
  static const std::vector<SchedulerClass> classes = {
      {"FlowMatchEulerDiscreteScheduler",
       [](const nlohmann::ordered_json& config,
          const std::string& where) -> std::unique_ptr<Scheduler> {
         return std::make_unique<FlowMatchEulerDiscreteScheduler>(
             models::config_from_json<FlowMatchEulerDiscreteConfig>(config, where));
       }},
  };
  return classes;
}

std::unique_ptr<Scheduler> make_scheduler(const std::string& class_name,
                                          const nlohmann::ordered_json& config,
                                          const std::string& where) {
  std::string known;
  for (const SchedulerClass& entry : scheduler_classes()) {
    if (entry.name == class_name) {
      try {
        return entry.make(config, where);
      } catch (const ArgumentError& error) {
        throw_error<ArgumentError>("{}: {}", where, error.what());
      }
    }
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw_error<ArgumentError>("{}: ferry has no scheduler \"{}\"; it has: {}", where, class_name,
                             known);
}

std::unique_ptr<Scheduler> load_scheduler(const std::filesystem::path& folder_or_file,
                                          const std::string& class_name) {
  std::filesystem::path file = folder_or_file;
  if (std::filesystem::is_directory(file)) file /= "scheduler_config.json";
  nlohmann::ordered_json config = models::read_config(file);
  std::string name = class_name;
  if (name.empty()) {
    auto it = config.find("_class_name");
    if (it == config.end() || !it->is_string()) {
      throw_error<FormatError>(
          "{}: expected a key \"_class_name\" that names the scheduler's class", file.string());
    }
    name = it->get<std::string>();
  }
  return make_scheduler(name, config, file.string());
}

void Scheduler::save_pretrained(const std::filesystem::path& folder) const {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error)
    throw_error<IoError>("{}: cannot create the folder: {}", folder.string(), error.message());
  models::write_config(folder / "scheduler_config.json", config_json());
}

}  // namespace ferry::schedulers
