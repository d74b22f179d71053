#include "plan_report.h"

#include <fmt/format.h>

#include <algorithm>

#include "ferry/base/units.h"
#include "ferry/offload/timeline.h"
#include "ferry/tensor/dtype.h"

namespace ferry::cli {

namespace {

using offload::Home;
using offload::Placement;

struct Row {  // equal blocks, or layers outside of blocks
  std::string label;
  std::string prefix;  // of blocks; "" otherwise
  size_t first = 0, last = 0, blocks = 0;
  uint64_t block_bytes = 0;
  uint64_t bytes = 0, resident = 0, disk = 0, host = 0, pack = 0;
  double compute_s = 0;

  void add(const Row& other) {
    bytes += other.bytes;
    resident += other.resident;
    disk += other.disk;
    host += other.host;
    pack += other.pack;
    compute_s += other.compute_s;
  }
};

// "blocks.12.attn.to_q" -> "blocks." and 12
bool split_block(const std::string& name, std::string& prefix, size_t& index) {
  for (size_t i = 1; i < name.size(); ++i) {
    if (name[i - 1] != '.' || !isdigit(name[i])) continue;
    size_t end = i;
    while (end < name.size() && isdigit(name[end])) ++end;
    if (end < name.size() && name[end] != '.') continue;
    prefix = name.substr(0, i);
    index = std::stoul(name.substr(i, end - i));
    return true;
  }
  return false;
}

std::vector<Row> fold(const PlannedComponent& component) {
  std::vector<Row> blocks;
  for (size_t i = 0; i < component.groups.size(); ++i) {
    const offload::GroupCost& group = component.groups[i];
    Row one;
    size_t index = 0;
    const bool block = split_block(group.name, one.prefix, index);
    one.label = group.name;
    one.first = one.last = index;
    one.blocks = 1;
    one.bytes = group.size_bytes;
    one.compute_s = group.compute_s;
    const bool resident = component.plan.placements[i] == Placement::resident;
    const Home home = component.plan.homes[i];
    (resident             ? one.resident
     : home == Home::host ? one.host
     : home == Home::pack ? one.pack
                          : one.disk) = group.size_bytes;
    Row* before = blocks.empty() ? nullptr : &blocks.back();
    if (before && block && before->prefix == one.prefix && before->last == index) {
      before->add(one);
    } else if (before && !block && before->prefix.empty()) {
      before->add(one);
      before->last = ++before->blocks;
      before->label = before->label.substr(0, before->label.find(" ..")) + " .. " + group.name;
    } else {
      blocks.push_back(one);
    }
  }
  std::vector<Row> rows;
  for (Row& block : blocks) {
    block.block_bytes = block.bytes;
    Row* before = rows.empty() ? nullptr : &rows.back();
    if (before && !block.prefix.empty() && before->prefix == block.prefix &&
        before->block_bytes == block.block_bytes && before->last + 1 == block.first) {
      before->last = block.last;
      ++before->blocks;
      before->add(block);
    } else {
      rows.push_back(block);
    }
  }
  for (Row& row : rows) {
    if (row.prefix.empty()) continue;
    row.label = row.blocks == 1 ? fmt::format("{}{}", row.prefix, row.first)
                                : fmt::format("{}{} to {}", row.prefix, row.first, row.last);
  }
  return rows;
}

std::string bytes_or_dash(uint64_t bytes) {
  return bytes == 0 ? "-" : format_bytes(bytes);
}

std::string table(const PlannedComponent& component, bool link) {
  const std::vector<Row> rows = fold(component);
  size_t width = 6;
  for (const Row& row : rows) width = std::max(width, row.label.size());
  const bool host = component.plan.host_bytes > 0;
  bool pack = false;
  for (const Row& row : rows) pack |= row.pack > 0;
  std::string text = fmt::format("{:{}}  {:>10}  {:>10}  {:>10}", "layers", width, "weights",
                                 link ? "on device" : "in memory", "from disk");
  if (host) text += fmt::format("  {:>10}", "from host");
  if (pack) text += fmt::format("  {:>10}", "from pack");
  text += fmt::format("  {:>9}\n", "compute");
  Row all;
  auto line = [&](const std::string& label, const Row& row) {
    text += fmt::format("{:{}}  {:>10}  {:>10}  {:>10}", label, width, format_bytes(row.bytes),
                        bytes_or_dash(row.resident), bytes_or_dash(row.disk));
    if (host) text += fmt::format("  {:>10}", bytes_or_dash(row.host));
    if (pack) text += fmt::format("  {:>10}", bytes_or_dash(row.pack));
    text += fmt::format("  {:>9}\n", format_duration(row.compute_s));
  };
  for (const Row& row : rows) {
    line(row.label, row);
    all.add(row);
  }
  if (rows.size() > 1) line("all", all);
  return text;
}

std::string bound_text(const offload::Prediction& p) {
  switch (p.bound) {
    case offload::Bound::compute:
      return "compute is the limit: weights arrive in time";
    case offload::Bound::disk:
      return "the disk is the limit";
    case offload::Bound::link:
      return "the link to the device is the limit";
    case offload::Bound::decode:
      return "decoding packs is the limit";
    case offload::Bound::room:
      return "memory is too small to read ahead";
  }
  return "";
}

std::string memory_lines(const PlannedComponent& c, const PlanRequest& request, uint64_t small) {
  const bool link = request.hardware.link_bytes_per_s > 0;
  std::string text;
  auto line = [&](const char* what, uint64_t bytes, const std::string& note) {
    if (bytes > 0) text += fmt::format("  {:<28}{:>10}  {}\n", what, format_bytes(bytes), note);
  };
  const auto residents =
      std::count(c.plan.placements.begin(), c.plan.placements.end(), offload::Placement::resident);
  line("weights that stay", c.plan.resident_bytes,
       fmt::format("{} of {} layers", residents, c.groups.size()));
  line("arena", c.plan.arena_bytes, "through which the others are streamed");
  line("small tensors", small, "of all components");
  if (!link) line("staging", c.plan.staging_bytes, "packed bytes on their way");
  line("activations", c.activation_bytes, c.workload.tiled ? "estimated, in tiles" : "estimated");
  line("context", request.hardware.context_bytes, "what the device's runtime takes");
  if (request.weights_memory_bytes) {
    const uint64_t weights = small + c.plan.peak_bytes();
    line("weights in all", weights,
         fmt::format("of {} (--weights-memory)", format_bytes(*request.weights_memory_bytes)));
  }
  text += fmt::format(
      "  {:<28}{:>10}{}\n", "predicted peak", format_bytes(c.peak_bytes),
      request.memory_bytes ? fmt::format("  of {}", format_bytes(*request.memory_bytes)) : "");
  return text;
}

}  // namespace

std::string plan_text(const std::string& title, const std::vector<PlannedComponent>& components,
                      const PlanRequest& request, const std::vector<NextGiB>& next) {
  const offload::Hardware& hardware = request.hardware;
  const bool link = hardware.link_bytes_per_s > 0;
  const PlannedComponent& main = pipelines::main_component(components);
  uint64_t small = 0;
  for (const PlannedComponent& component : components) small += component.small_bytes;

  std::string text =
      fmt::format("{} on {}: {}\n{} x {} pixels, {} text tokens, {} step{}; disk {}{}\n\n", title,
                  hardware.name, hardware.description, request.workload.width,
                  request.workload.height, request.workload.text_tokens, request.steps,
                  request.steps == 1 ? "" : "s", format_rate(hardware.disk_bytes_per_s),
                  link ? fmt::format(", link {}", format_rate(hardware.link_bytes_per_s)) : "");

  // One line a component.
  if (components.size() > 1) {
    text += fmt::format("{:<16}  {:>9}  {:>9}  {:>9}  {:>9}  {:>5}  {:>9}\n", "component",
                        "weights", "peak", "first run", "next runs", "runs", "in all");
    double all = 0;
    for (const PlannedComponent& c : components) {
      all += c.total_s();
      text +=
          fmt::format("{:<16}  {:>9}  {:>9}  {:>9}  {:>9}  {:>5}  {:>9}{}\n", c.name,
                      format_bytes(c.weight_bytes), format_bytes(c.peak_bytes),
                      format_duration(c.plan.prediction.first_step_s),
                      c.passes > 1 ? format_duration(c.plan.prediction.step_s) : "-", c.passes,
                      format_duration(c.total_s()), c.workload.tiled ? "  decodes in tiles" : "");
    }
    text += fmt::format("{:<16}  {:>9}  {:>9}  {:>9}  {:>9}  {:>5}  {:>9}\n\n", "together", "", "",
                        "", "", "", format_duration(all));
  }

  const offload::Prediction& p = main.plan.prediction;
  text += fmt::format("{}: {}\n\n", main.name, main.model->class_name());
  text += table(main, link);
  text += fmt::format("\n{}\n", link ? "memory of the device" : "memory");
  text += memory_lines(main, request, small);
  if (link) {
    text += "host memory (pinned)\n";
    if (main.plan.host_bytes > 0) {
      text += fmt::format("  {:<28}{:>10}  weights that wait there\n", "homes",
                          format_bytes(main.plan.host_bytes));
    }
    text += fmt::format("  {:<28}{:>10}  on the way from disk\n", "staging",
                        format_bytes(main.plan.staging_bytes));
    text += fmt::format("  {:<28}{:>10}{}\n", "predicted peak",
                        format_bytes(main.plan.host_peak_bytes()),
                        request.host_memory_bytes > 0
                            ? fmt::format("  of {}", format_bytes(request.host_memory_bytes))
                            : "");
  }
  const bool steady = main.passes > 1;
  text += fmt::format("\na {} takes {}: {}\n", steady ? "step" : "run",
                      format_duration(steady ? p.step_s : p.first_step_s), bound_text(p));
  text += fmt::format("  busy: compute {}", format_duration(p.compute_s));
  if (link) {
    text += fmt::format(", link {} for {}", format_duration(p.link_s), format_bytes(p.link_bytes));
  }
  text += fmt::format(", disk {} for {}", format_duration(p.disk_s), format_bytes(p.disk_bytes));
  if (p.decode_s > 0) text += fmt::format(", decoding {}", format_duration(p.decode_s));
  text += "\n";
  if (steady) text += fmt::format("  the first one, cold: {}\n", format_duration(p.first_step_s));
  for (const NextGiB& gib : next) {
    const double now = steady ? p.step_s : p.first_step_s;
    text += fmt::format("  with 1 GiB more of {}: {} ({:+.1f}%)\n", gib.what,
                        format_duration(gib.step_s), 100 * (gib.step_s / now - 1));
  }

  const offload::Simulation simulation =
      offload::simulate(main.groups, main.options, main.plan, {.record = true});
  text += fmt::format("\none {} in time ('#' busy, '+' half, '.' less)\n", steady ? "step" : "run");
  text += offload::draw_ascii(
      steady ? simulation.spans : simulation.first_spans,
      steady ? simulation.prediction.step_s : simulation.prediction.first_step_s);
  return text;
}

nlohmann::ordered_json plan_json(const std::vector<PlannedComponent>& components,
                                 const PlanRequest& request, const std::vector<NextGiB>& next) {
  using Json = nlohmann::ordered_json;
  Json json = {{"hardware", offload::to_json(request.hardware)},
               {"width", request.workload.width},
               {"height", request.workload.height},
               {"text_tokens", request.workload.text_tokens},
               {"steps", request.steps},
               {"host_memory_bytes", request.host_memory_bytes}};
  if (request.memory_bytes) json["memory_bytes"] = *request.memory_bytes;
  if (request.weights_memory_bytes) json["weights_memory_bytes"] = *request.weights_memory_bytes;
  json["components"] = Json::array();
  double all = 0;
  for (const PlannedComponent& c : components) {
    all += c.total_s();
    const offload::Prediction& p = c.plan.prediction;
    Json groups = Json::array();
    for (size_t i = 0; i < c.groups.size(); ++i) {
      const bool resident = c.plan.placements[i] == Placement::resident;
      const Home home = c.plan.homes[i];
      groups.push_back({{"name", c.groups[i].name},
                        {"bytes", c.groups[i].size_bytes},
                        {"compute_s", c.groups[i].compute_s},
                        {"placement", resident ? "resident" : "streamed"},
                        {"home", home == Home::host   ? "host"
                                 : home == Home::pack ? "pack"
                                                      : "disk"}});
    }
    json["components"].push_back({{"name", c.name},
                                  {"class", c.model->class_name()},
                                  {"weight_bytes", c.weight_bytes},
                                  {"small_bytes", c.small_bytes},
                                  {"table_bytes", c.table_bytes},
                                  {"unused_bytes", c.unused_bytes},
                                  {"activation_bytes", c.activation_bytes},
                                  {"tiled", c.workload.tiled},
                                  {"passes", c.passes},
                                  {"resident_bytes", c.plan.resident_bytes},
                                  {"arena_bytes", c.plan.arena_bytes},
                                  {"staging_bytes", c.plan.staging_bytes},
                                  {"host_bytes", c.plan.host_bytes},
                                  {"streamed_bytes", c.plan.streamed_bytes},
                                  {"peak_bytes", c.peak_bytes},
                                  {"host_peak_bytes", c.plan.host_peak_bytes()},
                                  {"step_s", p.step_s},
                                  {"first_step_s", p.first_step_s},
                                  {"compute_s", p.compute_s},
                                  {"disk_s", p.disk_s},
                                  {"link_s", p.link_s},
                                  {"decode_s", p.decode_s},
                                  {"disk_bytes", p.disk_bytes},
                                  {"link_bytes", p.link_bytes},
                                  {"bound", offload::bound_name(p.bound)},
                                  {"groups", groups}});
  }
  json["total_s"] = all;
  json["next_gib"] = Json::array();
  for (const NextGiB& gib : next)
    json["next_gib"].push_back({{"of", gib.what}, {"step_s", gib.step_s}});
  return json;
}

}  // namespace ferry::cli
