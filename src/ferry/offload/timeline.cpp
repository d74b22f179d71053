#include "ferry/offload/timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "ferry/base/units.h"

namespace ferry::offload {

namespace {

constexpr std::array kRows = {Resource::compute, Resource::link, Resource::decode, Resource::disk};

std::vector<Resource> used_rows(const std::vector<Span>& spans) {
  std::vector<Resource> rows;
  for (Resource row : kRows) {
    if (std::any_of(spans.begin(), spans.end(), [&](const Span& s) { return s.resource == row; }))
      rows.push_back(row);
  }
  return rows;
}

std::string escaped(const std::string& text) {
  std::string safe;
  for (char c : text) {
    switch (c) {
      case '<':
        safe += "&lt;";
        break;
      case '>':
        safe += "&gt;";
        break;
      case '&':
        safe += "&amp;";
        break;
      case '"':
        safe += "&quot;";
        break;
      default:
        safe += c;
    }
  }
  return safe;
}

const char* colour(Resource resource) {
  switch (resource) {
    case Resource::compute:
      return "#3b7dd8";
    case Resource::link:
      return "#e0902f";
    case Resource::decode:
      return "#8a5fc0";
    case Resource::disk:
      return "#4a9d5b";
  }
  return "#000";
}

}  // namespace

const char* resource_name(Resource resource) {
  switch (resource) {
    case Resource::compute:
      return "compute";
    case Resource::disk:
      return "disk";
    case Resource::link:
      return "link";
    case Resource::decode:
      return "decode";
  }
  return "";
}

std::string draw_ascii(const std::vector<Span>& spans, double seconds, int columns) {
  if (seconds <= 0 || columns <= 0) return "";
  const std::string end = format_duration(seconds);
  std::string text = fmt::format("{:9}0{:>{}}\n", "", end, columns - 1);
  for (Resource row : used_rows(spans)) {
    std::vector<double> busy(static_cast<size_t>(columns), 0.0);
    const double column_s = seconds / columns;
    for (const Span& span : spans) {
      if (span.resource != row) continue;
      const int first = std::clamp(static_cast<int>(span.begin_s / column_s), 0, columns - 1);
      const int last = std::clamp(static_cast<int>(span.end_s / column_s), 0, columns - 1);
      for (int i = first; i <= last; ++i) {
        busy[static_cast<size_t>(i)] += std::max(
            0.0, std::min(span.end_s, (i + 1) * column_s) - std::max(span.begin_s, i * column_s));
      }
    }
    std::string line;
    for (double s : busy) {
      const double share = s / column_s;
      line += share > 0.95 ? '#' : share >= 0.5 ? '+' : share > 0.02 ? '.' : ' ';
    }
    text += fmt::format("{:<9}{}\n", resource_name(row), line);
  }
  return text;
}

std::string draw_svg(const std::vector<Span>& spans, double seconds,
                     const std::vector<GroupCost>& groups, const Plan& plan,
                     const std::string& title) {
  constexpr double kLeft = 80, kWidth = 1000, kTop = 40, kRow = 34, kBar = 24;
  const std::vector<Resource> rows = used_rows(spans);
  const double height = kTop + kRow * static_cast<double>(rows.size()) + 40;
  const double scale = seconds > 0 ? kWidth / seconds : 0;
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0f}\" height=\"{:.0f}\" "
      "font-family=\"sans-serif\" font-size=\"13\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
      "<text x=\"{}\" y=\"22\" font-size=\"15\">{}</text>\n",
      kLeft + kWidth + 20, height, kLeft, escaped(title));
  for (size_t r = 0; r < rows.size(); ++r) {
    const double y = kTop + kRow * static_cast<double>(r);
    svg += fmt::format("<text x=\"8\" y=\"{:.0f}\">{}</text>\n", y + 17, resource_name(rows[r]));
    svg +=
        fmt::format("<rect x=\"{}\" y=\"{:.0f}\" width=\"{}\" height=\"{}\" fill=\"#f0f0f0\"/>\n",
                    kLeft, y, kWidth, kBar);
    for (const Span& span : spans) {
      if (span.resource != rows[r] || span.group >= groups.size()) continue;
      const double width = (span.end_s - span.begin_s) * scale;
      const bool resident = plan.placements[span.group] == Placement::resident;
      svg += fmt::format(
          "<rect x=\"{:.2f}\" y=\"{:.0f}\" width=\"{:.2f}\" height=\"{}\" fill=\"{}\"{} "
          "stroke=\"white\" stroke-width=\"{}\"><title>{} {}: {} to {}</title></rect>\n",
          kLeft + span.begin_s * scale, y, std::max(width, 0.2), kBar, colour(rows[r]),
          resident ? " fill-opacity=\"0.55\"" : "", width > 4 ? 0.5 : 0, resource_name(rows[r]),
          escaped(groups[span.group].name), format_duration(span.begin_s),
          format_duration(span.end_s));
    }
  }
  const double axis = kTop + kRow * static_cast<double>(rows.size()) + 14;
  for (int i = 0; i <= 4; ++i) {
    const double x = kLeft + kWidth * i / 4;
    svg += fmt::format("<text x=\"{:.0f}\" y=\"{:.0f}\" text-anchor=\"{}\">{}</text>\n", x, axis,
                       i == 0   ? "start"
                       : i == 4 ? "end"
                                : "middle",
                       i == 0 ? "0" : format_duration(seconds * i / 4));
  }
  svg += fmt::format(
      "<text x=\"{}\" y=\"{:.0f}\" fill=\"#666\">paler: weights that stay in memory</text>\n",
      kLeft, axis + 18);
  return svg + "</svg>\n";
}

}  // namespace ferry::offload
