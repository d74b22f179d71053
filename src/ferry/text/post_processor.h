// Post-processors: put the special tokens around a sequence.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "ferry/text/json_view.h"

namespace ferry::text {

// What the post-processors of tokenizer.json come to for a single sequence: templates, applied one
// after the other.
class PostProcessor {
 public:
  // Stands for the sequence within a template.
  struct Sequence {};
  using Template = std::vector<std::variant<Sequence, uint32_t>>;

  PostProcessor() = default;
  // [before..., sequence, after...]
  static PostProcessor around(const std::vector<uint32_t>& before,
                              const std::vector<uint32_t>& after);
  // Reads a "post_processor" section: TemplateProcessing, RobertaProcessing, BertProcessing,
  // ByteLevel (moves offsets only) or a Sequence. Throws FormatError for another type.
  static PostProcessor from_json(const JsonView& json);

  size_t added_tokens() const;
  std::vector<uint32_t> process(std::vector<uint32_t> ids) const;

 private:
  std::vector<Template> templates_;
};

}  // namespace ferry::text
