// A simulated step as a picture: what each resource does, one line each, over time.
#pragma once

#include <string>
#include <vector>

#include "ferry/offload/simulate.h"

namespace ferry::offload {

// Lines of `columns` characters for compute, link, disk and decode (those that did anything) under
// a time axis: '#' busy all of the time a column stands for, '+' half of it or more, '.' less.
std::string draw_ascii(const std::vector<Span>& spans, double seconds, int columns = 72);

// The same as an SVG document in which every bar names its group when pointed at. Text in names is
// escaped.
std::string draw_svg(const std::vector<Span>& spans, double seconds,
                     const std::vector<GroupCost>& groups, const Plan& plan,
                     const std::string& title);

const char* resource_name(Resource resource);

}  // namespace ferry::offload
