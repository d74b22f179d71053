// Where a pipeline's folder is: a path, or a name in the local Hugging Face cache. Opens no network
// connection.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace ferry::pipelines {

// "org/repo" or "org/repo@revision" (a branch, tag or commit).
struct HubName {
  std::string repo;
  std::string revision;  // empty: main

  // Nothing if `text` is no such name.
  static std::optional<HubName> parse(const std::string& text);
  // The command that brings it into the cache.
  std::string download_command() const;
};

// HF_HUB_CACHE, else $HF_HOME/hub, else $XDG_CACHE_HOME/huggingface/hub, else
// ~/.cache/huggingface/hub.
std::filesystem::path hub_cache_folder();

// The snapshot of `name` in the cache. Throws IoError with the download command if it is not there.
std::filesystem::path find_snapshot(const HubName& name);

// `text` itself if such a folder exists, else its snapshot. Throws IoError.
std::filesystem::path resolve_folder(const std::string& text);

}  // namespace ferry::pipelines
