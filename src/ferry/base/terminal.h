// stderr as a terminal with at most one status line at its bottom. Log lines go above it, so that
// neither tears the other. stderr belongs to the process, hence the functions instead of a class.
// Thread-safe. Needs no {fmt}.
#pragma once

#include <string>
#include <string_view>

namespace ferry::terminal {

// True if stderr is a terminal that understands cursor codes (TERM is neither unset nor "dumb").
bool is_interactive();
// Width in columns; 80 where unknown.
int columns();

// Writes `line` (a newline is added if it has none) above the status line.
void write_line(std::string_view line);

// Replaces the status line; an empty one removes it. Only meaningful if is_interactive().
void set_status(std::string_view status);

}  // namespace ferry::terminal
