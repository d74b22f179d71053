#include "ferry/pipelines/hub.h"

#include <cstdlib>
#include <regex>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"

namespace ferry::pipelines {

namespace fs = std::filesystem;

std::optional<HubName> HubName::parse(const std::string& text) {
  static const std::regex pattern(
      "([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@([A-Za-z0-9][A-Za-z0-9._/-]*))?");
  std::smatch match;
  if (!std::regex_match(text, match, pattern)) return std::nullopt;
  HubName name{match[1], match[3]};
  // ".." would leave the cache.
  if (text.find("..") != std::string::npos) return std::nullopt;
  return name;
}

std::string HubName::download_command() const {
  return "hf download " + repo + (revision.empty() ? "" : " --revision " + revision);
}

fs::path hub_cache_folder() {
  auto variable = [](const char* name) -> std::string {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
    if (auto value = variable(name); !value.empty()) return value;
  }
  if (auto home = variable("HF_HOME"); !home.empty()) return fs::path(home) / "hub";
  if (auto cache = variable("XDG_CACHE_HOME"); !cache.empty())
    return fs::path(cache) / "huggingface" / "hub";
  return fs::path(variable("HOME")) / ".cache" / "huggingface" / "hub";
}

fs::path find_snapshot(const HubName& name) {
  fs::path cache = hub_cache_folder();
  std::string folder = "models--" + name.repo;
  folder.replace(folder.find('/'), 1, "--");
  fs::path repo = cache / folder;
  std::string revision = name.revision.empty() ? "main" : name.revision;
  std::string commit = revision;
  if (fs::is_regular_file(repo / "refs" / revision)) {
    commit = io::read_text_file(repo / "refs" / revision, 4096);
    commit.erase(commit.find_last_not_of(" \r\n") + 1);
  }
  fs::path snapshot = repo / "snapshots" / commit;
  if (commit.empty() || commit.find('/') != std::string::npos || !fs::is_directory(snapshot)) {
    throw_error<IoError>(
        "{}{} is neither a folder nor in the Hugging Face cache ({}); download it with:\n  {}",
        name.repo, name.revision.empty() ? "" : "@" + name.revision, cache.string(),
        name.download_command());
  }
  return snapshot;
}

fs::path resolve_folder(const std::string& text) {
  if (fs::is_directory(text)) return text;
  if (fs::exists(text))
    throw_error<IoError>("{}: is a file, expected the folder of a pipeline", text);
  if (auto name = HubName::parse(text)) return find_snapshot(*name);
  throw_error<IoError>("{}: no such folder (and not a name on the Hugging Face Hub, org/repo)",
                       text);
}

}  // namespace ferry::pipelines
