// Tokens that are found in the text before the model sees it: special tokens and users' own.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ferry/text/json_view.h"
#include "ferry/text/normalizer.h"
#include "ferry/text/piece.h"
#include "ferry/text/token_model.h"

namespace ferry::text {

struct AddedToken {
  std::string content;
  bool single_word = false;  // only between non-word characters
  bool lstrip = false;       // swallows the blanks on its left
  bool rstrip = false;       // and on its right
  bool normalized = true;    // looked for in the normalized text, in its own normalized form
  bool special = false;      // left out by decode(skip_special_tokens)

  bool operator==(const AddedToken&) const = default;

  // A special token known by its text alone: found as it is written.
  static AddedToken make_special(std::string content);
  // An object with "content" and the flags; a missing flag is false, a missing "normalized" is true
  // for tokens that are not special.
  static AddedToken from_json(const JsonView& json);
};

// The pieces of `text` that are added tokens, longest first at each place. Not thread-safe while
// tokens are added; after that, const members are.
class AddedVocabulary {
 public:
  // Gives each token its id in the model, else the next free one. A token that is there already
  // takes the new flags.
  void add(std::span<const AddedToken> tokens, const TokenModel& model,
           const Normalizer* normalizer);
  std::optional<uint32_t> id(std::string_view content) const;
  // The token of an id as decoders want it, or nullptr.
  const std::string* decoded(uint32_t id) const;
  bool is_special(std::string_view content) const;
  const std::map<uint32_t, AddedToken>& tokens() const { return tokens_; }

  // Cuts the tokens that are not normalized out of the raw text, normalizes the rest, and cuts the
  // normalized ones out of that. `split_special`: special tokens are ordinary text.
  std::vector<Piece> extract(std::string_view text, const Normalizer* normalizer,
                             bool split_special) const;

 private:
  // A byte trie of contents; node 0 is the root.
  struct Matcher {
    struct Node {
      std::map<uint8_t, uint32_t> children;
      int64_t id = -1;
    };
    std::vector<Node> nodes{1};
    void add(std::string_view content, uint32_t id);
    // The end of the longest match that starts at `begin`, or `begin`.
    size_t longest(std::string_view text, size_t begin, uint32_t& id) const;
  };
  void add_one(const AddedToken& token, const TokenModel& model, const Normalizer* normalizer);
  void rebuild_matchers();
  std::vector<Piece> cut(const Piece& piece, const Matcher& matcher, bool split_special) const;

  std::map<std::string, uint32_t, std::less<>> ids_;
  std::map<uint32_t, AddedToken> tokens_;
  std::unordered_map<uint32_t, std::string> normalized_contents_;  // where they differ
  Matcher raw_matcher_;
  Matcher normalized_matcher_;
};

}  // namespace ferry::text
