#include "ferry/text/decoder.h"

#include <algorithm>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/byte_level.h"
#include "ferry/text/normalizer.h"

namespace ferry::text {
namespace {

using DecoderPtr = std::shared_ptr<const Decoder>;
using Tokens = std::vector<std::string>;

template <class Function>
class Step final : public Decoder {
 public:
  explicit Step(Function function) : function_(std::move(function)) {}
  Tokens decode(Tokens tokens) const override { return function_(std::move(tokens)); }

 private:
  Function function_;
};

template <class Function>
DecoderPtr step(Function function) {
  return std::make_shared<Step<Function>>(std::move(function));
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  if (from.empty()) return;
  for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
}

std::string join(const Tokens& tokens) {
  std::string out;
  for (const std::string& token : tokens) out += token;
  return out;
}

Tokens decode_byte_level(const Tokens& tokens) {
  std::string bytes;
  for (const std::string& token : tokens) bytes += characters_to_bytes(token).value_or(token);
  return {to_utf8_lossy(bytes)};
}

// The byte that a token such as <0x0A> stands for, or -1.
int byte_of_token(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    const char lower = static_cast<char>(c | 0x20);
    const int digit = c >= '0' && c <= '9'           ? c - '0'
                      : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                                                     : -1;
    if (digit < 0) return -1;
    byte = byte * 16 + digit;
  }
  return byte;
}

Tokens decode_byte_fallback(const Tokens& tokens) {
  Tokens out;
  std::string bytes;
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (to_utf8_lossy(bytes) == bytes) {
      out.push_back(bytes);
    } else {
      out.insert(out.end(), bytes.size(), "\uFFFD");
    }
    bytes.clear();
  };
  for (const std::string& token : tokens) {
    if (const int byte = byte_of_token(token); byte >= 0) {
      bytes += static_cast<char>(byte);
    } else {
      flush();
      out.push_back(token);
    }
  }
  flush();
  return out;
}

// Removes up to `start` and `stop` times `content` from the ends of each token.
DecoderPtr strip_from_json(const JsonView& json) {
  std::string content;
  append_utf8(content, json.at("content").character());
  const uint32_t start = json.at("start").id();
  const uint32_t stop = json.at("stop").id();
  return step([=](Tokens tokens) {
    for (std::string& token : tokens) {
      std::string_view rest = token;
      for (uint32_t i = 0; i < start && rest.starts_with(content); ++i) {
        rest.remove_prefix(content.size());
      }
      for (uint32_t i = 0; i < stop && rest.ends_with(content); ++i) {
        rest.remove_suffix(content.size());
      }
      token = std::string(rest);
    }
    return tokens;
  });
}

void clean_up_wordpiece(std::string& token) {
  constexpr std::pair<std::string_view, std::string_view> kRules[] = {
      {" .", "."},   {" ?", "?"},     {" !", "!"},    {" ,", ","},
      {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},  {" do not", " don't"},
      {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
  for (const auto& [from, to] : kRules) replace_all(token, from, to);
}

DecoderPtr wordpiece_from_json(const JsonView& json) {
  return step(
      [prefix = json.at("prefix").string(), cleanup = json.at("cleanup").boolean()](Tokens tokens) {
        for (size_t i = 0; i < tokens.size(); ++i) {
          if (i > 0) {
            tokens[i] =
                tokens[i].starts_with(prefix) ? tokens[i].substr(prefix.size()) : " " + tokens[i];
          }
          if (cleanup) clean_up_wordpiece(tokens[i]);
        }
        return tokens;
      });
}

DecoderPtr replace_from_json(const JsonView& json) {
  return step([pattern = pattern_from_json(json.at("pattern")),
               content = json.at("content").string()](Tokens tokens) {
    for (std::string& token : tokens) {
      std::string out;
      for (const Span& span : pattern->find(token)) {
        out += span.matched ? content : token.substr(span.begin, span.end - span.begin);
      }
      token = std::move(out);
    }
    return tokens;
  });
}

DecoderPtr sequence_from_json(const JsonView& json) {
  std::vector<DecoderPtr> steps;
  for (const JsonView& element : json.at("decoders").elements()) {
    steps.push_back(Decoder::from_json(element));
  }
  return step([steps = std::move(steps)](Tokens tokens) {
    for (const DecoderPtr& next : steps) tokens = next->decode(std::move(tokens));
    return tokens;
  });
}

}  // namespace

DecoderPtr Decoder::byte_level() {
  return step(decode_byte_level);
}

DecoderPtr Decoder::metaspace(char32_t replacement, PrependScheme scheme) {
  std::string mark;
  append_utf8(mark, replacement);
  return step([mark, scheme](Tokens tokens) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      replace_all(tokens[i], mark, i == 0 && scheme != PrependScheme::never ? "" : " ");
    }
    return tokens;
  });
}

DecoderPtr Decoder::from_json(const JsonView& json) {
  const std::string type = json.at("type").string();
  if (type == "Sequence") return sequence_from_json(json);
  if (type == "ByteLevel") return byte_level();
  if (type == "Metaspace") {
    return metaspace(json.at("replacement").character(), prepend_scheme_from_json(json));
  }
  if (type == "Replace") return replace_from_json(json);
  if (type == "ByteFallback") return step(decode_byte_fallback);
  if (type == "Fuse") return step([](const Tokens& tokens) { return Tokens{join(tokens)}; });
  if (type == "Strip") return strip_from_json(json);
  if (type == "WordPiece") return wordpiece_from_json(json);
  if (type == "BPEDecoder") {
    return step([suffix = json.at("suffix").string()](Tokens tokens) {
      for (size_t i = 0; i < tokens.size(); ++i) {
        replace_all(tokens[i], suffix, i + 1 == tokens.size() ? "" : " ");
      }
      return tokens;
    });
  }
  json.at("type").fail(fmt::format("'{}' is not a decoder that ferry knows", type));
}

}  // namespace ferry::text
