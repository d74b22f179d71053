// Tokenizer::from_pretrained: which files make which tokenizer, and which tokens are added to it.
// Ported from PreTrainedTokenizerBase._from_pretrained and TokenizersBackend of transformers 5.23.
#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/text/charsmap.h"
#include "ferry/text/clip_tokenizer.h"
#include "ferry/text/sentencepiece_model.h"
#include "ferry/text/t5_tokenizer.h"
#include "ferry/text/tokenizer.h"

namespace ferry::text {

namespace fs = std::filesystem;

namespace {

// PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, in its order, which is the order of addition.
constexpr std::array kNames = {"bos_token", "eos_token", "unk_token", "sep_token",
                               "pad_token", "cls_token", "mask_token"};

constexpr std::string_view kClipClass = "CLIPTokenizer";
constexpr std::string_view kT5Class = "T5Tokenizer";

bool is_standard_name(std::string_view name) {
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

// A special token as a config gives it: its text, or an object with its flags.
AddedToken special_from_json(const JsonView& json) {
  if (json.is_string()) return AddedToken::make_special(json.string());
  AddedToken token = AddedToken::from_json(json);
  token.special = true;
  return token;
}

std::vector<AddedToken> special_list_from_json(const JsonView& json) {
  std::vector<AddedToken> tokens;
  for (const JsonView& element : json.elements()) tokens.push_back(special_from_json(element));
  return tokens;
}

// The tokenizer.json's character map, if its normalizer has one.
std::string charsmap_of(const JsonView& tokenizer_json) {
  const auto normalizer = tokenizer_json.find("normalizer");
  if (!normalizer) return {};
  std::vector<JsonView> steps{*normalizer};
  if (normalizer->at("type").string() == "Sequence") {
    steps = normalizer->at("normalizers").elements();
  }
  for (const JsonView& step : steps) {
    if (step.string_or("type", "") != "Precompiled") continue;
    const auto charsmap = step.find("precompiled_charsmap");
    if (charsmap) return decode_base64(charsmap->string());
  }
  return {};
}

}  // namespace

class TokenizerLoader {
 public:
  TokenizerLoader(const fs::path& dir, std::string_view class_name) : dir_(dir) {
    if (!fs::is_directory(dir)) {
      throw_error<IoError>("{}: no such folder; expected a tokenizer's", dir.string());
    }
    if (has("tokenizer_config.json")) config_ = parse("tokenizer_config.json");
    if (has("tokenizer.json")) tokenizer_json_ = parse("tokenizer.json");
    class_name_ = choose_class(class_name);
  }

  TokenizerLoader(SentencePieceModel model, const std::string& where)
      : where_(where), class_name_(kT5Class), spiece_(std::move(model)) {}

  std::shared_ptr<const Tokenizer> load() {
    read_special_tokens();
    std::shared_ptr<Tokenizer> out(new Tokenizer());
    if (class_name_ == kClipClass) {
      *out->backend_ = clip();
    } else if (class_name_ == kT5Class) {
      *out->backend_ = t5();
    } else {
      *out->backend_ = TokenizerBackend::from_json(*tokenizer_json_);
    }
    add_special_tokens(*out->backend_);
    if (class_name_ == kClipClass) {
      out->backend_->post_processor = PostProcessor::around({id_of(*out->backend_, "bos_token")},
                                                            {id_of(*out->backend_, "eos_token")});
    } else if (class_name_ == kT5Class) {
      out->backend_->post_processor =
          PostProcessor::around({}, {id_of(*out->backend_, "eos_token")});
    }
    configure(*out);
    return out;
  }

 private:
  bool has(const char* file) const { return !dir_.empty() && fs::exists(dir_ / file); }
  JsonView parse(const char* file) const { return JsonView::parse_file(dir_ / file); }
  std::optional<JsonView> option(std::string_view key) const {
    return config_ ? config_->find(key) : std::nullopt;
  }

  std::string choose_class(std::string_view given) const {
    std::string name(given);
    if (name.empty()) {
      if (const auto declared = option("tokenizer_class")) name = declared->string();
    }
    if (name.ends_with("Fast")) name.resize(name.size() - 4);
    if (name == kClipClass || name == kT5Class) return name;
    if (tokenizer_json_) return name.empty() ? "PreTrainedTokenizer" : name;
    if (name.empty() && has("spiece.model")) return std::string(kT5Class);
    if (name.empty() && has("vocab.json") && has("merges.txt")) return std::string(kClipClass);
    throw_error<IoError>(
        "{}: no tokenizer.json{}; without it ferry reads CLIPTokenizer (vocab.json and merges.txt) "
        "and T5Tokenizer (spiece.model)",
        dir_.string(), name.empty() ? "" : ", which " + name + " needs");
  }

