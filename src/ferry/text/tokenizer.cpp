#include "ferry/text/tokenizer.h"

#include <algorithm>
#include <array>
#include <utility>

#include "ferry/base/error.h"
#include "ferry/text/tokenizer_backend.h"
#include "ferry/text/unicode.h"

namespace ferry::text {
namespace {

constexpr std::array kFiles = {"tokenizer.json",
                               "tokenizer_config.json",
                               "special_tokens_map.json",
                               "added_tokens.json",
                               "vocab.json",
                               "merges.txt",
                               "spiece.model",
                               "chat_template.jinja"};

// PreTrainedTokenizerBase.clean_up_tokenization
void clean_up(std::string& text) {
  constexpr std::pair<std::string_view, std::string_view> kRules[] = {
      {" .", "."},     {" ?", "?"},   {" !", "!"},   {" ,", ","},     {" ' ", "'"},
      {" n't", "n't"}, {" 'm", "'m"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
  for (const auto& [from, to] : kRules) {
    for (size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
      text.replace(at, from.size(), to);
    }
  }
}

}  // namespace

Tokenizer::Tokenizer() : backend_(std::make_unique<TokenizerBackend>()) {}
Tokenizer::~Tokenizer() = default;

Encoding Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  const std::string owned(text);
  return std::move(encode(std::span(&owned, 1), options).front());
}

std::vector<Encoding> Tokenizer::encode(std::span<const std::string> texts,
                                        const EncodeOptions& options) const {
  const int64_t max_length = options.max_length.value_or(model_max_length_);
  const auto added = options.add_special_tokens
                         ? static_cast<int64_t>(backend_->post_processor.added_tokens())
                         : 0;
  if (max_length < (options.truncation ? added : 0)) {
    throw_error<ArgumentError>("tokenizer: max_length is {}, but the special tokens alone take {}",
                               max_length, added);
  }
  std::vector<Encoding> batch;
  batch.reserve(texts.size());
  for (const std::string& text : texts) {
    check_utf8(text, "tokenizer input");
    std::vector<uint32_t> ids = backend_->tokenize(text, split_special_tokens_);
    if (options.truncation && static_cast<int64_t>(ids.size()) > max_length - added) {
      const ptrdiff_t excess = static_cast<int64_t>(ids.size()) - (max_length - added);
      if (truncate_left_) {
        ids.erase(ids.begin(), ids.begin() + excess);
      } else {
        ids.resize(ids.size() - static_cast<size_t>(excess));
      }
    }
    if (options.add_special_tokens) ids = backend_->post_processor.process(std::move(ids));
    Encoding encoding;
    encoding.ids.assign(ids.begin(), ids.end());
    encoding.attention_mask.assign(ids.size(), 1);
    batch.push_back(std::move(encoding));
  }
  pad(batch, options);
  return batch;
}

void Tokenizer::pad(std::vector<Encoding>& batch, const EncodeOptions& options) const {
  if (options.padding == Padding::none) return;
  size_t length = 0;
  if (options.padding == Padding::max_length) {
    const int64_t max_length = options.max_length.value_or(model_max_length_);
    if (max_length == kNoMaxLength) {
      throw_error<ArgumentError>(
          "tokenizer: padding to max_length, but no max_length is given and the tokenizer's folder "
          "states no model_max_length");
    }
    length = static_cast<size_t>(max_length);
  } else {
    for (const Encoding& encoding : batch) length = std::max(length, encoding.ids.size());
  }
  const auto pad_id = id_of(special_tokens_.pad);
  if (!pad_id) throw_error<ArgumentError>("tokenizer: padding asked for, but it has no pad token");
  for (Encoding& encoding : batch) {
    if (encoding.ids.size() >= length) continue;
    const size_t missing = length - encoding.ids.size();
    const auto fill = [&](std::vector<int64_t>& values, int64_t value) {
      values.insert(pad_left_ ? values.begin() : values.end(), missing, value);
    };
    fill(encoding.ids, *pad_id);
    fill(encoding.attention_mask, 0);
  }
}

std::string Tokenizer::decode(std::span<const int64_t> ids, bool skip_special_tokens) const {
  std::vector<uint32_t> known;
  known.reserve(ids.size());
  for (const int64_t id : ids) {
    if (id < 0 || id > UINT32_MAX) throw_error<ArgumentError>("decode: {} is not an id", id);
    known.push_back(static_cast<uint32_t>(id));
  }
  std::string text = backend_->decode(known, skip_special_tokens);
  if (clean_up_tokenization_spaces_ && backend_->model->allows_clean_up()) clean_up(text);
  return text;
}

int64_t Tokenizer::size() const {
  auto size = static_cast<int64_t>(backend_->model->vocabulary_size());
  const auto& added = backend_->added.tokens();
  if (!added.empty()) size = std::max<int64_t>(size, int64_t{added.rbegin()->first} + 1);
  return size;
}

std::optional<int64_t> Tokenizer::token_to_id(std::string_view token) const {
  const auto id = backend_->id(token);
  return id ? std::optional<int64_t>(*id) : std::nullopt;
}

std::optional<std::string> Tokenizer::id_to_token(int64_t id) const {
  if (id < 0 || id > UINT32_MAX) return std::nullopt;
  const auto& added = backend_->added.tokens();
  if (const auto found = added.find(static_cast<uint32_t>(id)); found != added.end()) {
    return found->second.content;
  }
  const std::string* token = backend_->model->token(static_cast<uint32_t>(id));
  return token ? std::optional(*token) : std::nullopt;
}

std::optional<int64_t> Tokenizer::id_of(const std::optional<std::string>& token) const {
  return token ? token_to_id(*token) : std::nullopt;
}

void Tokenizer::save_pretrained(const std::filesystem::path& dir) const {
  if (dir_.empty()) {
    throw_error<ArgumentError>(
        "saving a tokenizer to {}: it was made from the pieces in a GGUF file and has no files of "
        "its own; load one from a tokenizer's folder",
        dir.string());
  }
  try {
    std::filesystem::create_directories(dir);
    for (const char* file : kFiles) {
      if (!std::filesystem::exists(dir_ / file)) continue;
      std::filesystem::copy_file(dir_ / file, dir / file,
                                 std::filesystem::copy_options::overwrite_existing);
    }
  } catch (const std::filesystem::filesystem_error& e) {
    throw_error<IoError>("saving a tokenizer to {}: {}", dir.string(), e.code().message());
  }
}

}  // namespace ferry::text
