// ferry tokenize: lines of text to lines of token ids.
#include "command.h"
#include "ferry/text/tokenize_file.h"

namespace ferry::cli {

Command add_tokenize(CLI::App& app) {
  struct Options {
    std::string folder, input, output;
    std::optional<int64_t> max_length;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("tokenize", "Turn lines of text into token ids");
  command->footer(
      "Turns lines of text into token ids, as Hugging Face's tokenizer(text).input_ids does.\n"
      "Input: a JSON string a line. Output: a JSON list of ids a line.");
  command
      ->add_option("tokenizer", options->folder,
                   "folder with tokenizer.json, vocab.json + merges.txt or spiece.model")
      ->required()
      ->type_name("DIR");
  command->add_option("--input", options->input, "JSON strings, one a line")
      ->required()
      ->type_name("FILE");
  command->add_option("--output", options->output, "file to write")->required()->type_name("FILE");
  command
      ->add_option("--max-length", options->max_length,
                   "cut to this many tokens, special ones included")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  return {command, [options](Context& context) {
            check_writable_parent(options->output);
            text::tokenize_file(options->folder, options->input, options->output,
                                options->max_length);
            return 0;
          }};
}

}  // namespace ferry::cli
