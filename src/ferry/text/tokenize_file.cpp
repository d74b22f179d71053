#include "ferry/text/tokenize_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "ferry/base/error.h"
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

  std::ifstream in(input);
  if (!in) throw_error<IoError>("{}: cannot open: {}", input.string(), std::strerror(errno));
  const fs::path temporary = output.string() + fmt::format(".{}.tmp", getpid());
  try {
    std::ofstream out(temporary, std::ios::trunc);
    size_t number = 0;
    for (std::string line; std::getline(in, line);) {
      const auto where = fmt::format("{}: line {}", input.string(), ++number);
      const std::string text = JsonView::parse(line, where).string();
      out << nlohmann::json(tokenizer->encode(text, options).ids).dump() << '\n';
    }
    out.close();
    if (!out)
      throw_error<IoError>("{}: cannot write: {}", temporary.string(), std::strerror(errno));
    fs::rename(temporary, output);
  } catch (...) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    throw;
  }
}

}  // namespace ferry::text