  // Fills named_, extra_ and decoder_ from the configs.
  void read_special_tokens() {
    if (config_) read_config_tokens(*config_);
    if (const auto decoder = option("added_tokens_decoder")) {
      for (const auto& [id, token] : decoder->items()) {
        if (id.empty() || id.size() > 9 ||
            id.find_first_not_of("0123456789") != std::string::npos) {
          token.fail(fmt::format("the key '{}' is not an id", id));
        }
        decoder_[static_cast<uint32_t>(std::stoul(id))] = AddedToken::from_json(token);
      }
    } else {
      if (has("special_tokens_map.json")) read_config_tokens(parse("special_tokens_map.json"));
      if (has("added_tokens.json")) read_added_tokens(parse("added_tokens.json"));
      if (tokenizer_json_) {
        if (const auto added = tokenizer_json_->find("added_tokens")) {
          for (const JsonView& token : added->elements()) {
            decoder_[token.at("id").id()] = AddedToken::from_json(token);
          }
        }
      }
    }
    // A name that is only text takes the flags that its token has elsewhere.
    for (auto& [name, token] : named_) {
      for (const auto& [id, known] : decoder_) {
        if (is_standard_name(name) && known.content == token.content) token = known;
      }
    }
  }

  // Later files overrule earlier ones.
  void read_config_tokens(const JsonView& config) {
    for (const auto& [key, value] : config.items()) {
      if (!key.ends_with("_token") || !(value.is_string() || value.is_object())) continue;
      named_[key] = special_from_json(value);
    }
    auto extra = config.find("extra_special_tokens");
    if (!extra || (extra->is_array() && extra->elements().empty())) {
      const auto additional = config.find("additional_special_tokens");
      if (additional) extra = additional;
    }
    if (!extra) return;
    if (extra->is_object()) {
      for (const auto& [key, value] : extra->items()) named_[key] = special_from_json(value);
    } else {
      extra_ = special_list_from_json(*extra);
    }
  }

  void read_added_tokens(const JsonView& added) {
    for (const auto& [content, id] : added.items()) {
      const auto same = [&, text = content](const AddedToken& token) {
        return token.content == text;
      };
      bool special = extra_ && std::any_of(extra_->begin(), extra_->end(), same);
      for (const auto& [name, token] : named_) special = special || same(token);
      AddedToken token;
      token.content = content;
      token.special = special;
      token.normalized = !special;
      decoder_[id.id()] = std::move(token);
    }
  }

  // The text of a named token; `fallback` is the class's default, which it then takes.
  std::string named_or(const char* name, const char* fallback) {
    return named_.try_emplace(name, AddedToken::make_special(fallback)).first->second.content;
  }

  TokenizerBackend clip() {
    for (const char* name : {"eos_token", "pad_token"}) named_or(name, "<|endoftext|>");
    named_or("bos_token", "<|startoftext|>");
    const std::string unk = named_or("unk_token", "<|endoftext|>");
    if (tokenizer_json_) {
      const JsonView model = tokenizer_json_->at("model");
      return make_clip_backend(Vocabulary::from_json(model.at("vocab")),
                               merges_from_json(model.at("merges")), unk);
    }
    const fs::path merges = dir_ / "merges.txt";
    const JsonView vocab = parse("vocab.json");
    try {
      return make_clip_backend(Vocabulary::from_json(vocab),
                               merges_from_text(io::read_text_file(merges), merges.string()), unk);
    } catch (const FormatError& e) {
      if (!std::string_view(e.what()).starts_with("merge ")) throw;
      throw_error<FormatError>("{}: {}", merges.string(), e.what());
    }
  }

  TokenizerBackend t5() {
    named_or("eos_token", "</s>");
    named_or("unk_token", "<unk>");
    named_or("pad_token", "<pad>");
    const auto extra_ids_option = option("extra_ids");
    const uint32_t extra_ids = extra_ids_option ? extra_ids_option->id() : 100;
    if (extra_ids > 100000) extra_ids_option->fail("more sentinels than any vocabulary has");
    std::vector<AddedToken> special;
    TokenizerBackend out = tokenizer_json_ ? t5_from_json() : t5_from_spiece(extra_ids, special);
    if (!extra_) {
      for (uint32_t i = 0; i < extra_ids; ++i) {
        special.push_back(AddedToken::make_special(fmt::format("<extra_id_{}>", i)));
      }
      extra_ = std::move(special);
    }
    return out;
  }

  TokenizerBackend t5_from_json() const {
    ScoredTokens tokens = scored_tokens_from_json(tokenizer_json_->at("model").at("vocab"));
    try {
      return make_t5_backend(std::move(tokens), charsmap_of(*tokenizer_json_));
    } catch (const FormatError& e) {
      tokenizer_json_->at("model").fail(e.what());
    }
  }

