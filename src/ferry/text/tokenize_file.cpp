#include "ferry/text/tokenize_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "ferry/io/atomic_file.h"
#include "ferry/io/json_file.h"
#include "ferry/text/json_view.h"
#include "ferry/text/tokenizer.h"

namespace ferry::text {

namespace fs = std::filesystem;

void tokenize_file(const fs::path& dir, const fs::path& input, const fs::path& output,
                   std::optional<int64_t> max_length) {
  const auto tokenizer = Tokenizer::from_pretrained(dir);
  EncodeOptions options;
  options.max_length = max_length;
  options.truncation = max_length.has_value();

  const std::string lines = io::read_text_file(input);
  std::string_view rest = lines;
  io::AtomicFile out(output);
  for (size_t number = 1; !rest.empty(); ++number) {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const auto where = fmt::format("{}: line {}", input.string(), number);
    const std::string text = JsonView::parse(rest.substr(0, end), where).string();
    rest.remove_prefix(std::min(end + 1, rest.size()));
    const std::string ids = nlohmann::json(tokenizer->encode(text, options).ids).dump() + '\n';
    out.write(std::as_bytes(std::span(ids)));
  }
  out.commit();
}

}  // namespace ferry::text
