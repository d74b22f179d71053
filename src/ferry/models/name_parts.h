// Dotted names and their parts.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace ferry::models {

// Whether one of the dotted parts of `name` is among `parts`: "decoder.wo.weight" has "wo".
inline bool has_part(const std::string& name, const std::vector<std::string>& parts) {
  size_t begin = 0;
  while (begin <= name.size()) {
    size_t end = std::min(name.find('.', begin), name.size());
    if (std::find(parts.begin(), parts.end(), name.substr(begin, end - begin)) != parts.end())
      return true;
    begin = end + 1;
  }
  return false;
}

}  // namespace ferry::models