  // `special`: the pieces that sentencepiece keeps whole.
  TokenizerBackend t5_from_spiece(uint32_t extra_ids, std::vector<AddedToken>& special) const {
    using Type = SentencePieceModel::Type;
    const std::string path = spiece_ ? where_ : (dir_ / "spiece.model").string();
    const SentencePieceModel model = spiece_ ? *spiece_ : SentencePieceModel::read(path);
    if (model.kind != SentencePieceModel::Kind::unigram) {
      throw_error<FormatError>("{}: trainer_spec.model_type is {}, expected 1 (unigram)", path,
                               static_cast<int>(model.kind));
    }
    for (const auto& entry : model.pieces) {
      if (entry.type != Type::control && entry.type != Type::user_defined) continue;
      AddedToken token = AddedToken::make_special(entry.piece);
      token.special = entry.type == Type::control;
      special.push_back(std::move(token));
    }
    try {
      // GGUF files have the sentinels among the pieces.
      const bool complete = std::any_of(model.pieces.begin(), model.pieces.end(),
                                        [](auto& entry) { return entry.piece == "<extra_id_0>"; });
      return make_t5_backend(t5_vocabulary(model, complete ? 0 : extra_ids),
                             model.precompiled_charsmap);
    } catch (const FormatError& e) {
      throw_error<FormatError>("{}: {}", path, e.what());
    }
  }

  // TokenizersBackend.__init__: tokens with ids first, then the named ones, then the extra ones.
  void add_special_tokens(TokenizerBackend& backend) {
    if (!named_.contains("pad_token") && backend.pad_token) {
      named_["pad_token"] = AddedToken::make_special(*backend.pad_token);
    }
    std::vector<AddedToken> tokens;
    const auto is_named = [&](const std::string& content) {
      return std::any_of(named_.begin(), named_.end(),
                         [&](const auto& entry) { return entry.second.content == content; });
    };
    for (const auto& [id, token] : decoder_) {
      tokens.push_back(token);
      tokens.back().special = token.special || is_named(token.content);
    }
    const auto add = [&](const AddedToken& token) {
      const auto same = [&](const AddedToken& other) { return other.content == token.content; };
      if (backend.added.id(token.content) || std::any_of(tokens.begin(), tokens.end(), same))
        return;
      tokens.push_back(token);
    };
    for (const char* name : kNames) {
      if (const auto token = named_.find(name); token != named_.end()) add(token->second);
    }
    for (const auto& [name, token] : named_) {
      if (!is_standard_name(name)) add(token);
    }
    if (extra_) std::for_each(extra_->begin(), extra_->end(), add);
    backend.add_tokens(tokens);
  }

  uint32_t id_of(const TokenizerBackend& backend, const char* name) const {
    return *backend.id(named_.at(name).content);  // it has been added
  }

  std::optional<std::string> named(const char* name) const {
    const auto token = named_.find(name);
    return token == named_.end() ? std::nullopt : std::optional(token->second.content);
  }

  bool is_left(const char* key, const std::string& fallback) const {
    const auto value = option(key);
    const std::string side = value ? value->string() : fallback;
    if (side != "left" && side != "right") {
      value->fail(fmt::format("got '{}', expected left or right", side));
    }
    return side == "left";
  }

  void configure(Tokenizer& out) const {
    out.class_name_ = class_name_;
    out.dir_ = dir_;
    out.special_tokens_ = {.bos = named("bos_token"),
                           .eos = named("eos_token"),
                           .unk = named("unk_token"),
                           .sep = named("sep_token"),
                           .pad = named("pad_token"),
                           .cls = named("cls_token"),
                           .mask = named("mask_token")};
    out.pad_left_ = is_left("padding_side", out.backend_->padding_side);
    out.truncate_left_ = is_left("truncation_side", out.backend_->truncation_side);
    auto longest = option("model_max_length");
    if (!longest) longest = option("max_len");
    if (longest) {
      // transformers writes 1e30 for "no limit".
      const double length = longest->number();
      if (!(length >= 0)) longest->fail("got a negative length");
      if (length < 1e15) out.model_max_length_ = static_cast<int64_t>(length);
    }
    if (config_) {
      out.split_special_tokens_ = config_->boolean_or("split_special_tokens", false);
      out.clean_up_tokenization_spaces_ =
          config_->boolean_or("clean_up_tokenization_spaces", false);
    }
  }

  fs::path dir_;  // empty where the pieces were given
  std::string where_;
  std::string class_name_;
  std::optional<SentencePieceModel> spiece_;
  std::optional<JsonView> config_;
  std::optional<JsonView> tokenizer_json_;
  std::map<std::string, AddedToken> named_;
  std::optional<std::vector<AddedToken>> extra_;
  std::map<uint32_t, AddedToken> decoder_;
};

std::shared_ptr<const Tokenizer> Tokenizer::from_pretrained(const fs::path& dir,
                                                            std::string_view class_name) {
  return TokenizerLoader(dir, class_name).load();
}

std::shared_ptr<const Tokenizer> Tokenizer::from_sentencepiece(SentencePieceModel model,
                                                               const std::string& where) {
  return TokenizerLoader(std::move(model), where).load();
}

}  // namespace ferry::text
