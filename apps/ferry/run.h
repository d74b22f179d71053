// The command line as a function.
#pragma once

namespace ferry::cli {

// What `ferry ARGUMENTS...` does; returns its exit status. Replaces the process's handlers of
// SIGINT and SIGTERM.
int run_command_line(int argc, char** argv);

}  // namespace ferry::cli
