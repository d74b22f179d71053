#include "ferry/text/post_processor.h"

#include <utility>

#include "ferry/base/error.h"

namespace ferry::text {
namespace {

// ["token", id], as in Bert- and RobertaProcessing.
uint32_t token_and_id(const JsonView& json) {
  const auto pair = json.elements();
  if (pair.size() != 2 || !pair[0].is_string()) json.fail("expected [token, id]");
  return pair[1].id();
}

PostProcessor::Template template_from_json(const JsonView& json) {
  PostProcessor::Template out;
  const JsonView special_tokens = json.at("special_tokens");
  for (const JsonView& part : json.at("single").elements()) {
    if (const auto special = part.find("SpecialToken")) {
      const JsonView token = special_tokens.at(special->at("id").string());
      for (const JsonView& id : token.at("ids").elements()) out.emplace_back(id.id());
    } else if (part.at("Sequence").at("id").string() == "A") {
      out.emplace_back(PostProcessor::Sequence{});
    } else {
      part.fail("a template for one sequence can only name sequence A");
    }
  }
  return out;
}

}  // namespace

PostProcessor PostProcessor::around(const std::vector<uint32_t>& before,
                                    const std::vector<uint32_t>& after) {
  Template one(before.begin(), before.end());
  one.emplace_back(Sequence{});
  one.insert(one.end(), after.begin(), after.end());
  PostProcessor out;
  out.templates_.push_back(std::move(one));
  return out;
}

PostProcessor PostProcessor::from_json(const JsonView& json) {
  PostProcessor out;
  const std::string type = json.at("type").string();
  if (type == "TemplateProcessing") {
    out.templates_.push_back(template_from_json(json));
  } else if (type == "RobertaProcessing" || type == "BertProcessing") {
    out = around({token_and_id(json.at("cls"))}, {token_and_id(json.at("sep"))});
  } else if (type == "Sequence") {
    for (const JsonView& element : json.at("processors").elements()) {
      const PostProcessor part = from_json(element);
      out.templates_.insert(out.templates_.end(), part.templates_.begin(), part.templates_.end());
    }
  } else if (type != "ByteLevel") {
    json.at("type").fail(fmt::format("'{}' is not a post-processor that ferry knows", type));
  }
  return out;
}

size_t PostProcessor::added_tokens() const {
  size_t count = 0;
  for (const Template& one : templates_) {
    for (const auto& part : one) count += std::holds_alternative<uint32_t>(part);
  }
  return count;
}

std::vector<uint32_t> PostProcessor::process(std::vector<uint32_t> ids) const {
  for (const Template& one : templates_) {
    std::vector<uint32_t> out;
    for (const auto& part : one) {
      if (const auto* id = std::get_if<uint32_t>(&part)) {
        out.push_back(*id);
      } else {
        out.insert(out.end(), ids.begin(), ids.end());
      }
    }
    ids = std::move(out);
  }
  return ids;
}

}  // namespace ferry::text
