// ferry cache: what the pack cache holds.
#include <chrono>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/weights/pack_cache.h"

namespace ferry::cli {
namespace {

struct CacheOptions {
  std::vector<std::string> keys;
  bool json = false, all = false, faulty = false;
};

double seconds_ago(std::filesystem::file_time_type time) {
  return std::chrono::duration<double>(std::filesystem::file_time_type::clock::now() - time)
      .count();
}

// The entries that the given keys, or beginnings of keys, name. Throws ArgumentError for one that
// names none or several.
std::vector<weights::CacheEntry> named(const std::vector<weights::CacheEntry>& entries,
                                       const std::vector<std::string>& keys) {
  std::vector<weights::CacheEntry> found;
  for (const std::string& key : keys) {
    size_t matches = 0;
    for (const weights::CacheEntry& entry : entries) {
      if (key.empty() || !entry.key.starts_with(key)) continue;
      ++matches;
      found.push_back(entry);
    }
    if (matches != 1)
      throw_error<ArgumentError>(
          "\"{}\" names {} entries of the cache, expected one; ferry cache "
          "ls shows their keys",
          key, matches);
  }
  return found;
}

int run_list(const CacheOptions& options) {
  weights::PackCache cache;
  const auto entries = cache.list();
  uint64_t sum = 0;
  for (const weights::CacheEntry& entry : entries) sum += entry.size_bytes;
  if (options.json) {
    nlohmann::ordered_json json = {{"folder", cache.folder().string()},
                                   {"limit_bytes", cache.limit_bytes()},
                                   {"bytes", sum},
                                   {"entries", nlohmann::ordered_json::array()}};
    for (const weights::CacheEntry& entry : entries) {
      json["entries"].push_back({{"key", entry.key},
                                 {"size_bytes", entry.size_bytes},
                                 {"seconds_since_use", seconds_ago(entry.last_used)},
                                 {"recipe", entry.recipe},
                                 {"origin", entry.origin},
                                 {"fault", entry.fault}});
    }
    fmt::print("{}\n", json.dump(2));
    return 0;
  }
  for (const weights::CacheEntry& entry : entries) {
    fmt::print("{}  {:>9}  used {:>8} ago  {}{}\n", entry.key.substr(0, 12),
               format_bytes(entry.size_bytes), format_duration(seconds_ago(entry.last_used)),
               entry.origin, entry.fault.empty() ? "" : "  NOT USED: " + entry.fault);
  }
  fmt::print("{}: {} in {} {}, at most {}\n", cache.folder().string(), format_bytes(sum),
             entries.size(), entries.size() == 1 ? "entry" : "entries",
             format_bytes(cache.limit_bytes()));
  return 0;
}

int run_verify(const CacheOptions& options, const Context& context) {
  weights::PackCache cache;
  auto entries = cache.list();
  if (!options.keys.empty()) entries = named(entries, options.keys);
  bool good = true;
  for (const weights::CacheEntry& entry : entries) {
    const std::string fault = cache.verify(entry.key, context.stop);
    good &= fault.empty();
    fmt::print("{}  {:>9}  {}\n", entry.key.substr(0, 12), format_bytes(entry.size_bytes),
               fault.empty() ? "good" : "DAMAGED: " + fault);
  }
  if (!good)
    fmt::print("remove what is damaged with ferry cache rm; it is made again when needed\n");
  return good ? 0 : 1;
}

int run_remove(const CacheOptions& options) {
  if (options.keys.empty() && !options.all && !options.faulty)
    throw_error<ArgumentError>("ferry cache rm: give keys, --faulty or --all");
  weights::PackCache cache;
  auto entries = cache.list();
  if (options.faulty) std::erase_if(entries, [](const auto& entry) { return entry.fault.empty(); });
  if (!options.all && !options.faulty) entries = named(entries, options.keys);
  int failures = 0;
  for (const weights::CacheEntry& entry : entries) {
    if (cache.remove(entry.key)) {
      fmt::print("removed {} ({})\n", entry.key.substr(0, 12), format_bytes(entry.size_bytes));
    } else {
      fmt::print(stderr, "{}: another process is making it, or it is gone\n",
                 entry.key.substr(0, 12));
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace

Command add_cache(CLI::App& app) {
  auto options = std::make_shared<CacheOptions>();
  CLI::App* command = app.add_subcommand("cache", "Show, check or empty the pack cache");
  command->require_subcommand(1);
  command->footer(
      "The cache is $FERRY_CACHE_DIR, else $XDG_CACHE_HOME/ferry, else ~/.cache/ferry. Above\n"
      "$FERRY_CACHE_LIMIT (default 64GiB) the least recently used packs are removed.");
  CLI::App* list = command->add_subcommand("ls", "what is in it, the most recently used first");
  list->add_flag("--json", options->json, "as JSON");
  CLI::App* verify = command->add_subcommand("verify", "read everything and check it");
  verify->add_option("key", options->keys, "only these (or the beginnings of keys)")
      ->type_name("KEY");
  CLI::App* remove = command->add_subcommand("rm", "remove entries");
  remove->add_option("key", options->keys, "keys, or their beginnings")->type_name("KEY");
  remove->add_flag("--all", options->all, "everything");
  remove->add_flag("--faulty", options->faulty, "entries that are never used");
  return {command, [options, list, verify](Context& context) {
            if (list->parsed()) return run_list(*options);
            if (verify->parsed()) return run_verify(*options, context);
            return run_remove(*options);
          }};
}

}  // namespace ferry::cli
